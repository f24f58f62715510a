"""What cross terms between heads do to the model's predictions: the loss when they are taken out.

With o_h = z_h W_O[h] the squared norm of what a layer writes is  sum_h |o_h|^2 + sum over g != h of <o_g, o_h>.  The
second sum is the interference. For outputs that dictionaries reconstruct, o_h = sum_i f_i d_i W_O[h], it is the sum of
f_i f_j <d_i W_O, d_j W_O> over pairs of latents of different heads, so that removing it there is removing the
interference of their lifted atoms. Three ways to remove it, each at every token:

* `orthogonal`: the mutually orthogonal outputs of unchanged norms that are nearest to o in the sum of squared distances
  (an orthogonal Procrustes problem: with N = diag(|o_h|) they are N U, U the polar factor of N O). All cross terms are
  0 exactly, and the squared norm of the layer's output is the sum of the heads'.
* `others`: o_h less its projection on the sum of the other heads' outputs. What a head adds along what the others
  together add is gone; the results are not orthogonal to each other.
* `row_spaces`: o_h less its projection on the span of the other heads' W_O row spaces. This is a fixed linear map: what
  is left of a head is what no other head could have written. Where H d = D little is left, whatever the model.

Each is compared with a change of the layer's output by a vector of the same norm at each token, in a random direction
(seeded): a loss beyond that one's is due to the direction.
"""

from collections.abc import Callable, Iterable
from typing import NamedTuple

import torch
from torch import Tensor

WAYS = ("orthogonal", "others", "row_spaces")


def orthogonal(outputs: Tensor) -> Tensor:
    """(N, H, D) -> (N, H, D): the nearest outputs with the same norms and no cross terms, computed in float64.

    Where outputs are linearly dependent, to rounding, the nearest is not unique: that part of them is left, and
    so is a head whose norm is less than 1 / 3000 of the largest.
    """
    exact = outputs.double()
    norms = exact.norm(dim=2, keepdim=True)
    scaled = norms * exact
    size, basis = torch.linalg.eigh(scaled @ scaled.transpose(1, 2))  # (N, H), (N, H, H)
    known = size > 1e-14 * size[:, -1:].clamp(min=1e-300)
    inverse_root = torch.where(known, size.clamp(min=1e-300).rsqrt(), torch.zeros_like(size))
    polar = basis * inverse_root[:, None, :] @ basis.transpose(1, 2) @ scaled
    left = basis * ~known[:, None, :] @ basis.transpose(1, 2) @ exact
    return (norms * polar + left).to(outputs.dtype)


def others(outputs: Tensor) -> Tensor:
    """(N, H, D) -> (N, H, D): each head without its projection on the sum of the others."""
    rest = outputs.sum(1, keepdim=True) - outputs
    along = torch.linalg.vecdot(outputs, rest) / torch.linalg.vecdot(rest, rest).clamp(min=1e-30)
    return outputs - along[..., None] * rest


def row_spaces(W_O: Tensor) -> Tensor:
    """(H, d, D) -> (H, D, D): for each head the projection on the complement of the other heads' row spaces."""
    H, _, D = W_O.shape
    found = []
    for head in range(H):
        rest = W_O[torch.arange(H) != head].flatten(0, 1).double()
        _, size, basis = torch.linalg.svd(rest, full_matrices=False)
        basis = basis[size > size[0] * max(rest.shape) * torch.finfo(torch.float32).eps]
        found.append(torch.eye(D, dtype=torch.float64, device=W_O.device) - basis.T @ basis)
    return torch.stack(found).to(W_O)


def removals(W_O: Tensor) -> dict[str, Callable[[Tensor], Tensor]]:
    """The three ways, by name: (N, H, D) -> (N, H, D)."""
    projections = row_spaces(W_O)
    return {
        "orthogonal": orthogonal,
        "others": others,
        "row_spaces": lambda outputs: torch.einsum("nhd,hde->nhe", outputs, projections),
    }


class Change(NamedTuple):
    """The layer's output with the cross terms removed, and the control of the same size."""

    way: str
    control: bool
    output: Tensor
    """(N, D)"""


def changes(
    outputs: Tensor, rest: Tensor, ways: dict[str, Callable[[Tensor], Tensor]], generator: torch.Generator
) -> Iterable[Change]:
    """`outputs` (N, H, D), `rest` (D,) or (N, D): what is added to it. Controls draw from `generator` (CPU)."""
    unchanged = outputs.sum(1) + rest
    for way, remove in ways.items():
        changed = remove(outputs).sum(1) + rest
        yield Change(way, False, changed)
        direction = torch.randn(unchanged.shape, generator=generator, dtype=torch.float32).to(unchanged)
        direction /= direction.norm(dim=1, keepdim=True)
        yield Change(way, True, unchanged + (changed - unchanged).norm(dim=1, keepdim=True) * direction)
