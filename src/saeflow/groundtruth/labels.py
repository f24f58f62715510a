"""Automatic labels: for each live latent of a dictionary, the predicate that it matches best, and what it follows.

A latent *fires* where its activation is above 0. Against a predicate it has a precision (share of where it fires that
the predicate holds), a recall (share of where the predicate holds that it fires), their harmonic mean F1, and an AUROC:
the chance that its activation is larger at a position where the predicate holds than at one where it does not, ties
counted half. The label is the predicate of the largest F1, then AUROC, then the plainest. `f1_chance` is the same
largest F1 when the latent's activations are put at other positions at random: what a latent that knows nothing gets.
"""

from typing import NamedTuple

import numpy as np
import pandas as pd

from saeflow.groundtruth.predicates import Predicates

TIE, LEAK = 1e-9, 1e-6
LEAST_POSITIONS = 20  # of a predicate, for its AUROC to mean anything


def without_leaks(activations: np.ndarray) -> np.ndarray:
    """(M, n), with 0 for what is below a millionth of the latent's largest activation: what a softmax leaves of what is
    not selected is no firing."""
    return np.where(activations > LEAK * activations.max(0, initial=0), activations, 0.0)


class Matches(NamedTuple):
    """Of every live latent (rows) with every predicate (columns)."""

    live: np.ndarray
    """(L,): which latents fire anywhere."""
    precision: np.ndarray
    recall: np.ndarray
    f1: np.ndarray
    auroc: np.ndarray
    """NaN for a predicate that holds everywhere."""


def match(activations: np.ndarray, against: Predicates) -> Matches:
    """`activations` (M, n), at the positions of `against`; 0 or more."""
    live = np.flatnonzero((activations > 0).any(0))
    live_activations = activations[:, live].T  # (L, M)
    masks = against.masks.astype(np.float64).T  # (M, predicates)
    fires = (live_activations > 0).astype(np.float64)
    both = fires @ masks
    n_fires, n_true = fires.sum(1)[:, None], masks.sum(0)[None]
    n_false = masks.shape[0] - n_true
    with np.errstate(invalid="ignore"):
        auroc = (_ranks(live_activations) @ masks - n_true * (n_true + 1) / 2) / np.where(
            n_false > 0, n_true * n_false, np.nan
        )
    return Matches(live, both / np.maximum(n_fires, 1), both / n_true, 2 * both / (n_fires + n_true), auroc)


def label(activations: np.ndarray, against: Predicates, seed: int = 0) -> pd.DataFrame:
    """A row a live latent: `latent`, `label`, `precision`, `recall`, `f1`, `auroc`, `f1_chance`, the predicate of the
    largest AUROC, `frequency`, and `r2_<number>` with every number."""
    found = match(activations, against)
    names = np.array(against.names)
    table = {"latent": found.live, "frequency": (activations[:, found.live] > 0).mean(0)}
    best = _best(found.f1, np.nan_to_num(found.auroc, nan=0.5))
    rows = np.arange(len(found.live))
    often = against.masks.sum(1) >= LEAST_POSITIONS
    by_auroc = _best(np.where(often, np.nan_to_num(found.auroc, nan=0.0), -1.0), found.f1)
    shuffled = np.random.default_rng(seed).permutation(len(activations))
    chance = match(activations[shuffled], against).f1
    table |= {
        "label": names[best],
        **{name: getattr(found, name)[rows, best] for name in ("precision", "recall", "f1", "auroc")},
        "f1_chance": chance.max(1) if len(rows) else np.zeros(0),
        "label_by_auroc": names[by_auroc],
        "best_auroc": found.auroc[rows, by_auroc],
    }
    for name, value in against.numbers.items():
        table[f"r2_{name}"] = correlation(activations[:, found.live], value) ** 2
    return pd.DataFrame(table)


def correlation(activations: np.ndarray, number: np.ndarray) -> np.ndarray:
    """Pearson's, of every column of `activations` (M, L) with `number` (M,); 0 where either does not vary."""
    a, b = activations - activations.mean(0), number - number.mean()
    size = np.sqrt((a * a).sum(0) * (b @ b))
    return np.divide(a.T @ b, size, out=np.zeros(a.shape[1]), where=size > 1e-12)


def _best(first: np.ndarray, then: np.ndarray) -> np.ndarray:
    """Column of the largest `first` of every row; among equals of the largest `then`; among those the leftmost."""
    if not len(first):
        return np.zeros(0, dtype=np.int64)
    largest = first >= first.max(1, keepdims=True) - TIE
    return np.asarray(np.where(largest, then.round(9), -np.inf).argmax(1))


def _ranks(values: np.ndarray) -> np.ndarray:
    """Ranks from 1 along each row; equal values get their mean rank."""
    out = np.empty(values.shape)
    for row, ranks in zip(values, out, strict=True):
        _, inverse, counts = np.unique(row, return_inverse=True, return_counts=True)
        last = counts.cumsum()
        ranks[:] = ((2 * last - counts + 1) / 2)[inverse]
    return out
