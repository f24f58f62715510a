"""Choosing a few of many in an order that nothing but their values decides. Shapes: A items."""

import numpy as np
import torch
from torch import Tensor


def uniform(seed: int, latent: np.ndarray, place: np.ndarray) -> np.ndarray:
    """Numbers in [0, 1) that look random, float64 (splitmix64): each of a latent, a token's place in its store and the
    seed alone, so that draws by them do not depend on the order in which firings come."""
    with np.errstate(over="ignore"):
        x = latent.astype(np.uint64) * np.uint64(0x9E3779B97F4A7C15) + np.uint64(seed)
        x = _mixed(x) + place.astype(np.uint64) * np.uint64(0xD1B54A32D192ED03)
        return (_mixed(x) >> np.uint64(11)).astype(np.float64) * 2.0**-53


def _mixed(x: np.ndarray) -> np.ndarray:
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def lowest(group: np.ndarray, key: np.ndarray, most: int, n_groups: int) -> np.ndarray:
    """Indices of the `most` lowest `key` (A,), uniform in [0, 1), of every `group` (A,); by group, then key."""
    if not most:
        return np.zeros(0, dtype=np.int64)
    size = np.bincount(group, minlength=n_groups)
    bound = (2 * most + 20) / np.maximum(size, 1)  # below it lie enough of almost every group
    near = key < bound[group]
    short = np.bincount(group[near], minlength=n_groups) < np.minimum(size, most)
    near |= short[group]
    kept = np.flatnonzero(near)
    order = kept[np.lexsort((key[kept], group[kept]))]
    return order[ranks(group[order]) < most]


def ranks(group: np.ndarray) -> np.ndarray:
    """(A,) of sorted groups: 0 for the first of each, 1 for the second, ..."""
    if not len(group):
        return np.zeros(0, dtype=np.int64)
    begins = np.flatnonzero(np.concatenate([[True], group[1:] != group[:-1]]))
    return np.arange(len(group)) - np.repeat(begins, np.diff(np.concatenate([begins, [len(group)]])))


def largest(values: Tensor, most: int) -> tuple[np.ndarray, np.ndarray]:
    """values (A, n), float32 -> the `most` largest of each row and their places, (A, most) each; of equal ones the
    lower place first, which `topk` alone does not promise."""
    bits = values.contiguous().view(torch.int32)
    ordered = (bits ^ ((bits >> 31) & 0x7FFFFFFF)).long() << 32  # as the floats are
    n = values.shape[1]
    place = (
        n - 1 - (torch.topk(ordered + torch.arange(n - 1, -1, -1, device=values.device), most, dim=1)[0] & 0xFFFFFFFF)
    )
    return values.gather(1, place).cpu().numpy(), place.cpu().numpy()
