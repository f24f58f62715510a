"""Rows of tokens: documents joined by EOS, cut into rows, BOS in front of every row, as in notebook 004.

Without that notebook's flaws (reference: transcoder notes, section 1.5): documents are tokenised whole, so no chunk
boundary splits a token; no padding token enters the tokenizer; every token keeps its document and its offset in it.
"""

from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

import numpy as np
from tokenizers import Tokenizer

NO_DOCUMENT = -1  # document and offset of a BOS that packing put in front of a row
BATCH_CHARACTERS = 1 << 20  # texts that are tokenised at once: the tokenizer needs a hundred bytes a character


class Rows(NamedTuple):
    """Packed rows, each array of shape (rows, context_size)."""

    tokens: np.ndarray
    document: np.ndarray
    """Index of the token's document, in the order read; `NO_DOCUMENT` for a row's BOS."""
    offset: np.ndarray
    """Index of the token within its document; an EOS counts as the last token of the document that it ends."""


class Packer:
    """Collects documents and gives out whole rows; what does not fill a row waits for the next document."""

    def __init__(self, context_size: int, eos_token_id: int, bos_token_id: int | None):
        """`bos_token_id` None puts no BOS in front of the rows."""
        self.context_size, self.eos, self.bos = context_size, eos_token_id, bos_token_id
        self.body = context_size - (bos_token_id is not None)
        self._parts: list[np.ndarray] = []  # each (3, length): token, document, offset
        self._waiting = 0
        self._last: tuple[int, int] | None = None  # document and length of the one that the next EOS ends

    def add(self, document: int, ids: Sequence[int] | np.ndarray) -> None:
        """Appends one document's token ids (no special tokens among them), after an EOS unless it is the first."""
        part = np.empty((3, len(ids) + 1), dtype=np.int32)
        part[0, 1:], part[1, 1:], part[2, 1:] = ids, document, np.arange(len(ids))
        if self._last is None:
            part = part[:, 1:]
        else:
            part[:, 0] = self.eos, *self._last
        self._last = (document, len(ids))
        self._parts.append(part)
        self._waiting += part.shape[1]

    def rows_ready(self) -> int:
        return self._waiting // self.body

    def take(self) -> Rows:
        """Returns every whole row that is ready."""
        n = self.rows_ready()
        stream = np.concatenate(self._parts, axis=1) if self._parts else np.empty((3, 0), np.int32)
        taken, rest = stream[:, : n * self.body], stream[:, n * self.body :]
        self._parts, self._waiting = [rest.copy()], rest.shape[1]  # a view would keep the whole stream alive
        rows = taken.reshape(3, n, self.body)
        if self.bos is not None:
            front = np.full((3, n, 1), NO_DOCUMENT, dtype=np.int32)
            front[0] = self.bos
            rows = np.concatenate([front, rows], axis=2)
        return Rows(*rows)


def encode_all(tokenizer: Tokenizer, texts: Iterable[str], batch: int = 64) -> Iterator[list[int]]:
    """Token ids of each text, whole and without the tokenizer's own BOS or EOS.

    Up to `batch` texts at a time are read ahead, fewer where they are long. The text of a special token within a
    document becomes that token, as in the notebook.
    """

    def encode() -> Iterator[list[int]]:
        return (encoding.ids for encoding in tokenizer.encode_batch_fast(waiting, add_special_tokens=False))

    waiting: list[str] = []
    size = 0
    for text in texts:
        waiting.append(text)
        size += len(text)
        if len(waiting) == batch or size >= BATCH_CHARACTERS:
            yield from encode()
            waiting, size = [], 0
    yield from encode()
