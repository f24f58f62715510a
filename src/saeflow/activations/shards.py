"""The bytes of a shard: how an uncompressed Zarr v3 shard is laid out, written, and opened as a memory map.

A shard file holds the chunks of `shard_tokens` rows, each uncompressed and followed by its crc32c, and ends with an
index: offset and length of every chunk (uint64 each, both 2^64 - 1 for a chunk that is not there) and the index's own
crc32c (zarr-specs, codec `sharding_indexed`, index at the end). Zarr writes the same bytes, and the tests compare the
two; but zarr assembles a shard in memory, copies it four times and reads random rows 30 to 800 times slower than a
memory map, so the hot path goes around it. What is written here opens in zarr and xarray as any store does.

Beside a shard lies `<shard>.rows`: the crc32c of each of its rows, uint32, little-endian, those that pad its last chunk
too. A row is proven by its own, so that what is read at random of a store larger than memory is rows and not whole
chunks. It is a help and no part of the array: where it is missing, or a row does not match, the chunk's decides.
"""

import json
import math
import mmap
import os
import struct
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import google_crc32c
import numpy as np

from saeflow.storage.publish import begin_flush, beside, make_folder, publish, writing
from saeflow.storage.receipts import DamagedError

COORDINATES = ("token_id", "document", "position")
"""Arrays of a store that are of no hook: one value a token."""
ITEMSIZE = {"float32": 4, "float16": 2, "bfloat16": 2}
CRC = struct.Struct("<I")
ROWS = ".rows"
NO_CHUNK = 2**64 - 1
PAGE = mmap.PAGESIZE
ADVISED = 1 << 17  # bytes: the kernel reads no more ahead at once, whatever it is told, where nobody has raised it
WRITTEN = 1 << 20  # bytes handed to the kernel at once: nine times as many took up to eight times as long a byte
WHOLE = 4  # a chunk of which a quarter of the rows is asked for is compared as a whole


class ShardError(DamagedError):
    """A shard, or the metadata of an array, that is missing, short or damaged; the message names the file."""

    def __init__(self, path: Path, problem: str) -> None:
        self.path = path
        # <store>/activations.zarr/<hook>/c/<shard>/0...
        self.array = next(p for p in (path, *path.parents) if p.parent.suffix == ".zarr" or p == p.parent)
        super().__init__(path, problem, self.array)

    def affected(self) -> list[Path]:
        """The columns of its hook, which lie beside `activations.zarr`."""
        columns = sorted(file.parent for file in self.array.parents[1].glob("*/column.json"))
        return [column for column in columns if hook_of(column) in (self.array.name, None)]

    def set_aside(self) -> list[Path]:
        """Also removes the damaged file: its rows are computed anew, and all others kept."""
        (self.path / "zarr.json" if self.path.is_dir() else self.path).unlink(missing_ok=True)
        return super().set_aside()


def hook_of(column: Path) -> str | None:
    """The hook of a column folder; None where that is lost or damaged."""
    try:
        return str(json.loads((column / "column.json").read_bytes())["hook_name"])
    except (OSError, ValueError, KeyError, TypeError):
        return None


def shards_are_there(column: Path) -> bool:
    """Whether all shards are there that a column folder stands for; what is in them, who reads them finds out. True
    where nobody can know: another Zarr writer may have laid them out."""
    try:
        receipt = json.loads((column / "column.json").read_bytes())
        array = column.parent / "activations.zarr" / receipt["hook_name"]
        n_tokens, size = int(receipt["n_tokens"]), list(receipt["size"])
    except (OSError, ValueError, KeyError, TypeError):
        return True  # its own receipt says of this file what is to be said
    try:
        metadata = json.loads((array / "zarr.json").read_bytes())
        keys, (shard_tokens, *rest) = (
            metadata["chunk_key_encoding"],
            metadata["chunk_grid"]["configuration"]["chunk_shape"],
        )
        known = keys == {"name": "default", "configuration": {"separator": "/"}} and rest == size
    except FileNotFoundError:
        return False
    except (OSError, ValueError, KeyError, TypeError):
        return True
    numbers = range(math.ceil(n_tokens / shard_tokens)) if known else ()
    return all(shard_path(array, number, 1 + len(size)).is_file() for number in numbers)


class LayoutError(ValueError):
    """A shard that is whole but not laid out as above, as another Zarr writer may have left it."""


@dataclass(frozen=True)
class Layout:
    """Geometry of one array's shards: a row is one token's values at a hook."""

    row_bytes: int
    chunk_tokens: int
    shard_tokens: int

    @property
    def chunk_bytes(self) -> int:
        """A chunk with its crc32c."""
        return self.chunk_tokens * self.row_bytes + CRC.size

    @property
    def chunks(self) -> int:
        """Chunks that a shard has room for, whether they are there or not."""
        return self.shard_tokens // self.chunk_tokens

    @property
    def index_bytes(self) -> int:
        return 16 * self.chunks + CRC.size

    def chunks_of(self, n_rows: int) -> int:
        return -(-n_rows // self.chunk_tokens)

    def shard_bytes(self, n_rows: int) -> int:
        """Size of a shard file that holds `n_rows` rows; its last chunk is padded to a whole one."""
        return self.chunks_of(n_rows) * self.chunk_bytes + self.index_bytes

    def n_shards(self, n_tokens: int) -> int:
        """Shards that a column of `n_tokens` rows has."""
        return -(-n_tokens // self.shard_tokens)

    def rows_of(self, number: int, n_tokens: int) -> int:
        """Rows of a column of `n_tokens` that are in a shard; none, or fewer, where the column ends before it."""
        return min(n_tokens - number * self.shard_tokens, self.shard_tokens)

    def shards(self, n_tokens: int) -> Iterator[tuple[int, int]]:
        """Of a column of `n_tokens` rows, the number of each shard and how many rows it has there."""
        return ((number, self.rows_of(number, n_tokens)) for number in range(self.n_shards(n_tokens)))

    def damaged(self, c: int) -> str:
        """What is said of a chunk whose crc32c is another."""
        first = c * self.chunk_tokens
        return (
            f"the crc32c of chunk {c} (rows {first} to {first + self.chunk_tokens - 1} of the shard) does not match: a "
            "byte has changed since it was written"
        )

    def holds(self, path: Path, n_rows: int) -> bool:
        """Whether a shard file is there and long enough for `n_rows` rows."""
        try:
            return os.stat(path).st_size >= self.shard_bytes(n_rows)
        except FileNotFoundError:
            return False


def predicted_bytes(
    n_tokens: int, size: tuple[int, ...] | list[int], dtype: str, chunk_tokens: int, shard_tokens: int
) -> int:
    """Exact size on disk of one column's shards: values, checksums, index and the padding of the last chunk.

    Beside them a store holds two to three bytes a token of coordinates, and each hook four of its checksum, and each
    column its statistics, 8 (d^2 + d + 1) bytes, twice.
    """
    layout = Layout(math.prod(size) * ITEMSIZE[dtype], chunk_tokens, shard_tokens)
    full_shards, rest = divmod(n_tokens, shard_tokens)
    return full_shards * layout.shard_bytes(shard_tokens) + (layout.shard_bytes(rest) if rest else 0)


def shard_path(array: Path, shard: int, n_dims: int) -> Path:
    """File of a shard that spans every dimension but the first."""
    return array.joinpath("c", str(shard), *["0"] * (n_dims - 1))


def row_checksums_of(shard: Path) -> Path:
    """The file of the checksums of a shard's rows."""
    return shard.with_name(shard.name + ROWS)


def row_checksums(rows: np.ndarray) -> np.ndarray:
    """crc32c of rows, (N, row_bytes) uint8 -> (N,) uint32."""
    return np.fromiter(map(google_crc32c.value, rows), dtype="<u4", count=len(rows))


def write_row_checksums(shard: Path, checksums: Sequence[np.ndarray]) -> None:
    """Those of each chunk, in their order."""
    with writing(row_checksums_of(shard)) as partial:
        np.concatenate(checksums).tofile(partial)


class ShardWriter:
    """Writes one shard, chunk by chunk, beside its place; `close` publishes it, whole, after the checksums of its rows.

    `of_rows`: whether there are to be such.
    """

    def __init__(self, path: Path, layout: Layout, of_rows: bool = True) -> None:
        self.path, self.layout = path, layout
        self.partial = beside(path)
        make_folder(path.parent)
        self._file = open(self.partial, "wb")  # noqa: SIM115 (closed by close or discard)
        self._written = 0
        self._of_rows: list[np.ndarray] | None = [] if of_rows else None

    def add(self, chunk: np.ndarray) -> None:
        """Appends one whole chunk: its bytes as uint8, flat."""
        assert chunk.nbytes == self.layout.chunk_bytes - CRC.size
        for start in range(0, chunk.nbytes, WRITTEN):
            self._file.write(chunk[start : start + WRITTEN].data)
        self._file.write(CRC.pack(google_crc32c.value(chunk)))
        begin_flush(self._file.fileno())  # while the model computes, not all hooks' shards at the end
        self._written += 1
        if self._of_rows is not None:
            self._of_rows.append(row_checksums(chunk.reshape(self.layout.chunk_tokens, self.layout.row_bytes)))

    def close(self) -> None:
        length = self.layout.chunk_bytes
        entries = [v for i in range(self._written) for v in (i * length, length)]
        entries += [NO_CHUNK] * (2 * self.layout.chunks - len(entries))
        index = struct.pack(f"<{len(entries)}Q", *entries)
        self._file.write(index + CRC.pack(google_crc32c.value(index)))
        self._file.close()
        if self._of_rows:
            write_row_checksums(self.path, self._of_rows)
        publish(self.partial, self.path)

    def discard(self) -> None:
        """Gives up: closes the file and frees its space."""
        with suppress(OSError):  # a full disk also refuses what the buffer still holds
            self._file.close()
        self.partial.unlink(missing_ok=True)


class Shard:
    """A memory-mapped shard. The index is checked when it is opened, a row before it is first used: by its checksum, or
    with its chunk where that is read anyway or rows have none.

    So a flipped byte is found before any value that it is of is used, without reading what is not asked for. The kernel
    reads nothing ahead but what it is told of (`will_need`).
    """

    def __init__(self, path: Path, layout: Layout, n_rows: int) -> None:
        """Opens a shard that must hold `n_rows` rows or more.

        Raises `ShardError` where it is missing, short or has a damaged index, `LayoutError` where it is another layout.
        """
        self.path, self.layout = path, layout
        try:
            file_bytes = os.stat(path).st_size
        except FileNotFoundError:
            raise ShardError(path, "the file is missing") from None
        if file_bytes < layout.index_bytes:
            raise ShardError(path, f"{file_bytes} bytes are too few for its index")
        with open(path, "rb") as file:
            self._mmap = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        self._mmap.madvise(mmap.MADV_RANDOM)
        self._map = np.frombuffer(self._mmap, dtype=np.uint8)
        index = self._map[-layout.index_bytes :]
        present = chunks_in(index, file_bytes, layout, n_rows, str(path), lambda problem: ShardError(path, problem))
        self.n_chunks = present
        self._checked = np.zeros(present * layout.chunk_tokens, dtype=bool)  # by row
        # Element i is the row whose first byte is byte i: one index gathers rows across the checksums between chunks.
        n = len(self._map) - layout.row_bytes + 1
        self._row_at = np.ndarray((n,), dtype=np.dtype((np.void, layout.row_bytes)), buffer=self._map, strides=(1,))

    def take(self, rows: np.ndarray) -> np.ndarray:
        """Rows by number within the shard, rising, (N,) -> (N,) elements of `row_bytes` bytes each, a copy."""
        taken = self._row_at[self._starts(rows)]
        fresh = ~self._checked[rows]
        if fresh.any():
            self._check_rows(rows[fresh], taken[fresh])
        return taken

    def chunk(self, c: int, n_rows: int | None = None) -> np.ndarray:
        """The first `n_rows` rows of a chunk, (n_rows, row_bytes) uint8, a view of the map."""
        if not self.is_checked(c):
            self.check(c)
        return self._values(c)[:n_rows]

    def is_checked(self, c: int) -> bool:
        """Whether all rows of a chunk are."""
        first = c * self.layout.chunk_tokens
        return bool(self._checked[first : first + self.layout.chunk_tokens].all())

    def will_need(self, rows: np.ndarray, again: bool = True) -> None:
        """Tells the kernel of rows, rising, (N,), that are about to be read, so that it reads all of them at once; not
        `again`: of those alone that were not read yet."""
        if not again:
            rows = rows[~self._checked[rows]]
        if not len(rows):
            return
        starts = self._starts(rows)
        first, end = starts // PAGE, -(-(starts + self.layout.row_bytes) // PAGE)
        ends_a_run = np.flatnonzero(first[1:] > end[:-1])
        for a, b in zip(first[[0, *(ends_a_run + 1)]].tolist(), end[[*ends_a_run, -1]].tolist(), strict=True):
            self._advise(a * PAGE, b * PAGE)

    def check_all(self) -> None:
        """Compares every chunk with its crc32c; raises `ShardError`."""
        for c in range(self.n_chunks):
            self.check(c)

    def check(self, c: int) -> None:
        """Compares a chunk with its crc32c; raises `ShardError` where they differ."""
        start = c * self.layout.chunk_bytes
        self._advise(start // PAGE * PAGE, start + self.layout.chunk_bytes)
        if not matches(self._map[start : start + self.layout.chunk_bytes]):
            raise ShardError(self.path, self.layout.damaged(c))
        first = c * self.layout.chunk_tokens
        self._checked[first : first + self.layout.chunk_tokens] = True

    def write_row_checksums(self, shard: Path) -> None:
        """Beside `shard`, where this one is to lie, once all of its chunks have been compared."""
        assert self._checked.all()
        write_row_checksums(shard, [row_checksums(self._values(c)) for c in range(self.n_chunks)])

    def _check_rows(self, rows: np.ndarray, taken: np.ndarray) -> None:
        """Compares rows, rising, as they were `taken`, with their checksums, or with their chunks those of which much
        is asked for or that have none; raises `ShardError`."""
        chunk, known = rows // self.layout.chunk_tokens, self._row_checksums
        chunks, counts = np.unique(chunk, return_counts=True)
        for c in chunks[counts * WHOLE >= self.layout.chunk_tokens] if known is not None else chunks:
            self.check(int(c))
        left = ~self._checked[rows]
        if known is not None and left.any():
            found = row_checksums(taken[left].view(np.uint8).reshape(-1, self.layout.row_bytes))
            for c in np.unique(chunk[left][found != known[rows[left]]]):
                self.check(int(c))  # what differs may be the row's checksum
            self._checked[rows] = True

    @cached_property
    def _row_checksums(self) -> np.ndarray | None:
        """(rows,) uint32; None where there are none of this shard."""
        file = row_checksums_of(self.path)
        try:
            if os.stat(file).st_size == len(self._checked) * CRC.size:
                return np.memmap(file, dtype="<u4", mode="r").view(np.ndarray)
        except FileNotFoundError:
            pass
        return None

    def _starts(self, rows: np.ndarray) -> np.ndarray:
        """The first byte of each row, (N,)."""
        chunk, row = np.divmod(rows, self.layout.chunk_tokens)
        return chunk * self.layout.chunk_bytes + row * self.layout.row_bytes

    def _values(self, c: int) -> np.ndarray:
        """A chunk, (chunk_tokens, row_bytes) uint8, a view of the map."""
        start = c * self.layout.chunk_bytes
        values = self._map[start : start + self.layout.chunk_bytes - CRC.size]
        return values.reshape(self.layout.chunk_tokens, self.layout.row_bytes)

    def _advise(self, start: int, stop: int) -> None:
        for at in range(start, stop, ADVISED):
            self._mmap.madvise(mmap.MADV_WILLNEED, at, min(ADVISED, stop - at))


def chunks_in(
    index: np.ndarray, n_bytes: int, layout: Layout, n_rows: int, name: str, damaged: Callable[[str], Exception]
) -> int:
    """How many chunks a shard of `n_bytes` has, by its index, (index_bytes,) uint8, as long as they lie where `Layout`
    says.

    Raises what `damaged` makes of a problem where the index is damaged or the shard holds fewer than `n_rows` rows, and
    `LayoutError` where it is another layout.
    """
    if not matches(index):
        raise damaged("the crc32c of its index does not match: the file is damaged or was cut short")
    entries = index[: -CRC.size].view("<u8").reshape(layout.chunks, 2)
    present = int((entries[:, 0] != NO_CHUNK).sum())
    if present < layout.chunks_of(n_rows):
        raise damaged(f"it holds {present} chunks where {n_rows} rows need {layout.chunks_of(n_rows)}")
    expected = np.arange(present, dtype=np.uint64) * np.uint64(layout.chunk_bytes)
    as_written = (entries[:present, 0] == expected).all() and (entries[:present, 1] == layout.chunk_bytes).all()
    if not as_written or n_bytes != present * layout.chunk_bytes + layout.index_bytes:
        raise LayoutError(f"shard {name} is not laid out as saeflow writes it")
    return present


def matches(checked: np.ndarray) -> bool:
    """Whether bytes (uint8) end with their own crc32c."""
    return bool(google_crc32c.value(checked[: -CRC.size]) == CRC.unpack(checked[-CRC.size :].data)[0])
