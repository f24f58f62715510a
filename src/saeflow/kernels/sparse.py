"""Encoder and decoder of a sparse dictionary as differentiable functions whose one dense product is the encoder's.

The active (token, latent) pairs of a batch form a `Pattern`. What follows the encoder's product, forwards and
backwards, costs as many row operations as there are pairs; nothing has N n entries. Gradients are exact: what is not
active has none. No gradient towards the input is taken unless something asks for it. `dense_encode` and `dense_decode`
are the slow twins.

Shapes: N tokens, d = `d_in`, p = `d_out`, n = `d_sae`, P pairs.
"""

from collections.abc import Callable
from functools import cached_property
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from saeflow.kernels import loops
from saeflow.kernels.rows import inner_products, sum_bags, sum_rows
from saeflow.kernels.select import Active

Select = Callable[[Tensor, Tensor, Tensor], Active]
"""x (N, d), encoder (n, d), b_enc (n,) -> what is active: `select.top_k` and its siblings with their options bound."""


class ByLatent(NamedTuple):
    """The pairs of a pattern once more, ordered by latent and then by token: the transposed pattern."""

    tokens: Tensor
    """(P,)"""
    order: Tensor
    """(P,): where each of these pairs stands in the order by token."""
    starts: Tensor
    """(n + 1,): where each latent's pairs start."""


class Pattern:
    """Which pairs are active: `latents` (P,) by token, `starts` (N + 1,) of each token in them."""

    def __init__(self, latents: Tensor, starts: Tensor, n_latents: int) -> None:
        self.latents, self.starts, self.n_latents = latents, starts, n_latents

    @cached_property
    def by_latent(self) -> ByLatent:
        """Built once a step, however many products use it."""
        latents, n = self.latents, self.n_latents
        if loops.supports(latents):
            by_latent = ByLatent(torch.empty_like(latents), torch.empty_like(latents), latents.new_empty(n + 1))
            loops.transpose(latents.numpy(), self.starts.numpy(), *(t.numpy() for t in by_latent))
            return by_latent
        short = latents.to(torch.int16 if n < 1 << 15 else torch.int32)  # sorting goes by bytes
        found, order = torch.sort(short, stable=True)
        starts = self.starts.new_zeros(n + 1)
        torch.searchsorted(found, torch.arange(n, dtype=short.dtype, device=order.device), right=True, out=starts[1:])
        tokens = torch.searchsorted(self.starts, order, right=True).sub_(1)
        return ByLatent(tokens, order, starts)

    def dense(self, values: Tensor) -> Tensor:
        """Values (P,) as a matrix (N, n): for tests, and for what is not worth a kernel."""
        tokens = torch.repeat_interleave(self.starts.diff(), output_size=len(values))
        return values.new_zeros(len(self.starts) - 1, self.n_latents).index_put((tokens, self.latents), values)


def encode(
    x: Tensor, encoder: Tensor, b_enc: Tensor, select: Select, centre: Tensor | None = None
) -> tuple[Tensor, Pattern]:
    """Activations of the pairs that `select` keeps, relu((x - centre) encoder^T + b_enc): values (P,), and the pattern.

    x (N, d), encoder (n, d): W_enc transposed, b_enc (n,), `centre` (d,) or None.
    """
    with torch.no_grad():
        centred = x if centre is None else x - centre
        active = select(centred, encoder, b_enc)
    pattern = Pattern(active.latents, active.starts, len(b_enc))
    values: Tensor = _Encode.apply(x, encoder, b_enc, centre, (centred, active.values, pattern))
    return values, pattern


def decode(values: Tensor, pattern: Pattern, W_dec: Tensor) -> Tensor:
    """Values (P,), W_dec (n, p) -> f W_dec, (N, p)."""
    found: Tensor = _Decode.apply(values, W_dec, pattern)
    return found


def dense_encode(x: Tensor, encoder: Tensor, b_enc: Tensor, centre: Tensor | None, pattern: Pattern) -> Tensor:
    """Twin of `encode` for a known pattern: activations (N, n), by a dense product and a mask."""
    pre = (x if centre is None else x - centre) @ encoder.T + b_enc
    return torch.relu(pre) * pattern.dense(torch.ones_like(pattern.latents, dtype=pre.dtype))


def dense_decode(values: Tensor, pattern: Pattern, W_dec: Tensor) -> Tensor:
    """Twin of `decode`."""
    return pattern.dense(values) @ W_dec


class _Encode(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, encoder: Tensor, b_enc: Tensor, centre: Tensor | None, found: Any) -> Tensor:
        """`found`: the encoder's input, values, and pattern."""
        centred, values, ctx.pattern = found
        ctx.save_for_backward(centred, encoder, values)
        return values.view_as(values)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor) -> Any:
        centred, encoder, values = ctx.saved_tensors
        pattern = ctx.pattern
        g = g * (values > 0)  # of the pre-activations
        by_latent = pattern.by_latent
        sorted_g = g[by_latent.order]
        g_b_enc = sum_bags(sorted_g, by_latent.starts)
        g_encoder = sum_rows(centred, by_latent.tokens, by_latent.starts, sorted_g)
        g_x = g_centre = None
        if ctx.needs_input_grad[0]:
            g_x = sum_rows(encoder, pattern.latents, pattern.starts, g)
        if ctx.needs_input_grad[3]:  # every pre-activation sees -centre W_enc: no product over tokens
            g_centre = -(g_b_enc[None] @ encoder)[0]
        return g_x, g_encoder, g_b_enc, g_centre, None


class _Decode(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, values: Tensor, W_dec: Tensor, pattern: Pattern) -> Tensor:
        ctx.save_for_backward(values, W_dec)
        ctx.pattern = pattern
        return sum_rows(W_dec, pattern.latents, pattern.starts, values)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor) -> Any:
        values, W_dec = ctx.saved_tensors
        pattern = ctx.pattern
        g = g.contiguous()
        g_values = g_W_dec = None
        if ctx.needs_input_grad[0]:
            g_values = inner_products(g, W_dec, pattern.latents, pattern.starts)
        if ctx.needs_input_grad[1]:
            by_latent = pattern.by_latent
            g_W_dec = sum_rows(g, by_latent.tokens, by_latent.starts, values[by_latent.order])
        return g_values, g_W_dec, None


def concatenate_heads(heads: list[Active], n_latents: int) -> Active:
    """Patterns of H heads as one: the latents of head h are numbered from h n, its pairs follow those before it."""
    values = torch.cat([head.values for head in heads])
    latents = torch.cat([head.latents + h * n_latents for h, head in enumerate(heads)])
    counts = torch.cat([head.starts.diff() for head in heads])
    return Active(values, latents, torch.cat([counts.new_zeros(1), counts.cumsum(0)]))
