"""Intervals over documents: the documents of the held-out text are drawn again, with replacement, many times.

Documents are what was drawn from a population; tokens within one are not independent, and an interval over tokens would
be several times too narrow. A draw is a function of (number of documents, seed) alone, so that dictionaries evaluated
on the same tokens are resampled alike: the difference of two dictionaries' resampled metrics is the paired difference,
in which what the documents have in common cancels. Intervals are percentiles of the resampled ratios of sums (Efron and
Tibshirani 1993, chapter 13).

Dead and dense fractions have none: a draw leaves out a third of the documents, and with them latents that do fire, so
that the draws are biased.
"""

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np

from saeflow.evaluation.metrics import Ratio, ratios

BLOCK_ELEMENTS = 1 << 24
CONFIDENCE = 0.95
Metrics = Callable[[dict[str, Any]], dict[str, Ratio]]


def draws(n_documents: int, n_resamples: int, seed: int) -> Iterator[np.ndarray]:
    """Blocks of (resamples, n_documents): how often each document is drawn; `n_resamples` in all."""
    generator = np.random.default_rng(seed)
    size = max(1, BLOCK_ELEMENTS // n_documents)
    for start in range(0, n_resamples, size):
        shape = min(size, n_resamples - start)
        yield generator.multinomial(n_documents, np.full(n_documents, 1 / n_documents), size=shape).astype(np.float64)


def resample(
    sums: Mapping[str, np.ndarray], centred: np.ndarray | None, n_resamples: int, seed: int, metrics: Metrics = ratios
) -> dict[str, np.ndarray]:
    """Resampled `metrics`, (n_resamples,) each, NaN where one has no meaning.

    `sums`: (documents,) each; `centred` (documents, p): sums of the centred target.
    """
    found: list[dict[str, np.ndarray]] = []
    for counts in draws(len(sums["n_tokens"]), n_resamples, seed):
        drawn: dict[str, Any] = {name: counts @ values for name, values in sums.items()}
        if centred is not None:
            drawn["centred"] = np.square(counts @ centred).sum(1)
        found.append({name: ratio.value() for name, ratio in metrics(drawn).items()})
    return {name: np.concatenate([block[name] for block in found]) for name in found[0]}


def interval(resampled: np.ndarray, confidence: float) -> tuple[float, float] | None:
    """The central interval of a resampled metric; None where some draw gives it no meaning."""
    if not np.isfinite(resampled).all():
        return None
    low, high = np.quantile(resampled, [(1 - confidence) / 2, (1 + confidence) / 2])
    return float(low), float(high)


def resampled_sums(sums: np.ndarray, n_resamples: int, seed: int = 0) -> np.ndarray:
    """Sums over the documents of each draw: `sums` (documents, ...) gives (n_resamples, ...), float64."""
    flat = np.asarray(sums, dtype=np.float64).reshape(len(sums), -1)
    found = np.concatenate([counts @ flat for counts in draws(len(sums), n_resamples, seed)])
    return found.reshape(n_resamples, *sums.shape[1:])


def central_interval(resampled: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Ends (...) of the central 95 % of `resampled` (resamples, ...), of those that are not NaN; NaN where all are."""
    tail = (1 - CONFIDENCE) / 2
    undefined = np.isnan(resampled).all(0)
    low, high = np.nanquantile(np.where(undefined, 0.0, resampled), [tail, 1 - tail], axis=0)
    return np.where(undefined, np.nan, low), np.where(undefined, np.nan, high)


def ratio(numerator: np.ndarray, denominator: np.ndarray) -> np.ndarray:
    """Their quotient, NaN where the denominator is 0."""
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.where(denominator == 0, np.nan, numerator / denominator)
