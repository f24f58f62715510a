"""The tokens on which latents are looked up, numbered row by row without the BOS at the head of a row.

Shapes: R rows of P positions, N = R (P - `first`) tokens.
"""

from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import numpy as np

from saeflow.features.firings import Chunk
from saeflow.features.order import keys


class Text(NamedTuple):
    """Rows of a token store, and which they are of it."""

    tokens: np.ndarray
    """(R, P) token ids."""
    document: np.ndarray
    """(R, P)"""
    row: np.ndarray
    """(R,) numbers of the rows in the store, ascending."""
    first: int
    """Position of a row's first token that counts: 1 where there is a BOS."""

    @property
    def context_size(self) -> int:
        return int(self.tokens.shape[1])

    @property
    def n_tokens(self) -> int:
        return len(self.tokens) * (self.context_size - self.first)

    def grid(self, window: int = 1) -> "Grid":
        return Grid(self.context_size, window, self.first)

    def occurrences(self, n_vocabulary: int) -> np.ndarray:
        """(V,) how often each token id is there."""
        return np.bincount(self.tokens[:, self.first :].ravel(), minlength=n_vocabulary)


class Grid(NamedTuple):
    """How tokens, numbered row by row without those before position `first`, lie in rows, and rows in windows of text.
    Windows are aligned within a row, so that no two overlap; the last may be shorter."""

    context_size: int
    window: int
    first: int = 1

    @property
    def per_row(self) -> int:
        """Windows of a row."""
        return -(-self.context_size // self.window)

    def row_and_position(self, token: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Row and position of a token number."""
        row, rest = np.divmod(token, self.context_size - self.first)
        return row, rest + self.first

    def number(self, row: np.ndarray, position: np.ndarray) -> np.ndarray:
        """The reverse; before position `first` that of no token, or of one that is elsewhere."""
        return row * (self.context_size - self.first) + position - self.first

    def windows(self, token: np.ndarray) -> np.ndarray:
        """Number of the window that a token is in."""
        return self.window_at(*self.row_and_position(token))

    def window_at(self, row: np.ndarray, position: np.ndarray) -> np.ndarray:
        return row * self.per_row + position // self.window

    def span(self, window: int) -> tuple[int, int, int]:
        """Row, first position and end of a window."""
        row, place = divmod(int(window), self.per_row)
        return row, place * self.window, min((place + 1) * self.window, self.context_size)


@dataclass(frozen=True)
class Seen:
    """The firings of some latents, and how the tokens that they are on lie in rows and windows."""

    chunk: Chunk
    grid: Grid

    @cached_property
    def place(self) -> tuple[np.ndarray, np.ndarray]:
        """Row, from 0, and position of every firing, (A,) each."""
        return self.grid.row_and_position(self.chunk.token)

    @cached_property
    def ordered(self) -> np.ndarray:
        """(A,) `keys` of every firing, ascending."""
        return np.sort(keys(self.chunk.latent, self.chunk.value))
