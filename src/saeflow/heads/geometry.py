"""The linear algebra of heads and their dictionaries: decoder norms, ranks, singular spectra, principal angles.

Every answer is a dataset whose attributes say units and definitions. What is computed is float64.
"""

from collections.abc import Sequence

import numpy as np
import torch
import xarray as xr
from torch import Tensor

from saeflow.dictionaries import Dictionary

MATRICES = ("D", "W_O", "D_W_O")


def pairs_of(n_heads: int) -> list[tuple[int, int]]:
    """All pairs (g, h) of heads with g < h, in order."""
    return [(g, h) for g in range(n_heads) for h in range(g + 1, n_heads)]


def pair_coordinates(n_heads: int) -> dict[str, tuple[str, np.ndarray]]:
    """Coordinates of a dimension `pair`."""
    one, other = np.array(pairs_of(n_heads), dtype=np.int64).reshape(-1, 2).T
    return {"head": ("pair", one), "other_head": ("pair", other)}


def rank(singular_values: np.ndarray, shape: tuple[int, int]) -> int:
    """Values above the largest times max(shape) times float32's epsilon, which is what weights are stored in."""
    tolerance = singular_values.max(initial=0.0) * max(shape) * np.finfo(np.float32).eps
    return int((singular_values > tolerance).sum())


def participation(singular_values: np.ndarray) -> float:
    """(sum of s^2)^2 / sum of s^4: how many directions share the energy; from 1 to the rank."""
    squares = np.square(singular_values)
    return float(squares.sum() ** 2 / np.square(squares).sum())


def spectra(heads: Sequence[Dictionary], W_O: Tensor) -> xr.Dataset:
    """Singular values of each head's dictionary D_h (n, d), of W_O[h] (d, D), and of D_h W_O[h] (n, D).

    D_h W_O[h] maps through d dimensions, so it has d singular values at most that are not 0: these are given.
    """
    values, ranks, shares = [], [], []
    for one, W in zip(heads, W_O.double(), strict=True):
        D_h = one.W_dec.double()
        matrices = (D_h, W, D_h @ W)
        found = [torch.linalg.svdvals(matrix).cpu().numpy() for matrix in matrices]
        ranks.append([rank(s, tuple(matrix.shape)) for s, matrix in zip(found, matrices, strict=True)])
        shares.append([participation(s) for s in found])
        values.append([s[: W.shape[0]] for s in found])
    size = max(len(s) for of_head in values for s in of_head)
    padded = np.stack([[np.pad(s, (0, size - len(s))) for s in of_head] for of_head in values])
    coordinates = {"head": np.arange(len(values)), "matrix": list(MATRICES), "index": np.arange(size)}
    return xr.Dataset(
        {
            "singular_value": (("head", "matrix", "index"), padded, {"units": "1"}),
            "rank": (("head", "matrix"), np.array(ranks), {"description": "singular values above the tolerance"}),
            "participation": (("head", "matrix"), np.array(shares), {"description": "(sum s^2)^2 / sum s^4"}),
        },
        coordinates,
        {"d_head": int(W_O.shape[1]), "d_model": int(W_O.shape[2]), "description": "D: decoder rows of a head"},
    )


def decoder_norms(dictionaries: Sequence[Dictionary]) -> xr.Dataset:
    """Norms of decoder rows before and after they were folded into the encoder (`Dictionary.with_unit_decoder`).

    `dictionaries` are those of the heads, of one size. Folding changes no output and multiplies a latent's activation
    by its norm, so that `1 / norm` is also the factor by which an activation grows when it is undone.
    """
    before = np.stack([one.W_dec.double().norm(dim=1).cpu().numpy() for one in dictionaries])
    after = np.stack([one.with_unit_decoder().W_dec.double().norm(dim=1).cpu().numpy() for one in dictionaries])
    encoder = np.stack([one.W_enc.double().norm(dim=0).cpu().numpy() for one in dictionaries])
    dims = ("head", "latent")
    return xr.Dataset(
        {
            "decoder_norm": (dims, before, {"units": "activation of hook_z", "description": "|W_dec[i]| as trained"}),
            "decoder_norm_folded": (dims, after, {"units": "1", "description": "|W_dec[i]| after folding"}),
            "encoder_norm": (dims, encoder, {"description": "|W_enc[:, i]| as trained"}),
        },
        {"head": np.arange(len(before)), "latent": np.arange(before.shape[1])},
    )


def principal_angles(W_O: Tensor) -> xr.Dataset:
    """Angles between the row spaces of every two heads' W_O[h], in radians, largest first; and between random ones.

    The random subspaces have the same dimensions (seeded). An angle of 0 is a direction that both heads can write;
    two subspaces whose dimensions add up to more than D share one by necessity.
    """
    from scipy.linalg import subspace_angles

    n_heads, d, D = W_O.shape
    spaces = W_O.double().cpu().numpy()
    generator = np.random.default_rng(0)
    random = generator.standard_normal((n_heads, d, D))
    found, null = (
        np.stack([subspace_angles(of[g].T, of[h].T) for g, h in pairs_of(n_heads)]) for of in (spaces, random)
    )
    return xr.Dataset(
        {
            "angle": (("pair", "index"), found, {"units": "rad"}),
            "angle_random": (("pair", "index"), null, {"units": "rad", "description": "of random subspaces"}),
        },
        {"index": np.arange(found.shape[1]), **pair_coordinates(n_heads)},
        {"d_head": d, "d_model": D},
    )
