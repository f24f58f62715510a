"""What the activations of every latent of a chunk say: how often and how strongly it fires, and on what.

A firing is an activation that is not 0. Shapes: A firings, L latents, as `saeflow.features.firings.Chunk`.
"""

from typing import Any

import numpy as np

from saeflow.config import FeaturesConfig
from saeflow.features.firings import Chunk
from saeflow.features.order import ranks, values_of
from saeflow.features.text import Seen, Text

QUANTILES = (0.1, 0.25, 0.5, 0.75, 0.9, 0.99)
POSITIONS = 16  # bins of positions in a row


def activity(seen: Seen, text: Text) -> dict[str, np.ndarray]:
    """(L,) columns: how often, on how many documents and at which position latents fire, and how strongly; NaN of
    those that never do."""
    chunk, (row, position) = seen.chunk, seen.place
    count, latent, value = chunk.fired, chunk.latent, chunk.value.astype(np.float64)
    document = text.document[row, position]
    new = np.ones(len(latent), dtype=bool)  # the documents of a text are in order
    new[1:] = (latent[1:] != latent[:-1]) | (document[1:] != document[:-1])

    def mean(values: np.ndarray) -> np.ndarray:
        with np.errstate(invalid="ignore"):
            return np.bincount(latent, values, chunk.n_latents) / count

    middle = mean(value)
    columns = {
        "fired": count,
        "frequency": count / text.n_tokens,
        "n_documents": np.bincount(latent[new], minlength=chunk.n_latents),
        "mean": middle,
        "std": np.sqrt(mean((value - middle[latent]) ** 2)),
        "mean_position": mean(position.astype(np.float64)),
    }
    lowest, *between, highest = _quantiles(seen, (0.0, *QUANTILES, 1.0))
    columns |= {"min": lowest, "max": highest}
    return columns | {f"q{100 * q:02.0f}": of_q for q, of_q in zip(QUANTILES, between, strict=True)}


def _quantiles(seen: Seen, quantiles: tuple[float, ...]) -> list[np.ndarray]:
    """(L,) each, between the two nearest firings where it lies between, as numpy's."""
    found, chunk = [], seen.chunk
    last = np.maximum(chunk.fired - 1, 0)
    start = np.minimum(chunk.start[:-1], max(len(chunk.value) - 1, 0))
    values = values_of(seen.ordered) if len(chunk.value) else np.zeros(1)
    for q in quantiles:
        place = q * last
        low = np.floor(place).astype(np.int64)
        one, other = (values[start + np.minimum(i, last)] for i in (low, low + 1))
        found.append(np.where(chunk.fired > 0, one + (other - one) * (place - low), np.nan))
    return found


def limits(columns: dict[str, np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """(L,) ends of the range that is cut into bins and intervals: from 0 to the largest activation, or the smallest
    where there are some below 0."""
    return np.minimum(np.nan_to_num(columns["min"]), 0), np.maximum(np.nan_to_num(columns["max"]), 0)


def parts(chunk: Chunk, ends: tuple[np.ndarray, np.ndarray], n: int) -> np.ndarray:
    """(A,) in which of `n` equal parts of its latent's range a value lies; the last has both of its ends."""
    low, high = (end[chunk.latent] for end in ends)
    share = (chunk.value - low) / np.where(high > low, high - low, 1)
    return np.clip((share * n).astype(np.int64), 0, n - 1)


def counted(chunk: Chunk, part: np.ndarray, n: int) -> np.ndarray:
    """(L, n) int32: how many firings of each latent are in each part (A,)."""
    both = np.bincount(chunk.latent * n + part, minlength=chunk.n_latents * n)
    return both.reshape(chunk.n_latents, n).astype(np.int32)


def position_bins(text: Text) -> tuple[np.ndarray, np.ndarray]:
    """(P,) the bin of each position, and (bins + 1,) where they begin and end; as many as there are at most."""
    n = min(POSITIONS, text.context_size)
    edges = np.arange(n + 1) * text.context_size // n
    return np.searchsorted(edges, np.arange(text.context_size), side="right") - 1, edges


def tokens_of(seen: Seen, text: Text, occurrences: np.ndarray, config: FeaturesConfig) -> dict[str, list[Any]]:
    """Of each latent the token ids on which it fires most often, how often, on which share of their occurrences
    (V,), and how strongly in the mean: lists of up to `config.tokens`. Of equal ones the lower id comes first."""
    V, chunk = len(occurrences), seen.chunk
    both = chunk.latent * V + text.tokens[seen.place]
    order = np.argsort(both)
    both, value = both[order], chunk.value[order].astype(np.float64)
    begins = np.flatnonzero(np.concatenate([[True], both[1:] != both[:-1]])) if len(both) else np.zeros(0, np.int64)
    count = np.diff(np.concatenate([begins, [len(both)]]))
    latent, token = np.divmod(both[begins], V)
    total = np.add.reduceat(value, begins) if len(begins) else np.zeros(0)
    best = np.lexsort((token, -count, latent))
    best = best[ranks(latent[best]) < config.tokens]
    cuts = np.searchsorted(latent[best], np.arange(1, chunk.n_latents))
    columns = {
        "tokens": token[best].astype(np.int32),
        "token_fired": count[best],
        "token_share": count[best] / occurrences[token[best]],
        "token_mean": total[best] / count[best],
    }
    lists: dict[str, list[Any]] = {name: np.split(values, cuts) for name, values in columns.items()}
    distinct = np.bincount(latent, minlength=chunk.n_latents)
    return lists | {"n_distinct_tokens": list(distinct)}
