"""What latents of earlier transcoders bring to a latent on average over text, beside what the weights alone say of it.

Dunefsky, Chlenski, Nanda 2024, appendix: the mean of input times gradient over the tokens on which the latent's
activation is at least the 20th percentile of its positive ones, against the pullback of the same decoder; `overlap@k`
is the share of the k largest of the one that are among the k largest of the other. What a latent brings is its
activation times the pullback over the norm's scale, as in `CircuitRun.attribute`, so that the two differ by how often
and how strongly it fires with the latent in question.

Shapes: N tokens of the text, n latents, R rows.
"""

from typing import TYPE_CHECKING

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from saeflow.circuits.weights import as_read, connections
from saeflow.dictionaries import Dictionary
from saeflow.features.lookup import ENCODED, active, run_activations
from saeflow.features.text import Text

if TYPE_CHECKING:
    from transformer_lens import HookedTransformer

PERCENTILE = 20
KS = (5, 10, 20, 50, 100)


def strong_tokens(
    model: "HookedTransformer", transcoder: Dictionary, latents: np.ndarray, text: Text, batch_rows: int
) -> np.ndarray:
    """(latents, N) bool: on which tokens each is at least as active as the percentile of its positive activations."""
    found = np.zeros((len(latents), text.n_tokens), dtype=np.float32)
    place = np.full(transcoder.d_sae, -1)
    place[latents] = np.arange(len(latents))
    for row, values in run_activations(model, [transcoder.spec.hook_name], text, batch_rows):
        first = row * (text.context_size - text.first)
        for n_tokens, token, latent, value in active(transcoder, values, text):
            mine = place[latent] >= 0
            found[place[latent[mine]], first + token[mine]] = value[mine]
            first += n_tokens
    least = [np.percentile(one[one > 0], PERCENTILE) if (one > 0).any() else np.inf for one in found]
    return (found > 0) & (found >= np.array(least, dtype=np.float32)[:, None])


@torch.no_grad()
def mean_contributions(
    model: "HookedTransformer", transcoders: dict[int, Dictionary], layer: int, latents: np.ndarray, text: Text,
    strong: np.ndarray, batch_rows: int,
) -> dict[int, Tensor]:  # fmt: skip
    """By earlier layer, (latents, n): what each latent there adds to the pre-activation of each of `latents` of
    `layer`, in the mean over the tokens of `strong` (latents, N). 0 where there are none."""
    earlier = sorted(n for n in transcoders if n < layer)
    if not earlier:
        return {}
    by_row = strong.reshape(len(latents), len(text.tokens), -1)
    rows = np.flatnonzero(by_row.any(axis=(0, 2)))
    some, by_row = Text(text.tokens[rows], text.document[rows], text.row[rows], text.first), by_row[:, rows]
    scale_hook, device = f"blocks.{layer}.ln2.hook_scale", model.cfg.device
    hooks = [transcoders[n].spec.hook_name for n in earlier]
    sums = {n: torch.zeros(len(latents), transcoders[n].d_sae, dtype=torch.float64, device=device) for n in earlier}
    for row, values in run_activations(model, [*hooks, scale_hook], some, batch_rows):
        scale = values[scale_hook][:, some.first :].flatten()
        on = torch.from_numpy(by_row[:, row : row + batch_rows].reshape(len(latents), -1)).to(device)
        weight = on.double() / scale
        for n, hook in zip(earlier, hooks, strict=True):
            x = values[hook][:, some.first :].flatten(0, 1)
            size = max(1, ENCODED // transcoders[n].d_sae)
            for part, of_part in zip(x.split(size), weight.split(size, dim=1), strict=True):
                sums[n] += of_part @ transcoders[n].encode(part).double()
    count = torch.from_numpy(strong.sum(1)).to(device).clamp(min=1)[:, None]
    pulled = {n: pullbacks(model, transcoders, layer, latents, n) for n in earlier}
    return {n: sums[n] / count * pulled[n] for n in earlier}


def pullbacks(
    model: "HookedTransformer", transcoders: dict[int, Dictionary], layer: int, latents: np.ndarray, earlier: int
) -> Tensor:
    """(latents, n of the earlier transcoder): how strongly each latent there writes each of `latents` of `layer`."""
    encoders = transcoders[layer].W_enc.T[torch.from_numpy(latents)]
    return torch.stack([connections(transcoders[earlier], as_read(model, v)) for v in encoders])


def overlap(means: Tensor, weights: Tensor, k: int) -> float:
    """Share of the k largest of `means` (n,) that are among the k largest of `weights` (n,)."""
    largest = (set(t.topk(k).indices.tolist()) for t in (means, weights))
    return len(set.intersection(*largest)) / k


def overlap_table(
    means: dict[int, Tensor], weights: dict[int, Tensor], latents: np.ndarray, strong: np.ndarray
) -> pd.DataFrame:
    """A row a latent, earlier layer and k of `KS` that is below the number of latents there: `overlap`, what it is of
    a random choice (`by_chance`), and on how many tokens the mean is; none of a latent that is active on none."""
    rows = [
        (int(latent), layer, k, overlap(of_layer[n], weights[layer][n], k), k / of_layer.shape[1], int(strong[n].sum()))
        for n, latent in enumerate(latents)
        for layer, of_layer in means.items()
        for k in KS
        if k < of_layer.shape[1] and strong[n].any()
    ]
    return pd.DataFrame(rows, columns=["latent", "layer", "k", "overlap", "by_chance", "n_tokens"])
