"""One training step of a dictionary: loss and gradients, sparse wherever most latents are silent.

Shapes: N tokens, d = `d_in`, p = `d_out`, n = `d_sae`. All steps minimise

    sum_t w_t ||y_hat_t - y_t||^2 + l1 * mean_t sum_i c_i f_ti + extra,    f = act((x - b_dec or x) W_enc + b_enc),
    y_hat = f W_dec + b_dec (+ x W_skip^T),

where the weights w_t of the tokens say how the squared error is averaged (`token_weights`), and c_i is the norm of
latent i's decoder row or 1. `loss_as_written` is that, densely; its autograd gradients define those of `take_step`.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from saeflow.kernels.select import batch_top_k, positive, top_k
from saeflow.kernels.sparse import decode, encode, sum_by_latent


class Weights(NamedTuple):
    """Parameters of a dictionary in training, or their gradients. Row i of the first and third belongs to latent i."""

    encoder: Tensor
    """(n, d): W_enc transposed, so that its gradient is a sum of contiguous rows, as the decoder's is."""
    b_enc: Tensor
    """(n,)"""
    W_dec: Tensor
    """(n, p)"""
    b_dec: Tensor
    """(p,)"""
    W_skip: Tensor | None = None
    """(p, d), of a skip transcoder."""

    def named(self) -> dict[str, Tensor]:
        """Those that there are, by name."""
        return {name: t for name, t in self._asdict().items() if t is not None}

    def parameters(self) -> list[Tensor]:
        """Those that there are."""
        return list(self.named().values())


@dataclass(frozen=True)
class Objective:
    """What is minimised, but for coefficients that change with time."""

    activation: Literal["topk", "batchtopk", "relu"]
    k: int = 0
    by_norm: bool = False
    """Weigh latents by their decoder row's norm: in the penalty with relu, in the competition otherwise."""
    centred: bool = False
    """Subtract `b_dec` from the input."""
    squared_error: str = "sum"
    bf16: bool = False
    """The encoder's product, which decides what is active, in bfloat16."""


class Situation(NamedTuple):
    """What a term for dead latents may look at: the parameters with gradients, and the step so far."""

    weights: Weights
    centred: Tensor
    """(N, d): the encoder's input."""
    error: Tensor
    """(N, p): y_hat - y, detached."""
    w: Tensor
    """(N, 1): weights of the tokens' squared errors."""


class Step(NamedTuple):
    """What one step found. Tensors stay on the device; nothing here has waited for it."""

    loss: Tensor
    """(): all terms."""
    squared_error: Tensor
    """(): sum_t w_t ||y_hat_t - y_t||^2."""
    sparsity: Tensor
    """(): mean over tokens of sum_i c_i f_ti."""
    squared_norms: Tensor
    """(N,): ||y_hat_t - y_t||^2, whatever the weights of the tokens."""
    activity: Tensor
    """(n,): sum of each latent's activations over the tokens; above 0 where it fired."""
    active: Tensor | None
    """(): how many (token, latent) pairs are active; None where counting costs a pass and was not asked for."""
    smallest: Tensor | None
    """(): with batchtopk the smallest kept value (times norm with `by_norm`), infinite where nothing was active."""
    gradients: Weights


def take_step(
    objective: Objective,
    weights: Weights,
    x: Tensor,
    y: Tensor,
    l1: float = 0.0,
    sparse: bool = True,
    count: bool = True,
    extra: Callable[[Situation], Tensor] | None = None,
) -> Step:
    """Loss and gradients at inputs x (N, d) and targets y (N, p).

    `sparse`: the road to take with relu; the result is the same up to rounding, which is bfloat16's on the dense road
    with `objective.bf16`. `count`: count the active pairs even where that costs a pass. `extra`: one more term of the
    loss. N is 1 or more, and k at most n.
    """
    N = len(x)
    leaves = Weights(*(None if t is None else t.detach().requires_grad_() for t in weights))  # type: ignore[arg-type]
    norms = leaves.W_dec.norm(dim=1) if objective.by_norm else torch.ones_like(weights.b_enc)
    centre = leaves.b_dec if objective.centred else None
    active = smallest = None
    if sparse or objective.activation != "relu":
        select = _select(objective, norms.detach())
        values, pattern = encode(x, leaves.encoder, leaves.b_enc, select, centre)
        y_hat = decode(values, pattern, leaves.W_dec)
        with torch.set_grad_enabled(objective.activation == "relu"):
            activity = sum_by_latent(values, pattern)
        active = torch.count_nonzero(values.detach())
        if objective.activation == "batchtopk":
            ranked = values.detach() * norms.detach()[pattern.latents]
            smallest = (
                torch.where(ranked > 0, ranked, torch.inf).amin() if len(ranked) else ranked.new_tensor(torch.inf)
            )
    else:
        f = _DenseEncode.apply(x, leaves.encoder, leaves.b_enc, centre, objective.bf16)
        y_hat, activity = _DenseDecode.apply(f, leaves.W_dec)
        active = torch.count_nonzero(f.detach()) if count else None
    if leaves.W_skip is not None:
        y_hat = torch.addmm(y_hat, x, leaves.W_skip.T)

    w = token_weights(y, objective.squared_error)
    error = (y_hat + leaves.b_dec).sub_(y)
    squared_norms = error.square().sum(dim=1)
    squared_error = w[:, 0] @ squared_norms
    sparsity = activity @ norms / N
    loss = squared_error + l1 * sparsity if objective.activation == "relu" else squared_error
    if extra is not None:
        centred = x if centre is None else x - centre
        loss = loss + extra(Situation(leaves, centred, error.detach(), w))
    gradients = iter(torch.autograd.grad(loss, leaves.parameters()))
    return Step(
        loss.detach(),
        squared_error.detach(),
        sparsity.detach(),
        squared_norms.detach(),
        activity.detach(),
        active,
        smallest,
        Weights(*(None if t is None else next(gradients) for t in leaves)),  # type: ignore[arg-type]
    )


def loss_as_written(objective: Objective, weights: Weights, x: Tensor, y: Tensor, l1: float = 0.0) -> Tensor:
    """The loss, densely; among equal values torch.topk's choice is kept."""
    N, n = len(x), len(weights.b_enc)
    norms = weights.W_dec.norm(dim=1) if objective.by_norm else torch.ones_like(weights.b_enc)
    pre = (x - weights.b_dec if objective.centred else x) @ weights.encoder.T + weights.b_enc
    f = torch.relu(pre)
    if objective.activation != "relu":
        rank = (f * norms).detach()
        rank, k = (rank, objective.k) if objective.activation == "topk" else (rank.view(1, -1), objective.k * N)
        kept = torch.zeros_like(rank).scatter(1, torch.topk(rank, min(k, rank.shape[1]), dim=1).indices, 1.0)
        f = f * kept.view(N, n)
    y_hat = f @ weights.W_dec + weights.b_dec
    if weights.W_skip is not None:
        y_hat = y_hat + x @ weights.W_skip.T
    squared_error = (token_weights(y, objective.squared_error)[:, 0] * (y_hat - y).square().sum(dim=1)).sum()
    return squared_error + l1 * (f @ norms).mean() if objective.activation == "relu" else squared_error


def token_weights(y: Tensor, squared_error: str) -> Tensor:
    """Target y (N, p) -> weights (N, 1) of the tokens' squared errors.

    `sum`: over p, mean over N. `mean`: over both. `target_norm`: mean over both of the error divided by ||y_t||.
    """
    N, p = y.shape
    if squared_error == "target_norm":
        return (N * p * y.norm(dim=1, keepdim=True)).clamp_(min=1e-6).reciprocal_()  # a target of 0 has no scale
    return y.new_full((N, 1), {"sum": 1 / N, "mean": 1 / (N * p)}[squared_error])


def normalise_rows_(rows: Tensor) -> Tensor:
    """Makes every row of (n, p) a unit vector, in place. A row of zeros stays one."""
    return rows.div_(rows.norm(dim=1, keepdim=True).clamp_(min=1e-8))


def remove_parallel_(gradient: Tensor, rows: Tensor) -> Tensor:
    """Takes from each gradient row (n, p) its part along the unit row that it belongs to, in place.

    What is left moves the rows on the sphere; it must come before the optimiser, whose step would mix the two.
    """
    return gradient.addcmul_(rows, (gradient * rows).sum(dim=1, keepdim=True), value=-1)


def clip_norm_(gradients: list[Tensor], largest: float) -> None:
    """Scales all gradients by one factor so that their joint norm is at most `largest`; as torch's `clip_grad_norm_`.

    The factor stays on the device.
    """
    norm = torch.stack([g.norm() for g in gradients]).norm()
    torch._foreach_mul_(gradients, (largest / (norm + 1e-6)).clamp_(max=1.0))


def _select(objective: Objective, norms: Tensor) -> Callable[[Tensor, Tensor, Tensor], Any]:
    if objective.activation == "relu":
        return partial(positive, bf16=objective.bf16)
    scale = norms.clamp(min=1e-12) if objective.by_norm else None
    which = top_k if objective.activation == "topk" else batch_top_k
    return partial(which, k=objective.k, scale=scale, bf16=objective.bf16)


class _DenseEncode(torch.autograd.Function):
    """relu((x - centre) encoder^T + b_enc), (N, n), without a product for the gradient of `centre`."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, encoder: Tensor, b_enc: Tensor, centre: Tensor | None, bf16: bool) -> Tensor:
        x = x if centre is None else x - centre
        pre = x.bfloat16() @ encoder.bfloat16().T + b_enc if bf16 else torch.addmm(b_enc, x, encoder.T)
        f = pre.relu_()
        ctx.save_for_backward(x, encoder, f)
        return f

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor) -> Any:
        x, encoder, f = ctx.saved_tensors
        g = torch.ops.aten.threshold_backward(g, f, 0)
        g_b_enc = g.sum(dim=0)
        g_centre = -(g_b_enc @ encoder) if ctx.needs_input_grad[3] else None
        return None, g.T @ x, g_b_enc, g_centre, None


class _DenseDecode(torch.autograd.Function):
    """f (N, n) -> f W_dec (N, p) and the sums of f over tokens (n,); both gradients of f in one product."""

    @staticmethod
    def forward(ctx: Any, f: Tensor, W_dec: Tensor) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(f, W_dec)
        return f @ W_dec, f.sum(dim=0)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor, g_activity: Tensor) -> Any:
        f, W_dec = ctx.saved_tensors
        return torch.addmm(g_activity, g, W_dec.T), f.T @ g
