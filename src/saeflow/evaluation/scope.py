"""The tokens whose activations an evaluation replaces, and counts: all, or all but the first of rows."""

import json
import logging
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

log = logging.getLogger("saeflow")


class Scope(NamedTuple):
    """Of one batch of N tokens, flattened."""

    replaced: Tensor | None
    """(N,) bool; None: all."""

    @classmethod
    def of(cls, tokens: Tensor, replace_first: bool) -> "Scope":
        """Of `tokens` (B, P)."""
        return cls(None if replace_first else ~_first_of_rows(tokens))

    def part(self, values: Tensor) -> Tensor:
        """Those of the M tokens that are replaced: (N, ...) to (M, ...)."""
        return values if self.replaced is None else values[self.replaced]

    def put(self, new: Tensor, old: Tensor) -> Tensor:
        """`new` (M, ...) where tokens are replaced, `old` (N, ...) elsewhere."""
        if self.replaced is None:
            return new
        mixed = old.clone()
        mixed[self.replaced] = new
        return mixed

    def counted(self, values: Tensor) -> Tensor:
        """Values (N, ...) with 0 where nothing is replaced: sums are then of the others."""
        if self.replaced is None:
            return values
        return torch.where(self.replaced.view(-1, *[1] * (values.dim() - 1)), values, torch.zeros_like(values))


def warn_of_untrained_first(folders: list[Path], replace_first: bool) -> None:
    """Says in the log which dictionaries are to stand for first tokens that most of their training left out."""
    for folder in dict.fromkeys(folders):
        record = folder / "left_out.json"
        if replace_first and record.is_file() and json.loads(record.read_text())["first_of_rows"] > 0.5:
            log.warning(
                "%s was not trained on the first token of rows, but replaces it, and all later tokens attend to it: "
                "set evaluation.replace_first=false",
                folder,
            )


def bos_of(tokens: Tensor, prepend_bos: bool) -> Tensor:
    """Which tokens of a batch (B, P) are the BOS at the head of a row: (B P,) bool."""
    return _first_of_rows(tokens) & prepend_bos


def _first_of_rows(tokens: Tensor) -> Tensor:
    first = torch.zeros_like(tokens, dtype=torch.bool)
    first[:, 0] = True
    return first.flatten()
