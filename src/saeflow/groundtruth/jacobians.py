"""The derivative of an MLP that is known, against that of a transcoder that stands in for it.

At an input x the MLP has the Jacobian J = W_in diag(phi'(x W_in + b_in)) W_out, (d, d) from input to output direction,
and a transcoder W_enc diag(f > 0) W_dec (+ W_skip^T). A transcoder has only seen inputs that occur, and only along
the directions in which these differ can it know J: both are compared along those, weighted by how much inputs vary,
C^1/2 J with C the covariance of the inputs. `jacobian_cosine` is the mean over positions of the cosine between the two
as vectors of d d entries (positions where J vanishes along all that varies are left out); `jacobian_error` the mean
squared distance over the mean squared size of the truth. Of the compiled model `effective_inputs_true` says how sparse
the truth is in its own basis, in the words of the Jacobian stage's `effective_inputs`: of each output that has any
derivative, (sum |J|)^2 / sum J^2 over its inputs.
"""

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from saeflow.groundtruth.network import Network, Pass

if TYPE_CHECKING:
    from saeflow.dictionaries import Dictionary

SMALLEST = 1e-6  # norm of a Jacobian along what varies, below which there is no direction to compare


def mlp_jacobians(network: Network, layer: int, x: Tensor) -> Tensor:
    """x (M, d) before the MLP of a layer -> J (M, d, d), rows by input direction."""
    p, name = network.parameters, f"blocks.{layer}.mlp."
    pre = (x @ p[name + "W_in"] + p[name + "b_in"]).detach().requires_grad_()
    with torch.enable_grad():
        (slopes,) = torch.autograd.grad(network.activation(pre).sum(), pre)
    return torch.einsum("im,Mm,mo->Mio", p[name + "W_in"], slopes, p[name + "W_out"])


def transcoder_jacobians(dictionary: "Dictionary", x: Tensor) -> Tensor:
    """x (M, d) -> (M, d, d)."""
    active = (dictionary.encode(x) > 0).to(x.dtype)
    J = torch.einsum("in,Mn,no->Mio", dictionary.W_enc, active, dictionary.W_dec)
    return J if dictionary.W_skip is None else J + dictionary.W_skip.T


def effective_inputs(J: Tensor) -> float:
    """Mean over positions and outputs with a derivative, of J (M, d, d), rows by input direction."""
    squares = J.square().sum(1)
    live = squares > SMALLEST**2
    return (J.abs().sum(1).square()[live] / squares[live]).mean().item() if live.any() else 0.0


@torch.no_grad()
def compare_jacobians(network: Network, clean: Pass, dictionary: "Dictionary") -> dict[str, Any]:
    """Of a transcoder from `blocks.L.hook_resid_mid` to `blocks.L.hook_mlp_out`; nothing of any other dictionary."""
    spec = dictionary.spec
    layer = spec.hook_name.split(".")[1]
    if (spec.hook_name, spec.hook_name_out) != (f"blocks.{layer}.hook_resid_mid", f"blocks.{layer}.hook_mlp_out"):
        return {}
    x = clean.at(spec.hook_name).flatten(0, 1)
    values, vectors = torch.linalg.eigh(torch.cov(x.T))
    root = vectors * values.clamp(min=0).sqrt() @ vectors.T
    truth, found = (root @ J for J in (mlp_jacobians(network, int(layer), x), transcoder_jacobians(dictionary, x)))
    sizes, others = truth.norm(dim=(1, 2)), found.norm(dim=(1, 2))
    cosine = (truth * found).sum((1, 2)) / (sizes * others).clamp(min=SMALLEST**2)
    some = sizes > SMALLEST
    error = (truth - found).square().sum() / truth.square().sum() if some.any() else None
    return {
        "jacobian_cosine": cosine[some].mean().item() if some.any() else None,
        "jacobian_error": None if error is None else error.item(),
    }
