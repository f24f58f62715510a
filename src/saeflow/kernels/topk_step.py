"""One training step of a TopK dictionary whose only dense product is the encoder's.

The active pairs (t, i) form a pattern of k latents a token, and, sorted by latent, of a varying number of tokens a
latent. Three of the four remaining products gather rows along one of the two (`embedding_bag`: a weighted sum of rows
for each bag), the fourth takes one inner product a pair. Nothing has N n entries but the pre-activations. Exact.

Shapes as in `kernels.step`; k active latents a token, P = N k pairs.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from saeflow.kernels.step import Step, Weights, b_dec_gradient, centre


class Pattern(NamedTuple):
    """The active pairs of a batch."""

    indices: Tensor
    """(N, k): the latents of each token."""
    tokens: Tensor
    """(P,): the token of each pair, the pairs sorted by latent and then by token."""
    order: Tensor
    """(P,): where in the flat `indices` each of those pairs stands."""
    starts: Tensor
    """(n + 1,): where each latent's pairs start in `tokens`."""


def topk_loss(weights: Weights, x: Tensor, y: Tensor, w: Tensor, k: int, by_norm: bool, centred: bool) -> Tensor:
    """The loss as it is written; its autograd gradients define those of `topk_step`."""
    pre = centre(x, weights, centred) @ weights.encoder.T + weights.b_enc
    rank = pre * weights.W_dec.norm(dim=1) if by_norm else pre
    kept = torch.zeros_like(pre).scatter(1, torch.topk(rank, k, dim=1, sorted=False).indices, 1.0)
    f = torch.relu(pre) * kept
    return (w * (f @ weights.W_dec + weights.b_dec - y).square().sum(dim=1, keepdim=True)).sum()


@torch.no_grad()
def topk_step(weights: Weights, x: Tensor, y: Tensor, w: Tensor, k: int, by_norm: bool, centred: bool) -> Step:
    """Loss and gradients at inputs x (N, d) and targets y (N, p).

    `w` (N, 1) are the weights of the tokens' squared errors. `by_norm`: latents compete by pre-activation times the
    norm of their decoder row (what a latent contributes) rather than by pre-activation. `centred`: whether `b_dec` is
    subtracted from x. Of the k kept latents only those above 0 are active.
    """
    N, n = x.shape[0], weights.b_enc.shape[0]
    x = centre(x, weights, centred)
    values, indices = _top(weights, x, k, by_norm)
    pattern = _pattern(indices, n)

    error = _sum_rows(weights.W_dec, indices, values).add_(weights.b_dec).sub_(y)
    squared_norms = error.square().sum(dim=1)
    squared_error = w[:, 0] @ squared_norms
    sorted_values = values.view(-1)[pattern.order]
    activity = _sum_by_latent(sorted_values, pattern)
    sparsity = (activity @ weights.W_dec.norm(dim=1) if by_norm else activity.sum()) / N

    g = error.mul_(2 * w)  # of y_hat
    g_values = _inner_products(g, weights.W_dec, indices).mul_(values > 0)
    sorted_g_values = g_values.view(-1)[pattern.order]
    g_b_enc = _sum_by_latent(sorted_g_values, pattern)
    gradients = Weights(
        encoder=_sum_rows(x, pattern.tokens, sorted_g_values, pattern.starts),
        b_enc=g_b_enc,
        W_dec=_sum_rows(g, pattern.tokens, sorted_values, pattern.starts),
        b_dec=b_dec_gradient(g, g_b_enc, weights, centred),
    )
    return Step(squared_error, sparsity, squared_norms, activity, torch.count_nonzero(values), gradients)


def _top(weights: Weights, x: Tensor, k: int, by_norm: bool) -> tuple[Tensor, Tensor]:
    """x (N, d), centred -> values (N, k) after ReLU and their latents (N, k)."""
    if not by_norm:
        values, indices = torch.topk(torch.addmm(weights.b_enc, x, weights.encoder.T), k, dim=1, sorted=False)
        return values.relu_(), indices
    norms = weights.W_dec.norm(dim=1).clamp_(min=1e-12)
    scaled = torch.addmm(weights.b_enc * norms, x, (weights.encoder * norms[:, None]).T)
    values, indices = torch.topk(scaled, k, dim=1, sorted=False)
    return values.relu_().div_(norms[indices]), indices


def _pattern(indices: Tensor, n: int) -> Pattern:
    flat = indices.view(-1)
    latents, order = torch.sort(flat, stable=True)
    starts = torch.searchsorted(latents, torch.arange(n + 1, device=flat.device))
    return Pattern(indices, torch.div(order, indices.shape[1], rounding_mode="floor"), order, starts)


def _sum_rows(rows: Tensor, indices: Tensor, values: Tensor, starts: Tensor | None = None) -> Tensor:
    """For each bag of indices the sum of values * rows[indices]; bags are rows of `indices`, or begin at `starts`."""
    return torch.nn.functional.embedding_bag(
        indices, rows, starts, mode="sum", per_sample_weights=values, include_last_offset=starts is not None
    )


def _sum_by_latent(sorted_values: Tensor, pattern: Pattern) -> Tensor:
    """Values (P,) of the pairs sorted by latent -> their sums (n,)."""
    return torch.segment_reduce(sorted_values, "sum", offsets=pattern.starts)


def _inner_products(g: Tensor, rows: Tensor, indices: Tensor) -> Tensor:
    """g (N, p), rows (n, p), indices (N, k) -> g_t . rows[indices_tj] (N, k)."""
    N, k = indices.shape
    offsets = torch.arange(0, N * k, k, device=g.device)
    bags = torch.arange(N, device=g.device).repeat_interleave(k)
    flat = torch.ops.aten._embedding_bag_per_sample_weights_backward(g, rows, indices.view(-1), offsets, bags, 0)
    return flat.view(N, k)
