"""The Jacobians of single tokens, and the n x n matrix of their sums over tokens, both sparse: no n x n buffer.

Of each pair (output latent i, input latent j) that was ever active together: on how many tokens, and the sums of J, |J|
and J^2 over them. Two means of |J| follow. F-global of the paper (arXiv 2502.18147, version 2) divides sum |J[i, j]| by
the number of tokens on which output latent i is active, whether or not j is; an earlier notebook of its authors divides
by the number of all tokens. Both are entries of an n x n matrix that is 0 wherever the two never met.

Entries are gathered for a while, sorted by (i, j) and summed; sorted runs are merged so that each is at least twice as
long as the next. The order of every sum depends on the tokens alone. Runs of more than `IN_MEMORY` pairs lie in files,
40 bytes a pair, that are merged and read a block at a time: memory of the process stays below `stage.SUMS_MB`, and the
disk holds at most three times the pairs that ever met.
"""

import contextlib
import tempfile
import warnings
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import zarr
from torch import Tensor
from zarr.codecs import Crc32cCodec, ZstdCodec

from saeflow.config import JacobianConfig
from saeflow.jacobians.maps import JacobianBlocks

GATHERED = 1 << 21  # entries that are gathered before they are sorted: some 100 MB with what sorting takes
CHUNK = 1 << 18  # of a Zarr array
SHARE = 0.9
IN_MEMORY = 1 << 22  # pairs of a run that is kept in memory
BLOCK = 1 << 20  # pairs that are merged, ranked or written at once


@dataclass(frozen=True)
class Pairs:
    """The pairs that were active together, sorted by output, then input latent."""

    output: np.ndarray
    """(P,) int32"""
    input: np.ndarray
    """(P,) int32"""
    count: np.ndarray
    """(P,) int64: tokens on which both are active."""
    sum: np.ndarray
    """(P,) float64, of J over those tokens; the next two likewise."""
    sum_absolute: np.ndarray
    sum_squares: np.ndarray
    active_output: np.ndarray
    """(n_out,) int64: tokens on which an output latent is active."""
    active_input: np.ndarray
    """(n_in,)"""
    n_tokens: int

    def mean_absolute(self, convention: str, part: slice = slice(None)) -> np.ndarray:
        """(P,), or of a part of the pairs: mean |J| over the tokens where the output latent is active (`active`), or
        over all (`all`)."""
        if convention == "active":
            return np.asarray(self.sum_absolute[part] / self.active_output[self.output[part]])
        return np.asarray(self.sum_absolute[part] / self.n_tokens)

    def slices(self) -> Iterator[slice]:
        """All pairs, a block at a time: there may be more of them than fit into memory."""
        return (slice(start, start + BLOCK) for start in range(0, len(self.count), BLOCK))


_Run = list[np.ndarray]
"""Keys, ascending, and of each how many there are and the sums of J, |J| and J^2: in memory, or maps of files."""


class PairSums:
    """Takes the blocks of all tokens one after another, gives their `Pairs`."""

    def __init__(self, n_out: int, n_in: int, scratch: Path, shared: bool = False) -> None:
        """`scratch`: a folder on a disk that has room for the pairs; nothing is left in it."""
        self.n_out, self.n_in, self.shared, self.scratch = n_out, n_in, shared, scratch
        self.n_tokens = 0
        self.active_output, self.active_input = np.zeros(n_out, np.int64), np.zeros(n_in, np.int64)
        self._gathered: list[tuple[np.ndarray, np.ndarray]] = []
        self._waiting = 0
        self._runs: list[_Run] = []

    def add(self, blocks: JacobianBlocks) -> None:
        self.n_tokens += len(blocks.J)
        if self.shared:
            self._add_shared(blocks.J.double())
            return
        on_in, on_out = blocks.values_in > 0, blocks.values_out > 0
        self.active_input += np.bincount(blocks.inputs[on_in].cpu().numpy(), minlength=self.n_in)
        self.active_output += np.bincount(blocks.outputs[on_out].cpu().numpy(), minlength=self.n_out)
        both = on_out[:, :, None] & on_in[:, None, :]
        keys = blocks.outputs[:, :, None] * self.n_in + blocks.inputs[:, None, :]
        self._gathered.append((keys[both].cpu().numpy(), blocks.J[both].double().cpu().numpy()))
        self._waiting += len(self._gathered[-1][0])
        if self._waiting >= GATHERED:
            self._sort()

    def _add_shared(self, J: Tensor) -> None:
        """J (N, n_out, n_in) of the same pairs on each token, as many as the model is wide: they need no sorting."""
        keys, count = np.arange(self.n_out * self.n_in), np.full(self.n_out * self.n_in, len(J))
        sums = [count, *(v.sum(0).flatten().cpu().numpy() for v in (J, J.abs(), J.square()))]
        if self._runs:
            sums = [a + b for a, b in zip(sums, self._runs[0][1:], strict=True)]
        self._runs = [[keys, *sums]]
        self.active_output += len(J)
        self.active_input += len(J)

    def pairs(self) -> Pairs:
        """May be called once, at the end."""
        self._sort()
        while len(self._runs) > 1:
            self._merge_last()
        keys, count, total, absolute, squares = (
            self._runs[0] if self._runs else [np.zeros(0, np.int64)] * 2 + [np.zeros(0)] * 3
        )
        blocks = (divmod(keys[start : start + BLOCK], self.n_in) for start in range(0, max(1, len(keys)), BLOCK))
        halves = ([part.astype(np.int32) for part in block] for block in blocks)
        output, input = self._kept(halves, len(keys) > IN_MEMORY)
        active = (self.active_output, self.active_input)
        return Pairs(output, input, count, total, absolute, squares, *active, self.n_tokens)

    def _sort(self) -> None:
        if self._gathered:
            keys, J = (np.concatenate(parts) for parts in zip(*self._gathered, strict=True))
            self._gathered, self._waiting = [], 0
            self._runs.append(_merged([keys, np.ones(len(keys), np.int64), J, np.abs(J), J * J]))
            while len(self._runs) > 1 and len(self._runs[-2][0]) < 2 * len(self._runs[-1][0]):
                self._merge_last()

    def _merge_last(self) -> None:
        one, other = self._runs[-2:]
        is_large = len(one[0]) + len(other[0]) > IN_MEMORY
        self._runs[-2:] = [self._kept(_merged_in_blocks(one, other), True) if is_large else _merged(one, other)]

    def _kept(self, blocks: Iterable[list[np.ndarray]], on_disk: bool) -> list[np.ndarray]:
        """Columns that come in blocks, in memory or as maps of files."""
        if not on_disk:
            return [np.concatenate(parts) for parts in zip(*blocks, strict=True)]
        files, dtypes = list[Any](), list[np.dtype]()
        with contextlib.ExitStack() as stack:
            for block in blocks:
                if not files:  # they have no names, and are gone with the maps
                    files = [stack.enter_context(tempfile.TemporaryFile(dir=self.scratch)) for _ in block]
                    dtypes = [column.dtype for column in block]
                for column, file in zip(block, files, strict=True):
                    column.tofile(file)
            return [np.memmap(file, dtype, "r") for file, dtype in zip(files, dtypes, strict=True)]


def _merged(*runs: _Run) -> _Run:
    """One run of all of them; equal keys are summed in the order in which they stand."""
    keys, *sums = (np.concatenate(parts) for parts in zip(*runs, strict=True))
    if not len(keys):
        return runs[0]
    order = np.argsort(keys, kind="stable")
    keys = keys[order]
    starts = np.flatnonzero(np.concatenate([[True], keys[1:] != keys[:-1]]))
    return [keys[starts], *(np.add.reduceat(values[order], starts) for values in sums)]


def _merged_in_blocks(one: _Run, other: _Run) -> Iterator[_Run]:
    """The same of two runs, a block of rising keys after another."""
    at = [0, 0]
    while at[0] < len(one[0]) or at[1] < len(other[0]):
        parts = [[column[i : i + BLOCK] for column in run] for run, i in zip((one, other), at, strict=True)]
        # what is beyond the last key of a part that has more behind it may have its equal there
        ends = [p[0][-1] for p, run, i in zip(parts, (one, other), at, strict=True) if i + BLOCK < len(run[0])]
        until = [np.searchsorted(p[0], min(ends), side="right") if ends else len(p[0]) for p in parts]
        yield _merged(*([column[:n] for column in p] for p, n in zip(parts, until, strict=True)))
        at = [i + int(n) for i, n in zip(at, until, strict=True)]


# -------------------------------------------------------------------- tables
def exceedance_table(pairs: Pairs, config: JacobianConfig) -> pa.Table:
    """By `convention` of the mean: `count` of the n_out x n_in entries above each `threshold`, and their `fraction`."""
    thresholds = np.unique([*np.logspace(-5, 1, 49).round(12), *config.thresholds])
    size = len(pairs.active_output) * len(pairs.active_input)
    tables = []
    for convention in ("active", "all"):
        count = np.zeros(len(thresholds), np.int64)
        for part in pairs.slices():
            ordered = np.sort(pairs.mean_absolute(convention, part))
            count += len(ordered) - np.searchsorted(ordered, thresholds, side="right")
        columns = {"convention": [convention] * len(count), "threshold": thresholds, "count": count}
        tables.append(pa.table(columns | {"fraction": count / size}))
    return pa.concat_tables(tables)


def outputs_table(pairs: Pairs) -> pa.Table:
    """Each output latent that was ever active: on how many tokens, how many inputs it met, their sum |J|, and how many
    of them, largest first, make up 90 % of that."""
    found = np.flatnonzero(pairs.active_output)
    starts = np.searchsorted(pairs.output, found)
    ends = np.searchsorted(pairs.output, found, side="right")
    needed, total = np.zeros(len(found), np.int64), np.zeros(len(found))
    for row, (start, end) in enumerate(zip(starts, ends, strict=True)):
        reached = np.sort(pairs.sum_absolute[start:end])[::-1].cumsum()
        if end > start and reached[-1] > 0:
            total[row] = reached[-1]
            needed[row] = np.searchsorted(reached, SHARE * reached[-1]) + 1
    columns = {"output": found, "active_tokens": pairs.active_output[found], "n_inputs": ends - starts}
    return pa.table(columns | {"sum_absolute": total, "inputs_for_90_percent": needed})


# -------------------------------------------------------------------- Zarr
_ABOUT = {
    "output": "output latent",
    "input": "input latent",
    "count": "tokens on which both latents are active",
    "sum": "of J over these tokens",
    "sum_absolute": "of |J| over these tokens",
    "sum_squares": "of J^2 over these tokens",
    "mean_absolute_active": "sum_absolute / tokens on which the output latent is active",
    "mean_absolute_all": "sum_absolute / all tokens",
    "active_output": "tokens on which the latent is active",
    "active_input": "tokens on which the latent is active",
}


def write_pairs(path: Path, pairs: Pairs) -> None:
    """`global.zarr`: the sums and both means as sparse n_out x n_in matrices in coordinate form, dims (pair,)."""
    shape = [len(pairs.active_output), len(pairs.active_input)]
    attributes: dict[str, Any] = {"n_tokens": pairs.n_tokens, "shape": shape}
    group = zarr.open_group(path, mode="w", zarr_format=3, attributes=attributes)
    n = len(pairs.count)
    for name, about in _ABOUT.items():
        if convention := name.removeprefix("mean_absolute_") if name.startswith("mean_") else "":
            array = _create(group, name, np.dtype(np.float32), "pair", n, about)
            for part in pairs.slices():
                array[part] = pairs.mean_absolute(convention, part).astype(np.float32)
            continue
        values: np.ndarray = getattr(pairs, name)
        dimension = name.replace("active_", "") + "_latent" if name.startswith("active_") else "pair"
        array = _create(group, name, values.dtype, dimension, len(values), about)
        for start in range(0, len(values), BLOCK):
            array[start : start + BLOCK] = np.asarray(values[start : start + BLOCK])
    _consolidate(path)


class TokenBlocks:
    """`tokens.zarr`: the Jacobians of the first tokens in coordinate form, dims (entry,), in the order of the tokens.

    Entries are those of active latents, zeros left out. `token` is an index into arrays of dims (token,), which say
    which token that is. Written a chunk at a time.
    """

    def __init__(self, path: Path, token_id: np.ndarray, sequence: np.ndarray, position: np.ndarray) -> None:
        self.path, self.n_tokens = path, len(token_id)
        group = zarr.open_group(path, mode="w", zarr_format=3, attributes={"n_tokens": self.n_tokens})
        for name, values in (("token_id", token_id), ("sequence", sequence), ("position", position)):
            _create(group, name, np.int32, "token", len(values), "of the token in the held-out split")[:] = values
        columns = {"token": np.int32, "output": np.int32, "input": np.int32, "jacobian": np.float32}
        self._arrays = [_create(group, name, dtype, "entry", 0, "") for name, dtype in columns.items()]
        self._gathered: list[tuple[np.ndarray, ...]] = []
        self._waiting = 0

    def add(self, first: int, blocks: JacobianBlocks) -> None:
        """`first`: number of the blocks' first token. What is beyond the tokens asked for is left out."""
        J = blocks.J[: max(0, self.n_tokens - first)]
        token, i, j = J.nonzero(as_tuple=True)
        columns = (first + token, blocks.outputs[token, i], blocks.inputs[token, j], J[token, i, j])
        self._gathered.append(tuple(column.cpu().numpy() for column in columns))
        self._waiting += len(token)
        if self._waiting >= CHUNK:
            self._write(self._waiting // CHUNK * CHUNK)

    def close(self) -> None:
        self._write(self._waiting)
        _consolidate(self.path)

    def _write(self, n: int) -> None:
        if not self._waiting:
            return
        columns = [np.concatenate(parts) for parts in zip(*self._gathered, strict=True)]
        for array, values in zip(self._arrays, columns, strict=True):
            start = array.shape[0]
            array.resize((start + n,))
            array[start:] = values[:n]
        self._gathered, self._waiting = [tuple(values[n:] for values in columns)], self._waiting - n


def _create(group: Any, name: str, dtype: Any, dimension: str, length: int, about: str) -> Any:
    return group.create_array(
        name,
        shape=(length,),
        chunks=(CHUNK,),
        dtype=dtype,
        compressors=[ZstdCodec(level=3), Crc32cCodec()],
        dimension_names=(dimension,),
        attributes={"description": about} if about else {},
    )


def _consolidate(path: Path) -> None:
    with warnings.catch_warnings():  # it is outside the specification of version 3, and xarray warns where it lacks
        warnings.filterwarnings("ignore", message="Consolidated metadata")
        zarr.consolidate_metadata(path)
