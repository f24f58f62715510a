"""Tokens that training leaves out (`training.exclude`), and what the others are like.

The first token of a row has, in most language models, activations of some hundred to a thousand times the norm of any
other (Sun et al. 2024, "Massive Activations in Large Language Models"), and some delimiters likewise. Squared errors
and mean norms are then theirs alone. Here is found which tokens to leave out, and mean and norms are taken again of
those that are kept: taking what is left out off the stored statistics would cancel nearly all of their digits.

Row t of a column is the token at position t mod context_size of its row.
"""

from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from saeflow.activations.coordinates import read_coordinate
from saeflow.activations.reader import open_rows
from saeflow.activations.store import Column, StoreError
from saeflow.config.training import ExcludeConfig
from saeflow.jobs.progress import progress

SLAB_TOKENS = 4096  # read at once; sums are taken in slabs of this size, so results depend on it
SAMPLE_TOKENS = 8192
MASSIVE = 10.0  # medians: a norm beyond is called massive


class LeftOut(NamedTuple):
    """What `training.exclude` leaves out of some columns."""

    tokens: np.ndarray
    """(M,) int64, rising: numbers of the tokens."""
    n_stored: int
    """Tokens of a column."""
    by_reason: dict[str, int]
    """How many of them by each field of `ExcludeConfig`; what several name counts for the first."""
    median_norms: dict[str, float]
    """By hook, where norms decide: that of the tokens that positions and ids keep."""
    first_of_rows: float
    """The share of rows whose first token is left out."""

    @property
    def n_kept(self) -> int:
        return self.n_stored - len(self.tokens)

    def record(self) -> dict[str, Any]:
        """What is stored beside a dictionary."""
        counts = {"n_stored": self.n_stored, "n_kept": self.n_kept, "left_out": self.by_reason}
        return counts | {"first_of_rows": self.first_of_rows, "median_norms": self.median_norms}


def find_left_out(columns: list[Column], exclude: ExcludeConfig, context_size: int) -> LeftOut:
    """The tokens of row-aligned columns of one store that `exclude` names. Takes one byte a token of memory, and with
    `norm_above` eight more and a read of each column.

    Raises `StoreError` where no token is kept or the median norm is 0, `CoordinateError` where the store does not say
    which token is where.
    """
    n = columns[0].n_tokens
    out = np.zeros(n, dtype=bool)
    by_reason: dict[str, int] = {}

    def leave_out(reason: str, chosen: np.ndarray) -> None:
        before = int(out.sum())
        np.logical_or(out, chosen, out=out)
        by_reason[reason] = by_reason.get(reason, 0) + int(out.sum()) - before

    if exclude.positions:
        in_row = np.isin(np.arange(context_size), exclude.positions)
        leave_out("positions", np.resize(in_row, n))
    if exclude.token_ids:
        token_ids = read_coordinate(columns[0].store, "token_id", columns[0].n_tokens)
        leave_out("token_ids", np.concatenate([np.isin(ids, exclude.token_ids) for ids in token_ids]))
    medians: dict[str, float] = {}
    if exclude.norm_above is not None and not out.all():
        kept = ~out
        for column in columns:
            norms = np.concatenate([_norms(rows) for rows in _slabs(column)])
            median = medians[column.hook_name] = float(np.median(norms[kept]))
            if median == 0:
                raise StoreError(
                    f"training.exclude.norm_above: at {column.hook_name} half of the tokens or more are 0, and "
                    "with them the median norm; leave tokens out by positions or token_ids"
                )
            leave_out("norm_above", norms > exclude.norm_above * median)
    if out.all():
        raise StoreError(
            f"training.exclude={exclude.identity()} leaves out all {n} tokens of {columns[0].folder}: nothing is left "
            "to train on; name fewer"
        )
    return LeftOut(np.flatnonzero(out), n, by_reason, medians, float(out[::context_size].mean()))


class KeptStatistics(NamedTuple):
    """Of the tokens that are kept, in float64."""

    mean: Tensor
    """(d,)"""
    mean_square: Tensor
    """(d,)"""
    mean_norm: Tensor
    """(), the mean L2 norm of a token"""


def kept_statistics(column: Column, left_out: LeftOut) -> KeptStatistics:
    """Reads the column once."""
    sums = [torch.zeros(size, dtype=torch.float64) for size in ((column.d,), (column.d,), ())]
    kept = np.ones(column.n_tokens, dtype=bool)
    kept[left_out.tokens] = False
    for number, rows in enumerate(_slabs(column)):
        start = number * SLAB_TOKENS
        x = rows[torch.from_numpy(kept[start : start + len(rows)])].double()
        for total, more in zip(sums, (x.sum(0), x.square().sum(0), x.norm(dim=1).sum()), strict=True):
            total += more
    return KeptStatistics(*(total / left_out.n_kept for total in sums))


class Massive(NamedTuple):
    """How far norms at a hook go, in medians, of a sample of the tokens that are kept."""

    first: float
    """Median norm of the first tokens of rows; NaN where none is kept."""
    n_others: int
    """Other tokens beyond `MASSIVE` medians,"""
    n_tokens: int
    """of so many."""


def measure_massive(rows: Any, n_tokens: int, context_size: int, left_out: LeftOut | None) -> Massive:
    """Looks at the first rows of an opened column of `n_tokens` (`reader.open_rows`), some `SAMPLE_TOKENS` tokens."""
    n = min(max(1, SAMPLE_TOKENS // context_size) * context_size, n_tokens)
    numbers = np.arange(n)
    if left_out is not None:
        numbers = np.setdiff1d(numbers, left_out.tokens, assume_unique=True)
    is_first = numbers % context_size == 0
    if not len(numbers) or is_first.all():
        return Massive(np.nan, 0, len(numbers))
    norms = _norms(rows.take(numbers))
    median = float(np.median(norms))
    if median == 0:
        return Massive(np.nan, 0, len(numbers))
    first = float(np.median(norms[is_first])) / median if is_first.any() else np.nan
    return Massive(first, int((norms[~is_first] > MASSIVE * median).sum()), len(numbers))


def _norms(rows: Tensor) -> np.ndarray:
    """(N, d) to (N,), float32."""
    return torch.linalg.vector_norm(rows, dim=1).numpy()


def _slabs(column: Column) -> Iterator[Tensor]:
    """All rows of a column in order, (N, d) float32 each."""
    rows = open_rows(column)
    starts = range(0, column.n_tokens, SLAB_TOKENS)
    for start in progress(starts, "looking for outliers", column.n_tokens, "tokens", each=SLAB_TOKENS):
        yield rows.take(np.arange(start, min(start + SLAB_TOKENS, column.n_tokens)))
