"""The linear algebra of heads and their dictionaries: decoder norms, ranks, spectra, principal angles, and cosines.

Every answer is a dataset whose attributes say units and definitions. What is computed of weights is float64.

Do heads write in the same directions? `HeadCosines` are cosines of the outputs of every two heads, token by token:
notebook 001 looks at heads 0 and 1 on one row, here it is all pairs on many documents. The null rotates each head's
output by a random rotation of its own in d_model: everything that a head does by itself stays (norms, how its outputs
resemble each other), and only how two heads lie to one another is lost. There are several draws of them, as one is no
null: what matters is how far an average strays from draw to draw. Their quantiles are from counts in bins of `BIN`.
"""

from collections.abc import Sequence

import numpy as np
import torch
import xarray as xr
from torch import Tensor

from saeflow.dictionaries import Dictionary
from saeflow.heads.weights import head_outputs

MATRICES = ("D", "W_O", "D_W_O")
QUANTILES = (0.0, 0.05, 0.25, 0.5, 0.75, 0.95, 1.0)
BIN = 0.001
LINES = 4  # rows whose cosines are kept whole, for the notebook's line plot


_PARTICIPATION = "(sum s^2)^2 / sum s^4"


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
    """(sum of s^2)^2 / sum of s^4: how many directions share the energy; from 1 to the rank, 0 where there is none."""
    squares = np.square(singular_values)
    return float(squares.sum() ** 2 / np.square(squares).sum()) if squares.any() else 0.0


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
            "participation": (("head", "matrix"), np.array(shares), {"description": _PARTICIPATION}),
        },
        coordinates,
        {"d_head": int(W_O.shape[1]), "d_model": int(W_O.shape[2]), "description": "D: decoder rows of a head"},
    )


def ov_spectra(W_V: Tensor, W_O: Tensor) -> xr.Dataset:
    """Singular values of what each head moves from source to destination, W_V[h] W_O[h] (D, D), of which d at most are
    not 0: these are given. `W_V` (H, D, d), `W_O` (H, d, D). Source: notebook 001, its text after cell 131."""
    values = torch.linalg.svdvals(W_V.double() @ W_O.double())[:, : W_O.shape[1]].cpu().numpy()
    shape = (int(W_O.shape[2]), int(W_O.shape[2]))
    return xr.Dataset(
        {
            "singular_value": (("head", "index"), values, {"units": "1"}),
            "rank": ("head", np.array([rank(s, shape) for s in values]), {"description": "above the tolerance"}),
            "participation": ("head", np.array([participation(s) for s in values]), {"description": _PARTICIPATION}),
        },
        {"head": np.arange(len(values)), "index": np.arange(values.shape[1])},
        {"d_head": int(W_O.shape[1]), "d_model": int(W_O.shape[2]), "description": "W_V[h] W_O[h], the norm folded in"},
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
    random = np.random.default_rng(0).standard_normal((n_heads, d, D))
    pairs = pairs_of(n_heads)
    found, null = (np.stack([subspace_angles(of[g].T, of[h].T) for g, h in pairs]) for of in (spaces, random))
    return xr.Dataset(
        {
            "angle": (("pair", "index"), found, {"units": "rad"}),
            "angle_random": (("pair", "index"), null, {"units": "rad", "description": "of random subspaces"}),
        },
        {"index": np.arange(found.shape[1]), **pair_coordinates(n_heads)},
        {"d_head": d, "d_model": D},
    )


def pair_cosines(outputs: Tensor) -> Tensor:
    """(N, H, D) -> (N, pairs); 0 where a head writes nothing."""
    unit = outputs / outputs.norm(dim=2, keepdim=True).clamp(min=1e-30)
    g, h = torch.tensor(pairs_of(outputs.shape[1]), device=outputs.device).T
    return torch.bmm(unit, unit.transpose(1, 2))[:, g, h]


class HeadCosines:
    """Cosines of the rows that are added, their own and of randomly rotated heads."""

    def __init__(self, W_O: Tensor, rotations: Tensor, first: int) -> None:
        """`W_O` (H, d, D), `rotations` (R, H, D, D); quantiles by pair leave out the positions before `first`."""
        self.W_O, self.first = W_O, first
        self.rotated = W_O @ rotations.to(W_O)  # (R, H, d, D): z (W_O R) is the rotated output
        n_pairs, bins = len(pairs_of(len(W_O))), round(2 / BIN)
        self._found: list[np.ndarray] = []
        self._counts = np.zeros((len(rotations), n_pairs, bins), dtype=np.int64)
        self._sums = np.zeros((len(rotations), n_pairs))

    def add(self, z: Tensor) -> None:
        """`z` (B, P, H, d) of whole rows."""
        B, P = z.shape[:2]
        self._found.append(pair_cosines(head_outputs(z.flatten(0, 1), self.W_O)).view(B, P, -1).float().cpu().numpy())
        kept, (_, n_pairs, bins) = z[:, self.first :].flatten(0, 1), self._counts.shape
        for r, W_O in enumerate(self.rotated):
            cosines = pair_cosines(head_outputs(kept, W_O))
            self._sums[r] += cosines.double().sum(0).cpu().numpy()
            places = ((cosines + 1) / BIN).long().clamp(0, bins - 1)
            places += bins * torch.arange(n_pairs, device=places.device)
            self._counts[r] += (
                torch.bincount(places.flatten(), minlength=n_pairs * bins).view(n_pairs, bins).cpu().numpy()
            )

    def dataset(self) -> xr.Dataset:
        """Quantiles by pair, over all positions from `first` on, and by pair and position over rows; and first rows."""
        H, first = self.W_O.shape[0], self.first
        cosines = np.concatenate(self._found)  # (rows, P, pairs)
        units = {"units": "1", "description": "cosine of the two heads' outputs z_h W_O[h]"}
        about = f"the same, each head rotated by a random rotation of its own; quantiles to {BIN}"
        rotated = {"units": "1", "description": about}
        quantiles = list(QUANTILES)
        kept = cosines[:, first:].reshape(-1, cosines.shape[2])
        by_pair = np.quantile(kept, quantiles, axis=0).T
        by_pair_null = np.stack([[_quantiles(of_pair) for of_pair in counts] for counts in self._counts])
        by_position = np.quantile(cosines, quantiles, axis=0).transpose(2, 1, 0)
        mean, mean_null = kept.mean(0, dtype=np.float64), self._sums / max(1, len(kept))
        lines = cosines[:LINES].transpose(2, 0, 1)
        return xr.Dataset(
            {
                "cosine": (("pair", "quantile"), by_pair.astype(np.float32), units),
                "cosine_rotated": (("rotation", "pair", "quantile"), by_pair_null.astype(np.float32), rotated),
                "cosine_by_position": (("pair", "position", "quantile"), by_position.astype(np.float32), units),
                "mean_cosine": ("pair", mean, units),
                "mean_cosine_rotated": (("rotation", "pair"), mean_null, rotated),
                "cosine_in_row": (("pair", "row", "position"), lines, units | {"rows": "the first ones"}),
            },
            {
                "quantile": quantiles,
                "rotation": np.arange(len(self._counts)),
                "position": np.arange(cosines.shape[1]),
                "row": np.arange(len(cosines[:LINES])),
                **pair_coordinates(H),
            },
            {
                "n_rows": len(cosines),
                "first_position": first,
                "positions": "quantiles by pair leave out those before it",
            },
        )


def _quantiles(counts: np.ndarray) -> np.ndarray:
    """`QUANTILES` of values in [-1, 1] from their counts in equal bins, as if those of a bin were spread over it."""
    edges, reached = np.linspace(-1, 1, len(counts) + 1), np.append(0, counts.cumsum())
    below, at = (np.stack([of[:-1], of[1:]], axis=1)[counts > 0].ravel() for of in (reached, edges))
    return np.interp(np.array(QUANTILES) * reached[-1], below, at)
