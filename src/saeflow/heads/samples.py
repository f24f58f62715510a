"""Which latents are looked at closely, and what a number of theirs says of all that could have been.

Latents are drawn by a random number of each, so that one more live latent changes a sample by one at most. An interval
of a median or a mean over latents covers other draws of latents of the same dictionary, on the same tokens: neither
other dictionaries nor other documents. That of a median is between two order statistics, whatever the distribution
(David and Nagaraja 2003, section 7.1): of m independent values the number below the median is binomial(m, 1/2), so that
x_(l) to x_(m + 1 - l) holds it with probability 1 - 2 P(binomial(m, 1/2) < l). That of a mean is Student's.
"""

import numpy as np
from scipy.stats import binom, t

from saeflow.config import HeadsConfig
from saeflow.evaluation.intervals import CONFIDENCE


def choose_latents(active: np.ndarray, config: HeadsConfig, first: int = 0, most: int | None = None) -> np.ndarray:
    """Numbers of the latents to look at, in order. `active` (n,): tokens on which each is, of latents `first` to
    `first` + n of a dictionary; `most` in place of `heads.n_latents`.

    Those that `heads.latents` names, whether they fire or not; with `all`, those that are active on enough tokens; else
    as many of these as are asked for, drawn at random.
    """
    if not isinstance(config.latents, str) and len(config.latents):
        named = np.unique(config.latents) - first
        return named[(named >= 0) & (named < len(active))]
    live = np.flatnonzero(active >= config.min_active)
    if config.latents == "all":
        return live
    rank = np.random.default_rng(config.seed).random(len(active))
    drawn = live[np.argsort(rank[live], kind="stable")]
    return np.sort(drawn[: most or config.n_latents])


def median_interval(values: np.ndarray, confidence: float = CONFIDENCE) -> tuple[float, float]:
    """Ends of the interval of the median, of values (m,) without those that are NaN; NaN where they are too few."""
    ordered = np.sort(values[~np.isnan(values)])
    rank = int(binom.ppf((1 - confidence) / 2, len(ordered), 0.5)) if len(ordered) else 0
    if rank < 1:  # even the smallest and the largest hold it too seldom
        return np.nan, np.nan
    return float(ordered[rank - 1]), float(ordered[-rank])


def mean_interval(values: np.ndarray, confidence: float = CONFIDENCE) -> tuple[float, float]:
    """The same of the mean; NaN for fewer than two values."""
    kept = values[~np.isnan(values)]
    if len(kept) < 2:
        return np.nan, np.nan
    half = float(t.ppf((1 + confidence) / 2, len(kept) - 1)) * kept.std(ddof=1) / np.sqrt(len(kept))
    return float(kept.mean() - half), float(kept.mean() + half)
