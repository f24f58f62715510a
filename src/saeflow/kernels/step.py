"""One training step of a dictionary: loss and gradients, sparse wherever most latents are silent.

Shapes: N tokens, d = `d_in`, p = `d_out`, n = `d_sae`. All steps minimise

    sum_t w_t ||y_hat_t - y_t||^2 + l1 * mean_t sum_i c_i f_ti + extra,    f = act((x - b_dec or x) W_enc + b_enc),
    y_hat = f W_dec + b_dec (+ x W_skip^T),

where the weights w_t of the tokens say how the squared error is averaged (`token_weights`), and c_i is the norm of
latent i's decoder row or 1. `loss_slow` is that, densely; its autograd gradients define those of `take_step`.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from typing import Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor

from saeflow.kernels import loops
from saeflow.kernels.rows import inner_products, sum_bags, sum_rows
from saeflow.kernels.select import Active, active_of_heads, at_once, batch_top_k, positive, top_k
from saeflow.kernels.sparse import Pattern, concatenate_heads


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


class AuxiliaryLossInput(NamedTuple):
    """What a term for dead latents may look at: the parameters with gradients, and the step so far."""

    weights: Weights
    centred: Tensor
    """(N, d): the encoder's input."""
    error: Tensor
    """(N, p): y_hat - y, detached."""
    w: Tensor
    """(N,): weights of the tokens' squared errors."""


AuxiliaryLoss = Callable[[AuxiliaryLossInput], Tensor]


@dataclass(frozen=True)
class StepMetrics:
    """What any trainer's step tells its metrics. Tensors stay on the device; nothing here has waited for it."""

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
    n_active: Tensor | None
    """(): how many (token, latent) pairs are active; None where counting costs a pass and was not asked for."""


@dataclass(frozen=True)
class Step(StepMetrics):
    """What one step found."""

    smallest: Tensor | None
    """(): with batchtopk the smallest kept value (times norm with `by_norm`), infinite where nothing was active."""
    gradients: Weights
    active_pairs: Active | None = None
    """The active pairs, of a sparse step."""


@torch.no_grad()
def take_step(
    objective: Objective,
    weights: Weights,
    x: Tensor,
    y: Tensor,
    l1: float | Tensor = 0.0,
    sparse: bool = True,
    count: bool = True,
    auxiliary_loss: AuxiliaryLoss | None = None,
    active: Active | None = None,
) -> Step:
    """Loss and gradients at inputs x (N, d) and targets y (N, p).

    `sparse`: whether a step with relu is sparse or dense; the result is the same up to rounding, which is bfloat16's in
    a dense step with `objective.bf16`. `count`: count the active pairs even where that costs a pass. `auxiliary_loss`:
    one more term of the loss, whose gradients autograd takes. `active`: what is active, where the caller knows. N is 1
    or more, and k at most n.
    """
    N = len(x)
    relu = objective.activation == "relu"
    norms = _norms(objective, weights)
    penalty = norms * (l1 / N if relu else 0.0)  # the price of one unit of each latent
    f = _activations(objective, weights, x, norms, sparse, active)
    error = _error_without_latents(weights, x, y)
    w = token_weights(y, objective.squared_error)
    squared_norms = f.reconstruct_(error, weights.W_dec, w, penalty)
    squared_error = w @ squared_norms
    encoder, b_enc, W_dec, activity = f.gradients(error, w, weights.W_dec)
    b_dec = 2 * (w @ error)
    if objective.centred:  # every pre-activation sees -b_dec W_enc: no product over tokens
        b_dec -= b_enc @ weights.encoder
    if relu and objective.by_norm:
        W_dec.addcmul_(weights.W_dec, (activity * (l1 / N) / norms.clamp(min=1e-30))[:, None])
    W_skip = None if weights.W_skip is None else (error * (2 * w)[:, None]).T @ x
    gradients = Weights(encoder, b_enc, W_dec, b_dec, W_skip)
    sparsity = activity @ norms / N
    loss = squared_error + l1 * sparsity if relu else squared_error
    if auxiliary_loss is not None:
        with torch.enable_grad():
            leaves = Weights(*(None if t is None else t.detach().requires_grad_() for t in weights))  # type: ignore[arg-type]
            centred = x - leaves.b_dec if objective.centred else x
            term = auxiliary_loss(AuxiliaryLossInput(leaves, centred, error, w))
            more = torch.autograd.grad(term, leaves.parameters(), allow_unused=True)
        for gradient, addition in zip(gradients.parameters(), more, strict=True):
            if addition is not None:
                gradient += addition
        loss = loss + term.detach()
    n_active = smallest = kept = None
    if isinstance(f, _Sparse):
        n_active = (f.values > 0).sum()
        kept = Active(f.values, f.pattern.latents, f.pattern.starts)
        smallest = _smallest(objective, kept, norms)
    elif count:
        n_active = (f.f > 0).sum()
    return Step(loss, squared_error, sparsity, squared_norms, activity, n_active, smallest, gradients, kept)


@torch.no_grad()
def take_steps(
    objective: Objective, weights: Weights, x: Tensor, y: Tensor, l1: Tensor, sparse: bool = True, count: bool = True
) -> tuple[list[Step], Weights]:
    """`take_step` of H dictionaries of one shape at once: weights, x (H, N, d) and y (H, N, p) with heads in front.

    `l1` (H,). After the products, taken head by head, all H are one pattern of H N tokens and H n latents, so that a
    step makes as many calls for H small dictionaries as for one. In dense steps each goes alone. Active pairs are
    counted only where `count` says so. Also returns the gradients with heads in front; those of each step are parts of
    them.
    """
    H, N, _ = x.shape
    relu = objective.activation == "relu"
    if relu and not sparse:
        alone = [Weights(*(None if t is None else t[h] for t in weights)) for h in range(H)]  # type: ignore[arg-type]
        results = [take_step(objective, alone[h], x[h], y[h], float(l1[h]), sparse, count) for h in range(H)]
        each = zip(*(step.gradients for step in results), strict=True)
        return results, Weights(*(None if g[0] is None else torch.stack(g) for g in each))  # type: ignore[arg-type]
    norms = _norms(objective, weights)
    price = (l1 / N if relu else torch.zeros_like(l1))[:, None]
    centred = x - weights.b_dec[:, None] if objective.centred else x
    active = _select_of_heads(objective, centred, weights.encoder, weights.b_enc, norms)
    flat = [weights.encoder, weights.W_dec, norms, norms * price]
    encoder, W_dec, norms, penalty = (t.flatten(0, 1) for t in flat)
    f = _Sparse(centred.flatten(0, 1), active, len(encoder))
    error = weights.b_dec[:, None] - y
    if weights.W_skip is not None:
        error.baddbmm_(x, weights.W_skip.mT)
    w = token_weights(y, objective.squared_error)
    squares = f.reconstruct_(error.flatten(0, 1), W_dec, w.flatten(), penalty).view(H, N)
    g_encoder, g_b_enc, g_W_dec, activity = f.gradients(error.flatten(0, 1), w.flatten(), W_dec)
    if relu and objective.by_norm:
        rate = activity * price.expand(H, norms.numel() // H).flatten() / norms.clamp(min=1e-30)
        g_W_dec.addcmul_(W_dec, rate[:, None])
    g_b_dec = 2 * torch.bmm(w[:, None], error)[:, 0]
    g_encoder, g_b_enc = g_encoder.view_as(weights.encoder), g_b_enc.view(H, -1)
    if objective.centred:
        g_b_dec -= torch.bmm(g_b_enc[:, None], weights.encoder)[:, 0]
    g_skip = None if weights.W_skip is None else torch.bmm((error * (2 * w)[..., None]).mT, x)
    gradients = Weights(g_encoder, g_b_enc, g_W_dec.view_as(weights.W_dec), g_b_dec, g_skip)
    squared_error = (w * squares).sum(dim=1)
    activity = activity.view(H, -1)
    sparsity = (activity * norms.view(H, -1)).sum(dim=1) / N
    loss = squared_error + l1 * sparsity if relu else squared_error
    by_head: list[Active | None] = [None] * H
    if count or objective.activation == "batchtopk":  # asking where heads begin waits for a GPU
        bounds = pairwise(active.starts[::N].tolist())
        by_head = [active._replace(values=active.values[a:b], latents=active.latents[a:b]) for a, b in bounds]
    n_active = [None if one is None else (one.values > 0).sum() for one in by_head]
    smallest = [None if one is None else _smallest(objective, one, norms) for one in by_head]
    parts = [Weights(*(None if t is None else t[h] for t in gradients)) for h in range(H)]  # type: ignore[arg-type]
    each = zip(loss, squared_error, sparsity, squares, activity, n_active, smallest, parts, strict=True)
    return [Step(*of_head) for of_head in each], gradients


@torch.no_grad()
def squared_norms(objective: Objective, weights: Weights, x: Tensor, y: Tensor, sparse: bool = True) -> Tensor:
    """||y_hat_t - y_t||^2 of each token (N,), as in `take_step`, without gradients."""
    norms = _norms(objective, weights)
    f, error = _activations(objective, weights, x, norms, sparse), _error_without_latents(weights, x, y)
    return f.reconstruct_(error, weights.W_dec, y.new_zeros(len(y)), torch.zeros_like(norms))


def _norms(objective: Objective, weights: Weights) -> Tensor:
    """What latents are weighed by (n,), or with heads in front: their decoder rows' norms, or 1."""
    return weights.W_dec.norm(dim=-1) if objective.by_norm else torch.ones_like(weights.b_enc)


def _error_without_latents(weights: Weights, x: Tensor, y: Tensor) -> Tensor:
    """The error (N, p) of an output without latents."""
    error = weights.b_dec - y
    return error if weights.W_skip is None else error.addmm_(x, weights.W_skip.T)


def loss_slow(objective: Objective, weights: Weights, x: Tensor, y: Tensor, l1: float = 0.0) -> Tensor:
    """The loss, densely; among equal values the first are kept."""
    N, n = len(x), len(weights.b_enc)
    norms = _norms(objective, weights)
    pre = (x - weights.b_dec if objective.centred else x) @ weights.encoder.T + weights.b_enc
    f = torch.relu(pre)
    if objective.activation != "relu":
        rank = (f * norms).detach()
        rank, k = (rank, objective.k) if objective.activation == "topk" else (rank.view(1, -1), objective.k * N)
        order = torch.sort(rank, dim=1, descending=True, stable=True).indices
        kept = torch.zeros_like(rank).scatter(1, order[:, :k], 1.0)
        f = f * kept.view(N, n)
    y_hat = f @ weights.W_dec + weights.b_dec
    if weights.W_skip is not None:
        y_hat = y_hat + x @ weights.W_skip.T
    squared_error = (token_weights(y, objective.squared_error) * (y_hat - y).square().sum(dim=1)).sum()
    return squared_error + l1 * (f @ norms).mean() if objective.activation == "relu" else squared_error


NO_SCALE = 1e-6  # of N p ||y_t||: of what is 0 but for rounding


def token_weights(y: Tensor, squared_error: str) -> Tensor:
    """Target y (N, p) -> weights (N,) of the tokens' squared errors; or both with heads in front.

    `sum`: over p, mean over N. `mean`: over both. `target_norm`: mean over both of the error divided by ||y_t||; a
    target of 0 has no scale to measure its error by, and weight 0: with any other it would drown all tokens that have
    one. It still counts in N, so that no token's weight depends on the others.
    """
    N, p = y.shape[-2:]
    if squared_error == "target_norm":
        scales = N * p * y.norm(dim=-1)
        return torch.where(scales <= NO_SCALE, 0.0, scales.reciprocal())
    return y.new_full(y.shape[:-1], {"sum": 1 / N, "mean": 1 / (N * p)}[squared_error])


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
    norm = torch.stack(torch._foreach_norm(gradients)).norm()
    torch._foreach_mul_(gradients, (largest / (norm + 1e-6)).clamp_(max=1.0))


def clip_norms_(gradients: list[Tensor], largest: float) -> None:
    """`clip_norm_` of H dictionaries, each by itself; gradients with heads in front."""
    norms = torch.stack([g.flatten(1).norm(dim=1) for g in gradients]).norm(dim=0)
    factors = (largest / (norms + 1e-6)).clamp_(max=1.0)
    for gradient in gradients:
        gradient.mul_(factors.view(-1, *[1] * (gradient.dim() - 1)))


class _Sparse:
    """Activations by their active pairs. x (N, d) is the encoder's input."""

    def __init__(self, x: Tensor, active: Active, n_latents: int) -> None:
        self.x, self.values = x, active.values
        self.pattern = Pattern(active.latents, active.starts, n_latents)

    def reconstruct_(self, error: Tensor, W_dec: Tensor, w: Tensor, penalty: Tensor) -> Tensor:
        """Adds f W_dec to error (N, p); returns its rows' squared norms (N,). Keeps the gradient of
        sum_t w_t |error_t|^2 + penalty . f_t towards the pre-activations."""
        values, (latents, starts) = self.values, (self.pattern.latents, self.pattern.starts)
        if (gpu := loops.on_gpu(error)) is not None:
            squares, self.g_values = gpu.reconstruct(values, latents, starts, W_dec, 2 * w, penalty, error)
            return squares
        if not loops.supports(error):
            error += sum_rows(W_dec, latents, starts, values)
            self.g_values = inner_products(error * (2 * w)[:, None], W_dec, latents, starts).add_(penalty[latents])
            self.g_values *= values > 0
            return error.square().sum(dim=1)
        squares, self.g_values = torch.empty_like(w), torch.empty_like(values)
        tensors = values, latents, starts, W_dec, 2 * w, penalty, error, squares, self.g_values
        work = partial(loops.reconstruct, *(t.numpy() for t in tensors))
        loops.in_threads(work, len(error), len(values) * error.shape[1], starts.numpy())
        return squares

    def gradients(self, error: Tensor, w: Tensor, W_dec: Tensor) -> tuple[Tensor, ...]:
        """After `reconstruct_` -> gradients of encoder, b_enc and W_dec; sums of activations (n,)."""
        values, g_values, n = self.values, self.g_values, len(W_dec)
        if loops.supports(error):
            P, by_token = len(values), (values, g_values, self.pattern.latents, self.pattern.starts)
            by_latent = np.empty(P, np.int32), *np.empty((2, P), values.numpy().dtype), np.empty(n + 1, np.int64)
            encoder, decoder, sums = error.new_empty(n, self.x.shape[1]), torch.empty_like(W_dec), error.new_empty(2, n)
            loops.transpose_values(*(t.numpy() for t in by_token), *by_latent)
            g = error * (2 * w)[:, None]
            work = partial(loops.gradients, *by_latent, *(t.numpy() for t in (g, self.x, encoder, decoder, sums)))
            loops.in_threads(work, n, P * error.shape[1], by_latent[-1])
            return encoder, sums[1], decoder, sums[0]
        tokens, order, starts = self.pattern.by_latent
        if (gpu := loops.on_gpu(error)) is not None:
            return gpu.gradients(values, g_values, error, 2 * w, self.x, *self.pattern.by_latent)
        values, g_values = values[order], g_values[order]
        encoder = sum_rows(self.x, tokens, starts, g_values)
        decoder = sum_rows(error * (2 * w)[:, None], tokens, starts, values)
        return encoder, sum_bags(g_values, starts), decoder, sum_bags(values, starts)


class _Dense:
    """The same as a matrix f (N, n)."""

    def __init__(self, x: Tensor, f: Tensor) -> None:
        self.x, self.f = x, f

    def reconstruct_(self, error: Tensor, W_dec: Tensor, w: Tensor, penalty: Tensor) -> Tensor:
        self.penalty = penalty
        return error.addmm_(self.f, W_dec).square().sum(dim=1)

    def gradients(self, error: Tensor, w: Tensor, W_dec: Tensor) -> tuple[Tensor, ...]:
        g = error * (2 * w)[:, None]
        g_pre = torch.ops.aten.threshold_backward(torch.addmm(self.penalty, g, W_dec.T), self.f, 0)
        encoder, W_dec = (self.x.T @ g_pre).T, (g.T @ self.f).T  # faster than the other way round
        return encoder.contiguous(), g_pre.sum(dim=0), W_dec.contiguous(), self.f.sum(dim=0)


def _activations(
    objective: Objective, weights: Weights, x: Tensor, norms: Tensor, sparse: bool, active: Active | None = None
) -> _Sparse | _Dense:
    encoder, b_enc, bf16 = weights.encoder, weights.b_enc, objective.bf16
    x = x - weights.b_dec if objective.centred else x
    if objective.activation == "relu" and not sparse:
        pre = x.bfloat16() @ encoder.bfloat16().T + b_enc if bf16 else torch.addmm(b_enc, x, encoder.T)
        return _Dense(x, pre.relu_())
    if active is None:
        active = _select(objective, x, encoder, b_enc, norms)
    return _Sparse(x, active, len(b_enc))


def _select(objective: Objective, x: Tensor, encoder: Tensor, b_enc: Tensor, norms: Tensor) -> Active:
    if objective.activation == "relu":
        return positive(x, encoder, b_enc, objective.bf16)
    scale = norms.clamp(min=1e-12) if objective.by_norm else None
    which = top_k if objective.activation == "topk" else batch_top_k
    return which(x, encoder, b_enc, objective.k, scale, objective.bf16)


def _select_of_heads(objective: Objective, x: Tensor, encoder: Tensor, b_enc: Tensor, norms: Tensor) -> Active:
    """`_select` of heads as one pattern: row t of head h is row h N + t, its latent i column h n + i."""
    if objective.activation != "batchtopk" and at_once(x, encoder):
        k = objective.k if objective.activation == "topk" else None
        scale = norms.clamp(min=1e-12) if objective.by_norm and k else None
        return active_of_heads(x, encoder, b_enc, k, scale)
    heads = [_select(objective, *head) for head in zip(x, encoder, b_enc, norms, strict=True)]
    return concatenate_heads(heads, b_enc.shape[1])


def _smallest(objective: Objective, active: Active, norms: Tensor) -> Tensor | None:
    if objective.activation != "batchtopk":
        return None
    ranked = active.values * norms[active.latents]
    return torch.where(ranked > 0, ranked, torch.inf).amin() if len(ranked) else ranked.new_tensor(torch.inf)
