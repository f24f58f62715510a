"""Sums of rows, and inner products with rows, along a sparse pattern: the three products of a step that are not dense.

A bag is a run of pairs that share a token (or, in the transposed pattern, a latent). Nothing here is differentiable.
"""

import torch
from torch import Tensor


def sum_rows(rows: Tensor, indices: Tensor, starts: Tensor, values: Tensor) -> Tensor:
    """For each bag b the sum of values[j] rows[indices[j]] over its pairs j: (bags, width).

    rows (m, width), indices and values (P,), starts (bags + 1,).
    """
    return torch.nn.functional.embedding_bag(
        indices, rows, starts, mode="sum", per_sample_weights=values, include_last_offset=True
    )


def inner_products(g: Tensor, rows: Tensor, indices: Tensor, starts: Tensor) -> Tensor:
    """For each pair j of bag b: g[b] . rows[indices[j]], (P,). g (bags, width), rows (m, width), starts (bags + 1,)."""
    bags = torch.repeat_interleave(starts.diff(), output_size=len(indices))
    return torch.ops.aten._embedding_bag_per_sample_weights_backward(g, rows, indices, starts[:-1], bags, 0)


def sum_bags(values: Tensor, starts: Tensor) -> Tensor:
    """Values (P,) -> their sums in each bag (bags,)."""
    return torch.segment_reduce(values, "sum", offsets=starts)
