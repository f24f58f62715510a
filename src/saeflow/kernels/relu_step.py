"""One training step of a ReLU dictionary with an L1 penalty, in closed form: five dense products, no autograd.

Shapes as in `kernels.step`.
"""

import torch
from torch import Tensor

from saeflow.kernels.step import Step, Weights, b_dec_gradient, centre


def relu_loss(weights: Weights, x: Tensor, y: Tensor, w: Tensor, l1: float, by_norm: bool, centred: bool) -> Tensor:
    """The loss as it is written; its autograd gradients define those of `relu_step`."""
    f = torch.relu(centre(x, weights, centred) @ weights.encoder.T + weights.b_enc)
    penalised = f * weights.W_dec.norm(dim=1) if by_norm else f
    squared_norms = (f @ weights.W_dec + weights.b_dec - y).square().sum(dim=1, keepdim=True)
    return (w * squared_norms).sum() + l1 * penalised.sum(dim=1).mean()


@torch.no_grad()
def relu_step(
    weights: Weights, x: Tensor, y: Tensor, w: Tensor, l1: float, by_norm: bool, centred: bool, count: bool
) -> Step:
    """Loss and gradients at inputs x (N, d) and targets y (N, p).

    `w` (N, 1) are the weights of the tokens' squared errors. `l1`: the coefficient, of activations weighted by the norm
    of their decoder rows if `by_norm`. `centred`: subtract `b_dec` from x. `count`: count the active pairs.
    """
    N = x.shape[0]
    encoder, b_enc, W_dec, b_dec = weights
    norms = W_dec.norm(dim=1) if by_norm else torch.ones_like(b_enc)
    x = centre(x, weights, centred)
    f = torch.addmm(b_enc, x, encoder.T).relu_()

    error = torch.addmm(b_dec, f, W_dec).sub_(y)
    squared_norms = error.square().sum(dim=1)
    squared_error = w[:, 0] @ squared_norms
    activity = f.sum(dim=0)
    sparsity = activity @ norms / N

    g = error.mul_(2 * w)  # of y_hat
    g_pre = torch.addmm(norms * (l1 / N), g, W_dec.T)  # of f: from the error, and from the penalty
    torch.ops.aten.threshold_backward.grad_input(g_pre, f, 0, grad_input=g_pre)  # of the pre-activations
    g_W_dec = f.T @ g
    if by_norm:
        g_W_dec.addcmul_(W_dec, (activity * (l1 / N) / norms.clamp(min=1e-12))[:, None])
    g_b_enc = g_pre.sum(dim=0)
    gradients = Weights(g_pre.T @ x, g_b_enc, g_W_dec, b_dec_gradient(g, g_b_enc, weights, centred))
    active = torch.count_nonzero(f) if count else None
    return Step(squared_error, sparsity, squared_norms, activity, active, gradients)
