"""The latents nearest to each: by decoder row, by firing together, and by the Jacobian of a pair.

Of equal ones the lower number comes first. Shapes: n latents, p what a dictionary writes, N tokens.
"""

import json
from pathlib import Path
from typing import NamedTuple

import numpy as np
import scipy.sparse as sp
import torch

from saeflow.dictionaries import Dictionary
from saeflow.features.order import largest, ranks

AT_ONCE = 1 << 22  # similarities that are held dense


class Nearest(NamedTuple):
    """Of every latent a list of others, the nearest first, and of how near they are."""

    latent: list[np.ndarray]
    value: list[np.ndarray]


@torch.no_grad()
def by_decoder(dictionary: Dictionary, most: int) -> Nearest:
    """The largest cosines of decoder rows; rows of zeros are near to none."""
    W = dictionary.W_dec.double()
    norm = W.norm(dim=1, keepdim=True)
    W, live = W / norm.clamp(min=1e-30), norm[:, 0] > 0
    n = len(W)
    most = min(most, n - 1)
    found = Nearest([], [])
    size = max(1, AT_ONCE // n)
    for start in range(0, n, size):
        cosine = W[start : start + size] @ W.T
        cosine[:, ~live] = -torch.inf
        cosine[torch.arange(len(cosine)), torch.arange(start, start + len(cosine))] = -torch.inf
        cosine[~live[start : start + size]] = -torch.inf
        value, place = largest(cosine.float(), most)  # those that are equal as they are stored are in order
        for of_one, others in zip(value, place, strict=True):
            there = np.isfinite(of_one)
            found.latent.append(others[there])
            found.value.append(of_one[there])
    return found


class Together:
    """How often latents fire on the same tokens, on a sample of the tokens that come."""

    def __init__(self, n_latents: int, chosen: np.ndarray) -> None:
        """`chosen`: ascending numbers of the tokens that count."""
        self.n_latents, self.chosen = n_latents, chosen
        self._latents: list[np.ndarray] = []
        self._counts: list[np.ndarray] = []

    def add(self, first: int, n_tokens: int, token: np.ndarray, latent: np.ndarray) -> None:
        """Of every firing on `n_tokens` tokens: `token`, ascending and counted from token number `first`, `latent`."""
        here = self.chosen[(self.chosen >= first) & (self.chosen < first + n_tokens)] - first
        begin, end = (np.searchsorted(token, here, side=side) for side in ("left", "right"))
        self._counts.append(end - begin)
        some = [latent[a:b] for a, b in zip(begin, end, strict=True)]
        self._latents.append(np.concatenate([latent[:0], *some]).astype(np.int32))  # parts would keep the whole alive

    def nearest(self, most: int) -> Nearest:
        """The largest Jaccard indices: tokens on which both fire, over those on which either does."""
        start = np.concatenate([[0], np.cumsum(np.concatenate(self._counts))]).astype(np.int32)
        latents = np.concatenate([np.zeros(0, np.int32), *self._latents]).astype(np.int32)
        fires = sp.csr_array((np.ones(len(latents), np.int32), latents, start), shape=(len(start) - 1, self.n_latents))
        by_latent = fires.T.tocsr()
        count = np.diff(by_latent.indptr)
        found = Nearest([], [])
        size = max(1, AT_ONCE // self.n_latents)
        for first in range(0, self.n_latents, size):
            both = (by_latent[first : first + size] @ fires).toarray()
            either = count[first : first + size, None] + count - both
            jaccard = torch.from_numpy((both / np.maximum(either, 1)).astype(np.float32))
            jaccard[torch.arange(len(both)), torch.arange(first, first + len(both))] = 0
            for values, others in zip(*largest(jaccard, min(most, self.n_latents)), strict=True):
                found.latent.append(others[values > 0])
                found.value.append(values[values > 0])
        return found


def by_jacobian(folder: Path, dictionary: Dictionary, most: int) -> tuple[str, Nearest]:
    """Of a finished study of a pair of which the dictionary is one side, the side (`input`, `output`) of the others,
    and those with the largest mean |J| over all tokens."""
    import zarr

    study = json.loads((folder / "summary.json").read_text())
    own, others = ("input", "output") if dictionary.spec.hook_name == study["hook_name"] else ("output", "input")
    group = zarr.open_group(folder / "global.zarr", mode="r")
    own_latent, other, mean = (np.asarray(group[name][:]) for name in (own, others, "mean_absolute_all"))  # type: ignore[index]
    order = np.lexsort((other, -mean, own_latent))
    order = order[ranks(own_latent[order]) < most]
    cuts = np.searchsorted(own_latent[order], np.arange(1, dictionary.d_sae))
    found = Nearest(np.split(other[order], cuts), np.split(mean[order], cuts))
    return others, found
