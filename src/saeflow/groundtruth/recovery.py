"""How much of the truth a dictionary holds: is there a latent for every variable, and is every latent one variable?

*Recovery* is how well one latent for each value of a variable, and for each number, agrees with it, between the level
of random directions and 1: `saeflow.groundtruth.matching`. A latent is a *mixture* if it neither fires as one value of
one variable (F1 of 0.9 or more) nor follows a numerical one (absolute correlation of 0.95 or more): a conjunction such
as x at position 1 is a mixture of token and position.

Redundancy: how many different things the latents are, what they cover, and whether another seed finds them again.
"""

from typing import Any

import numpy as np
import pandas as pd
from scipy.sparse.csgraph import connected_components

from saeflow.groundtruth.cases import Case
from saeflow.groundtruth.labels import TIE, Predicates, correlation, match, predicates
from saeflow.groundtruth.matching import matched, random_directions, random_latents, true_features

PURE_F1, PURE_CORRELATION = 0.9, 0.95
COSINE, CORRELATION, IDENTIFIES = 0.9, 0.95, 0.9
N_DRAWS = 16  # of random directions


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


def recovery(
    case: Case, tokens: np.ndarray, hook_names: tuple[str, str], x: np.ndarray, activations: np.ndarray,
    W_dec: np.ndarray | None,
) -> dict[str, Any]:  # fmt: skip
    """Of a dictionary that reads the first of the hooks, x (M, d), and writes to the second, at rows `tokens` (N, P).

    `activations` (M, n); `W_dec` (n, p): what latents write, or None on a model whose directions are not known: there
    a dictionary that fires as it should and writes anything else passes for the truth (its unexplained variance tells).
    Gives `recovery`, `recovery_raw`, `recovery_random` (means over the true features), `recovery_<variable>` (raw, of
    its features), `decoder_cosine` (of matched latents with the known directions), `mixtures`, the share of live
    latents, and `mixtures_random`. None is what there is not: no feature at the hook, no known direction, or nothing
    that random directions leave to be found.
    """
    truth, n = true_features(case, tokens, hook_names[1]), activations.shape[1]
    share, width_out = float((activations > 0).mean()), x.shape[1] if W_dec is None else W_dec.shape[1]
    row: dict[str, Any] = dict.fromkeys(("recovery", "recovery_raw", "recovery_random", "decoder_cosine"))
    levels = []
    for draw in range(N_DRAWS):
        reads = random_directions(n, x.shape[1], 2 * draw)
        writes = reads if hook_names[0] == hook_names[1] else random_directions(n, width_out, 2 * draw + 1)
        random = random_latents(x, reads, share)
        levels.append(matched(truth, random, None if W_dec is None else writes)[0])
        if not draw:
            row["mixtures_random"] = _mixtures(case, tokens, random)
    if truth.names:
        agrees, cosine = matched(truth, activations, W_dec)
        raw, level = float(agrees.mean()), float(np.mean(levels))
        row |= {"recovery_raw": raw, "recovery_random": level}
        if level < 1 - TIE:
            row["recovery"] = (raw - level) / (1 - level if raw > level else max(level, TIE))
        row["decoder_cosine"] = None if np.isnan(cosine).all() else float(np.nanmean(cosine))
        of = [name.split("=")[0] for name in truth.names]
        row |= {f"recovery_{v}": float(agrees[[v == o for o in of]].mean()) for v in dict.fromkeys(of)}
    return row | {"mixtures": _mixtures(case, tokens, activations)}


def _mixtures(case: Case, tokens: np.ndarray, activations: np.ndarray) -> float | None:
    live = activations[:, (activations > 0).any(0)]
    return float((~pure(case, tokens, live)).mean()) if live.shape[1] else None


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
def duplicates(W_dec: np.ndarray | None, activations: np.ndarray) -> list[list[int]]:
    """Groups of two or more live latents, each linked to another by a cosine of decoder rows above 0.9 and a
    correlation of activations above 0.95; without decoder rows by that alone. W_dec (n, d), activations (M, n)."""
    live = np.flatnonzero((activations > 0).any(0))
    centred = activations[:, live] - activations[:, live].mean(0)
    varying = np.linalg.norm(centred, axis=0) > TIE
    columns = _unit(centred.T)
    constant = ~varying[:, None] & ~varying[None]  # latents that always fire alike correlate with each other
    alike = (columns @ columns.T > CORRELATION) | constant
    if W_dec is not None:
        rows = _unit(W_dec[live])
        alike &= rows @ rows.T > COSINE
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


def all_duplicates(W_dec: np.ndarray, activations: np.ndarray) -> dict[str, list[list[int]]]:
    """The groups of `duplicates`, by when latents fire and what they write, and by when they fire alone."""
    return {"firing_and_writing": duplicates(W_dec, activations), "firing": duplicates(None, activations)}


def redundancy(groups: dict[str, list[list[int]]], activations: np.ndarray, states: np.ndarray) -> dict[str, Any]:
    """Counts of a dictionary: latents that live, that are distinct by each of `all_duplicates`, and coverage."""
    n_live = int((activations > 0).any(0).sum())
    copies, alike = (sum(len(g) - 1 for g in groups[by]) for by in ("firing_and_writing", "firing"))
    identified, fired = coverage(activations, states)
    return {
        "n_live": n_live,
        "n_distinct": n_live - copies,
        "n_distinct_firing": n_live - alike,
        "redundancy": copies / n_live if n_live else 0.0,
        "n_states": len(np.unique(states)),
        "states_identified": identified,
        "states_fired_on": fired,
    }


def _unit(rows: np.ndarray) -> np.ndarray:
    return rows / np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), TIE)
