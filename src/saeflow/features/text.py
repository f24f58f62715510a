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

    def place(self, token: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Row, from 0 for the first of these, and position of tokens by number."""
        row, rest = np.divmod(token, self.context_size - self.first)
        return row, rest + self.first

    def number(self, row: np.ndarray, position: np.ndarray) -> np.ndarray:
        """The reverse; at BOS that of no token, or of one that is not there."""
        return row * (self.context_size - self.first) + position - self.first

    def occurrences(self, n_vocabulary: int) -> np.ndarray:
        """(V,) how often each token id is there."""
        return np.bincount(self.tokens[:, self.first :].ravel(), minlength=n_vocabulary)


@dataclass(frozen=True)
class Seen:
    """The firings of some latents, and the text that they are on."""

    chunk: Chunk
    text: Text

    @cached_property
    def place(self) -> tuple[np.ndarray, np.ndarray]:
        """Row, from 0, and position of every firing, (A,) each."""
        return self.text.place(self.chunk.token)

    @cached_property
    def ordered(self) -> np.ndarray:
        """(A,) `keys` of every firing, ascending."""
        return np.sort(keys(self.chunk.latent, self.chunk.value))
