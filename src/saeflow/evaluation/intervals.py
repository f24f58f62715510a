"""Intervals over documents: every estimate is made again without each document in turn (the jackknife).

Documents are what was drawn from a population; tokens within one are not independent, and an interval over tokens would
be several times too narrow. An interval says what other documents would have changed: the weights of the dictionaries,
and the seeds of their training, are taken as they are. Of an estimate t from n documents, and t_i from all but the i-th
(Efron and Tibshirani 1993, chapter 11; d_i are about t, which is the safe side where t is biased):

    d_i = t_i - t      s^2 = (n - 1) / n sum d_i^2      nu = min((sum d_i^2)^2 / sum d_i^4 - 1, n - 6), at least 1

and the interval is t +- s q, where q is a quantile of Student's distribution with nu degrees of freedom. The first of
the two is how many documents carry the variance, less one: some n / 3 where all are alike, and few where lengths are
unequal or some documents unlike the others. With n - 1 degrees instead, a 95 % interval of a ratio of sums holds the
truth in 88 to 92 of 100 studies of ten documents and in 75 to 92 of five, because its numerator and denominator are
skewed; the percentile bootstrap in 85 to 91 and 68 to 84. This one holds it in 93 and 90 or more
(`tests/evaluation/test_coverage.py`).

What is left out depends on the documents alone, so that dictionaries evaluated on the same tokens are resampled alike:
the difference of two dictionaries' resampled metrics is the resampled difference, and its interval the paired one, in
which what the documents have in common cancels. Of more documents than resamples are asked for, every resample leaves
out one group of them: document i is in group i modulo their number.

Dead and dense fractions have none: they are of latents, and one that a single document makes fire is no longer dead.
"""

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from scipy.special import stdtrit

from saeflow.config.evaluation import FEWEST_DOCUMENTS
from saeflow.evaluation.metrics import Ratio, ratios

CONFIDENCE = 0.95
Metrics = Callable[[dict[str, Any]], dict[str, Ratio]]


def interval(
    value: Any, resampled: np.ndarray, confidence: float = CONFIDENCE, least: Any = -np.inf, most: Any = np.inf
) -> tuple[np.ndarray, np.ndarray]:
    """Ends (...) of the interval of `value` (...), an estimate from all documents, of which `resampled` (n, ...) are
    those from all but one document, or one group.

    NaN where the estimate or some resample has no meaning, and where n is less than `FEWEST_DOCUMENTS`. `least` and
    `most`: what the truth cannot be below or above.
    """
    value, n = np.asarray(value, dtype=np.float64), len(resampled)
    if n < FEWEST_DOCUMENTS:
        return np.full(value.shape, np.nan), np.full(value.shape, np.nan)
    squares = np.square(resampled - value)
    total = squares.sum(0)
    largest = np.where(total > 0, squares.max(0), 1.0)  # so that no square underflows
    carrying = np.square(total / largest) / np.maximum(np.square(squares / largest).sum(0), 1.0)
    freedom = np.clip(carrying - 1, 1, max(1, n - 6))
    half = np.sqrt((n - 1) / n * total) * stdtrit(freedom, (1 + confidence) / 2)
    return np.clip(value - half, least, most), np.clip(value + half, least, most)


def entry(name: str, value: Any, low: Any, high: Any, n_documents: int) -> dict[str, Any]:
    """`name` of a summary with `_low` and `_high`, the ends of its interval; None where undefined. Where a value has a
    meaning but no interval, `_low_reason` says why."""
    ends = {"": float(value), "_low": float(low), "_high": float(high)}
    found: dict[str, Any] = {f"{name}{end}": number if np.isfinite(number) else None for end, number in ends.items()}
    if found[name] is not None and found[f"{name}_low"] is None:
        found[f"{name}_low_reason"] = no_interval(n_documents)
    return found


def no_interval(n_documents: int) -> str:
    """Why an estimate that has a meaning has no interval."""
    if n_documents < FEWEST_DOCUMENTS:
        named = "1 document" if n_documents == 1 else f"{n_documents} documents"
        return f"no interval: {named}, and fewer than {FEWEST_DOCUMENTS} do not tell how much documents differ"
    return "no interval: without some of the documents it has no meaning"


def resample(
    sums: Mapping[str, np.ndarray], centred: np.ndarray | None, n_resamples: int, metrics: Metrics = ratios
) -> dict[str, np.ndarray]:
    """`metrics` without each document, or group of documents: (resamples,) each, NaN where one has no meaning.

    `sums`: (documents,) each; `centred` (documents, p): sums of the centred target.
    """
    left: dict[str, Any] = {name: resampled_sums(values, n_resamples) for name, values in sums.items()}
    if centred is not None:
        left["centred"] = np.square(resampled_sums(centred, n_resamples)).sum(1)
    return {name: ratio.value() for name, ratio in metrics(left).items()}


def resampled_sums(sums: np.ndarray, n_resamples: int) -> np.ndarray:
    """Sums over all documents but one, or one group: `sums` (documents, ...) gives (resamples, ...), float64.

    By adding, not by taking away, so that what is 0 without a document is exactly 0.
    """
    values = np.asarray(sums, dtype=np.float64)
    if len(values) > n_resamples:
        values = np.stack([values[start::n_resamples].sum(0) for start in range(n_resamples)])
    nothing = np.zeros_like(values[:1])
    before = np.concatenate([nothing, values[:-1].cumsum(0)])
    after = np.concatenate([values[:0:-1].cumsum(0)[::-1], nothing])
    return before + after


def ratio(numerator: np.ndarray, denominator: np.ndarray) -> np.ndarray:
    """Their quotient, NaN where the denominator is 0."""
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.where(denominator == 0, np.nan, numerator / denominator)
