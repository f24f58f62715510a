"""Sums of rows, and inner products with rows, along a sparse pattern: the three products of a step that are not dense.

A bag is a run of pairs that share a token (or, in the transposed pattern, a latent). Nothing here is differentiable. On
CPUs these are compiled loops (`loops`), on GPUs too where Triton is installed (`triton_loops`), elsewhere operations of
torch.
"""

from functools import partial

import torch
from torch import Tensor

from saeflow.kernels import loops


def sum_rows(rows: Tensor, indices: Tensor, starts: Tensor, values: Tensor) -> Tensor:
    """For each bag b the sum of values[j] rows[indices[j]] over its pairs j: (bags, width).

    rows (m, width), indices and values (P,), starts (bags + 1,).
    """
    if (gpu := loops.on_gpu(rows)) is not None:
        return gpu.sum_rows(rows, indices, starts, values)
    if not loops.supports(rows):
        return torch.nn.functional.embedding_bag(
            indices, rows, starts, mode="sum", per_sample_weights=values, include_last_offset=True
        )
    out = rows.new_empty(len(starts) - 1, rows.shape[1])
    arrays = [t.contiguous().numpy() for t in (rows, indices, starts, values, out)]
    loops.in_threads(partial(loops.sum_rows, *arrays), len(out), rows.shape[1] * len(indices), arrays[2])
    return out


def inner_products(g: Tensor, rows: Tensor, indices: Tensor, starts: Tensor) -> Tensor:
    """For each pair j of bag b: g[b] . rows[indices[j]], (P,). g (bags, width), rows (m, width), starts (bags + 1,)."""
    if (gpu := loops.on_gpu(rows)) is not None:
        return gpu.inner_products(g, rows, indices, starts)
    if not loops.supports(rows):
        bags = torch.repeat_interleave(starts.diff(), output_size=len(indices))
        return torch.ops.aten._embedding_bag_per_sample_weights_backward(g, rows, indices, starts[:-1], bags, 0)
    out = rows.new_empty(len(indices))
    arrays = [t.contiguous().numpy() for t in (g, rows, indices, starts, out)]
    loops.in_threads(partial(loops.inner_products, *arrays), len(g), rows.shape[1] * len(indices), arrays[3])
    return out


def sum_bags(values: Tensor, starts: Tensor) -> Tensor:
    """Values (P,) -> their sums in each bag (bags,)."""
    if not loops.supports(values):
        return torch.segment_reduce(values, "sum", offsets=starts)
    out = values.new_empty(len(starts) - 1)
    loops.sum_bags(values.numpy(), starts.numpy(), out.numpy())
    return out
