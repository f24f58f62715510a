"""Rows of a column whose array lies in a bucket, read there without a copy of the store.

A token's row comes only with its chunk, since a chunk is what has a checksum; and a batch of shuffled tokens has one in
nearly every chunk. So rows are asked for many batches at once: each chunk is read once for all of them, checked, and
what is not wanted is dropped. What that costs follows from the memory that is given to it: a column of N tokens of
which M fit into memory at once is read N / M times an epoch, or once in all where all of it fits.
"""

import json
import logging
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from saeflow.activations.elsewhere import forget
from saeflow.activations.shards import CRC, Layout, LayoutError, chunks_in, hook_of, matches, shard_path
from saeflow.activations.store import Column, StoreError, layout_of
from saeflow.storage.receipts import DamagedError
from saeflow.storage.remote import PIECE, READ_TRIES, BadReadError, Remote, RemoteError

log = logging.getLogger("saeflow")
AT_ONCE = 8  # requests on the way
NOT_THERE = "is AWS_ENDPOINT_URL the server that it was pushed to? Else push it again from where it is"


class RemoteShardError(DamagedError):
    """A shard in a bucket that is missing, short or damaged; the message names it."""

    def __init__(self, name: str, path: str, problem: str, column: Column) -> None:
        """`name`: of the object, for people; `path`: below the array."""
        super().__init__(column.folder, problem, column.folder)
        self.args = (
            f"{name} is damaged ({problem}); run the workflow again, it makes {column.folder} anew here, and take away "
            "what is damaged there with make remote-verify SET_ASIDE=1, before the next push",
        )
        self.column, self.path = column, path

    def affected(self) -> list[Path]:
        """The columns of its hook."""
        columns = sorted(file.parent for file in self.column.store.glob("*/column.json"))
        return [column for column in columns if hook_of(column) in (self.column.hook_name, None)]

    def set_aside(self) -> list[Path]:
        """Also forgets the array there, so that it is computed anew here."""
        forget(self.column.store, self.column.hook_name)
        return super().set_aside()


class RemoteRows:
    """Rows of a column by token number, from the shards in a bucket."""

    slabs = AT_ONCE
    """How many slabs are best read together by who reads all in order."""

    def __init__(self, column: Column, url: str) -> None:
        """Reads the index of every shard.

        Raises `RemoteShardError` for a damaged one, `StoreError` for a layout not known here, `RemoteError` where the
        bucket cannot be read.
        """
        self.column, self.remote = column, Remote(url)
        try:
            about = self.remote.get("zarr.json")
            if about is None:
                raise RemoteError(f"{self.remote.name('zarr.json')} is not there; {NOT_THERE}")
            layout = layout_of(json.loads(about), column)
        except (BadReadError, ValueError, TypeError):
            raise self._damaged("zarr.json", "it is not whole") from None
        if layout is None:
            raise StoreError(
                f"{url} is not laid out as saeflow writes it: bring the array here (scripts/remote.py pull --arrays)"
            )
        self.layout: Layout = layout
        self._threads = ThreadPoolExecutor(AT_ONCE, thread_name_prefix="chunks")
        list(self._threads.map(self._open, range(layout.n_shards(column.n_tokens))))

    def take(self, rows: np.ndarray) -> Tensor:
        """Rows by token number in any order, (N,) int64 -> (N, d) float32."""
        return self.stored(rows).float()

    def stored(self, rows: np.ndarray) -> Tensor:
        """The same as they are stored, (N,) int64 -> (N, d) of the column's dtype. Every chunk is read once."""
        order = np.argsort(rows)
        ordered = rows[order]
        out = np.empty((len(rows), self.layout.row_bytes), dtype=np.uint8)

        def gather(run: range) -> None:
            for chunk, held in zip(run, self.chunks(run), strict=True):
                first = chunk * self.layout.chunk_tokens
                start, stop = np.searchsorted(ordered, (first, first + self.layout.chunk_tokens))
                out[order[start:stop]] = held[ordered[start:stop] - first]

        list(self._threads.map(gather, self.runs(np.unique(ordered // self.layout.chunk_tokens))))
        return torch.from_numpy(out).view(getattr(torch, self.column.dtype))

    def chunks(self, run: range) -> list[np.ndarray]:
        """Chunks that follow each other in a shard, by their numbers in the column, in one reading: each (chunk_tokens,
        row_bytes) uint8, compared with its crc32c."""
        number, first = divmod(run[0], self.layout.chunks)
        path, length = self._path(number), self.layout.chunk_bytes
        for left in reversed(range(READ_TRIES)):
            try:
                found = self.remote.read(path, first * length, len(run) * length).reshape(len(run), length)
            except FileNotFoundError:
                raise self._damaged(path, "it is missing") from None
            except BadReadError as error:
                raise self._damaged(path, f"it {error.problem}") from None
            wrong = [c for c, one in enumerate(found, first) if not matches(one)]
            if not wrong:
                return [one[: -CRC.size].reshape(self.layout.chunk_tokens, self.layout.row_bytes) for one in found]
            if left:
                log.warning("%s: %s; reading it again", self.remote.name(path), self.layout.damaged(wrong[0]))
        raise self._damaged(path, f"{self.layout.damaged(wrong[0])}, read {READ_TRIES} times")

    def runs(self, chunks: np.ndarray) -> Iterator[range]:
        """Rising numbers of chunks as runs of one shard each, that one request brings."""
        most = max(1, PIECE // self.layout.chunk_bytes)
        start = stop = int(chunks[0])
        for chunk in chunks.tolist():
            if chunk != stop or chunk - start == most or chunk // self.layout.chunks != start // self.layout.chunks:
                yield range(start, stop)
                start = chunk
            stop = chunk + 1
        yield range(start, stop)

    def _open(self, number: int) -> None:
        path, n_rows = self._path(number), self.layout.rows_of(number, self.column.n_tokens)
        for left in reversed(range(READ_TRIES)):
            try:
                found = self.remote.tail(path, self.layout.index_bytes)
            except BadReadError as error:
                raise self._damaged(path, f"it {error.problem}") from None
            if found is None:
                raise self._damaged(path, "it is missing")
            try:
                name = self.remote.name(path)
                chunks_in(found[1], found[0], self.layout, n_rows, name, lambda p: self._damaged(path, p))
                return
            except RemoteShardError:
                if not left:
                    raise
            except LayoutError as error:
                raise StoreError(f"{error}: bring the array here (scripts/remote.py pull --arrays)") from None

    def _path(self, number: int) -> str:
        return shard_path(Path(), number, len(self.column.size) + 1).as_posix()

    def _damaged(self, path: str, problem: str) -> RemoteShardError:
        return RemoteShardError(self.remote.name(path), path, problem, self.column)
