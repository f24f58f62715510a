"""Shuffled reading: batch s of columns is a pure function of (seed, s), prefetched in a thread.

The tokens of epoch e come in the order of a permutation that is computed, not stored: a keyed Feistel network over
Z_a x Z_b, a b >= n, whose few results beyond n are put through it again (Black and Rogaway 2002, ciphers with
arbitrary finite domains). So any batch can be asked for at any time, by any number of readers, without memory that
grows with n. Batches straddle epochs: batch s holds the tokens s B to (s + 1) B - 1 of the endless stream of epochs, so
every batch is full and every epoch has every token exactly once. With tokens left out the stream is of those that
are kept: epochs are shorter, batches as full, and the order a function of the same and of what is left out.

Rows are gathered from memory maps of the raw shards, in the order that they lie on disk. A chunk's checksum is compared
when the chunk is first touched, before any of its values is used. A store that is not laid out as saeflow writes it
(converted by another tool, say) is read through zarr: slower, with the same values. Of an array in a bucket
(`saeflow.activations.remote`) the rows of many batches are read together, as many as there is memory for.
"""

import hashlib
import itertools
import logging
import math
import resource
from collections import deque
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property, lru_cache
from typing import Any

import numpy as np
import torch
from torch import Tensor

from saeflow.activations.elsewhere import array_url
from saeflow.activations.remote import RemoteRows
from saeflow.activations.shards import LayoutError, Shard, ShardError, shard_path
from saeflow.activations.store import Column, StoreError, array_layout

log = logging.getLogger("saeflow")
ROUNDS = 8
IN_MEMORY_TOKENS = 1 << 16  # up to so many tokens an epoch,
IN_MEMORY_BYTES = 16 << 20  # and float32 bytes a column, are kept in memory
READ_AHEAD = 1 << 30  # bytes of memory for the rows of columns that lie in a bucket


class BatchReader:
    """Shuffled batches of row-aligned columns of one store, in float32."""

    def __init__(
        self,
        columns: list[Column],
        batch_size: int,
        seed: int,
        left_out: np.ndarray | None = None,
        read_ahead: int = READ_AHEAD,
    ) -> None:
        """`left_out`: numbers of tokens that no batch has, (M,) int64, rising. `read_ahead`: bytes of memory for what
        is read ahead of columns in a bucket.

        Raises `StoreError` for columns of different stores or lengths: their rows would not be the same tokens.
        """
        if len({c.store.resolve() for c in columns}) != 1 or len({c.n_tokens for c in columns}) != 1:
            what = ", ".join(f"{c.folder} ({c.n_tokens} tokens)" for c in columns)
            raise StoreError(f"only columns of one store and one length can be read together, not {what}")
        left_out = np.zeros(0, dtype=np.int64) if left_out is None else left_out
        self.n_tokens, self.batch_size, self.seed = columns[0].n_tokens - len(left_out), batch_size, seed
        self._kept_before = left_out - np.arange(len(left_out))
        """How many tokens that are kept come before each that is left out, (M,)."""
        self.columns = [_in_memory(open_rows(column), read_ahead // len(columns)) for column in columns]
        far = [column for column in self.columns if isinstance(column, RemoteRows)]
        a_batch = batch_size * sum(column.layout.row_bytes for column in far)
        self.at_once = max(1, read_ahead // 2 // a_batch) if far else 1
        """Batches that are read together; while they are used, the next are read."""
        if far:
            passes = max(1.0, self.n_tokens / (self.at_once * batch_size))
            log.info(
                "reading %d columns in their bucket, %.1f times an epoch with device.read_ahead_mb=%d",
                len(far), passes, read_ahead >> 20,
            )  # fmt: skip

    def rows(self, s: int) -> np.ndarray:
        """Token numbers of batch s, (batch_size,) int64."""
        start, stop = s * self.batch_size, (s + 1) * self.batch_size
        first, last = start // self.n_tokens, (stop - 1) // self.n_tokens
        bounds = [start, *(e * self.n_tokens for e in range(first + 1, last + 1)), stop]
        epochs = zip(range(first, last + 1), itertools.pairwise(bounds), strict=True)
        parts = [self._order(e, a - e * self.n_tokens, b - e * self.n_tokens) for e, (a, b) in epochs]
        kept = parts[0] if len(parts) == 1 else np.concatenate(parts)
        return kept + np.searchsorted(self._kept_before, kept, side="right") if len(self._kept_before) else kept

    def _order(self, epoch: int, start: int, stop: int) -> np.ndarray:
        """Numbers, counted among the tokens that are kept, at places `start` to `stop - 1` of an epoch."""
        if self.n_tokens > IN_MEMORY_TOKENS:
            return permute(np.arange(start, stop, dtype=np.int64), self.n_tokens, self.seed, epoch)
        return _short_epoch(self.n_tokens, self.seed, epoch)[start:stop]

    def batch(self, s: int) -> tuple[Tensor, ...]:
        """Batch s, for every column an (N, d) float32 tensor, heads flattened; row i of each is the same token."""
        rows = self.rows(s)
        return tuple(column.take(rows) for column in self.columns)

    def iterate(self, start_step: int, n_steps: int, prefetch: int = 4) -> Iterator[tuple[Tensor, ...]]:
        """Batches `start_step` to `start_step + n_steps - 1`, up to `prefetch` of them read ahead by a thread, or as
        many as are read together.

        What fails in the thread is raised here. The thread ends when the iterator is exhausted, closed or dropped.
        Columns that are held in memory need no thread.
        """
        stop = start_step + n_steps
        if all(isinstance(column, InMemoryRows) for column in self.columns):
            yield from map(self.batch, range(start_step, stop))
            return
        groups = iter(range(s, min(s + self.at_once, stop)) for s in range(start_step, stop, self.at_once))
        thread = ThreadPoolExecutor(1, thread_name_prefix="batch-reader")
        try:
            first = itertools.islice(groups, prefetch + 1 if self.at_once == 1 else 1)
            ahead = deque(thread.submit(self._group, steps) for steps in first)
            while ahead:
                group = ahead.popleft().result()
                ahead.extend(thread.submit(self._group, steps) for steps in itertools.islice(groups, 1))
                while group:
                    yield tuple(values.float() for values in group.popleft())
        finally:
            thread.shutdown(cancel_futures=True)

    def _group(self, steps: range) -> deque[tuple[Tensor, ...]]:
        """Batches that are read together, those of columns in a bucket as they are stored."""
        if len(steps) == 1:
            return deque([self.batch(steps[0])])
        rows = [self.rows(s) for s in steps]
        parts = [
            column.stored(np.concatenate(rows)).split(self.batch_size)
            if isinstance(column, RemoteRows)
            else [column.take(of_batch) for of_batch in rows]
            for column in self.columns
        ]
        return deque(zip(*parts, strict=True))


# -------------------------------------------------------------------- the order of an epoch
def permute(index: np.ndarray, n: int, seed: int, epoch: int) -> np.ndarray:
    """Where a permutation of 0 .. n - 1, chosen by (seed, epoch), sends some indices; both are int64 of shape (N,)."""
    a = math.isqrt(n - 1) + 1 if n > 1 else 1
    b = -(-n // a)
    keys = np.frombuffer(hashlib.blake2b(f"{seed}/{epoch}".encode(), digest_size=8 * ROUNDS).digest(), dtype="<u8")
    found = _feistel(index.astype(np.uint64), a, b, keys)
    while (outside := found >= n).any():
        found[outside] = _feistel(found[outside], a, b, keys)
    return found.astype(np.int64)


@lru_cache(4)  # a batch begins in one epoch and ends in the next
def _short_epoch(n: int, seed: int, epoch: int) -> np.ndarray:
    return permute(np.arange(n, dtype=np.int64), n, seed, epoch)


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


# -------------------------------------------------------------------- rows of one column
class MappedRows:
    """Rows of a column by token number, from memory maps of its shards."""

    slabs = 1
    """How many slabs are best read together by who reads all in order."""

    def __init__(self, column: Column) -> None:
        """Opens every shard. Raises `ShardError` for a damaged one, `LayoutError` for a layout not known here."""
        self.column = column
        layout = array_layout(column)
        if layout is None:
            raise LayoutError(f"{column.array} is not laid out as saeflow writes it")
        self.layout, n_dims = layout, len(column.size) + 1
        _allow_open_files(layout.n_shards(column.n_tokens))
        self.shards = [
            Shard(shard_path(column.array, number, n_dims), layout, n_rows)
            for number, n_rows in layout.shards(column.n_tokens)
        ]

    def take(self, rows: np.ndarray) -> Tensor:
        """Rows by token number in any order, (N,) int64 -> (N, d) float32."""
        order = np.argsort(rows)
        ordered = rows[order]
        shard_tokens = self.layout.shard_tokens
        first, last = ordered[0] // shard_tokens, ordered[-1] // shard_tokens
        bounds = np.searchsorted(ordered, np.arange(first, last + 2) * shard_tokens)
        out = np.empty((len(rows), self.layout.row_bytes), dtype=np.uint8)
        out_rows = out.view(np.dtype((np.void, self.layout.row_bytes)))[:, 0]  # one element a row: moved as one copy
        for number in np.flatnonzero(np.diff(bounds)):
            a, b = bounds[number], bounds[number + 1]
            shard = first + number
            out_rows[order[a:b]] = self.shards[shard].take(ordered[a:b] - shard * shard_tokens)
        return _float32(out, self.column)


class ZarrRows:
    """The same through zarr, for stores in another layout."""

    slabs = 1

    def __init__(self, column: Column) -> None:
        import zarr

        self.column = column
        self.array: Any = zarr.open_array(column.array, mode="r")
        if self.array.shape[0] < column.n_tokens or self.array.shape[1:] != column.size:
            raise StoreError(
                f"{column.array} has shape {self.array.shape}; {column.folder} needs {column.n_tokens} rows"
            )

    def take(self, rows: np.ndarray) -> Tensor:
        """Rows by token number in any order, (N,) int64 -> (N, d) float32."""
        unique, inverse = np.unique(rows, return_inverse=True)
        try:
            values = np.asarray(self.array.oindex[unique])[inverse]
        except ValueError as error:
            if "checksum" not in str(error):
                raise
            raise ShardError(self.column.array, f"zarr finds a damaged chunk ({error})") from error
        found = _float32(values.reshape(len(rows), -1).view(np.uint8), self.column)
        if not found.isfinite().all():  # caching lets only finite values in: these are fill values of a missing chunk
            raise ShardError(self.column.array, "a chunk is missing: its rows read as NaN")
        return found


class InMemoryRows:
    """Rows of a small column: all of them are read with the first, and kept in memory."""

    def __init__(self, rows: "MappedRows | ZarrRows | RemoteRows") -> None:
        self.rows = rows

    @cached_property
    def values(self) -> Tensor:
        return self.rows.take(np.arange(self.rows.column.n_tokens))

    def take(self, rows: np.ndarray) -> Tensor:
        """Rows by token number in any order, (N,) int64 -> (N, d) float32."""
        return self.values[torch.from_numpy(rows)]


def _in_memory(rows: MappedRows | ZarrRows | RemoteRows, read_ahead: int) -> Any:
    """The same rows in memory, where they are few, or lie in a bucket and fit into what is read ahead."""
    column = rows.column
    n_bytes = 4 * column.n_tokens * math.prod(column.size)
    few = column.n_tokens <= IN_MEMORY_TOKENS and n_bytes <= IN_MEMORY_BYTES
    return InMemoryRows(rows) if few or (isinstance(rows, RemoteRows) and n_bytes <= read_ahead) else rows


def open_rows(column: Column) -> MappedRows | ZarrRows | RemoteRows:
    """The fastest way to read a column's rows, where they are."""
    if url := array_url(column.folder):
        return RemoteRows(column, url)
    try:
        return MappedRows(column)
    except LayoutError:
        return ZarrRows(column)
    except ShardError:
        if url := array_url(column.folder):  # it was dropped in this moment
            return RemoteRows(column, url)
        raise


def damaged_shards(column: Column) -> Iterator[ShardError]:
    """Reads all of a column's shards; nothing where another Zarr writer laid them out. A damaged chunk is found by
    every reader that touches it: this is for who wants to know before."""
    try:
        layout = array_layout(column)
    except ShardError as error:
        yield error
        return
    for number, n_rows in layout.shards(column.n_tokens) if layout else ():
        assert layout
        try:
            shard = Shard(shard_path(column.array, number, len(column.size) + 1), layout, n_rows)
            for c in range(layout.chunks_of(n_rows)):
                shard.check(c)
        except ShardError as error:
            yield error
        except LayoutError:
            return


def _float32(values: np.ndarray, column: Column) -> Tensor:
    """Stored bytes, (N, bytes) uint8, as an (N, d) float32 tensor."""
    return torch.from_numpy(values).view(getattr(torch, column.dtype)).float()


def _allow_open_files(n: int) -> None:
    """Every mapped shard counts as an open file; the soft limit is often 1,024, the hard one far more."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != resource.RLIM_INFINITY and 4 * n + 256 > soft:
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
