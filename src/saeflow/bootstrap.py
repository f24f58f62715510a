"""Confidence intervals over documents: the tokens of one document are no independent draws, so documents are resampled.

Percentile intervals (Efron 1979). Statistics are functions of sums over tokens; those of the sums that belong to one
document stay together, and a resample is a sum over documents drawn with replacement. The draws depend on the number
of documents and the seed alone, so that all tables of one study, and all studies of the same tokens, share them.
"""

import numpy as np

LEVEL = 0.95
SEED = 0


def resampled(sums: np.ndarray, n_samples: int, seed: int = SEED) -> np.ndarray:
    """Sums over `n_samples` resamples of the D documents: `sums` (D, ...) gives (n_samples, ...), float64."""
    D = len(sums)
    weights = np.random.default_rng(seed).multinomial(D, np.full(D, 1 / D), size=n_samples).astype(np.float64)
    flat = np.asarray(sums, dtype=np.float64).reshape(D, -1)
    return (weights @ flat).reshape(n_samples, *sums.shape[1:])


def interval(replicates: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Lower and upper ends (...) of the central 95 % of `replicates` (n_samples, ...). NaN where all of them are."""
    tail = (1 - LEVEL) / 2
    values = np.asarray(replicates, dtype=np.float64)
    undefined = np.isnan(values).all(0)
    low, high = np.nanquantile(np.where(undefined, 0.0, values), [tail, 1 - tail], axis=0)
    return np.where(undefined, np.nan, low), np.where(undefined, np.nan, high)


def ratio(numerator: np.ndarray, denominator: np.ndarray) -> np.ndarray:
    """Their quotient, NaN where the denominator is 0."""
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.where(denominator == 0, np.nan, numerator / denominator)
