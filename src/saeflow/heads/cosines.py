"""Do heads write in the same directions? Cosines of the outputs of every two heads, token by token.

Notebook 001 looks at heads 0 and 1 on one row; here it is all pairs on many documents. The null rotates each head's
output by a random rotation of its own in d_model: everything that a head does by itself stays (norms, how its outputs
resemble each other), and only how two heads lie to one another is lost.
"""

import numpy as np
import torch
import xarray as xr
from torch import Tensor

from saeflow.heads.geometry import pair_coordinates, pairs_of
from saeflow.heads.weights import head_outputs, random_rotations

QUANTILES = (0.0, 0.05, 0.25, 0.5, 0.75, 0.95, 1.0)
LINES = 4  # rows whose cosines are kept whole, for the notebook's line plot


def pair_cosines(outputs: Tensor) -> Tensor:
    """(N, H, D) -> (N, pairs); 0 where a head writes nothing."""
    unit = outputs / outputs.norm(dim=2, keepdim=True).clamp(min=1e-30)
    g, h = torch.tensor(pairs_of(outputs.shape[1]), device=outputs.device).T
    return torch.bmm(unit, unit.transpose(1, 2))[:, g, h]


class HeadCosines:
    """Cosines of the rows that are added, their own and of randomly rotated heads."""

    def __init__(self, W_O: Tensor, seed: int) -> None:
        self.W_O = W_O
        rotations = random_rotations(W_O.shape[0], W_O.shape[2], seed).to(W_O)
        self.rotated = W_O @ rotations  # z (W_O R) is the rotated output
        self._found: list[np.ndarray] = []
        self._null: list[np.ndarray] = []

    def add(self, z: Tensor) -> None:
        """`z` (B, P, H, d) of whole rows."""
        B, P = z.shape[:2]
        for W_O, chunks in ((self.W_O, self._found), (self.rotated, self._null)):
            cosines = pair_cosines(head_outputs(z.flatten(0, 1), W_O))
            chunks.append(cosines.view(B, P, -1).float().cpu().numpy())

    def dataset(self, first: int) -> xr.Dataset:
        """Quantiles by pair, over all positions from `first` on, and by pair and position over rows; and first rows."""
        H = self.W_O.shape[0]
        cosines, null = np.concatenate(self._found), np.concatenate(self._null)  # (rows, P, pairs)
        units = {"units": "1", "description": "cosine of the two heads' outputs z_h W_O[h]"}
        rotated = {"units": "1", "description": "the same, each head rotated by a random rotation of its own"}
        quantiles = list(QUANTILES)
        by_pair, by_pair_null = (
            np.quantile(values[:, first:].reshape(-1, values.shape[2]), quantiles, axis=0).T
            for values in (cosines, null)
        )
        by_position = np.quantile(cosines, quantiles, axis=0).transpose(2, 1, 0)
        mean, mean_null = (values[:, first:].mean((0, 1), dtype=np.float64) for values in (cosines, null))
        lines = cosines[:LINES].transpose(2, 0, 1)
        return xr.Dataset(
            {
                "cosine": (("pair", "quantile"), by_pair.astype(np.float32), units),
                "cosine_rotated": (("pair", "quantile"), by_pair_null.astype(np.float32), rotated),
                "cosine_by_position": (("pair", "position", "quantile"), by_position.astype(np.float32), units),
                "mean_cosine": ("pair", mean, units),
                "mean_cosine_rotated": ("pair", mean_null, rotated),
                "cosine_in_row": (("pair", "row", "position"), lines, units | {"rows": "the first ones"}),
            },
            {
                "quantile": quantiles,
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
