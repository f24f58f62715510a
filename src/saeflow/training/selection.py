"""The tokens that a job trains on: what `training.exclude` leaves out, and what training takes from the others.

The dictionaries of a job share batches, so they share what is left out. Batches stay full: a step has `batch_size`
tokens that are kept, and `training.n_tokens` counts these.
"""

import logging
from collections.abc import Callable, Sequence
from functools import lru_cache
from pathlib import Path

import torch
from torch import Tensor

from saeflow.activations.exclusion import MASSIVE, LeftOut, find_left_out, kept_statistics, measure_massive
from saeflow.activations.reader import READ_AHEAD, BatchReader
from saeflow.activations.store import Column
from saeflow.config import ConfigError, TrainingConfig
from saeflow.training.protocol import HookStatistics

log = logging.getLogger("saeflow")
REMEMBERED = 32  # steps of which members ask one after the other


class Selection:
    """Of the columns that a job's dictionaries read, in rows of `context_size` tokens."""

    def __init__(
        self,
        columns: dict[Path, Column],
        options: Sequence[TrainingConfig],
        reads: Sequence[list[Path]],
        context_size: int,
        read_ahead: int = READ_AHEAD,
    ) -> None:
        """`options` of each dictionary, and which columns it `reads`; `read_ahead`: see `BatchReader`.

        Raises `ConfigError` for dictionaries that cannot share batches, `StoreError` where no token is left.
        """
        if len({(o.batch_size, o.shuffle_seed, o.buffered) for o in options}) > 1:
            raise ConfigError(
                "dictionaries that train in one job must have one training.batch_size, shuffle_seed, order and "
                "buffer_tokens"
            )
        exclude = options[0].exclude
        by_norm = exclude.norm_above is not None
        if any(o.exclude != exclude for o in options) or (by_norm and len({frozenset(r) for r in reads}) > 1):
            raise ConfigError(
                "dictionaries that train in one job must have one training.exclude, and with norm_above read the same "
                "columns"
            )
        opened = list(columns.values())
        self.context_size = context_size
        self.left_out = find_left_out(opened, exclude, context_size) if exclude.identity() else None
        left_out = None
        if self.left_out is not None:
            left_out = self.left_out.tokens
            said = ", ".join(f"{n:,} by {reason}" for reason, n in self.left_out.by_reason.items())
            log.info("training.exclude leaves out %s, of %s tokens", said, f"{self.left_out.n_stored:,}")
        of = (options[0].batch_size, options[0].shuffle_seed, left_out, read_ahead, options[0].buffered)
        self.batches = BatchReader(opened, *of)
        self.statistics = {folder: hook_statistics(column, self.left_out) for folder, column in columns.items()}
        self.is_first: Callable[[int], Tensor] = lru_cache(REMEMBERED)(self._is_first)
        """Of a step's batch, which tokens are the first of their row: (N,) bool."""

    def _is_first(self, step: int) -> Tensor:
        return torch.from_numpy(self.batches.rows(step) % self.context_size == 0)

    def warn_of_massive(self, columns: Sequence[Column]) -> None:
        """Says in the log where norms of tokens that are trained on are so large that they are all that counts."""
        for column, rows in zip(columns, self.batches.columns, strict=True):
            found = measure_massive(rows, column.n_tokens, self.context_size, self.left_out)
            if found.first > MASSIVE:
                log.warning(
                    "%s: the first token of a row has %.0f times the median norm, and training would serve it alone; "
                    "leave it out with training.exclude.positions=[0], or training.exclude.norm_above=%g",
                    column.hook_name, found.first, MASSIVE,
                )  # fmt: skip
            if found.n_others:
                log.warning(
                    "%s: %d of %d tokens that are not the first of their row have over %g times the median norm; leave "
                    "them out with training.exclude.norm_above=%g, or by training.exclude.token_ids",
                    column.hook_name, found.n_others, found.n_tokens, MASSIVE, MASSIVE,
                )  # fmt: skip


def hook_statistics(column: Column, left_out: LeftOut | None = None) -> HookStatistics:
    """Of the tokens that training has: those stored with the column, or, where tokens are left out, taken anew."""
    if left_out is None:
        mean, covariance, mean_norm = (torch.as_tensor(value) for value in column.statistics)
        squares = covariance.diagonal() + mean.square()
    else:
        mean, squares, mean_norm = kept_statistics(column, left_out)
    heads = squares.view(column.size).sum(dim=1).sqrt() if len(column.size) == 2 else None
    found = HookStatistics(mean, float(mean_norm), heads)
    for head in found.silent_heads:
        log.warning("head %d of %s is 0 on every token: no latent will fire for it", head, column.hook_name)
    return found
