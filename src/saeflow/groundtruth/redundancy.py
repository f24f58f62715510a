"""How many different things a dictionary's latents are, what they cover, and whether another seed finds them again."""

from typing import Any

import numpy as np

from saeflow.groundtruth.labels import TIE

COSINE, CORRELATION, IDENTIFIES = 0.9, 0.95, 0.9


def duplicates(
    W_dec: np.ndarray, activations: np.ndarray, cosine: float = COSINE, correlated: float = CORRELATION
) -> list[list[int]]:
    """Groups of two or more live latents, each linked to another by a cosine of decoder rows above `cosine` and a
    correlation of activations above `correlated`. W_dec (n, d), activations (M, n)."""
    live = np.flatnonzero((activations > 0).any(0))
    rows = _unit(W_dec[live])
    centred = activations[:, live] - activations[:, live].mean(0)
    varying = np.linalg.norm(centred, axis=0) > TIE
    columns = _unit(centred.T)
    constant = ~varying[:, None] & ~varying[None]  # latents that always fire alike correlate with each other
    alike = (rows @ rows.T > cosine) & ((columns @ columns.T > correlated) | constant)
    groups = list(range(len(live)))
    for i, j in zip(*np.nonzero(np.triu(alike, 1)), strict=True):
        a, b = groups[i], groups[j]
        groups = [a if group == b else group for group in groups]
    found: dict[int, list[int]] = {}
    for latent, group in zip(live.tolist(), groups, strict=True):
        found.setdefault(group, []).append(latent)
    return [group for group in found.values() if len(group) > 1]


def coverage(activations: np.ndarray, states: np.ndarray) -> tuple[float, float]:
    """Share of states (`states` (M,), the state at each position) that some latent identifies (fires there and almost
    nowhere else: F1 of 0.9 or more), and share at which any latent fires at all."""
    fires = activations > 0
    every = np.unique(states)
    identified = fired = 0
    for state in every:
        there = states == state
        both = fires[there].sum(0)
        f1 = 2 * both / np.maximum(fires.sum(0) + there.sum(), 1)
        identified += bool((f1 >= IDENTIFIES).any())
        fired += bool(both.any())
    return identified / len(every), fired / len(every)


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
