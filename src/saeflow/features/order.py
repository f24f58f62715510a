"""Choosing a few of many in an order that nothing but their values decides. Shapes: A items."""

import numpy as np
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
    found, place = values.topk(most, dim=1)
    if not most:
        return found.cpu().numpy(), place.cpu().numpy()
    cut = (values >= found[:, -1:]).sum(1) > most  # rows where it chose among equal ones
    if cut.any():
        place[cut] = values[cut].sort(dim=1, descending=True, stable=True)[1][:, :most]
    place = place.sort(dim=1)[0]
    found, order = values.gather(1, place).sort(dim=1, descending=True, stable=True)
    return found.cpu().numpy(), place.gather(1, order).cpu().numpy()


def keys(latent: np.ndarray, value: np.ndarray) -> np.ndarray:
    """(A,) int64, ordered by latent, then by value (float32)."""
    return (latent.astype(np.int64) << 32) + _flipped(value.view(np.int32)).astype(np.int64) + (1 << 31)


def values_of(key: np.ndarray) -> np.ndarray:
    """The values that `keys` were made of, float64."""
    bits = ((key & 0xFFFFFFFF) - (1 << 31)).astype(np.int32)
    return _flipped(bits).view(np.float32).astype(np.float64)


def _flipped(bits: np.ndarray) -> np.ndarray:
    """Bits of floats as integers of the same order, and the reverse: of those below 0 all but the sign turn."""
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)
