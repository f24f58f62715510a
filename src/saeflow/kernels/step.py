"""What every training step shares: the parameters, what a step returns, and how decoder rows are kept at norm 1.

Shapes: N tokens, d = `d_in`, p = `d_out`, n = `d_sae`. All steps minimise

    sum_t w_t ||y_hat_t - y_t||^2 + l1 * mean_t sum_i c_i f_ti,    f = act((x - b_dec or x) W_enc + b_enc),
    y_hat = f W_dec + b_dec,

where the weights w_t of the tokens say how the squared error is averaged (`token_weights`), and c_i is the norm of
latent i's decoder row or 1.
"""

from typing import NamedTuple

from torch import Tensor


class Weights(NamedTuple):
    """Parameters of a dictionary in training, or their gradients. Row i of both matrices belongs to latent i."""

    encoder: Tensor
    """(n, d): W_enc transposed, so that its gradient is a sum of contiguous rows, as the decoder's is."""
    b_enc: Tensor
    """(n,)"""
    W_dec: Tensor
    """(n, p)"""
    b_dec: Tensor
    """(p,)"""


class Step(NamedTuple):
    """What one step found. Tensors stay on the device; nothing here has waited for it."""

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
    gradients: Weights


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


def centre(x: Tensor, weights: Weights, centred: bool) -> Tensor:
    """What the encoder multiplies: x (N, d) without `b_dec` where the dictionary subtracts it."""
    return x - weights.b_dec if centred else x


def b_dec_gradient(g: Tensor, b_enc_gradient: Tensor, weights: Weights, centred: bool) -> Tensor:
    """Gradient (p,) of `b_dec` from that of y_hat (N, p); where the input is centred, also through the encoder.

    The latter needs no product over tokens: every pre-activation sees -b_dec W_enc.
    """
    gradient = g.sum(dim=0)
    return gradient.sub_(b_enc_gradient @ weights.encoder) if centred else gradient
