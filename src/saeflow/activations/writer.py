"""Filling one hook's columns, token by token, from what is on disk and then from what the model gives; or one shard of
it, ahead of that.

The order of everything here is fixed by token numbers, never by how a run went: a chunk's moments are merged when its
last token has come, a shard is closed when its last token has come, and what a run finds on disk it reads back through
the same steps. That is why a killed, continued or extended column has the bytes of an undisturbed one.
"""

import logging
import math
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from saeflow.activations.moments import Moments, Statistics
from saeflow.activations.shards import Shard, ShardWriter
from saeflow.activations.store import ActivationStore

log = logging.getLogger("saeflow")
PENDING_TASKS = 4  # chunks handed to the thread that may wait for the disk
FLOAT16_MAX = 65504.0


class ActivationError(ValueError):
    """Activations that cannot be stored; the message names the hook, the value and what to do."""


class ColumnRequest(NamedTuple):
    """One column: a hook, its size per token, and how many tokens."""

    hook_name: str
    size: tuple[int, ...]
    n_tokens: int


class HookWriter:
    """The rows of one hook, cut into chunks and shards. Keeps one chunk in memory; full ones go to a thread that writes
    them."""

    def __init__(
        self, store: ActivationStore, hook_name: str, size: tuple[int, ...], device: str, thread: ThreadPoolExecutor
    ) -> None:
        self.store, self.hook_name, self.size = store, hook_name, size
        self.device, self._thread = device, thread
        self.layout, self.dtype = store.layout(size), getattr(torch, store.config.dtype)
        self.position = self.last = 0
        self._shard: ShardWriter | None = None
        self._pending: deque[Future] = deque()
        self._new_chunk()

    @property
    def done(self) -> bool:
        raise NotImplementedError

    def append(self, first: int, values: Tensor) -> None:
        """Takes what is needed of a block of activations, (N, *size) float32; its first row is token `first`."""
        raise NotImplementedError

    def wait(self) -> None:
        """Returns when all that was handed to the thread is on disk; raises what the thread raised."""
        while self._pending:
            self._pending.popleft().result()

    def discard(self) -> None:
        """Drops the shard that was begun, if any."""
        if self._shard:
            self._shard.discard()

    # ---------------------------------------------------------------- rows, chunks
    def _new_chunk(self) -> None:
        self._chunk = torch.empty(self.layout.chunk_tokens, *self.size, dtype=self.dtype, device=self.device)
        self._filled = 0

    def _take(self, values: Tensor) -> None:
        """The next rows, (N, *size), none of them beyond the shard or the column."""
        while len(values):
            n = min(len(values), self.layout.chunk_tokens - self._filled)
            self._chunk[self._filled : self._filled + n] = values[:n]
            values = values[n:]
            self._filled += n
            self.position += n
            if self._filled == self.layout.chunk_tokens:
                self._end_chunk()

    def _end_chunk(self) -> None:
        """All rows of a chunk, or of a shard, are in `_chunk`."""
        self._see(self._chunk[: self._filled])
        if self._shard:
            self._chunk[self._filled :] = math.nan  # the fill value, as Zarr pads a chunk
            self._write(self._chunk)
        self._new_chunk()

    def _see(self, chunk: Tensor) -> None:
        """Looks at the rows of a chunk, which end at `position`, before they are written."""
        raise NotImplementedError

    def _refuse(self, chunk: Tensor) -> None:
        first = self.position - len(chunk)
        raise ActivationError(
            f"{self.hook_name}: NaN or infinity among tokens {first} to {self.position - 1}. Check the model's "
            "weights; with activations.dtype=float16 or bfloat16 try float32"
        )

    def _check_float16(self, values: Tensor) -> None:
        largest = values.abs().max().item() if self.dtype == torch.float16 and values.numel() else 0.0
        if largest > FLOAT16_MAX:
            raise ActivationError(
                f"{self.hook_name} reaches {largest:.6g}, but float16 ends at {FLOAT16_MAX:.0f}: set "
                "activations.dtype to bfloat16 or float32"
            )

    # ---------------------------------------------------------------- the thread
    def _write(self, chunk: Tensor) -> None:
        """Hands a chunk over; the caller must not write to it again."""
        assert self._shard is not None
        self._submit(_or_discard, self._shard, self._shard.add, chunk.cpu().view(torch.uint8).numpy().reshape(-1))

    def _close(self) -> None:
        if self._shard:
            self._submit(_or_discard, self._shard, self._shard.close)
            self._shard = None

    def _submit(self, task: Callable[..., None], *arguments: Any) -> None:
        self._pending.append(self._thread.submit(task, *arguments))
        while len(self._pending) > PENDING_TASKS:
            self._pending.popleft().result()


class AheadWriter(HookWriter):
    """One shard, written to `path` for the job that will make the hook's columns; statistics are that one's."""

    def __init__(
        self,
        store: ActivationStore,
        column: ColumnRequest,
        number: int,
        path: Path,
        device: str,
        thread: ThreadPoolExecutor,
    ) -> None:
        super().__init__(store, column.hook_name, column.size, device, thread)
        self.position = number * self.layout.shard_tokens
        self.last = min(column.n_tokens, self.position + self.layout.shard_tokens)
        self._shard = ShardWriter(path, self.layout, of_rows=False)

    @property
    def done(self) -> bool:
        return self.position == self.last

    def append(self, first: int, values: Tensor) -> None:
        values = values[max(0, self.position - first) : self.last - first]
        self._check_float16(values)
        self._take(values)
        if self.done:
            if self._filled:
                self._end_chunk()
            self._close()

    def _see(self, chunk: Tensor) -> None:
        if not torch.linalg.vector_norm(chunk.float()).isfinite():
            self._refuse(chunk)


class ColumnWriter(HookWriter):
    """All wanted columns of one hook, the shortest first, as one pass over the tokens.

    After every whole shard the progress file records it with the moments up to its end, and a run that was killed
    continues there. `ahead`, of a shard by its number and how many of its tokens are needed, moves it into place where
    it was computed ahead, and returns how many tokens it holds.
    """

    def __init__(
        self,
        store: ActivationStore,
        columns: list[ColumnRequest],
        device: str,
        thread: ThreadPoolExecutor,
        ahead: Callable[[int, int], int] = lambda number, n_tokens: 0,
    ) -> None:
        super().__init__(store, columns[0].hook_name, columns[0].size, device, thread)
        self._ahead = ahead
        self.statistics: dict[ColumnRequest, Statistics] = {}
        self._columns = sorted(columns, key=lambda w: w.n_tokens)
        self.last = self._columns[-1].n_tokens
        self._begin()

    @property
    def done(self) -> bool:
        return not self._columns

    def append(self, first: int, values: Tensor) -> None:
        stop = first + len(values)
        self._check_float16(values[max(0, self.position - first) : max(0, self.last - first)])
        while not self.done and self.position < stop:
            end = min(stop, self._target, self._shard_end)
            self._take(values[self.position - first : end - first])
            self._settle()

    # ---------------------------------------------------------------- from column to column, from shard to shard
    @property
    def _target(self) -> int:
        return self._columns[0].n_tokens

    def _begin(self) -> None:
        """Goes to the end of the whole shards on record; to 0 if one of them is gone or the column ends before it."""
        empty = Moments(math.prod(self.size), self.device)
        self.stored, recorded = self.store.load_progress(self.hook_name, self.device) or (0, empty)
        gone = [s for s in range(recorded.count // self.layout.shard_tokens) if not self._available(s)]
        if gone:
            log.warning("%s is gone or short: computing it again", self._path(gone[0]))
            self.store.save_progress(self.hook_name, self.stored, empty)
        self._record = bool(gone) or self._target >= recorded.count  # else there is nothing new to put on record
        self.moments = recorded if self._record and not gone else empty
        self._recorded = self.moments.copy()
        self.position = self._shard_end = self.moments.count
        self._shard, self._moved = None, False
        self._new_chunk()
        self._settle()

    def _settle(self) -> None:
        """Ends and begins shards and columns until a row is needed that is not on disk."""
        while not self.done:
            if self.position == self._target:
                self._end_column()
            elif self.position == self._shard_end:
                self._begin_shard()
            else:
                return

    def _begin_shard(self) -> None:
        """Reads the rows of the next shard that are on disk; opens a new file where those are too few."""
        number = self.position // self.layout.shard_tokens
        needed = min(self._target - self.position, self.layout.shard_tokens)
        if self._available(number) < needed and (moved := self._ahead(number, needed)):
            self.stored, self._moved = max(self.stored, self.position + moved), True
        available = min(self._available(number), needed)
        self._shard_end = self.position + self.layout.shard_tokens
        if available < needed:
            self._shard = ShardWriter(self._path(number), self.layout)
        if available:
            shard = Shard(self._path(number), self.layout, available)
            for c in range(self.layout.chunks_of(available)):
                n = min(available - c * self.layout.chunk_tokens, self.layout.chunk_tokens)
                rows = torch.from_numpy(shard.chunk(c, n).copy()).view(self.dtype)
                self._take(rows.view(n, *self.size).to(self.device))

    def _end_shard(self) -> None:
        """The shard is full."""
        self._close()
        if self._record:
            self._recorded = self.moments.copy()
            self._submit(self.store.save_progress, self.hook_name, self.stored, self._recorded)

    def _end_column(self) -> None:
        """The column is complete: its last shard may be partial, and its statistics include the last, partial chunk."""
        if self._filled:
            self._end_chunk()  # the next column begins anew from what is on record
        self.statistics[self._columns.pop(0)] = self.moments.statistics()
        if self._shard or self._moved:
            self._close()
            self._submit(self.store.save_progress, self.hook_name, self.stored, self._recorded)
        if not self.done:
            self.wait()
            self._begin()

    def _path(self, number: int) -> Path:
        return self.store.shard(self.hook_name, self.size, number)

    def _available(self, number: int) -> int:
        """Rows of a shard that are known to be on disk: they are on record, and the file is long enough."""
        rows = self.layout.rows_of(number, self.stored)
        return rows if rows > 0 and self.layout.holds(self._path(number), rows) else 0

    def _close(self) -> None:
        if self._shard:
            self.stored = max(self.stored, self.position)
        super()._close()

    def _take(self, values: Tensor) -> None:
        super()._take(values)
        if self.position == self._shard_end:
            self._end_shard()

    def _see(self, chunk: Tensor) -> None:
        self.moments.add(chunk.flatten(1).float())
        if not math.isfinite(self.moments.norm_sum):
            self._refuse(chunk)


def _or_discard(shard: ShardWriter, task: Callable[..., None], *arguments: Any) -> None:
    try:
        task(*arguments)
    except BaseException:
        shard.discard()
        raise
