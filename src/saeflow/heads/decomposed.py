"""Latents of a dictionary on all heads in the dictionaries of single heads: which atoms, how well, do they fire alike?

Chosen are random latents that are active on enough tokens. Each is decomposed head by head, and in all heads' atoms at
once, in the heads' `own` dictionaries and in two nulls of the same shape: `random` unit atoms, and `other_head`: each
head's part in the dictionary of the next head, which is a dictionary just as structured, but of another space.
"""

from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import scipy.sparse as sp
from threadpoolctl import threadpool_limits

from saeflow.config import HeadsConfig
from saeflow.dictionaries import Dictionary
from saeflow.dictionaries.heads import BlockDiagonal
from saeflow.heads.decomposition import (
    ALL,
    SparseCode,
    block_diagonal,
    curves,
    decompose,
    decomposition_table,
    expected_best_cosine,
    random_atoms,
    unit,
)
from saeflow.heads.study import HeadMeasurements
from saeflow.heads.weights import Attention, decoder_by_head

FOR_ATOMS = "nn_omp"
"""The method whose atoms are compared with the latent."""


class Decomposed(NamedTuple):
    """Of the chosen latents."""

    table: pd.DataFrame
    """`decomposition_table`, with the share of the latent's squared decoder norm that a head has, and whether it has
    the largest (`top_head`)."""
    curves: pd.DataFrame
    """Residual against number of atoms: `of` each latent's top head, and of all heads at once."""
    agreement: pd.DataFrame
    """One row a latent and atom of its decomposition in all heads' atoms, the first chosen first: the atom, its
    coefficient and cosine, and how their activations agree, beside the mean over atoms of that head that ever fire
    and the best of all atoms."""
    summary: dict[str, Any]


class Agreement(NamedTuple):
    """Of m latents with n others, (m, n) each, over the same tokens; NaN where one of the two never fires."""

    jaccard: np.ndarray
    """|f > 0 and g > 0| / |f > 0 or g > 0| for activations f of the one and g of the other."""
    correlation: np.ndarray
    """Pearson's, of f and g, zeros included."""
    together: np.ndarray
    """Tokens on which both are active."""


def choose_latents(active: np.ndarray, config: HeadsConfig) -> np.ndarray:
    """Random latents of those active on enough tokens, in order; all where there are few. `active` (n,): tokens."""
    live = np.flatnonzero(active >= config.min_active)
    return np.sort(np.random.default_rng(config.seed).permutation(live)[: config.n_latents])


def decompose_latents(
    concat: Dictionary,
    head_dictionary: BlockDiagonal,
    measurements: HeadMeasurements,
    keys: tuple[str, str],
    chosen: np.ndarray,
    attention: Attention,
    config: HeadsConfig,
) -> Decomposed:
    """The `chosen` latents of `concat` in the atoms of `head_dictionary`; `keys` of the two dictionaries in the
    study."""
    n_heads, d_head, _ = attention.W_O.shape
    decoder = decoder_by_head(concat, n_heads).double().numpy()
    own = {h: unit(one.W_dec.double().numpy()) for h, one in enumerate(head_dictionary.heads)}
    dictionaries = {
        "own": own,
        "random": {h: random_atoms(D.shape, config.seed + h) for h, D in own.items()},
        "other_head": {h: own[(h + 1) % n_heads] for h in own},
    }
    for atoms in dictionaries.values():
        atoms[ALL] = block_diagonal([atoms[h] for h in range(n_heads)])
    directions = {(int(i), h): decoder[i, h] for i in chosen for h in range(n_heads) if decoder[i, h].any()}
    directions |= {(int(i), ALL): decoder[i].ravel() for i in chosen}
    with threadpool_limits(1):  # on matrices this small a second thread costs more than it brings
        table = decomposition_table(directions, dictionaries, config.max_atoms)
    squares = dict(zip(chosen.tolist(), np.square(decoder[chosen]).sum(2), strict=True))
    at = list(zip(table["latent"], table["head"], strict=True))
    table["decoder_squared_share"] = [squares[i][h] / squares[i].sum() if h != ALL else 1.0 for i, h in at]
    table["top_head"] = [int(squares[i].argmax()) == h for i, h in at]
    of = {"top_head": table["top_head"], "all_heads": table["head"] == ALL}
    lines = pd.concat([curves(table[rows], config.max_atoms).assign(of=name) for name, rows in of.items()])
    firing = agreement(measurements.latents[keys[0]][:, chosen], measurements.latents[keys[1]])
    rows: list[dict[str, Any]] = []
    for m, i in enumerate(chosen.tolist()):
        codes = decompose(decoder[i].ravel(), own[ALL], FOR_ATOMS, config.max_atoms)
        if codes:
            rows += _atoms(i, decoder[i].ravel(), codes[max(codes)], own[ALL], head_dictionary, _row(firing, m))
    agreed = pd.DataFrame(rows)
    return Decomposed(table, lines.reset_index(drop=True), agreed, _summary(table, agreed, len(own[0]), d_head))


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


def _row(firing: Agreement, m: int) -> Agreement:
    return Agreement(*(values[m] for values in firing))


def _atoms(
    latent: int, v: np.ndarray, best: SparseCode, atoms: np.ndarray, head_dictionary: BlockDiagonal, firing: Agreement
) -> list[dict[str, Any]]:
    """Rows of `Decomposed.agreement` of one latent, whose decoder row is `v`."""
    size = head_dictionary.heads[0].d_sae
    rows = []
    for rank, (number, coefficient) in enumerate(zip(best.atoms.tolist(), best.coefficients, strict=True), start=1):
        head, atom = head_dictionary.latent(number)
        row: dict[str, Any] = {"latent": latent, "rank": rank, "head": head, "atom": atom}
        row |= {"coefficient": float(coefficient), "cosine": float(atoms[number] @ v / np.linalg.norm(v))}
        row |= {"tokens_together": int(firing.together[number])}
        for name in ("jaccard", "correlation"):
            values = getattr(firing, name)
            of_head = values[head * size : (head + 1) * size]
            row |= {name: float(values[number])}
            row |= {f"{name}_mean_of_head": float(np.nanmean(of_head)) if np.isfinite(of_head).any() else np.nan}
            row |= {f"{name}_best": float(np.nanmax(values)) if np.isfinite(values).any() else np.nan}
        rows.append(row)
    return rows


def _summary(table: pd.DataFrame, agreed: pd.DataFrame, n: int, d_head: int) -> dict[str, Any]:
    """`best_cosine`: mean over latents of that of their top head's part with the best atom."""
    one = table[table["top_head"] & (table["n_atoms"] == 1) & (table["method"] == FOR_ATOMS)]
    cosine = (1 - one["residual"] ** 2) ** 0.5
    summary: dict[str, Any] = {
        "decomposed_latents": int(table["latent"].nunique()),
        "best_cosine": {str(name): float(value) for name, value in cosine.groupby(one["dictionary"]).mean().items()},
        "best_cosine_expected_of_random": expected_best_cosine(n, d_head),
    }
    first = agreed[agreed["rank"] == 1] if len(agreed) else agreed
    for name in ("correlation", "correlation_mean_of_head", "correlation_best", "jaccard"):
        mean = first[name].mean() if len(first) else np.nan
        summary[f"first_atom_{name}"] = float(mean) if np.isfinite(mean) else None
    return summary
