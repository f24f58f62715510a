"""Do latents of different heads write over each other? Atoms after W_O, plain and weighted by how they fire together.

Atom i of head g is a_i = d_i W_O[g] in R^D, d_i a decoder row. For two heads g and h:

* plain: the cosines of all n_g n_h pairs of atoms. For directions drawn at random their mean square is 1 / D.
* weighted: w_ij = E[f_i f_j] <a_i, a_j>, E over tokens. Summed over all pairs it is E[<o_g, o_h>], where o_g = sum_i
  f_i a_i is what the dictionary reconstructs of head g's output (but for b_dec). It has two parts: `from_means`,
  <E o_g, E o_h>, which latents would have that fire independently of each other, and the rest, from their covariance.

The null rotates each head by a random rotation of its own, R_g and R_h, many times. With Q = R_g R_h^T the rotated
<a_i, b_j> is a_i Q b_j^T, so that what is summed over pairs follows from D x D matrices: `total` is <M, Q> with
M = sum_ij E[f_i f_j] a_i^T b_j, of mean 0 and standard deviation |M| / sqrt(D) over uniform Q.

Latents that never fired are left out of both. No n x n matrix is held but for `CHUNK` rows at a time.

Latents of one head in the atoms of another are the notebook's "how hard is it to write it as a combination?" After W_O
the coordinates 64:128 of the residual stream are no more head 1's than any others, so a lifted atom a = d_i W_O[g] is
compared with what head h can write at all, the row space of W_O[h]: `in_row_space` is the norm of its part there over
its own. What lies outside no combination of head h's lifted atoms can give, so the residual of its decomposition in
them (coefficients >= 0) is never below sqrt(1 - in_row_space^2). The null are head h's atoms rotated at random, with
their row space.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd
import scipy.sparse as sp
import xarray as xr

from saeflow.heads.decomposition import decompose, unit
from saeflow.heads.geometry import pair_coordinates, pairs_of
from saeflow.heads.samples import median_interval
from saeflow.jobs.progress import progress

CHUNK = 256
EDGES = np.linspace(-1, 1, 201)
TOP = ("latent", "other_latent", "interference", "cosine", "mean_product", "tokens_together")


ABOUT = {
    "plain": "pairs of live latents by the cosine of their lifted atoms",
    "weighted": "the same, each weighted by E[f_i f_j] |a_i| |a_j|",
    "mean_square": "mean square of the cosines; 1 / d_model for random directions",
    "total": "sum over latents of E[f_i f_j] <a_i, a_j>, which is E[<o_g, o_h>]",
    "absolute": "sum over latents of |E[f_i f_j] <a_i, a_j>|",
    "from_means": "sum over latents of E[f_i] E[f_j] <a_i, a_j>",
    "weight": "sum over latents of E[f_i f_j] |a_i| |a_j|",  # what `total` would be if all atoms were parallel
}


class PairInterference:
    """What `ABOUT` says, of the atoms of two heads; added up some atoms of the first at a time."""

    def __init__(self, means: tuple[np.ndarray, np.ndarray]) -> None:
        """`means` (D,) of both heads' outputs, E o."""
        self.means = means
        D = len(means[0])
        self.products, self.moments = np.zeros((D, D)), (np.zeros((D, D)), np.zeros((D, D)))
        self.plain, self.weighted = np.zeros(len(EDGES) - 1, dtype=np.int64), np.zeros(len(EDGES) - 1)
        self.n_pairs, self.squares = 0, 0.0
        self.total = self.absolute = self.weight = 0.0
        self.top = pd.DataFrame({name: np.zeros(0) for name in TOP})
        """The pairs of latents of largest |w_ij|."""

    @property
    def from_means(self) -> float:
        return float(self.means[0] @ self.means[1])

    @property
    def mean_square(self) -> float:
        return self.squares / max(1, self.n_pairs)

    def rotated(self, Q: np.ndarray) -> dict[str, float]:
        """What of `ABOUT` is summed over pairs, with <a_i, b_j> replaced by a_i Q b_j^T."""
        of_first, of_other = self.moments
        return {
            "total": float((self.products * Q).sum()),
            "from_means": float(self.means[0] @ Q @ self.means[1]),
            "mean_square": float(((Q.T @ of_first @ Q) * of_other).sum() / max(1, self.n_pairs)),
        }

    def add(self, a: np.ndarray, b: np.ndarray, together: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Atoms a (some, D) and b (m, D), `together` (some, m): E[f_i f_j]. Returns w_ij and the cosines."""
        products = a @ b.T
        scale = np.linalg.norm(a, axis=1)[:, None] * np.linalg.norm(b, axis=1)
        cosines = np.clip(np.divide(products, scale, out=np.zeros_like(products), where=scale > 0), -1, 1)
        w, most = together * products, together * scale
        self.plain += np.histogram(cosines, EDGES)[0]
        self.weighted += np.histogram(cosines, EDGES, weights=most)[0]
        self.n_pairs += cosines.size
        self.squares += np.square(cosines).sum()
        self.total += w.sum()
        self.absolute += np.abs(w).sum()
        self.weight += most.sum()
        self.products += a.T @ (together @ b)
        self.moments[0][:] += unit(a).T @ unit(a)
        self.moments[1][:] = unit(b).T @ unit(b)
        return w, cosines


def interference(
    f: sp.csc_array, f_other: sp.csc_array, versions: Sequence[tuple[np.ndarray, np.ndarray]], top: int = 0
) -> list[PairInterference]:
    """`f` (N, n) are the activations of one head's latents on N tokens, `f_other` those of another head's.

    `versions`: lifted atoms (n, D) of both heads, and others to be compared, such as rotated ones. The `top` pairs of
    latents are of the first version.
    """
    live, live_other = (np.flatnonzero(np.diff(one.indptr)) for one in (f, f_other))
    f, f_other = f[:, live], f_other[:, live_other].tocsr()
    versions = [(a[live], b[live_other]) for a, b in versions]
    means, means_other = (np.asarray(one.mean(axis=0)).ravel() for one in (f, f_other))
    found = [PairInterference((means @ a, means_other @ b)) for a, b in versions]
    tops: list[pd.DataFrame] = []
    for start in range(0, len(live), CHUNK):
        some = slice(start, start + CHUNK)
        together = (f[:, some].T @ f_other).toarray() / f.shape[0]  # E[f_i f_j]
        first, *_ = [one.add(a[some], b, together) for one, (a, b) in zip(found, versions, strict=True)]
        if top:
            both = (f[:, some] > 0).astype(np.int64).T @ (f_other > 0).astype(np.int64)
            tops.append(_largest(*first, together, both.toarray(), live[some], live_other, top))
    if tops:
        by = ["interference", "latent", "other_latent"]  # |w|; of equal ones the lower latents first
        ordered = pd.concat(tops).sort_values(by, key=lambda c: -c.abs() if c.name == "interference" else c)
        found[0].top = ordered.head(top).reset_index(drop=True)
    return found


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
    """All pairs of heads, each beside its null: both heads' atoms rotated by `rotations` (R, H, D, D) of their own.

    `latents` (N, n) and `atoms` (n, D) by head. Sums are of every rotation, what is by bin of the first alone. Also the
    `top` pairs of latents of every pair of heads.
    """
    rotated = [one @ R for one, R in zip(atoms, rotations[0], strict=True)]
    found, null = zip(
        *(
            interference(latents[g], latents[h], [(atoms[g], atoms[h]), (rotated[g], rotated[h])], top)
            for g, h in progress(pairs_of(len(atoms)), "interference")
        ),
        strict=True,
    )
    both = list(zip(found, pairs_of(len(atoms)), strict=True))
    turned = [[one.rotated(R[g] @ R[h].T) for one, (g, h) in both] for R in rotations]
    data: dict[str, tuple[tuple[str, ...], np.ndarray, dict[str, str]]] = {}
    for name, description in ABOUT.items():
        dims = ("pair", "bin") if name in ("plain", "weighted") else ("pair",)
        units = "pairs" if name == "plain" else "1" if name == "mean_square" else "squared norm in the residual stream"
        about = {"units": units, "description": description}
        data[name] = (dims, np.array([getattr(one, name) for one in found]), about)
        more = about | {"description": f"{description}, each head rotated by a random rotation"}
        if name in ("plain", "weighted", "absolute"):
            data[f"{name}_rotated"] = (dims, np.array([getattr(one, name) for one in null]), more)
        elif name != "weight":  # of which norms alone decide
            values = np.array([[one[name] for one in of_rotation] for of_rotation in turned])
            data[f"{name}_rotated"] = (("rotation", *dims), values, more)
    coordinates: dict[str, Any] = {"bin": (EDGES[:-1] + EDGES[1:]) / 2, "rotation": np.arange(len(rotations))}
    coordinates |= pair_coordinates(len(atoms))
    dataset = xr.Dataset(data, coordinates, {"d_model": atoms[0].shape[1], "n_tokens": latents[0].shape[0]})
    tables = [one.top.assign(head=g, other_head=h) for one, (g, h) in both]
    return dataset, pd.concat(tables, ignore_index=True)


# -------------------------------------------------------------------- atoms of another head
def row_space(W: np.ndarray) -> np.ndarray:
    """Orthonormal rows (r, D) that span the rows of W (d, D)."""
    _, size, basis = np.linalg.svd(W, full_matrices=False)
    return basis[size > size[0] * max(W.shape) * np.finfo(np.float32).eps]


def lifted_table(
    chosen: list[np.ndarray], atoms: list[np.ndarray], W_O: np.ndarray, rotations: np.ndarray, n_atoms: Sequence[int]
) -> pd.DataFrame:
    """The `chosen` latents of every head in the lifted atoms (n, D) of every other head, `W_O` (H, d, D).

    Columns: head, latent, other_head, `rotated` (whether head h's atoms were, by `rotations` (H, D, D)), in_row_space,
    n_atoms, residual. A number of atoms that a decomposition does not have counts with the next smaller.
    """
    n_heads = len(atoms)
    units = [unit(one) for one in atoms]
    others = {
        (h, rotated): (units[h] @ R, row_space(W_O[h]) @ R)
        for h in range(n_heads)
        for rotated, R in ((False, np.eye(W_O.shape[2])), (True, rotations[h]))
    }
    rows = []
    for g in progress(range(n_heads), "lifted latents", unit="heads"):
        for i in chosen[g].tolist():
            v = units[g][i]
            for (h, rotated), (D, basis) in others.items():
                if h == g or not v.any():
                    continue
                codes = decompose(v, D, "nn_omp", max(n_atoms))
                inside = float(np.linalg.norm(basis @ v))
                for m in n_atoms:
                    residual = min((one.residual for k, one in codes.items() if k <= m), default=1.0)
                    rows.append((g, i, h, rotated, inside, m, residual))
    names = ["head", "latent", "other_head", "rotated", "in_row_space", "n_atoms", "residual"]
    return pd.DataFrame(rows, columns=names)


def lifted_medians(lifted: pd.DataFrame) -> pd.DataFrame:
    """Of a `lifted_table`, medians over latents of each latent's mean over the other heads, and the ends of their
    intervals: of `in_row_space` (n_atoms 0) and of the residual by number of atoms. Columns: rotated, n_atoms, median,
    low, high."""
    latent = ["head", "latent", "rotated"]
    inside = lifted.groupby(latent)["in_row_space"].mean().reset_index(name="value").assign(n_atoms=0)
    left = lifted.groupby([*latent, "n_atoms"])["residual"].mean().reset_index(name="value")
    rows = [
        (rotated, m, values.median(), *median_interval(values.to_numpy()))
        for (rotated, m), values in pd.concat([inside, left]).groupby(["rotated", "n_atoms"])["value"]
    ]
    return pd.DataFrame(rows, columns=["rotated", "n_atoms", "median", "low", "high"])
