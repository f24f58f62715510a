"""Latents of one head in the atoms of another: the notebook's "how hard is it to write it as a combination?"

After W_O the coordinates 64:128 of the residual stream are no more head 1's than any others, so a lifted atom a = d_i
W_O[g] is compared with what head h can write at all, the row space of W_O[h]: `in_row_space` is the norm of its part
there over its own. What lies outside no combination of head h's lifted atoms can give, so the residual of its
decomposition in them (coefficients >= 0) is never below sqrt(1 - in_row_space^2). The null are head h's atoms rotated
at random, with their row space.
"""

from collections.abc import Sequence

import numpy as np
import pandas as pd

from saeflow.heads.decomposition import decompose, unit
from saeflow.jobs.log import progress


def row_space(W: np.ndarray) -> np.ndarray:
    """Orthonormal rows (r, D) that span the rows of W (d, D)."""
    _, size, basis = np.linalg.svd(W, full_matrices=False)
    return basis[size > size[0] * max(W.shape) * np.finfo(np.float32).eps]


def lifted_table(
    chosen: Sequence[np.ndarray],
    atoms: Sequence[np.ndarray],
    W_O: np.ndarray,
    rotations: np.ndarray,
    n_atoms: Sequence[int],
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
    for g in progress(range(n_heads), "lifted latents"):
        for i in chosen[g].tolist():
            v = units[g][i]
            for (h, rotated), (D, basis) in others.items():
                if h == g or not v.any():
                    continue
                codes = decompose(v, D, "nn_omp", max(n_atoms))
                inside = float(np.linalg.norm(basis @ v))
                for m in n_atoms:
                    residual = min((one.residual for k, one in codes.items() if k <= m), default=1.0)
                    row = {"head": g, "latent": i, "other_head": h, "rotated": rotated, "in_row_space": inside}
                    rows.append(row | {"n_atoms": m, "residual": residual})
    names = ["head", "latent", "other_head", "rotated", "in_row_space", "n_atoms", "residual"]
    return pd.DataFrame(rows, columns=names)
