"""Which latents are explained, and on which text: those that fire, where they are most active."""

from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch

from saeflow.config import CircuitsConfig, ConfigError
from saeflow.config.circuits import check_prompt
from saeflow.dictionaries import Dictionary
from saeflow.features.lookup import active, run_activations
from saeflow.features.text import Text

if TYPE_CHECKING:
    from transformer_lens import HookedTransformer


class Activity(NamedTuple):
    """Of every latent of a dictionary, on the tokens that were looked at."""

    fired: np.ndarray
    """(n,) on how many it is active."""
    largest: np.ndarray
    """(n,) its largest activation, 0 for one that never fires."""
    token: np.ndarray
    """(n,) number of the first token with that, -1 for one that never fires."""


def activity(model: "HookedTransformer", dictionary: Dictionary, text: Text, batch_rows: int) -> Activity:
    """Runs the model on the text as far as the dictionary."""
    n = dictionary.d_sae
    found = Activity(np.zeros(n, dtype=np.int64), np.zeros(n), np.full(n, -1))
    for row, values in run_activations(model, [dictionary.spec.hook_name], text, batch_rows):
        first = row * (text.context_size - text.first)
        for n_tokens, token, latent, value in active(dictionary, values, text):
            found.fired[:] += np.bincount(latent, minlength=n)
            order = np.lexsort((-token, value))  # of each latent the largest is written last, of equals the first token
            best = np.full(n, -1)
            best[latent[order]] = order
            better = (best >= 0) & (value[best] > found.largest)
            found.largest[better], found.token[better] = value[best[better]], first + token[best[better]]
            first += n_tokens
    return found


def choose(fired: np.ndarray, config: CircuitsConfig, layer: int) -> np.ndarray:
    """The latents that are named, or some drawn from those that fire on `min_active` tokens, ascending.

    `fired` (n,): on how many tokens each is active. Raises `ConfigError` for one that there is not, or that never fires
    where no prompt is given on which it is explained all the same, and where too few fire to draw from.
    """
    named = np.array(config.latents, dtype=np.int64)
    if beyond := [int(latent) for latent in named if latent >= len(fired)]:
        raise ConfigError(
            f"circuits.latents={beyond}, but the transcoder of layer {layer} has {len(fired)} latents, counted from 0; "
            "name others, or set circuits.layer"
        )
    if dead := [int(latent) for latent in named if not fired[latent]] if config.prompt is None else []:
        raise ConfigError(
            f"circuits.latents={dead} fire on none of the held-out tokens that are looked at; name others, raise "
            "circuits.n_tokens, or give a circuits.prompt"
        )
    if len(named):
        return named
    live = np.flatnonzero(fired >= config.min_active)
    if len(live) < config.n_latents:
        raise ConfigError(
            f"circuits.n_latents={config.n_latents}, but {len(live)} latents of layer {layer} fire on "
            f"{config.min_active} tokens or more; lower one of the two, or raise circuits.n_tokens"
        )
    drawn: np.ndarray = np.sort(np.random.default_rng(config.seed).choice(live, config.n_latents, replace=False))
    return drawn


def prompt_tokens(ids: list[int], bos: int | None, n_positions: int) -> torch.Tensor:
    """Token ids of a prompt (P,), behind a BOS where rows have one. Raises `ConfigError` for none, and for more than
    the model takes."""
    check_prompt(len(ids), bos is not None, n_positions)
    return torch.tensor([*([] if bos is None else [bos]), *ids])
