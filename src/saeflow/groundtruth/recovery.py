"""How much of the truth a dictionary holds: is there a latent for every variable, and is every latent one variable?

A variable's *recovery* is how well its best latent matches it: for a categorical one the mean over its values (those
that occur, but not everywhere) of the largest AUROC, rescaled from [0.5, 1] to [0, 1]; for a numerical one the largest
absolute correlation. A latent is a *mixture* if it neither fires as one value of one variable (F1 of 0.9 or more) nor
follows a numerical one (absolute correlation of 0.95 or more): a conjunction such as x at position 1 is a mixture of
token and position.

Redundancy: how many different things the latents are, what they cover, and whether another seed finds them again.
"""

from typing import Any

import numpy as np
import pandas as pd
from scipy.sparse.csgraph import connected_components

from saeflow.groundtruth.cases import Case
from saeflow.groundtruth.labels import TIE, Predicates, correlation, match, predicates

PURE_F1, PURE_CORRELATION = 0.9, 0.95
COSINE, CORRELATION, IDENTIFIES = 0.9, 0.95, 0.9


def true_values(case: Case, tokens: np.ndarray, variables: list[str]) -> dict[str, Predicates]:
    """By categorical variable: a predicate for each value that occurs, but not everywhere."""
    values = case.program.run(tokens)
    found = {}
    for name in variables:
        of = case.program.variables[name].values
        if of is not None:
            masks = {f"{name}={v}": (values[name] == code).ravel() for code, v in enumerate(of)}
            some = {k: m for k, m in masks.items() if m.any() and not m.all()}
            if some:
                found[name] = Predicates(tuple(some), np.stack(list(some.values())), (True,) * len(some), {})
    return found


def recovery(case: Case, tokens: np.ndarray, hook_name: str, activations: np.ndarray) -> dict[str, Any]:
    """Of latents at rows `tokens` (N, P), `activations` (N P, n): `recovery` (mean over the variables that the compiled
    model has at the hook), `recovery_<variable>` of each, and `mixtures`, the share of live latents."""
    variables = list(case.compiled.variables_at(hook_name))
    values = case.program.run(tokens)
    scores: dict[str, float] = {}
    live = activations[:, (activations > 0).any(0)]
    for name, against in true_values(case, tokens, variables).items():
        auroc = match(live, against).auroc
        best = auroc.max(0) if live.shape[1] else np.full(len(against.names), 0.5)
        scores[name] = float(2 * best.clip(0.5).mean() - 1)
    for name in variables:
        if case.program.variables[name].numerical:
            scores[name] = float(np.abs(correlation(live, values[name].ravel())).max(initial=0.0))
    row: dict[str, Any] = {"recovery": float(np.mean(list(scores.values()))) if scores else None}
    row |= {f"recovery_{name}": score for name, score in scores.items()}
    return row | {"mixtures": float((~pure(case, tokens, live)).mean()) if live.shape[1] else None}


def random_latents(x: np.ndarray, n: int, share: float, seed: int = 0) -> np.ndarray:
    """(M, n): what a dictionary of `n` random directions makes of `x` (M, d), with one threshold by which a share of
    all activations is above 0: the level that any dictionary of that width and sparsity has for nothing."""
    W = np.random.default_rng(seed).standard_normal((x.shape[1], n))
    found = (x - x.mean(0)) @ (W / np.linalg.norm(W, axis=0))
    return np.maximum(found - np.quantile(found, 1 - share), 0)


def pure(case: Case, tokens: np.ndarray, live: np.ndarray) -> np.ndarray:
    """(L,) bool: which of the latents with activations `live` (M, L) are one value of one variable, or follow one; of
    all variables of the program, wherever they are made, and BOS, PAD and what is always there."""
    everything = predicates(case, tokens)
    keep = [t or n in ("always", "BOS", "PAD") for n, t in zip(everything.names, everything.true_values, strict=True)]
    fires_as_one = match(live, Predicates((), everything.masks[keep], (), {})).f1.max(1) >= PURE_F1
    for number in everything.numbers.values():
        fires_as_one |= np.abs(correlation(live, number)) >= PURE_CORRELATION
    return fires_as_one


# -------------------------------------------------------------------- redundancy
def duplicates(W_dec: np.ndarray, activations: np.ndarray) -> list[list[int]]:
    """Groups of two or more live latents, each linked to another by a cosine of decoder rows above 0.9 and a
    correlation of activations above 0.95. W_dec (n, d), activations (M, n)."""
    live = np.flatnonzero((activations > 0).any(0))
    rows = _unit(W_dec[live])
    centred = activations[:, live] - activations[:, live].mean(0)
    varying = np.linalg.norm(centred, axis=0) > TIE
    columns = _unit(centred.T)
    constant = ~varying[:, None] & ~varying[None]  # latents that always fire alike correlate with each other
    alike = (rows @ rows.T > COSINE) & ((columns @ columns.T > CORRELATION) | constant)
    n, group = connected_components(alike, directed=False)
    return [live[group == i].tolist() for i in range(n) if (group == i).sum() > 1]


def coverage(activations: np.ndarray, states: np.ndarray) -> tuple[float, float]:
    """Share of states (`states` (M,), the state at each position) that some latent identifies (fires there and almost
    nowhere else: F1 of 0.9 or more), and share at which any latent fires at all."""
    fires, there = pd.DataFrame(activations > 0), np.unique(states, return_counts=True)[1]
    both = fires.groupby(states).sum().to_numpy()
    f1 = 2 * both / np.maximum(fires.sum().to_numpy() + there[:, None], 1)
    return float((f1 >= IDENTIFIES).any(1).mean()), float(both.any(1).mean())


def stability(decoders: list[np.ndarray]) -> float:
    """Mean over ordered pairs of dictionaries, and over the live latents of the first, of the largest cosine with a
    live latent's decoder row of the second. `decoders`: rows of live latents, (L, d) each, of two or more seeds."""
    units = [_unit(rows) for rows in decoders]
    found = [(a @ b.T).max(1).mean() for i, a in enumerate(units) for j, b in enumerate(units) if i != j and len(a)]
    return float(np.mean(found))


def redundancy(W_dec: np.ndarray, activations: np.ndarray, states: np.ndarray) -> dict[str, Any]:
    """Counts of a dictionary: live and distinct latents, duplicates, coverage."""
    n_live = int((activations > 0).any(0).sum())
    copies = sum(len(group) - 1 for group in duplicates(W_dec, activations))
    identified, fired = coverage(activations, states)
    return {
        "n_live": n_live,
        "n_distinct": n_live - copies,
        "redundancy": copies / n_live if n_live else 0.0,
        "n_states": len(np.unique(states)),
        "states_identified": identified,
        "states_fired_on": fired,
    }


def _unit(rows: np.ndarray) -> np.ndarray:
    return rows / np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), TIE)
