"""Shuffled reading: batch s of columns is a pure function of (seed, s), prefetched in a thread.

Which tokens it holds, `saeflow.activations.order` says. Rows are gathered from memory maps of the raw shards, in the
order that they lie on disk. The kernel, which would read megabytes beside every row, is told to read only what it is
told of: in the uniform order the rows of the batch, in the buffered one the pieces of the coming buffer. A row's
checksum is compared before any of its values is used (`saeflow.activations.shards`). A store that is not laid out as
saeflow writes it (converted by another tool, say) is read through zarr: slower, with the same values. Of an array in a
bucket (`saeflow.activations.remote`) the rows of many batches are read together, as many as there is memory for.
"""

import itertools
import logging
import math
import resource
import threading
from collections import deque
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor

from saeflow.activations.elsewhere import array_url
from saeflow.activations.order import PIECE_TOKENS, BufferedOrder, Order, UniformOrder
from saeflow.activations.remote import RemoteRows
from saeflow.activations.shards import LayoutError, Shard, ShardError, shard_path
from saeflow.activations.store import Column, StoreError, array_layout
from saeflow.storage.memory import machine_memory

log = logging.getLogger("saeflow")
IN_MEMORY_TOKENS = 1 << 16  # up to so many tokens
IN_MEMORY_BYTES = 16 << 20  # and float32 bytes, a column is kept in memory
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
        buffer_tokens: int | None = None,
    ) -> None:
        """`left_out`: numbers of tokens that no batch has, (M,) int64, rising. `read_ahead`: bytes of memory for what
        is read ahead of columns in a bucket. `buffer_tokens`: of the buffered order; None: the uniform one.

        Raises `StoreError` for columns of different stores or lengths: their rows would not be the same tokens.
        """
        if len({c.store.resolve() for c in columns}) != 1 or len({c.n_tokens for c in columns}) != 1:
            what = ", ".join(f"{c.folder} ({c.n_tokens} tokens)" for c in columns)
            raise StoreError(f"only columns of one store and one length can be read together, not {what}")
        left_out = np.zeros(0, dtype=np.int64) if left_out is None else left_out
        of = (columns[0].n_tokens, left_out, batch_size, seed)
        self.order: Order = UniformOrder(*of) if buffer_tokens is None else BufferedOrder(*of, buffer_tokens)
        self.batch_size = batch_size
        self.columns = [_in_memory(open_rows(column), read_ahead // len(columns)) for column in columns]
        self._in_pieces = [column for column in self.columns if buffer_tokens and isinstance(column, MappedRows)]
        self._told = np.zeros(0, dtype=np.int64)
        far = [column for column in self.columns if isinstance(column, RemoteRows)]
        a_batch = batch_size * sum(column.layout.row_bytes for column in far)
        self.at_once = max(1, read_ahead // 2 // a_batch) if far else 1
        """Batches that are read together; while they are used, the next are read."""
        if far:
            together = min(self.order.n_tokens, buffer_tokens or self.order.n_tokens)
            passes = max(1.0, together / (self.at_once * batch_size))
            log.info(
                "reading %d columns in their bucket, %.1f times an epoch with device.read_ahead_mb=%d",
                len(far), passes, read_ahead >> 20,
            )  # fmt: skip

    def rows(self, s: int) -> np.ndarray:
        """Token numbers of batch s, (batch_size,) int64."""
        return self.order.rows(s)

    def batch(self, s: int) -> tuple[Tensor, ...]:
        """Batch s, for every column an (N, d) float32 tensor, heads flattened; row i of each is the same token."""
        rows = self.rows(s)
        if self._in_pieces:
            self._tell(self.order.pieces(s))
        return tuple(
            column.take(rows, told=True) if column in self._in_pieces else column.take(rows) for column in self.columns
        )

    def _tell(self, pieces: np.ndarray) -> None:
        """Has pieces read that were not named for the batch before."""
        new = np.setdiff1d(pieces, self._told)
        self._told = pieces
        tokens = (new[:, None] * PIECE_TOKENS + np.arange(PIECE_TOKENS)).reshape(-1)
        for column in self._in_pieces:
            column.will_need(tokens[tokens < column.column.n_tokens])

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
        checking = threading.Event()
        checker = threading.Thread(target=self._check, args=(checking,), name="batch-checker", daemon=True)
        groups = iter(range(s, min(s + self.at_once, stop)) for s in range(start_step, stop, self.at_once))
        thread = ThreadPoolExecutor(1, thread_name_prefix="batch-reader")
        checker.start()
        try:
            first = itertools.islice(groups, prefetch + 1 if self.at_once == 1 else 1)
            ahead = deque(thread.submit(self._group, steps) for steps in first)
            while ahead:
                group = ahead.popleft().result()
                ahead.extend(thread.submit(self._group, steps) for steps in itertools.islice(groups, 1))
                while group:
                    yield tuple(values.float() for values in group.popleft())
        finally:
            checking.set()
            thread.shutdown(cancel_futures=True)
            checker.join()

    def _check(self, stop: threading.Event) -> None:
        """Compares chunk by chunk, beside the batches, what fits into memory: so each is read in order and once, and
        batches need not look at their rows any more. What is damaged is found again by who needs it."""
        for column in self.columns:
            if isinstance(column, MappedRows) and not column.evicts and column not in self._in_pieces:
                for shard in column.shards:
                    for c in range(shard.n_chunks):
                        if stop.is_set():
                            return
                        with suppress(ShardError):
                            shard.chunk(c)

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

        self.evicts = layout.row_bytes * column.n_tokens > machine_memory() // 2
        """Whether what was read once may have to be read from the disk again."""

    def take(self, rows: np.ndarray, told: bool = False) -> Tensor:
        """Rows by token number in any order, (N,) int64 -> (N, d) float32. `told`: `will_need` was, of these."""
        order = np.argsort(rows)
        ordered = rows[order]
        if not told:
            self.will_need(ordered, again=self.evicts)
        out = np.empty((len(rows), self.layout.row_bytes), dtype=np.uint8)
        out_rows = out.view(np.dtype((np.void, self.layout.row_bytes)))[:, 0]  # one element a row: moved as one copy
        for shard, of_shard, a, b in self._by_shard(ordered):
            out_rows[order[a:b]] = shard.take(of_shard)
        return _float32(out, self.column)

    def will_need(self, rows: np.ndarray, again: bool = True) -> None:
        """Has the kernel begin to read rows by token number, rising, (N,); not `again`: those that were not read."""
        for shard, of_shard, _, _ in self._by_shard(rows):
            shard.will_need(of_shard, again)

    def _by_shard(self, rows: np.ndarray) -> Iterator[tuple[Shard, np.ndarray, int, int]]:
        """Rows by token number, rising, (N,), of each shard that has some of them: the shard, their numbers in it, and
        where in `rows` they begin and end."""
        if not len(rows):
            return
        shard_tokens = self.layout.shard_tokens
        first, last = rows[0] // shard_tokens, rows[-1] // shard_tokens
        bounds = np.searchsorted(rows, np.arange(first, last + 2) * shard_tokens)
        for number in np.flatnonzero(np.diff(bounds)):
            a, b = bounds[number], bounds[number + 1]
            yield self.shards[first + number], rows[a:b] - (first + number) * shard_tokens, a, b


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
