"""In which order training reads the tokens of a store: batch s as a pure function of (seed, s).

The stream of tokens is endless: epoch after epoch, each with every token that is kept exactly once. Batch s holds the
tokens s B to (s + 1) B - 1 of it, so every batch is full. With tokens left out an epoch is of those that are kept:
shorter, its batches as full, its order a function of the same and of what is left out.

`uniform`: an epoch is a permutation that is computed, not stored: a keyed Feistel network over Z_a x Z_b, a b >= n,
whose few results beyond n are put through it again (Black and Rogaway 2002, ciphers with arbitrary finite domains). So
any batch can be asked for at any time, by any number of readers, without memory that grows with n.

`buffered`, for stores larger than memory: an epoch is a permutation of pieces of `PIECE_TOKENS` tokens that lie side
by side, cut into buffers of as many pieces as `buffer_tokens` holds, and in each buffer a permutation of its tokens.
Pieces are read whole, each once an epoch. Any one token is at any place of an epoch with the probability that it has in
the uniform order, so a batch's mean is unbiased; what differs is which tokens come together. Two tokens of a batch are
of one piece of c tokens with probability (c - 1) / (M - 1) in a buffer of M, where it is (c - 1) / (n - 1) in the
uniform order. If values of tokens of one piece have correlation r, and of others none, the variance of a batch's mean
is that of independent draws times

    1 + (B - 1) r (c - 1) / (M - 1),

in the uniform order the same with n for M. (Both leave out that an epoch, and a buffer, is drawn without replacement,
which makes variances smaller.) Memory grows with the pieces: 24 bytes each.
"""

import hashlib
import itertools
import math
from abc import abstractmethod
from functools import lru_cache
from typing import NamedTuple

import numpy as np

ROUNDS = 8
IN_MEMORY_TOKENS = 1 << 16  # up to so many tokens the order of an epoch, or of a buffer, is kept in memory
PIECE_TOKENS = 256


class Order:
    """Which tokens batches hold: `n_tokens` of those stored are kept."""

    def __init__(self, n_stored: int, left_out: np.ndarray, batch_size: int, seed: int) -> None:
        """`left_out`: numbers of tokens that no batch has, (M,) int64, rising."""
        self.n_tokens, self.batch_size, self.seed = n_stored - len(left_out), batch_size, seed
        self._kept_before = left_out - np.arange(len(left_out))
        """How many tokens that are kept come before each that is left out, (M,)."""

    def rows(self, s: int) -> np.ndarray:
        """Token numbers of batch s, (batch_size,) int64."""
        start, stop = s * self.batch_size, (s + 1) * self.batch_size
        first, last = start // self.n_tokens, (stop - 1) // self.n_tokens
        bounds = [start, *(e * self.n_tokens for e in range(first + 1, last + 1)), stop]
        epochs = zip(range(first, last + 1), itertools.pairwise(bounds), strict=True)
        parts = [self._kept(e, a - e * self.n_tokens, b - e * self.n_tokens) for e, (a, b) in epochs]
        kept = parts[0] if len(parts) == 1 else np.concatenate(parts)
        return kept + np.searchsorted(self._kept_before, kept, side="right") if len(self._kept_before) else kept

    @abstractmethod
    def _kept(self, epoch: int, start: int, stop: int) -> np.ndarray:
        """Numbers, counted among the tokens that are kept, at places `start` to `stop - 1` of an epoch."""

    def pieces(self, s: int) -> np.ndarray:
        """Numbers of the pieces that are to be read whole for batch s, or soon after it, (P,) int64; those that the
        batch before has named are among them."""
        return np.zeros(0, dtype=np.int64)


class UniformOrder(Order):
    """Each epoch is a permutation of all tokens that are kept."""

    def _kept(self, epoch: int, start: int, stop: int) -> np.ndarray:
        return permuted(start, stop, self.n_tokens, self.seed, str(epoch))


class Buffer(NamedTuple):
    """One buffer of an epoch."""

    start: int
    """Its first place in the epoch;"""
    first: np.ndarray
    """of each of its pieces the first token, counted among those that are kept, (P,)"""
    ends: np.ndarray
    """and how many tokens they and those before hold, (P,)."""
    pieces: np.ndarray
    """Their numbers, (P,)."""

    @property
    def n_tokens(self) -> int:
        return int(self.ends[-1])


class BufferedOrder(Order):
    """Each epoch is a permutation of pieces, and within each buffer one of tokens."""

    def __init__(self, n_stored: int, left_out: np.ndarray, batch_size: int, seed: int, buffer_tokens: int) -> None:
        super().__init__(n_stored, left_out, batch_size, seed)
        bounds = np.minimum(np.arange(-(-n_stored // PIECE_TOKENS) + 1) * PIECE_TOKENS, n_stored)
        self._first = bounds - np.searchsorted(left_out, bounds)  # kept tokens before each piece, and in all
        self.pieces_at_once = max(1, buffer_tokens // PIECE_TOKENS)
        self._places = lru_cache(2)(self._places_of)
        self.buffer = lru_cache(4)(self._buffer)

    def _places_of(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """Pieces in the order of an epoch, and the place in it of the first token of each, and of all."""
        n = len(self._first) - 1
        order = permute(np.arange(n, dtype=np.int64), n, self.seed, f"{epoch}/pieces")
        return order, np.concatenate([[0], np.diff(self._first)[order].cumsum()])

    def _buffer(self, epoch: int, number: int) -> Buffer:
        order, places = self._places(epoch)
        pieces = order[number * self.pieces_at_once : (number + 1) * self.pieces_at_once]
        start = places[number * self.pieces_at_once]
        ends = places[number * self.pieces_at_once + 1 :][: len(pieces)] - start
        return Buffer(int(start), self._first[pieces], ends, pieces)

    def number_at(self, epoch: int, place: int) -> int:
        """Of the buffer that has a place of an epoch."""
        return (int(np.searchsorted(self._places(epoch)[1], place, side="right")) - 1) // self.pieces_at_once

    def _kept(self, epoch: int, start: int, stop: int) -> np.ndarray:
        return np.concatenate(
            [self._kept_in(epoch, number, start, stop) for number in self._numbers(epoch, start, stop)]
        )

    def _numbers(self, epoch: int, start: int, stop: int) -> range:
        """Of the buffers that have places `start` to `stop - 1` of an epoch."""
        return range(self.number_at(epoch, start), self.number_at(epoch, stop - 1) + 1)

    def _kept_in(self, epoch: int, number: int, start: int, stop: int) -> np.ndarray:
        """Those at places of an epoch that are in one buffer."""
        buffer = self.buffer(epoch, number)
        a, b = max(0, start - buffer.start), min(buffer.n_tokens, stop - buffer.start)
        if a >= b:
            return np.zeros(0, dtype=np.int64)  # all of its tokens are left out
        at = permuted(a, b, buffer.n_tokens, self.seed, f"{epoch}/{number}")
        piece = np.searchsorted(buffer.ends, at, side="right")
        return buffer.first[piece] + at - np.concatenate([[0], buffer.ends])[piece]

    def pieces(self, s: int) -> np.ndarray:
        """Those of the batch's buffers, and of the buffer that follows as large a share as is used of the last."""
        (first, start), (last, end) = (
            divmod(at, self.n_tokens) for at in (s * self.batch_size, (s + 1) * self.batch_size - 1)
        )
        names = [
            (epoch, number)
            for epoch in range(first, last + 1)
            for number in self._numbers(
                epoch, start if epoch == first else 0, end + 1 if epoch == last else self.n_tokens
            )
        ]
        buffers = [self.buffer(*name) for name in names]
        used = (end + 1 - buffers[-1].start) / buffers[-1].n_tokens
        is_last = buffers[-1].start + buffers[-1].n_tokens == self.n_tokens
        following = self.buffer(last + 1, 0) if is_last else self.buffer(last, names[-1][1] + 1)
        ahead = following.pieces[: math.ceil(used * len(following.pieces))]
        return np.concatenate([*(buffer.pieces for buffer in buffers), ahead])


# -------------------------------------------------------------------- permutations
def permuted(start: int, stop: int, n: int, seed: int, name: str) -> np.ndarray:
    """Places `start` to `stop - 1` of a permutation of 0 .. n - 1, (stop - start,) int64."""
    if n > IN_MEMORY_TOKENS:
        return permute(np.arange(start, stop, dtype=np.int64), n, seed, name)
    return _short(n, seed, name)[start:stop]


def permute(index: np.ndarray, n: int, seed: int, name: int | str) -> np.ndarray:
    """Where a permutation of 0 .. n - 1, chosen by (seed, name), sends some indices; both are int64 of shape (N,)."""
    a = math.isqrt(n - 1) + 1 if n > 1 else 1
    b = -(-n // a)
    keys = np.frombuffer(hashlib.blake2b(f"{seed}/{name}".encode(), digest_size=8 * ROUNDS).digest(), dtype="<u8")
    found = _feistel(index.astype(np.uint64), a, b, keys)
    while (outside := found >= n).any():
        found[outside] = _feistel(found[outside], a, b, keys)
    return found.astype(np.int64)


@lru_cache(4)  # a batch begins in one epoch and ends in the next
def _short(n: int, seed: int, name: str) -> np.ndarray:
    return permute(np.arange(n, dtype=np.int64), n, seed, name)


def _feistel(x: np.ndarray, a: int, b: int, keys: np.ndarray) -> np.ndarray:
    """A permutation of 0 .. a b - 1: each round adds a hash of one half to the other, which can be undone."""
    left, right = np.divmod(x, np.uint64(b))
    for i in range(0, len(keys), 2):
        left = (left + _mix(right ^ keys[i]) % np.uint64(a)) % np.uint64(a)
        right = (right + _mix(left ^ keys[i + 1]) % np.uint64(b)) % np.uint64(b)
    return left * np.uint64(b) + right


def _mix(x: np.ndarray) -> np.ndarray:
    """The finaliser of splitmix64: every bit of the result depends on every bit of x."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))
