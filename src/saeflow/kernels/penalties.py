"""What the Jacobian of a token costs: penalties of J (N, k_out, k_in), with their derivatives.

Each gives (costs of the tokens (N,), derivative of their sum, of J's shape) and may use J's memory for it. L1 is the
paper's; the others are among those that its code offers (arXiv 2502.18147, commit b73cadb): L1 also shrinks what it
does not remove, and these do so less, or not at all.
"""

from collections.abc import Callable

import torch
from torch import Tensor

# As by L1 up to the first |J|; from the second, no more.
SCAD_SLOPE, SCAD_FLAT, SCAD_SCALE = 0.5, 2.15, 2.2
LP_POWER, LP_SMOOTHING = 0.4, 1e-3


def l1(J: Tensor) -> tuple[Tensor, Tensor]:
    """sum |J|"""
    return torch.linalg.vector_norm(J, 1, dim=(1, 2)), J.sign_()


def scad(J: Tensor) -> tuple[Tensor, Tensor]:
    """Smoothly clipped absolute deviation (Fan and Li 2001): like L1 near 0, quadratic, then constant."""
    size = J.abs()
    a = SCAD_FLAT / SCAD_SLOPE
    bent = (2 * SCAD_FLAT * size - size.square() - SCAD_SLOPE**2) / (2 * (a - 1))
    flat = SCAD_SLOPE**2 * (a + 1) / 2
    value = torch.where(size <= SCAD_SLOPE, SCAD_SLOPE * size, bent).where(size <= SCAD_FLAT, size.new_tensor(flat))
    slope = ((SCAD_FLAT - size) / (a - 1)).clamp(0, SCAD_SLOPE)
    return SCAD_SCALE * value.sum(dim=(1, 2)), SCAD_SCALE * slope * J.sign()


def l1_over_l2(J: Tensor) -> tuple[Tensor, Tensor]:
    """sum |J| / sqrt(sum J^2) of each token: does not change when J is scaled. 0 where J is 0."""
    total = J.abs().sum(dim=(1, 2), keepdim=True)
    norm = J.square().sum(dim=(1, 2), keepdim=True).clamp(min=torch.finfo(J.dtype).tiny ** 0.5).sqrt()
    return (total / norm).flatten(), J.sign() / norm - total * J / norm**3


def lp(J: Tensor) -> tuple[Tensor, Tensor]:
    """sum (|J| + e)^p - e^p with p = 0.4; e = 0.001 bounds the slope at 0."""
    shifted = J.abs() + LP_SMOOTHING
    return (shifted**LP_POWER - LP_SMOOTHING**LP_POWER).sum(dim=(1, 2)), LP_POWER * shifted ** (LP_POWER - 1) * J.sign()


PENALTIES: dict[str, Callable[[Tensor], tuple[Tensor, Tensor]]] = {f.__name__: f for f in (l1, scad, l1_over_l2, lp)}
