"""Do a latent and the atoms that it decomposes into fire on the same tokens?

For activations f of a latent and g of an atom, over tokens: the Jaccard index |f > 0 and g > 0| / |f > 0 or g > 0|, and
Pearson's correlation of f and g, zeros included. NaN where one of the two never fires.
"""

from typing import NamedTuple

import numpy as np
import scipy.sparse as sp


class Agreement(NamedTuple):
    """Of m latents with n others, (m, n) each."""

    jaccard: np.ndarray
    correlation: np.ndarray
    together: np.ndarray
    """Tokens on which both are active."""


def agreement(f: sp.csc_array, g: sp.csc_array) -> Agreement:
    """`f` (N, m) and `g` (N, n): activations on the same tokens."""
    n_tokens = f.shape[0]
    together = ((f > 0).astype(np.int64).T @ (g > 0).astype(np.int64)).toarray()
    count, count_other = (np.asarray((one > 0).sum(axis=0)).ravel() for one in (f, g))
    either = count[:, None] + count_other - together
    mean, mean_other = (np.asarray(one.mean(axis=0)).ravel() for one in (f, g))
    products = (f.T @ g).toarray() / n_tokens - mean[:, None] * mean_other
    square, square_other = (np.asarray(one.multiply(one).mean(axis=0)).ravel() for one in (f, g))
    deviation, deviation_other = (
        np.sqrt(np.maximum(s - m**2, 0)) for s, m in ((square, mean), (square_other, mean_other))
    )
    fires = (count > 0)[:, None] & (count_other > 0)
    with np.errstate(invalid="ignore", divide="ignore"):
        jaccard = np.where(fires, together / either, np.nan)
        correlation = np.where(fires, products / (deviation[:, None] * deviation_other), np.nan)
    return Agreement(jaccard, correlation, together)
