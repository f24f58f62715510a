"""The folder of an activation store: its Zarr group, its coordinates, what is known to be on disk, and its columns.

    <store>/activations.zarr/<hook>/     one sharded array a hook, (token, d) or (token, head, d_head)
    <store>/activations.zarr/token_id    and document, position: one value a token
    <store>/progress/<hook>.safetensors  how far a hook's shards reach, and the statistics up to its last whole shard
    <store>/<column>/                    receipt of one hook up to one number of rows, with its statistics

All arrays have the length of the longest column, so that xarray opens them as one data set: what a shorter column does
not hold reads as NaN there (attribute `n_tokens` says how much it holds). `Column` never reads past its own end.
"""

import json
import logging
import math
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import torch
from safetensors.torch import load_file

from saeflow.activations.coordinates import NO_COORDINATE
from saeflow.activations.moments import Moments, Statistics
from saeflow.activations.shards import COORDINATES, ITEMSIZE, Layout, ShardError, shard_path
from saeflow.config import ActivationsConfig
from saeflow.storage.checksums import StateError, load_state, save_state, save_tensors
from saeflow.storage.locks import locked
from saeflow.storage.publish import flush
from saeflow.text.tokens import open_tokens

if TYPE_CHECKING:
    import zarr

log = logging.getLogger("saeflow")
NAN_BFLOAT16 = 0x7FC0
SLAB_TOKENS = 1 << 16
STORED_AS = {"float32": "float32", "float16": "float16", "bfloat16": "uint16"}


class StoreError(ValueError):
    """A store or column that does not fit what is asked of it; the message names the folder and what to do."""


def dimension_names(hook_name: str, n_dims: int) -> tuple[str, ...]:
    """Names of an array's dimensions. Hooks of one store that differ in size differ in the name of that dimension."""
    last = hook_name.rsplit(".", 1)[-1]
    if n_dims == 3:
        return ("token", "key_value_head" if last in ("hook_k", "hook_v") else "head", "d_head")
    return ("token", "d_mlp" if ".mlp." in hook_name else "d")


class TokenRows:
    """The packed rows of a tokens folder, read in slabs: a chunk on disk holds many rows, and decoding it costs."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.store = folder, open_tokens(folder)
        self.n_rows, self.context_size = self.store.n_rows, self.store.context_size
        self._slab = max(1, SLAB_TOKENS // self.context_size)
        self._first, self._loaded = 0, self.store[0:0]

    def tokens(self, start: int, stop: int) -> np.ndarray:
        """Token ids of rows, (rows, context_size) int32; the last slab stays in memory."""
        if start < self._first or stop > self._first + len(self._loaded):
            self._first, self._loaded = start, self.store[start : max(stop, start + self._slab)]
        return self._loaded[start - self._first : stop - self._first]

    def coordinates(self, start: int, stop: int) -> Iterator[tuple[slice, dict[str, np.ndarray]]]:
        """Of rows `start` to `stop`, slab by slab: the slice of tokens, and (N,) int32 values by coordinate."""
        for first in range(start, stop, self._slab):
            tokens, document, _ = self.store.rows(first, min(first + self._slab, stop))
            position = np.broadcast_to(np.arange(self.context_size, dtype=np.int32), tokens.shape)
            values = (tokens, document, position)
            where = slice(first * self.context_size, (first + len(tokens)) * self.context_size)
            yield where, {k: v.reshape(-1) for k, v in zip(COORDINATES, values, strict=True)}


class ActivationStore:
    """What writes a store: one process at a time, inside `locked`."""

    def __init__(self, folder: Path, config: ActivationsConfig) -> None:
        self.folder, self.config = folder, config
        self.zarr = folder / "activations.zarr"

    def layout(self, size: tuple[int, ...]) -> Layout:
        row_bytes = math.prod(size) * ITEMSIZE[self.config.dtype]
        return Layout(row_bytes, self.config.chunk_tokens, self.config.shard_tokens)

    def shard(self, hook_name: str, size: tuple[int, ...], number: int) -> Path:
        return shard_path(self.zarr / hook_name, number, len(size) + 1)

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Waits until no other process writes this store."""
        with locked(self.folder / ".lock", str(self.folder)):
            for leftover in self.zarr.rglob("*.partial"):
                leftover.unlink()
            for file in (self.zarr / "zarr.json", *self.zarr.glob("*/zarr.json")):
                if file.is_file() and _is_torn(file):
                    log.warning("%s is not whole: writing it anew", file)
                    file.unlink()  # what it describes stays, and is described again
            yield

    # ---------------------------------------------------------------- Zarr metadata and coordinates
    def group(self) -> "zarr.Group":
        import zarr

        return zarr.open_group(self.zarr, mode="a", zarr_format=3)

    def create(self, hook_name: str, size: tuple[int, ...], attributes: dict[str, Any]) -> None:
        """Adds the array of a hook, still without rows, or checks that the one that is there is laid out alike."""
        from zarr.codecs import Crc32cCodec

        group = self.group()
        c = self.config
        dtype = STORED_AS[c.dtype]
        if hook_name in group:
            array: Any = group[hook_name]
            layout = (array.shape[1:], str(array.dtype), array.chunks[0], (array.shards or array.chunks)[0])
            wanted = (tuple(size), dtype, c.chunk_tokens, c.shard_tokens)
            if layout != wanted:
                raise StoreError(
                    f"{self.zarr}/{hook_name} has (size, dtype, chunk, shard) {layout}, but {wanted} is asked for: "
                    f"remove {self.folder} to cache it anew"
                )
            return
        group.create_array(
            hook_name,
            shape=(0, *size),
            chunks=(c.chunk_tokens, *size),
            shards=(c.shard_tokens, *size),
            dtype=dtype,
            filters=None,
            compressors=[Crc32cCodec()],
            fill_value=NAN_BFLOAT16 if c.dtype == "bfloat16" else math.nan,
            dimension_names=dimension_names(hook_name, len(size) + 1),
            attributes={**attributes, "hook": hook_name, "torch_dtype": c.dtype, "n_tokens": 0},
        )

    def n_coordinates(self) -> int:
        """Tokens whose coordinates are on disk."""
        return cast(int, self.group().attrs.get("n_tokens", 0)) if self.zarr.is_dir() else 0

    def check_tokens(self, rows: TokenRows) -> None:
        """Raises `StoreError` unless `rows` and what the store holds agree as far as both reach."""
        if self.n_coordinates() == 0:
            return
        group = self.group()
        n_tokens = min(self.n_coordinates(), rows.n_rows * rows.context_size)
        for where, wanted in rows.coordinates(0, n_tokens // rows.context_size):
            for name, values in wanted.items():
                try:
                    found = np.asarray(group[name][where])  # type: ignore[index]
                except (KeyError, ValueError, RuntimeError) as error:
                    log.warning("%s/%s is damaged (%s): writing it anew", self.zarr, name, error)
                    return self._forget_coordinates()
                if (other := found != values).any() and (found[other] == NO_COORDINATE).all():
                    log.warning("%s/%s has lost a chunk: writing it anew", self.zarr, name)
                    return self._forget_coordinates()
                if other.any():
                    raise StoreError(
                        f"{self.zarr} was made from other tokens than {rows.folder}: {name} differs between tokens "
                        f"{where.start} and {where.stop}. The rows of a store's columns must be the same, the shorter "
                        f"a beginning of the longer; remove {self.folder} to cache it anew"
                    )

    def _forget_coordinates(self) -> None:
        """So that `commit` writes them from the first token on."""
        for name in COORDINATES:
            shutil.rmtree(self.zarr / name, ignore_errors=True)
        self.group().attrs.update({"n_tokens": 0})

    def commit(self, n_tokens: dict[str, int], rows: TokenRows, attributes: dict[str, Any]) -> None:
        """Makes what was written visible: coordinates first, then the arrays' lengths. May be repeated after a kill."""
        from zarr.codecs import Crc32cCodec, ZstdCodec

        group = self.group()
        known, there = self.n_coordinates(), [array.shape[0] for _, array in group.arrays()]
        length = max(known, *n_tokens.values(), *there)
        described = max(known, min(length, rows.n_rows * rows.context_size))
        for name in COORDINATES:
            if name not in group:
                group.create_array(
                    name,
                    shape=(0,),
                    chunks=(self.config.shard_tokens,),
                    dtype="int32",
                    compressors=[ZstdCodec(level=3), Crc32cCodec()],
                    fill_value=NO_COORDINATE,
                    dimension_names=("token",),
                )
            group[name].resize((length,))  # type: ignore[union-attr]
        for where, values in rows.coordinates(known // rows.context_size, described // rows.context_size):
            for name, part in values.items():
                group[name][where] = part  # type: ignore[index]
        for name in COORDINATES:
            flush(self.zarr / name)
        for name, array in sorted(group.arrays()):
            if array.shape[0] < length:
                array.resize((length, *array.shape[1:]))
            if n_tokens.get(name, 0) > cast(int, array.attrs.get("n_tokens", 0)):
                array.attrs["n_tokens"] = n_tokens[name]
        # xarray takes the names in `coordinates` as coordinates of every array.
        group.attrs.update({**attributes, "coordinates": " ".join(COORDINATES), "n_tokens": described})
        for file in (*self.zarr.glob("*/zarr.json"), self.zarr / "zarr.json"):
            flush(file)

    # ---------------------------------------------------------------- progress
    def load_progress(self, hook_name: str, device: str) -> tuple[int, Moments] | None:
        """Tokens of a hook that are on disk, and the moments of those in its first whole shards."""
        file = self._progress(hook_name)
        if not file.is_file():
            return None
        try:
            state = load_state(file)
        except StateError as error:
            log.warning("%s: computing all of %s again", error, hook_name)
            return None
        return int(state.pop("stored")), Moments.from_tensors(state, device)

    def forget(self, hook_name: str, n_tokens: int) -> None:
        """So that a hook's rows are computed and written anew, shard by shard, beneath those who read them; unless a
        longer column than of `n_tokens` has more of them, which its last shard would lose."""
        stored = (self.load_progress(hook_name, "cpu") or (0, None))[0]
        if stored <= n_tokens:
            self._progress(hook_name).unlink(missing_ok=True)
        else:
            log.info("%s: the rows are kept, since a longer column of %d tokens has them too", hook_name, stored)

    def _progress(self, hook_name: str) -> Path:
        return self.folder / "progress" / f"{hook_name}.safetensors"

    def save_progress(self, hook_name: str, stored: int, moments: Moments) -> None:
        state = moments.tensors() | {"stored": torch.tensor(stored)}
        save_state(self._progress(hook_name), state)


def _is_torn(file: Path) -> bool:
    """Whether a metadata file holds anything but a JSON object, as a power cut may leave it."""
    try:
        return not isinstance(json.loads(file.read_bytes()), dict)
    except ValueError:
        return True


# -------------------------------------------------------------------- columns
@dataclass(frozen=True)
class Column:
    """One hook's activations up to one number of tokens, as its receipt states them."""

    folder: Path
    hook_name: str
    n_tokens: int
    size: tuple[int, ...]
    dtype: str

    @property
    def d(self) -> int:
        """Values per token, heads flattened."""
        return math.prod(self.size)

    @property
    def store(self) -> Path:
        return self.folder.parent

    @property
    def array(self) -> Path:
        """Folder of the Zarr array."""
        return self.store / "activations.zarr" / self.hook_name

    @cached_property
    def statistics(self) -> Statistics:
        return Statistics(**load_file(self.folder / "statistics.safetensors"))


def open_column(folder: str | Path) -> Column:
    """Opens a column folder. Reads its receipt only; `saeflow.activations.reader` reads the values."""
    folder = Path(folder)
    file = folder / "column.json"
    if not file.is_file():
        raise StoreError(f"{folder} is no column of an activation store: it has no column.json; run the workflow again")
    receipt = json.loads(file.read_text())
    return Column(folder, receipt["hook_name"], receipt["n_tokens"], tuple(receipt["size"]), receipt["dtype"])


def array_layout(column: Column) -> Layout | None:
    """Layout of a column's shards, from its array's metadata; None where it is not the one of `shards`."""
    file = column.array / "zarr.json"
    if not file.is_file() or _is_torn(file):
        raise ShardError(file, "it is not whole" if file.is_file() else "it is missing")
    metadata = json.loads(file.read_bytes())
    checksummed = [{"name": "bytes", "configuration": {"endian": "little"}}, {"name": "crc32c"}]
    size = list(column.size)
    try:
        (sharding,) = metadata["codecs"]
        inner = sharding["configuration"]
        shard_tokens, *shard_size = metadata["chunk_grid"]["configuration"]["chunk_shape"]
        chunk_tokens, *chunk_size = inner["chunk_shape"]
        known = (
            metadata["chunk_key_encoding"] == {"name": "default", "configuration": {"separator": "/"}}
            and metadata["data_type"] == STORED_AS[column.dtype]
            and sharding["name"] == "sharding_indexed"
            and inner["codecs"] == inner["index_codecs"] == checksummed
            and inner["index_location"] == "end"
            and metadata["shape"][1:] == shard_size == chunk_size == size
        )
    except (KeyError, TypeError, ValueError):
        return None
    return Layout(column.d * ITEMSIZE[column.dtype], chunk_tokens, shard_tokens) if known else None


def write_column(column: Column, statistics: Statistics) -> None:
    """Fills a column folder."""
    receipt = {k: getattr(column, k) for k in ("hook_name", "n_tokens", "size", "dtype")}
    (column.folder / "column.json").write_text(json.dumps(receipt, indent=1) + "\n")
    save_tensors(column.folder / "statistics.safetensors", statistics._asdict())
