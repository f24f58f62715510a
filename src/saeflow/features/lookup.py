"""The pass over the tokens: activations by running the model or from where they are cached, and where latents fire."""

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from saeflow.activations.store import Column
from saeflow.config import FeaturesConfig
from saeflow.dictionaries import Dictionary
from saeflow.features.firings import HELD, Firings
from saeflow.features.neighbours import Together
from saeflow.features.text import Text
from saeflow.jobs.progress import progress
from saeflow.models.attention import fused_attention
from saeflow.models.splicing import flattened, read_hooks
from saeflow.text.tokens import TokenStore, spread

if TYPE_CHECKING:
    from transformer_lens import HookedTransformer

ENCODED = 1 << 22  # activations of latents that are held dense at once
Batch = tuple[int, dict[str, Tensor]]
"""Number of the first of some rows, and what each hook has there, (B, P, d) or (B, P, head, d_head)."""


class Found(NamedTuple):
    """What the pass found of one dictionary."""

    dictionary: Dictionary
    firings: Firings
    together: Together


def choose_text(store: TokenStore, columns: dict[str, Column], config: FeaturesConfig) -> Text:
    """Rows of the store that are spread over all, or over those of which activations are cached."""
    there = min([store.n_rows, *(column.n_tokens // store.context_size for column in columns.values())])
    return spread_text(store, config.n_tokens, config.seed, there)


def spread_text(store: TokenStore, n_tokens: int, seed: int = 0, of: int | None = None) -> Text:
    """Rows that are spread over all of a store, or over its first `of`: as many as hold `n_tokens`, or all."""
    first, there = int(store.attributes["prepend_bos"]), store.n_rows if of is None else of
    n_rows = min(there, -(-n_tokens // (store.context_size - first)))
    row, rows = store.spread_rows(n_rows, seed, there)
    return Text(rows.tokens, rows.document, row, first)


def run_activations(model: "HookedTransformer", hooks: list[str], text: Text, batch_rows: int) -> Iterator[Batch]:
    """By running the model as far as the highest hook."""
    n_rows = len(text.tokens)
    for start in progress(range(0, n_rows, batch_rows), "looking up", n_rows, "rows", each=batch_rows):
        tokens = torch.from_numpy(text.tokens[start : start + batch_rows].astype(np.int64)).to(model.cfg.device)
        with fused_attention(model), torch.no_grad():
            yield start, dict(zip(hooks, read_hooks(model, tokens, hooks), strict=True))


def stored_activations(
    columns: dict[str, Column], hooks: list[str], text: Text, batch_rows: int, device: Any
) -> Iterator[Batch]:
    """From columns of cached activations, by hook."""
    import zarr

    arrays: dict[str, Any] = {hook: zarr.open_array(columns[hook].array, mode="r") for hook in hooks}
    size, n_rows = text.context_size, len(text.tokens)
    for start in progress(range(0, n_rows, batch_rows), "looking up", n_rows, "rows", each=batch_rows):
        rows = text.row[start : start + batch_rows]
        runs = np.split(rows, np.flatnonzero(np.diff(rows) != 1) + 1)
        values = {}
        for hook, array in arrays.items():
            parts = [np.asarray(array[run[0] * size : (run[-1] + 1) * size]) for run in runs]
            value = torch.from_numpy(np.concatenate(parts))
            value = value.view(torch.bfloat16) if columns[hook].dtype == "bfloat16" else value
            values[hook] = value.to(device, torch.float32).unflatten(0, (len(rows), size))
        yield start, values


@torch.no_grad()
def gather(
    dictionaries: list[Dictionary], batches: Iterator[Batch], text: Text, scratch: list[Path], config: FeaturesConfig
) -> list[Found]:
    """Takes the activations of all batches through all dictionaries."""
    chosen = spread(text.n_tokens, min(text.n_tokens, config.neighbour_tokens), config.seed)
    found = [
        Found(one, Firings(one.d_sae, folder, HELD // len(dictionaries)), Together(one.d_sae, chosen))
        for one, folder in zip(dictionaries, scratch, strict=True)
    ]
    for row, values in batches:
        for dictionary, firings, together in found:
            first = row * (text.context_size - text.first)
            for n_tokens, *firing in active(dictionary, values, text):
                firings.add(n_tokens, *firing)
                together.add(first, n_tokens, *firing[:2])
                first += n_tokens
    return found


def active(
    dictionary: Dictionary, values: dict[str, Tensor], text: Text
) -> Iterator[tuple[int, np.ndarray, np.ndarray, np.ndarray]]:
    """Where latents fire on what a batch has at each hook, some tokens at a time: how many tokens these are, and the
    token, counted from the first of them, the latent and the activation of every firing."""
    spec = dictionary.spec
    x = flattened(values[spec.hook_name][:, text.first :], spec.hook_head_index)
    for some in x.split(max(1, ENCODED // dictionary.d_sae)):
        token, latent, value = (t.cpu().numpy() for t in dictionary.active(some))
        yield len(some), token, latent, value
