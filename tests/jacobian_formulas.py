"""Penalties of Jacobians J (N, k_out, k_in) as their sources write them, summed; differentiable."""

from collections.abc import Callable

import torch
from torch import Tensor


def scad_as_written(J: Tensor) -> Tensor:
    """Fan and Li (2001), equation 2.7 integrated, with a = 4.3 and lambda = 0.5; times 2.2."""
    size, a, lam = J.abs(), 4.3, 0.5
    middle = -(size**2 - 2 * a * lam * size + lam**2) / (2 * (a - 1))
    return 2.2 * torch.where(size <= lam, lam * size, torch.where(size <= a * lam, middle, (a + 1) * lam**2 / 2)).sum()


AS_WRITTEN: dict[str, Callable[[Tensor], Tensor]] = {
    "l1": lambda J: J.abs().sum(),
    "scad": scad_as_written,
    "l1_over_l2": lambda J: sum((t.abs().sum() / t.norm() for t in J if t.any()), J.new_zeros(())),
    "lp": lambda J: ((J.abs() + 0.001) ** 0.4 - 0.001**0.4).sum(),
}
