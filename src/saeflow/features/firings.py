"""Where every latent of a dictionary fires: gathered token by token, read latent by latent, in bounded memory.

What comes is sorted by latent whenever so many firings have gathered that they are not to be held any longer; segments
but the only one lie on disk until all is read. What is read does not depend on how it came: of each latent its tokens
in order.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import scipy.sparse as sp

HELD = 1 << 25  # firings, of 8 bytes, that the dictionaries of a job hold before they are sorted and put on the disk
LATENTS = 256  # that are read at once

Segment = tuple[np.ndarray, np.ndarray, np.ndarray]
"""Sorted by latent: where each begins, the tokens, the values."""


@dataclass(frozen=True)
class Chunk:
    """The firings of some latents in a row, each one's together, in the order of the tokens. A firings, L latents."""

    first: int
    """Number of the first latent."""
    start: np.ndarray
    """(L + 1,) int64: where the firings of each latent begin and end."""
    token: np.ndarray
    """(A,) int64"""
    value: np.ndarray
    """(A,) float32, not 0."""

    @property
    def n_latents(self) -> int:
        return len(self.start) - 1

    @cached_property
    def fired(self) -> np.ndarray:
        """(L,) firings of each."""
        return np.diff(self.start)

    @cached_property
    def latent(self) -> np.ndarray:
        """(A,) the latent of each firing, from 0 for the first of the chunk."""
        return np.repeat(np.arange(self.n_latents), self.fired)


class Firings:
    """All firings of one dictionary of `n_latents`, on tokens that are numbered from 0 as they come."""

    def __init__(self, n_latents: int, scratch: Path, segment: int = HELD) -> None:
        """`scratch`: a folder that may be made and filled; `segment`: how many firings are held."""
        self.n_latents, self.scratch, self.segment = n_latents, scratch, segment
        self._on_disk: list[Segment] = []
        self._gathered: list[sp.csr_array] = []
        self._waiting = 0  # firings among these
        self.n_firings = 0
        self._first = 0  # token of these

    def add(self, n_tokens: int, token: np.ndarray, latent: np.ndarray, value: np.ndarray) -> None:
        """Of the next `n_tokens` tokens: `token` (A,), ascending and counted from the first of these, `latent` and
        `value`."""
        start = np.searchsorted(token, np.arange(n_tokens + 1)).astype(np.int32)
        shape = (n_tokens, self.n_latents)
        self._gathered.append(sp.csr_array((value, latent.astype(np.int32), start), shape=shape))
        self._waiting += len(value)
        self.n_firings += len(value)
        if self._waiting >= self.segment:
            self._put_on_disk()

    def chunks(self, n: int = LATENTS) -> Iterator[Chunk]:
        """All latents, `n` at a time."""
        if self._on_disk and self._gathered:
            self._put_on_disk()
        segments = self._on_disk or [self._sorted()]
        for first in range(0, self.n_latents, n):
            yield _joined(first, [_cut(segment, first, min(first + n, self.n_latents)) for segment in segments])

    def _sorted(self) -> Segment:
        """What has gathered, by latent."""
        none = sp.csr_array((0, self.n_latents), dtype=np.float32)
        by_latent = sp.vstack([none, *self._gathered], format="csr").tocsc()  # keeps the tokens of a latent in order
        token = by_latent.indices.astype(np.int64) + self._first
        return by_latent.indptr.astype(np.int64), token, by_latent.data

    def _put_on_disk(self) -> None:
        self.scratch.mkdir(exist_ok=True)
        files = [self.scratch / f"{len(self._on_disk)}.{name}.npy" for name in ("start", "token", "value")]
        for file, values in zip(files, self._sorted(), strict=True):
            np.save(file, values, allow_pickle=False)
        start, token, value = (np.load(file, mmap_mode="r", allow_pickle=False) for file in files)
        self._on_disk.append((np.asarray(start), token, value))
        self._first += sum(matrix.shape[0] for matrix in self._gathered)
        self._gathered, self._waiting = [], 0


def _cut(segment: Segment, first: int, end: int) -> Segment:
    """The latents from `first` to `end`: how often each fires, tokens and values."""
    start, token, value = segment
    some = slice(int(start[first]), int(start[end]))
    return np.diff(start[first : end + 1]), np.asarray(token[some]), np.asarray(value[some])


def _joined(first: int, parts: list[Segment]) -> Chunk:
    """Parts of later tokens behind those of earlier ones, latent by latent."""
    counts, tokens, values = (list(columns) for columns in zip(*parts, strict=True))
    token, value = np.concatenate(tokens), np.concatenate(values)
    if len(parts) > 1:
        latent = np.concatenate([np.repeat(np.arange(len(count)), count) for count in counts])
        order = np.argsort(latent, kind="stable")
        token, value = token[order], value[order]
    start = np.concatenate([[0], np.cumsum(np.sum(counts, axis=0))])
    return Chunk(first, start.astype(np.int64), token, value)
