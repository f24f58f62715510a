"""The coordinates of a store: `token_id`, `document` and `position` of every token, arrays beside those of hooks."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from saeflow.activations.shards import COORDINATES
from saeflow.storage.receipts import DamagedError

NO_COORDINATE = -1
"""Stands where no value has been written, and for the document of a BOS in front of a row."""


class CoordinateError(DamagedError):
    """An array of coordinates that is missing or damaged; the message names it. Caching writes it anew."""

    def affected(self) -> list[Path]:
        """The columns of its store, which stand for its coordinates too."""
        return sorted(file.parent for file in self.artifact.glob("*/column.json"))


def read_coordinate(store: Path, name: str, n_tokens: int) -> Iterator[np.ndarray]:
    """One coordinate of the first `n_tokens` tokens in order, (N,) int32, chunk by chunk. Raises `CoordinateError`."""
    import zarr

    file = store / "activations.zarr" / name
    try:
        array: Any = zarr.open_array(file, mode="r")
        step = array.chunks[0]
    except (OSError, ValueError, KeyError, TypeError, RuntimeError) as error:
        raise CoordinateError(file, f"it cannot be opened: {error}", store) from error
    if array.shape[0] < n_tokens:
        raise CoordinateError(file, f"it has {array.shape[0]:,} of {n_tokens:,} tokens", store)
    for start in range(0, n_tokens, step):
        stop = min(start + step, n_tokens)
        try:
            values = np.asarray(array[start:stop])
        except (OSError, ValueError, TypeError, RuntimeError) as error:
            raise CoordinateError(file, f"tokens {start:,} to {stop:,}: {error}", store) from error
        if (values == NO_COORDINATE).all():  # one of them may be: of the BOS in front of a row, which is of no document
            raise CoordinateError(file, f"the chunk of tokens {start:,} to {stop:,} is missing", store)
        yield values


def damaged_coordinates(store: Path, n_tokens: int) -> Iterator[CoordinateError]:
    """Reads all coordinates of a store's first `n_tokens` tokens."""
    for name in COORDINATES:
        try:
            for _ in read_coordinate(store, name, n_tokens):
                pass
        except CoordinateError as error:
            yield error
