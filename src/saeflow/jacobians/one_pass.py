"""One pass over held-out tokens, or over a text: the model, then a map's Jacobians, a few tokens at a time.

Position 0 is left out, as in the paper's analysis (arXiv 2502.18147).
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
from torch import Tensor

from saeflow.features.text import Grid
from saeflow.jacobians.examples import Activity, ExampleSelection
from saeflow.jacobians.maps import JacobianBlocks, JacobianMap
from saeflow.jobs.progress import progress
from saeflow.models.attention import fused_attention
from saeflow.models.splicing import read_hooks

if TYPE_CHECKING:
    from transformer_lens import HookedTransformer

ROWS = 16  # that go through the model at once


@dataclass
class Tokens:
    """The tokens of a study: the first `n_tokens` of some rows, those before position `first` of each left out."""

    rows: np.ndarray
    """(row, position), token ids; of even a hundred million tokens a small part of what a model takes."""
    sequence: np.ndarray
    """(row,): which rows of the held-out split they are."""
    document: np.ndarray
    """(n_tokens,): from 0 to `n_documents` - 1"""
    first: int = 1

    @property
    def context_size(self) -> int:
        return int(self.rows.shape[1])

    @property
    def per_row(self) -> int:
        return self.context_size - self.first

    def grid(self, window: int = 1) -> Grid:
        return Grid(self.context_size, window, self.first)

    @property
    def n_tokens(self) -> int:
        return len(self.document)

    @property
    def n_documents(self) -> int:
        return int(self.document.max()) + 1


class TokenChunk(NamedTuple):
    """Some tokens of the study, in order."""

    first: int
    """Number of the first of them."""
    values: list[Tensor]
    """(N, d): the model's, one a hook of the map."""
    blocks: JacobianBlocks

    @property
    def n_tokens(self) -> int:
        return len(self.blocks.J)


def iterate_jacobians(model: "HookedTransformer", jacobian_map: JacobianMap, tokens: Tokens) -> Iterator[TokenChunk]:
    """Yields the Jacobians of all tokens, in order; one forward pass, which stops above the hooks."""
    per_row = tokens.per_row
    n_rows = -(-tokens.n_tokens // per_row)
    for start in progress(range(0, n_rows, ROWS), "Jacobians", n_rows, "rows", each=ROWS):
        first = start * per_row
        read = _read(model, jacobian_map, tokens.rows[start : start + ROWS])
        values = [v[:, tokens.first :].flatten(0, 1)[: tokens.n_tokens - first] for v in read]
        for blocks in jacobian_map.blocks(values):
            yield TokenChunk(first + blocks.tokens.start, [v[blocks.tokens] for v in values], blocks)


def collect_activity(
    model: "HookedTransformer", jacobian_map: JacobianMap, tokens: Tokens, grid: Grid, wanted: ExampleSelection
) -> Activity:
    """Runs the rows that hold wanted windows once more, for what the wanted latents and pairs do there."""
    activity = Activity(wanted)
    per_row, first = tokens.per_row, tokens.first
    spans = [grid.span(window) for window in wanted.windows]
    places = [(r, p) for r, start, end in spans for p in range(max(start, first), end)]
    numbers = grid.number(*np.array(places, np.int64).reshape(-1, 2).T)
    numbers = numbers[numbers < tokens.n_tokens]
    rows = np.unique(numbers // per_row)
    for start in progress(range(0, len(rows), ROWS), "examples", len(rows), "rows", each=ROWS):
        some = rows[start : start + ROWS]
        values = _read(model, jacobian_map, tokens.rows[some])
        here = numbers[np.isin(numbers // per_row, some)]
        place, position = np.searchsorted(some, here // per_row), here % per_row + first
        for blocks in jacobian_map.blocks([v[place, position] for v in values]):
            activity.add(here[blocks.tokens], blocks)
    return activity


def _read(model: "HookedTransformer", jacobian_map: JacobianMap, rows: np.ndarray) -> list[Tensor]:
    """Values (rows, position, d) at the map's hooks."""
    ids = torch.from_numpy(rows.astype(np.int64)).to(model.cfg.device)
    with fused_attention(model):
        return read_hooks(model, ids, jacobian_map.hooks)
