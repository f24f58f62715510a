"""A direction as a sum of few atoms of a dictionary: how good, with how many, and is that more than chance?

Notebook 001 takes a latent of a dictionary on all heads, cuts its decoder row by head, and writes the cut of head 7 in
that head's dictionary by the pseudo-inverse: exact, but with all 2,048 coefficients. Exactness says nothing, as any
dictionary of full rank has it. What says something is the residual that a few atoms leave, beside what they leave with
atoms that have nothing to do with the direction: random unit atoms, or another head's dictionary.

Methods, on unit atoms; the residual is |v - c D| / |v| with v (d,) and D (n, d):

* `pseudo_inverse`: the shortest c, cut to its largest entries, coefficients as they are
* `omp`: orthogonal matching pursuit (scikit-learn)
* `nn_omp`: the same with coefficients >= 0: the atom of the largest positive correlation with the residual is added,
  then all coefficients are refitted (Bruckstein, Elad and Zibulevsky 2008; `scipy.optimize.nnls`)
* `nn_lasso`: the path of the lasso with coefficients >= 0 (scikit-learn); its atoms at each knot
  are refitted without the penalty (`nnls`), as the penalty shrinks what it keeps

Coefficients >= 0 because latents never fire below 0: only these could be activations.
"""

import warnings
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
import pandas as pd

from saeflow.jobs.log import progress

METHODS = ("pseudo_inverse", "omp", "nn_omp", "nn_lasso")


class SparseCode(NamedTuple):
    """An approximation by few atoms, the first chosen first."""

    atoms: np.ndarray
    """Their numbers."""
    coefficients: np.ndarray
    """Of unit atoms."""
    residual: float
    """Relative to the direction's norm."""


ALL = -1
"""In place of a head: all of them, concatenated."""

SparseCodes = dict[int, SparseCode]
"""Approximations by number of atoms. A number that a method never has exactly is missing."""


def unit(D: np.ndarray) -> np.ndarray:
    """(n, d) with rows of norm 1; a row of zeros stays one."""
    norms = np.linalg.norm(D, axis=1, keepdims=True)
    return D / np.where(norms > 0, norms, 1)


def decompose(v: np.ndarray, D: np.ndarray, method: str, max_atoms: int) -> SparseCodes:
    """Approximations of v (d,) by up to `max_atoms` of the unit atoms D (n, d).

    Raises `ValueError` for an unknown method and for v = 0, which has no direction.
    """
    if not np.linalg.norm(v) > 0:
        raise ValueError("a direction of norm 0 cannot be decomposed")
    methods = {"pseudo_inverse": _pseudo_inverse, "omp": _omp, "nn_omp": _nn_omp, "nn_lasso": _nn_lasso}
    if method not in methods:
        raise ValueError(f"no method {method!r}; there are: {', '.join(methods)}")
    return methods[method](v, D, min(max_atoms, len(D), len(v)))


def pseudo_inverse(v: np.ndarray, D: np.ndarray) -> np.ndarray:
    """The shortest c (n,) with c D nearest to v, as in notebook 001: v pinv(D), by the smaller D^T D."""
    return v @ np.linalg.pinv(D.T @ D, hermitian=True) @ D.T


def _sparse(v: np.ndarray, D: np.ndarray, atoms: np.ndarray, coefficients: np.ndarray) -> SparseCode:
    residual = np.linalg.norm(v - coefficients @ D[atoms]) / np.linalg.norm(v)
    return SparseCode(np.asarray(atoms), np.asarray(coefficients), float(residual))


def _pseudo_inverse(v: np.ndarray, D: np.ndarray, max_atoms: int) -> SparseCodes:
    c = pseudo_inverse(v, D)
    order = np.argsort(-np.abs(c), kind="stable")
    return {m: _sparse(v, D, order[:m], c[order[:m]]) for m in range(1, max_atoms + 1)}


def _omp(v: np.ndarray, D: np.ndarray, max_atoms: int) -> SparseCodes:
    from sklearn.linear_model import orthogonal_mp

    with warnings.catch_warnings():  # it ends early where nothing is left
        warnings.filterwarnings("ignore", message="Orthogonal matching pursuit ended prematurely")
        coefficients = orthogonal_mp(D.T, v / np.linalg.norm(v), n_nonzero_coefs=max_atoms, return_path=True)
    coefficients = coefficients.reshape(len(D), -1) * np.linalg.norm(v)
    codes: SparseCodes = {}
    chosen: list[int] = []
    for c in coefficients.T:
        chosen += [int(i) for i in np.flatnonzero(c) if i not in chosen]
        codes[len(chosen)] = _sparse(v, D, np.array(chosen), c[chosen])
    return codes


def _nn_omp(v: np.ndarray, D: np.ndarray, max_atoms: int) -> SparseCodes:
    from scipy.optimize import nnls

    codes: SparseCodes = {}
    chosen: list[int] = []
    residual = v
    while len(chosen) < max_atoms:
        correlation = D @ residual
        correlation[chosen] = -np.inf
        best = int(correlation.argmax())
        if not correlation[best] > 1e-9 * np.linalg.norm(v):
            break  # no atom points where something is left
        chosen.append(best)
        c, _ = nnls(D[chosen].T, v)
        residual = v - c @ D[chosen]
        _keep(codes, _sparse(v, D, np.array(chosen)[c > 0], c[c > 0]))
    return codes


def _keep(codes: SparseCodes, one: SparseCode) -> None:
    """The better of two with as many atoms."""
    n_atoms = len(one.atoms)
    if n_atoms not in codes or one.residual < codes[n_atoms].residual:
        codes[n_atoms] = one


def _nn_lasso(v: np.ndarray, D: np.ndarray, max_atoms: int) -> SparseCodes:
    from scipy.optimize import nnls
    from sklearn.linear_model import lars_path

    size = np.linalg.norm(v)
    with warnings.catch_warnings():  # where two atoms join at once it says so
        warnings.simplefilter("ignore")
        _, _, coefficients = lars_path(
            D.T, v / size, method="lasso", positive=True, max_iter=2 * max_atoms, alpha_min=1e-6
        )
    codes: SparseCodes = {}
    for c in coefficients.T:
        support = np.flatnonzero(c > 0)
        if 0 < len(support) <= max_atoms:
            support = support[np.argsort(-c[support], kind="stable")]
            refitted, _ = nnls(D[support].T, v)
            _keep(codes, _sparse(v, D, support[refitted > 0], refitted[refitted > 0]))
    return codes


# -------------------------------------------------------------------- nulls and tables
def random_atoms(shape: tuple[int, int], seed: int) -> np.ndarray:
    """Unit atoms (n, d), uniform on the sphere."""
    return unit(np.random.default_rng(seed).standard_normal(shape))


def expected_best_cosine(n: int, d: int) -> float:
    """About the largest cosine of a direction with n random atoms in d dimensions: sqrt(2 ln n / d)."""
    return float(np.sqrt(2 * np.log(n) / d))


def block_diagonal(blocks: Sequence[np.ndarray]) -> np.ndarray:
    """Dictionaries of heads (n, d) as one on the concatenated heads, (H n, H d)."""
    from scipy.linalg import block_diag

    return np.asarray(block_diag(*blocks))


def decomposition_table(
    directions: Mapping[tuple[int, int], np.ndarray],
    dictionaries: Mapping[str, Mapping[int, np.ndarray]],
    max_atoms: int,
) -> pd.DataFrame:
    """Every direction by every method in every dictionary: one row for each number of atoms.

    `directions` are by (latent, head); of each of `dictionaries` (`own`, `random`, ...) the unit atoms by head. All
    heads together may stand as head `ALL`. Columns: latent, head, dictionary, method, n_atoms, residual, `atoms`,
    `coefficients`.
    """
    rows = []
    for (latent, head), v in progress(directions.items(), "decomposing"):
        for name, by_head in dictionaries.items():
            for method in METHODS:
                for m, one in sorted(decompose(v, by_head[head], method, max_atoms).items()):
                    row = {"latent": latent, "head": head, "dictionary": name, "method": method, "n_atoms": m}
                    chosen = {"atoms": one.atoms.tolist(), "coefficients": one.coefficients.tolist()}
                    rows.append(row | {"residual": one.residual} | chosen)
    return pd.DataFrame(rows)


def curves(table: pd.DataFrame, max_atoms: int) -> pd.DataFrame:
    """Quantiles over directions of the residual by method, dictionary and number of atoms.

    A number that a method does not have for a direction counts with the residual of the next smaller that it has: it
    needs no more atoms.
    """
    keys = ["latent", "head", "dictionary", "method"]
    wide = table.pivot_table(index=keys, columns="n_atoms", values="residual").reindex(columns=range(1, max_atoms + 1))
    rows = []
    for (name, method), one in wide.ffill(axis=1).groupby(["dictionary", "method"], sort=True):
        for m in one.columns:
            low, median, high = np.nanquantile(one[m], [0.25, 0.5, 0.75])
            row = {"dictionary": name, "method": method, "n_atoms": m}
            rows.append(row | {"low": low, "median": median, "high": high})
    return pd.DataFrame(rows)
