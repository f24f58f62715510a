"""The activations of every latent of a chunk that are shown, each with the text around it.

The `top` ones, at most one in each window of as many tokens as are shown, and random ones of each of the equal
intervals of the range. Shapes: A firings, E examples.
"""

from typing import Any

import numpy as np
import pyarrow as pa

from saeflow.config import FeaturesConfig
from saeflow.features.order import keys, lowest, ranks, uniform, values_of
from saeflow.features.statistics import limits, parts
from saeflow.features.text import Seen, Text

SCHEMA = pa.schema(
    {
        "latent": pa.int32(),
        "rank": pa.int16(),
        "interval": pa.int16(),
        "value": pa.float32(),
        "quantile": pa.float32(),
        "document": pa.int32(),
        "row": pa.int32(),
        "position": pa.int32(),
        "begin": pa.int32(),
        "token_ids": pa.list_(pa.int32()),
        "activations": pa.list_(pa.float32()),
    }
)


def top(seen: Seen, most: int) -> np.ndarray:
    """(E,) indices of firings: of each latent the `most` of largest size, at most one in each window of the grid; by
    latent, the largest first, of equal ones the earlier."""
    near = _large(seen, seen.grid.window * most)
    (row, position), latent, size = seen.place, seen.chunk.latent[near], np.abs(seen.chunk.value[near])
    where = seen.grid.window_at(row[near], position[near])
    begins = np.ones(len(latent), dtype=bool)
    begins[1:] = (latent[1:] != latent[:-1]) | (where[1:] != where[:-1])
    if not len(latent):
        return np.zeros(0, dtype=np.int64)
    run = np.cumsum(begins) - 1
    largest = np.maximum.reduceat(size, np.flatnonzero(begins))
    at = np.flatnonzero(size == largest[run])
    at = at[ranks(run[at]) == 0]
    order = at[np.lexsort((at, -size[at], latent[at]))]
    return near[order[ranks(latent[order]) < most]]


def _large(seen: Seen, most: int) -> np.ndarray:
    """Indices, ascending, of all firings of each latent that are as large as its `most` largest: no others can be the
    largest of a window that comes first."""
    chunk, ordered = seen.chunk, seen.ordered
    if len(chunk.value) and chunk.value.min() < 0:
        ordered = np.sort(keys(chunk.latent, np.abs(chunk.value)))
    if not len(ordered):
        return np.zeros(0, dtype=np.int64)
    least = values_of(ordered[np.clip(chunk.start[1:] - most, chunk.start[:-1], len(ordered) - 1)])
    return np.flatnonzero(np.abs(chunk.value) >= least[chunk.latent])


def examples_table(
    seen: Seen, text: Text, columns: dict[str, np.ndarray], draw: np.ndarray, config: FeaturesConfig
) -> pa.Table:
    """A row an example, as `SCHEMA`: of each latent its top ones, then those of each interval, the highest first.

    `columns`: the chunk's `saeflow.features.statistics.activity`; `draw` (A,) decides which are drawn, the lowest.
    """
    chunk = seen.chunk
    best = top(seen, config.top)
    interval = parts(chunk, limits(columns), config.intervals)
    # the intervals of a latent from the highest down
    group = chunk.latent * config.intervals + config.intervals - 1 - interval
    drawn = lowest(group, draw, config.per_interval, chunk.n_latents * config.intervals)
    chosen = np.concatenate([best, drawn])
    number = np.concatenate([ranks(chunk.latent[best]) + 1, np.zeros(len(drawn), dtype=np.int64)])
    order = np.argsort(chunk.latent[chosen], kind="stable")
    chosen, number = chosen[order], number[order]
    latent, value = chunk.latent[chosen], chunk.value[chosen]
    below = np.searchsorted(seen.ordered, keys(latent, value)) - chunk.start[latent]
    row, position = (where[chosen] for where in seen.place)
    begin, end = np.maximum(position - config.before, 0), np.minimum(position + config.after + 1, text.context_size)
    ids, values = _around(seen, text, latent, row, begin, end)
    arrays: dict[str, Any] = {
        "latent": chunk.first + latent,
        "rank": pa.array(number, mask=number == 0),
        "interval": pa.array(interval[chosen], mask=number > 0),
        "value": value,
        "quantile": below / np.maximum(chunk.fired[latent], 1),
        "document": text.document[row, position],
        "row": text.row[row],
        "position": position,
        "begin": begin,
        "token_ids": ids,
        "activations": values,
    }
    typed = [
        (a if isinstance(a, pa.Array) else pa.array(a)).cast(SCHEMA.field(name).type) for name, a in arrays.items()
    ]
    return pa.Table.from_arrays(typed, schema=SCHEMA)


def _around(
    seen: Seen, text: Text, latent: np.ndarray, row: np.ndarray, begin: np.ndarray, end: np.ndarray
) -> tuple[pa.Array, pa.Array]:
    """Token ids and the latent's activations from position `begin` to `end` of each example (E,)."""
    size = end - begin
    which = np.repeat(np.arange(len(size)), size)
    starts = np.concatenate([[0], np.cumsum(size)])
    position = np.arange(len(which)) - starts[which] + begin[which]
    ids = text.tokens[row[which], position].astype(np.int32)
    values = values_at(seen, latent[which], row[which], position)
    offsets = pa.array(starts.astype(np.int32))
    return tuple(pa.ListArray.from_arrays(offsets, pa.array(v)) for v in (ids, values))


def values_at(seen: Seen, latent: np.ndarray, row: np.ndarray, position: np.ndarray) -> np.ndarray:
    """(M,) float32: activations of latents of the chunk at places; 0 where they don't fire, and at BOS."""
    values, chunk = np.zeros(len(position), dtype=np.float32), seen.chunk
    number = seen.grid.number(row, position)
    if len(chunk.value):
        n = max(int(chunk.token.max()), int(number.max(initial=0))) + 1
        known, wanted = chunk.latent * n + chunk.token, latent * n + number  # the first in order
        at = np.minimum(np.searchsorted(known, wanted), len(known) - 1)
        found = (known[at] == wanted) & (position >= seen.grid.first)
        values[found] = chunk.value[at[found]]
    return values


def draws(seen: Seen, text: Text, seed: int) -> np.ndarray:
    """(A,) what decides which firings are drawn: see `uniform`."""
    row, position = seen.place
    return uniform(seed, seen.chunk.first + seen.chunk.latent, text.row[row] * text.context_size + position)
