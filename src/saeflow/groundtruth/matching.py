"""Does a dictionary have the truth? One latent for each true feature, matched one to one.

The *true features* of a hook are, of the variables that the compiled model has there, the values of categorical ones
that occur, but not everywhere, and the numerical ones. A latent *agrees* with a value by the F1 of its firing, with a
number by the absolute correlation of its activations. On the compiled model, whose directions are known, that is
multiplied by the cosine of what the latent writes with the feature's direction, or by 0 where it is negative.

Latents and features are then matched one to one, so that their agreement is largest in sum (Hungarian method), and
`recovery_raw` is the mean over features; one that gets no latent counts 0. As a random direction sees the input too, it
agrees with something: `recovery_random` is the mean over draws of as many random directions, as sparse, and

    recovery = (recovery_raw - recovery_random) / (1 - recovery_random)  where that is above 0
               (recovery_raw - recovery_random) / recovery_random        where it is below

1 for the truth, in any order and scale, with or without other latents beside it; 0 for what random directions find; -1
where nothing agrees with anything. What other latents are, `mixtures` and the counts of duplicates say.
"""

from typing import NamedTuple

import numpy as np
from scipy.optimize import linear_sum_assignment

from saeflow.groundtruth.cases import Case
from saeflow.groundtruth.labels import TIE, correlation


class TrueFeatures(NamedTuple):
    """Of rows (N, P), flattened: M = N P."""

    names: tuple[str, ...]
    """`tokens=x`, or the name of a number."""
    masks: np.ndarray
    """(values, M) bool; they come first."""
    numbers: np.ndarray
    """(numbers, M) float64"""
    columns: tuple[int, ...]
    """Of the compiled model's directions, that of each."""


def true_features(case: Case, tokens: np.ndarray, hook_name: str) -> TrueFeatures:
    """Of rows `tokens` (N, P) at a hook of the residual stream's width."""
    values = case.program.run(tokens)
    masks: dict[str, tuple[np.ndarray, int]] = {}
    numbers: dict[str, tuple[np.ndarray, int]] = {}
    for name, columns in case.compiled.variables_at(hook_name).items():
        of = case.program.variables[name].values
        if of is None:
            numbers[name] = (values[name].ravel(), columns[0])
            continue
        for code, (value, column) in enumerate(zip(of, columns, strict=True)):
            mask = (values[name] == code).ravel()
            if mask.any() and not mask.all():
                masks[f"{name}={value}"] = (mask, column)
    n = tokens.size
    return TrueFeatures(
        (*masks, *numbers),
        np.array([mask for mask, _ in masks.values()], dtype=bool).reshape(-1, n),
        np.array([number for number, _ in numbers.values()]).reshape(-1, n),
        tuple(column for _, column in (*masks.values(), *numbers.values())),
    )


def agreement(truth: TrueFeatures, activations: np.ndarray) -> np.ndarray:
    """(n, features): of latents with `activations` (M, n); 0 for those that never fire."""
    fires = (activations > 0).astype(np.float64)
    both = fires.T @ truth.masks.T
    sizes = fires.sum(0)[:, None] + truth.masks.sum(1)
    f1 = 2 * both / np.maximum(sizes, 1)
    follows = [np.abs(correlation(activations, number)) for number in truth.numbers]
    found = np.concatenate([f1, np.array(follows).reshape(-1, activations.shape[1]).T], axis=1)
    return found * (fires.max(0, initial=0) > 0)[:, None]


def cosines(truth: TrueFeatures, W_dec: np.ndarray) -> np.ndarray:
    """(n, features): of decoder rows (n, d_model of the compiled model) with the features' directions."""
    norms = np.maximum(np.linalg.norm(W_dec, axis=1, keepdims=True), TIE)
    return np.asarray((W_dec / norms)[:, list(truth.columns)])


def matched(truth: TrueFeatures, activations: np.ndarray, W_dec: np.ndarray | None) -> tuple[np.ndarray, np.ndarray]:
    """Of each feature the agreement with the latent that it is matched with, and that pair's cosine, both (features,).

    `activations` (M, n); `W_dec` (n, d): what the latents write, where the features' directions are known, else None,
    and cosines are NaN. So they are for a feature without a latent, whose agreement is 0.
    """
    found = agreement(truth, activations)
    toward = np.full(found.shape, np.nan) if W_dec is None else cosines(truth, W_dec)
    if W_dec is not None:
        found = found * toward.clip(0)
    agrees, cosine = np.zeros(len(truth.names)), np.full(len(truth.names), np.nan)
    latents, features = linear_sum_assignment(found, maximize=True)
    agrees[features], cosine[features] = found[latents, features], toward[latents, features]
    return agrees, cosine


def random_directions(n: int, d: int, seed: int) -> np.ndarray:
    """(n, d), of norm 1."""
    rows = np.random.default_rng(seed).standard_normal((n, d))
    return np.asarray(rows / np.linalg.norm(rows, axis=1, keepdims=True))


def random_latents(x: np.ndarray, directions: np.ndarray, share: float) -> np.ndarray:
    """(M, n): what a dictionary of random directions (n, d) makes of `x` (M, d), with one threshold by which a share of
    all activations is above 0: what any dictionary of that width and sparsity has for nothing."""
    found = (x - x.mean(0)) @ directions.T
    return np.maximum(found - np.quantile(found, 1 - share), 0)
