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

`decompose_latents` asks of latents of a dictionary on all heads: which atoms of the dictionaries of single heads, how
well, do they fire alike?

Each is decomposed head by head, and in all heads' atoms at once, in the heads' `own` dictionaries and in two nulls of
the same shape: `random` atoms of the same norms, and `other_head`: each head's part in the dictionary of the next head,
which is a dictionary just as structured, but of another space. The pseudo-inverse is of decoder rows as they are, as in
notebook 001, whose norms decide which of the many exact solutions is the shortest; sparse methods take atoms of norm 1.
"""

import warnings
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import scipy.sparse as sp
import xarray as xr
from scipy.linalg import block_diag
from threadpoolctl import threadpool_limits

from saeflow.config import HeadsConfig
from saeflow.dictionaries import Dictionary
from saeflow.dictionaries.heads import BlockDiagonal
from saeflow.heads.samples import mean_interval, median_interval
from saeflow.heads.weights import decoder_by_head
from saeflow.jobs.progress import progress

METHODS = ("pseudo_inverse", "omp", "nn_omp", "nn_lasso")
FOR_ATOMS = "nn_omp"
"""The method whose atoms are compared with the latent."""


class SparseCode(NamedTuple):
    """An approximation by few atoms, the first chosen first."""

    atoms: np.ndarray
    """Their numbers."""
    coefficients: np.ndarray
    """Of the atoms that were given."""
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
    """Approximations of v (d,) by up to `max_atoms` of the atoms D (n, d), of norm 1 but for `pseudo_inverse`.

    Raises `ValueError` for an unknown method and for v = 0, which has no direction.
    """
    if not np.linalg.norm(v) > 0:
        raise ValueError("a direction of norm 0 cannot be decomposed")
    methods = {"pseudo_inverse": _pseudo_inverse, "omp": _omp, "nn_omp": _nn_omp, "nn_lasso": _nn_lasso}
    if method not in methods:
        raise ValueError(f"no method {method!r}; there are: {', '.join(methods)}")
    return methods[method](v, D, min(max_atoms, len(D), len(v)))


def pseudo_inverse(v: np.ndarray, D: np.ndarray) -> np.ndarray:
    """The shortest c (n,) with c D nearest to v (d,): v pinv(D), by the smaller D^T D; of several v (m, d) as many c.
    Source: notebook 001, cell 213, where D are decoder rows as they were trained."""
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
        limits = {"max_iter": 2 * max_atoms, "alpha_min": 1e-6}
        _, _, coefficients = lars_path(D.T, v / size, method="lasso", positive=True, **limits)
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


def decomposition_table(
    directions: Mapping[tuple[int, int], np.ndarray],
    dictionaries: Mapping[str, Mapping[int, np.ndarray]],
    max_atoms: int,
) -> pd.DataFrame:
    """Every direction by every method in every dictionary: one row for each number of atoms.

    `directions` are by (latent, head); of each of `dictionaries` (`own`, `random`, ...) the atoms by head. All heads
    together may stand as head `ALL`. Columns: latent, head, dictionary, method, n_atoms, residual, `atoms`,
    `coefficients` (of atoms of norm 1, but with the pseudo-inverse of those that are given).
    """
    rows = []
    units = {name: {h: unit(D) for h, D in by_head.items()} for name, by_head in dictionaries.items()}
    for (latent, head), v in progress(directions.items(), "decomposing", unit="latents"):
        for name, by_head in dictionaries.items():
            for method in METHODS:
                atoms = (by_head if method == "pseudo_inverse" else units[name])[head]
                for m, one in sorted(decompose(v, atoms, method, max_atoms).items()):
                    row = {"latent": latent, "head": head, "dictionary": name, "method": method, "n_atoms": m}
                    chosen = {"atoms": one.atoms.tolist(), "coefficients": one.coefficients.tolist()}
                    rows.append(row | {"residual": one.residual} | chosen)
    return pd.DataFrame(rows)


def curves(table: pd.DataFrame, max_atoms: int) -> pd.DataFrame:
    """Quartiles over directions of the residual (`low`, `median`, `high`) by method, dictionary and number of atoms,
    and the ends of the interval of the median (`median_low`, `median_high`).

    A number that a method does not have for a direction counts with the residual of the next smaller that it has: it
    needs no more atoms.
    """
    keys = ["latent", "head", "dictionary", "method"]
    wide = table.pivot_table(index=keys, columns="n_atoms", values="residual").reindex(columns=range(1, max_atoms + 1))
    rows = []
    for (name, method), one in wide.ffill(axis=1).groupby(["dictionary", "method"], sort=True):
        for m in one.columns:
            quartiles = np.nanquantile(one[m], [0.25, 0.5, 0.75])
            rows.append((name, method, m, *quartiles, *median_interval(one[m].to_numpy())))
    names = ["low", "median", "high", "median_low", "median_high"]
    return pd.DataFrame(rows, columns=["dictionary", "method", "n_atoms", *names])


def coefficients(concat: Dictionary, head_dictionary: BlockDiagonal, chosen: np.ndarray) -> xr.Dataset:
    """All coefficients of the `chosen` latents by the pseudo-inverse, head by head: c = v pinv(D) of the part v of a
    latent's decoder row on a head and D (n, d) that head's decoder rows, both as trained. Those in all heads' atoms at
    once are the same, as the dictionary of all heads is block-diagonal."""
    n_heads = len(head_dictionary.heads)
    parts = decoder_by_head(concat, n_heads).double().numpy()[chosen]
    matrices = [one.W_dec.double().numpy() for one in head_dictionary.heads]
    found = np.stack([pseudo_inverse(parts[:, h], D) for h, D in enumerate(matrices)], axis=1)
    left = np.stack([parts[:, h] - found[:, h] @ D for h, D in enumerate(matrices)], axis=1)
    size = np.linalg.norm(parts, axis=2)
    residual = np.divide(np.linalg.norm(left, axis=2), size, out=np.zeros_like(size), where=size > 0)
    return xr.Dataset(
        {
            "coefficient": (
                ("latent", "head", "atom"),
                found.astype(np.float32),
                {"units": "1", "description": "c of c D nearest to the latent's part v on the head: v pinv(D)"},
            ),
            "residual": (("latent", "head"), residual, {"units": "1", "description": "|v - c D| / |v|"}),
            "size": (("latent", "head"), size, {"units": "1", "description": "|v|"}),
        },
        {"latent": chosen, "head": np.arange(n_heads), "atom": np.arange(found.shape[2])},
    )


# -------------------------------------------------------------------- latents in the atoms of heads
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


def decompose_latents(
    concat: Dictionary, head_dictionary: BlockDiagonal, chosen: np.ndarray, firing: Agreement, config: HeadsConfig
) -> Decomposed:
    """The `chosen` latents of `concat` in the atoms of `head_dictionary`, whose activations agree as `firing` says."""
    n_heads, d_head = len(head_dictionary.heads), head_dictionary.heads[0].d_in
    decoder = decoder_by_head(concat, n_heads).double().numpy()
    own = {h: one.W_dec.double().numpy() for h, one in enumerate(head_dictionary.heads)}
    norms = {h: np.linalg.norm(D, axis=1, keepdims=True) for h, D in own.items()}
    dictionaries = {
        "own": own,
        "random": {h: norms[h] * random_atoms(D.shape, config.seed + h) for h, D in own.items()},
        "other_head": {h: own[(h + 1) % n_heads] for h in own},
    }
    for atoms in dictionaries.values():
        atoms[ALL] = block_diag(*(atoms[h] for h in range(n_heads)))
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
    rows: list[dict[str, Any]] = []
    unit_atoms = unit(own[ALL])
    for m, i in enumerate(chosen.tolist()):
        codes = decompose(decoder[i].ravel(), unit_atoms, FOR_ATOMS, config.max_atoms)
        if codes:
            of_latent = Agreement(*(values[m] for values in firing))
            rows += _atoms(i, decoder[i].ravel(), codes[max(codes)], unit_atoms, head_dictionary, of_latent)
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
    variance, variance_other = (np.maximum(s - m**2, 0) for s, m in ((square, mean), (square_other, mean_other)))
    fires = (count > 0)[:, None] & (count_other > 0)
    with np.errstate(invalid="ignore", divide="ignore"):
        jaccard = np.where(fires, together / either, np.nan)
        correlation = np.where(fires, products / (np.sqrt(variance)[:, None] * np.sqrt(variance_other)), np.nan)
    return Agreement(jaccard, correlation, together)


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
    """`best_cosine`: mean over latents of that of their top head's part with the best atom, and the interval of it."""
    one = table[table["top_head"] & (table["n_atoms"] == 1) & (table["method"] == FOR_ATOMS)]
    cosine = (1 - one["residual"] ** 2) ** 0.5
    summary: dict[str, Any] = {
        "decomposed_latents": int(table["latent"].nunique()),
        "best_cosine": {str(name): float(value) for name, value in cosine.groupby(one["dictionary"]).mean().items()},
        "best_cosine_interval": {
            str(name): [none_if_nan(end) for end in mean_interval(values.to_numpy())]
            for name, values in cosine.groupby(one["dictionary"])
        },
        "best_cosine_expected_of_random": expected_best_cosine(n, d_head),
    }
    first = agreed[agreed["rank"] == 1] if len(agreed) else agreed
    for name in ("correlation", "correlation_mean_of_head", "correlation_best", "jaccard"):
        summary[f"first_atom_{name}"] = none_if_nan(first[name].mean() if len(first) else np.nan)
    return summary


def none_if_nan(value: Any) -> float | None:
    """For JSON, which has no NaN."""
    return float(value) if np.isfinite(value) else None
