"""Mean, covariance and mean norm of a stream of rows, in one pass.

Chan, Golub and LeVeque (1979): a chunk's mean and centred products are merged into the running ones. The products of a
chunk are a float32 matrix product of *centred* rows, so a mean far larger than the spread cancels nothing; everything
that is accumulated is float64. The result depends on the order and the size of the chunks, so callers fix both.
"""

from typing import NamedTuple

import torch
from torch import Tensor


class Statistics(NamedTuple):
    """Of N rows of size d, in float64."""

    mean: Tensor
    """(d,)"""
    covariance: Tensor
    """(d, d), divided by N"""
    mean_norm: Tensor
    """(), the mean L2 norm of a row"""


STRIP = 128  # columns that are taken at a time


class Moments:
    """The running sums; `add` chunks, then ask for `statistics`."""

    def __init__(self, d: int, device: str | torch.device = "cpu") -> None:
        self.count = 0
        self.mean = torch.zeros(d, dtype=torch.float64, device=device)
        self.products = torch.zeros(d, d, dtype=torch.float64, device=device)
        self.norm_sum = torch.zeros((), dtype=torch.float64, device=device)

    def add(self, rows: Tensor) -> None:
        """Merges a chunk of rows, (N, d) float32."""
        n = len(rows)
        mean = _means(rows)
        centred = rows - mean.to(rows.dtype)
        difference = mean - self.mean
        total = self.count + n
        self.products += _products(centred).double()
        self.products.addr_(difference, difference, alpha=self.count * n / total)
        self.mean += difference * (n / total)
        self.norm_sum += torch.linalg.vector_norm(rows, dim=1).sum(dtype=torch.float64)
        self.count = total

    def statistics(self) -> Statistics:
        return Statistics(self.mean.cpu(), (self.products / self.count).cpu(), (self.norm_sum / self.count).cpu())

    def copy(self) -> "Moments":
        return Moments.from_tensors(self.tensors(), self.mean.device)

    def tensors(self) -> dict[str, Tensor]:
        """A copy of the state, for a checkpoint."""
        state = {"mean": self.mean, "products": self.products, "norm_sum": self.norm_sum}
        return {"count": torch.tensor(self.count)} | {k: v.clone() for k, v in state.items()}

    @classmethod
    def from_tensors(cls, state: dict[str, Tensor], device: str | torch.device) -> "Moments":
        self = cls(0, device)
        self.count = int(state["count"])
        self.mean, self.products, self.norm_sum = (state[k].to(device) for k in ("mean", "products", "norm_sum"))
        return self


def _means(rows: Tensor) -> Tensor:
    """Means (d,) in float64 of rows (N, d), with the bits of `rows.mean(0)`. Strip by strip, as copies of a strip in
    float64 stay in the cache; but torch adds up a single column in another order."""
    d = rows.shape[1]
    strips = rows.split(d if d % STRIP == 1 else STRIP, dim=1)
    return torch.cat([strip.mean(0, dtype=torch.float64) for strip in strips])


def _products(rows: Tensor) -> Tensor:
    """rows^T rows, (d, d), of rows (N, d). What is below the diagonal is copied from above it: of wide rows that is
    nearly half of the work of caching statistics."""
    d = rows.shape[1]
    products = rows.new_empty(d, d)
    for i in range(0, d, STRIP):
        torch.mm(rows[:, i : i + STRIP].T, rows[:, i:], out=products[i : i + STRIP, i:])
        products[i + STRIP :, i : i + STRIP] = products[i : i + STRIP, i + STRIP :].T
    return products
