"""Do latents of different heads write over each other? Atoms after W_O, plain and weighted by how they fire together.

Atom i of head g is a_i = d_i W_O[g] in R^D, d_i a decoder row. For two heads g and h:

* plain: the cosines of all n_g n_h pairs of atoms. For directions drawn at random their mean square is 1 / D.
* weighted: w_ij = E[f_i f_j] <a_i, a_j>, E over tokens. Summed over all pairs it is E[<o_g, o_h>], where o_g = sum_i
  f_i a_i is what the dictionary reconstructs of head g's output (but for b_dec). It has two parts: `from_means`,
  <E o_g, E o_h>, which latents would have that fire independently of each other, and the rest, from their covariance.

Latents that never fired are left out of both. No n x n matrix is held but for `CHUNK` rows at a time.
"""

from typing import NamedTuple

import numpy as np
import pandas as pd
import scipy.sparse as sp
import xarray as xr

from saeflow.heads.geometry import pair_coordinates, pairs_of

CHUNK = 256
EDGES = np.linspace(-1, 1, 201)


class PairInterference(NamedTuple):
    """Of two heads' atoms."""

    plain: np.ndarray
    """Histogram of the cosines of live pairs, on `EDGES`."""
    weighted: np.ndarray
    """The same, each pair weighted by E[f_i f_j] |a_i| |a_j|."""
    mean_square: float
    """Mean square of the cosines."""
    total: float
    """Sum of w_ij."""
    absolute: float
    """Sum of |w_ij|."""
    from_means: float
    """Sum of E[f_i] E[f_j] <a_i, a_j>."""
    weight: float
    """Sum of E[f_i f_j] |a_i| |a_j|: what `total` would be if all atoms were parallel."""
    top: pd.DataFrame
    """The pairs of largest |w_ij|."""


def interference(
    f: sp.csc_array, f_other: sp.csc_array, atoms: np.ndarray, atoms_other: np.ndarray, top: int = 0
) -> PairInterference:
    """`f` (N, n) are the activations of one head's latents on N tokens, `atoms` (n, D) its lifted atoms; of the other
    head likewise, on the same tokens."""
    n_tokens = f.shape[0]
    live, live_other = (np.flatnonzero(np.diff(one.indptr)) for one in (f, f_other))
    f, f_other, atoms, atoms_other = f[:, live], f_other[:, live_other], atoms[live], atoms_other[live_other]
    norms, norms_other = (np.linalg.norm(one, axis=1) for one in (atoms, atoms_other))
    plain, weighted = np.zeros(len(EDGES) - 1, dtype=np.int64), np.zeros(len(EDGES) - 1)
    squares = total = absolute = weight = 0.0
    tops: list[pd.DataFrame] = []
    for start in range(0, len(live), CHUNK):
        some = slice(start, start + CHUNK)
        together = (f[:, some].T @ f_other).toarray() / n_tokens  # E[f_i f_j]
        products = atoms[some] @ atoms_other.T
        scale = norms[some, None] * norms_other
        cosines = np.clip(np.divide(products, scale, out=np.zeros_like(products), where=scale > 0), -1, 1)
        w, most = together * products, together * scale
        plain += np.histogram(cosines, EDGES)[0]
        weighted += np.histogram(cosines, EDGES, weights=most)[0]
        squares += np.square(cosines).sum()
        total, absolute, weight = total + w.sum(), absolute + np.abs(w).sum(), weight + most.sum()
        if top:
            both = (f[:, some] > 0).astype(np.int64).T @ (f_other > 0).astype(np.int64)
            tops.append(_largest(w, cosines, together, both.toarray(), live[some], live_other, top))
    means, means_other = (np.asarray(one.mean(axis=0)).ravel() for one in (f, f_other))
    from_means = float((means @ atoms) @ (means_other @ atoms_other))
    found = pd.concat(tops).pipe(_ordered).head(top).reset_index(drop=True) if tops else pd.DataFrame()
    mean_square = squares / max(1, len(live) * len(live_other))
    return PairInterference(plain, weighted, mean_square, total, absolute, from_means, weight, found)


def _ordered(table: pd.DataFrame) -> pd.DataFrame:
    """By |w|; of equal ones the lower latents first."""
    by = table.assign(size=-table["interference"].abs()).sort_values(["size", "latent", "other_latent"], kind="stable")
    return by.drop(columns="size")


def _largest(
    w: np.ndarray, cosines: np.ndarray, together: np.ndarray, both: np.ndarray, latents: np.ndarray,
    others: np.ndarray, top: int,
) -> pd.DataFrame:  # fmt: skip
    flat = np.abs(w).ravel()
    places = np.argpartition(-flat, min(top, flat.size) - 1)[:top] if flat.size else np.zeros(0, dtype=np.int64)
    i, j = np.unravel_index(places, w.shape)
    columns = {"latent": latents[i], "other_latent": others[j], "interference": w[i, j], "cosine": cosines[i, j]}
    return pd.DataFrame(columns | {"mean_product": together[i, j], "tokens_together": both[i, j]})


def interference_dataset(
    latents: list[sp.csc_array], atoms: list[np.ndarray], rotations: np.ndarray, top: int
) -> tuple[xr.Dataset, pd.DataFrame]:
    """All pairs of heads, each beside its null: both heads' atoms rotated by `rotations` (H, D, D) of their own.

    `latents` (N, n) and `atoms` (n, D) by head. Also the `top` pairs of latents of every pair of heads.
    """
    rotated = [one @ R for one, R in zip(atoms, rotations, strict=True)]
    found, null = [], []
    for g, h in pairs_of(len(atoms)):
        found.append(interference(latents[g], latents[h], atoms[g], atoms[h], top))
        null.append(interference(latents[g], latents[h], rotated[g], rotated[h]))
    data: dict[str, tuple[tuple[str, ...], np.ndarray, dict[str, str]]] = {}
    about = {
        "plain": "pairs of live latents by the cosine of their lifted atoms",
        "weighted": "the same, each weighted by E[f_i f_j] |a_i| |a_j|",
        "mean_square": "mean square of the cosines; 1 / d_model for random directions",
        "total": "sum over latents of E[f_i f_j] <a_i, a_j>, which is E[<o_g, o_h>]",
        "absolute": "sum over latents of |E[f_i f_j] <a_i, a_j>|",
        "from_means": "sum over latents of E[f_i] E[f_j] <a_i, a_j>",
        "weight": "sum over latents of E[f_i f_j] |a_i| |a_j|",
    }
    for name, description in about.items():
        dims = ("pair", "bin") if name in ("plain", "weighted") else ("pair",)
        units = "pairs" if name == "plain" else "1" if name == "mean_square" else "squared norm in the residual stream"
        for suffix, of, more in (("", found, ""), ("_rotated", null, ", each head rotated by a random rotation")):
            values = np.array([getattr(one, name) for one in of])
            data[name + suffix] = (dims, values, {"units": units, "description": description + more})
    centres = (EDGES[:-1] + EDGES[1:]) / 2
    coordinates = {"bin": centres, **pair_coordinates(len(atoms))}
    dataset = xr.Dataset(data, coordinates, {"d_model": atoms[0].shape[1], "n_tokens": latents[0].shape[0]})
    tables = [one.top.assign(head=g, other_head=h) for one, (g, h) in zip(found, pairs_of(len(atoms)), strict=True)]
    return dataset, pd.concat(tables, ignore_index=True)
