"""Sums of per-token values by batch and by document, from which every average and its interval follow.

The BOS in front of a row belongs to the document whose token it predicts, and is summed apart from the rest: the two
parts, `bos` and `rest`, are disjoint and can be added. All sums are float64.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from torch import Tensor

from saeflow.jobs.progress import progress
from saeflow.text.tokens import TokenStore

Row = dict[str, Any]
Rows = TokenStore | np.ndarray
"""(sequence, position) of token ids."""


class Sums(NamedTuple):
    """Rows begin with `batch` or `document`, and `positions` (`bos` or `rest`); a row of BOS alone has no predictions
    but those made from BOS. A document that lies in two batches is one row of `documents`."""

    batches: list[Row]
    documents: list[Row]
    vectors: dict[str, np.ndarray]
    """(rows of `documents`, p): sums of what is a vector for each token."""


class SumAccumulator:
    """Adds values up, a batch at a time."""

    def __init__(self, prepend_bos: bool) -> None:
        self.parts = ("bos", "rest") if prepend_bos else ("rest",)
        self._names: list[str] = []
        self._batches: list[Row] = []
        self._documents: dict[tuple[int, int], np.ndarray] = {}
        self._vectors: dict[str, dict[tuple[int, int], np.ndarray]] = {}

    def add(self, document: np.ndarray, values: dict[str, Tensor], vectors: dict[str, Tensor] | None = None) -> None:
        """One batch of B rows of P positions: `document` and `values` (B, P), `vectors` (B, P, p)."""
        labels, group = np.unique(document, return_inverse=True)
        group = group.reshape(document.shape) * len(self.parts)
        if len(self.parts) == 2:
            group[:, 1:] += 1
        present, member = np.unique(group, return_inverse=True)
        keys = [(int(labels[g // len(self.parts)]), int(g % len(self.parts))) for g in present]
        # A product with 0 and 1, and no scattered addition: those have no fixed order on a GPU.
        device = next(iter(values.values())).device
        chosen = torch.zeros(len(present), document.size, dtype=torch.float64)
        chosen[torch.from_numpy(member.ravel()), torch.arange(document.size)] = 1
        chosen = chosen.to(device)
        self._names = list(values)
        stacked = torch.stack([v.flatten().double() for v in values.values()], dim=1)
        sums = (chosen @ stacked).cpu().numpy()
        _add(self._documents, keys, sums)
        for i, part in enumerate(self.parts):
            total = sums[[key[1] == i for key in keys]].sum(0)
            self._batches.append(
                {"batch": len(self._batches) // len(self.parts), "positions": part} | self._named(total)
            )
        for name, vector in (vectors or {}).items():
            added = (chosen @ vector.flatten(0, 1).double()).cpu().numpy()
            _add(self._vectors.setdefault(name, {}), keys, added)

    def sums(self) -> Sums:
        keys = sorted(self._documents)
        documents = [
            {"document": document, "positions": self.parts[part]} | self._named(self._documents[document, part])
            for document, part in keys
        ]
        vectors = {name: np.stack([by_key[key] for key in keys]) for name, by_key in self._vectors.items()}
        return Sums(self._batches, documents, vectors)

    def _named(self, sums: np.ndarray) -> Row:
        return dict(zip(self._names, sums.tolist(), strict=True))


def _add(sums: dict[tuple[int, int], np.ndarray], keys: list[tuple[int, int]], rows: np.ndarray) -> None:
    for key, row in zip(keys, rows, strict=True):
        sums[key] = sums[key] + row if key in sums else row


def joined(one: list[Row], other: list[Row]) -> list[Row]:
    """The columns of both, of the same batches or documents in the same order."""
    names = {"batch", "document", "positions"}
    for a, b in zip(one, other, strict=True):
        if {n: a[n] for n in names & a.keys()} != {n: b[n] for n in names & b.keys()}:
            raise ValueError(f"the rows are of other tokens: {a} and {b}")
    return [a | b for a, b in zip(one, other, strict=True)]


def columns(rows: list[Row]) -> dict[str, np.ndarray]:
    """The sums alone, (rows,) each."""
    names = [name for name in rows[0] if name not in ("batch", "document", "positions")]
    return {name: np.array([row[name] for row in rows]) for name in names}


def write_tables(folder: Path, **tables: "pa.Table | list[Row]") -> None:
    """Writes each as `<name>.parquet`."""
    for name, table in tables.items():
        pq.write_table(pa.Table.from_pylist(table) if isinstance(table, list) else table, folder / f"{name}.parquet")


def token_batches(
    rows: Rows, prepend_bos: bool, batch_rows: int, device: Any, description: str
) -> Iterator[tuple[Tensor, np.ndarray]]:
    """Tokens and documents (B, P) of rows (sequence, position) of token ids, `batch_rows` at a time. Of an array each
    row is a document."""
    for start in progress(range(0, len(rows), batch_rows), description, len(rows), "rows", each=batch_rows):
        if isinstance(rows, TokenStore):
            tokens, document, _ = rows.rows(start, start + batch_rows)
        else:
            tokens = rows[start : start + batch_rows]
            document = np.repeat(np.arange(start, start + len(tokens))[:, None], tokens.shape[1], axis=1)
        if prepend_bos:
            document = np.concatenate([document[:, 1:2], document[:, 1:]], axis=1)
        yield torch.from_numpy(tokens.astype(np.int64)).to(device), document
