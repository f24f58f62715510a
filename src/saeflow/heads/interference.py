"""Do latents of different heads write over each other? Atoms after W_O, plain and weighted by how they fire together.

Atom i of head g is a_i = d_i W_O[g] in R^D, d_i a decoder row. For two heads g and h:

* plain: the cosines of all n_g n_h pairs of atoms. For directions drawn at random their mean square is 1 / D.
* weighted: w_ij = E[f_i f_j] <a_i, a_j>, E over tokens. Summed over all pairs it is E[<o_g, o_h>], where o_g = sum_i
  f_i a_i is what the dictionary reconstructs of head g's output (but for b_dec). It has two parts: `from_means`,
  <E o_g, E o_h>, which latents would have that fire independently of each other, and the rest, from their covariance.

Latents that never fired are left out of both. No n x n matrix is held but for `CHUNK` rows at a time.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import pandas as pd
import scipy.sparse as sp
import xarray as xr

from saeflow.heads.geometry import pair_coordinates, pairs_of
from saeflow.jobs.log import progress

CHUNK = 256
EDGES = np.linspace(-1, 1, 201)
TOP = ("latent", "other_latent", "interference", "cosine", "mean_product", "tokens_together")


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
    f: sp.csc_array, f_other: sp.csc_array, versions: Sequence[tuple[np.ndarray, np.ndarray]], top: int = 0
) -> list[PairInterference]:
    """`f` (N, n) are the activations of one head's latents on N tokens, `f_other` those of another head's.

    `versions`: lifted atoms (n, D) of both heads, and others to be compared, such as rotated ones. The `top` pairs of
    latents are of the first version.
    """
    live, live_other = (np.flatnonzero(np.diff(one.indptr)) for one in (f, f_other))
    f, f_other = f[:, live], f_other[:, live_other].tocsr()
    tallies = [_Tally(a[live], b[live_other]) for a, b in versions]
    tops: list[pd.DataFrame] = []
    for start in range(0, len(live), CHUNK):
        some = slice(start, start + CHUNK)
        together = (f[:, some].T @ f_other).toarray() / f.shape[0]  # E[f_i f_j]
        found = [tally.add(some, together) for tally in tallies]
        if top:
            both = (f[:, some] > 0).astype(np.int64).T @ (f_other > 0).astype(np.int64)
            tops.append(_largest(*found[0], together, both.toarray(), live[some], live_other, top))
    means, means_other = (np.asarray(one.mean(axis=0)).ravel() for one in (f, f_other))
    none = pd.DataFrame({name: np.zeros(0) for name in TOP})
    pairs = pd.concat(tops).pipe(_ordered).head(top).reset_index(drop=True) if tops else none
    return [tally.result(means, means_other, none if i else pairs) for i, tally in enumerate(tallies)]


class _Tally:
    """Sums over pairs of atoms `a` (n, D) and `b` (m, D), some of the first at a time."""

    def __init__(self, a: np.ndarray, b: np.ndarray) -> None:
        self.a, self.b = a, b
        self.norms, self.norms_b = (np.linalg.norm(one, axis=1) for one in (a, b))
        self.plain, self.weighted = np.zeros(len(EDGES) - 1, dtype=np.int64), np.zeros(len(EDGES) - 1)
        self.squares = self.total = self.absolute = self.weight = 0.0

    def add(self, some: slice, together: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """`together` (some, m): E[f_i f_j]. Returns w_ij and the cosines."""
        products = self.a[some] @ self.b.T
        scale = self.norms[some, None] * self.norms_b
        cosines = np.clip(np.divide(products, scale, out=np.zeros_like(products), where=scale > 0), -1, 1)
        w, most = together * products, together * scale
        self.plain += np.histogram(cosines, EDGES)[0]
        self.weighted += np.histogram(cosines, EDGES, weights=most)[0]
        self.squares += np.square(cosines).sum()
        self.total += w.sum()
        self.absolute += np.abs(w).sum()
        self.weight += most.sum()
        return w, cosines

    def result(self, means: np.ndarray, means_b: np.ndarray, top: pd.DataFrame) -> PairInterference:
        """`means`: E[f] of both."""
        from_means = float((means @ self.a) @ (means_b @ self.b))
        mean_square = self.squares / max(1, len(self.a) * len(self.b))
        sums = (self.total, self.absolute, from_means, self.weight)
        return PairInterference(self.plain, self.weighted, mean_square, *sums, top)


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
    found: list[PairInterference] = []
    null: list[PairInterference] = []
    for g, h in progress(pairs_of(len(atoms)), "interference"):
        versions = [(atoms[g], atoms[h]), (rotated[g], rotated[h])]
        for results, one in zip((found, null), interference(latents[g], latents[h], versions, top), strict=True):
            results.append(one)
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
