"""The derivative of an MLP that is known, against that of dictionaries that stand in for it.

At an input x the MLP has the Jacobian J = W_in diag(phi'(x W_in + b_in)) W_out, (d, d) from input to output direction.
What is compared with it, in the same form:

* a transcoder: W_enc diag(f > 0) W_dec (+ W_skip^T);
* a pair of SAEs around the MLP: P_in J P_out, with P = W_enc diag(f > 0) W_dec of each. That is the pair's Jacobian of
  active latents (k, k), which `saeflow.jacobians.maps.Pair` gives, read by the encoder of the input SAE and written by
  the decoder of the output SAE: what one who looks at these latents alone takes the MLP to do. At x, not at its
  reconstruction.

A dictionary has only seen inputs that occur, and only along the directions in which these differ can it know J: both
are compared along those, weighted by how much inputs vary, C^1/2 J with C the covariance of the inputs.
`jacobian_cosine` is the mean over positions of the cosine between the two as vectors of d d entries (positions where J
vanishes along all that varies are left out); `jacobian_error` the mean squared distance over the mean squared size of
the truth.

A pair has only the entries between active latents, so not even the truth has a cosine of 1: of the compiled model
`jacobian_cosine_directions` is that of the pair whose latents are the directions of the program's variables, active
where the stream is not 0. `effective_inputs_true` says how sparse the truth is in that basis, `effective_inputs` how
sparse a pair's Jacobian is between latents, in the words of the Jacobian stage: of each output that has any derivative,
(sum |J|)^2 / sum J^2 over its inputs.
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


def dictionary_jacobians(dictionary: "Dictionary", x: Tensor) -> Tensor:
    """x (M, d) -> the Jacobian of the dictionary's output by its input there (M, d, d), rows by input direction."""
    J = torch.einsum("in,Mn,no->Mio", dictionary.W_enc, (dictionary.encode(x) > 0).to(x.dtype), dictionary.W_dec)
    return J if dictionary.W_skip is None else J + dictionary.W_skip.T


def effective_inputs(J: Tensor) -> float:
    """Mean over positions and outputs with a derivative, of J (M, d, d), rows by input direction."""
    squares = J.square().sum(1)
    live = squares > SMALLEST**2
    return (J.abs().sum(1).square()[live] / squares[live]).mean().item() if live.any() else 0.0


@torch.no_grad()
def compare_jacobians(
    network: Network, clean: Pass, dictionary: "Dictionary", input: "Dictionary | None" = None
) -> dict[str, Any]:
    """Of a transcoder from `blocks.L.hook_resid_mid` to `blocks.L.hook_mlp_out`, or of a pair of SAEs of these hooks,
    `input` the first of them; nothing of any other dictionary. Values are None where no input moves the MLP."""
    hook_name, hook_name_out = (input or dictionary).spec.hook_name, dictionary.spec.hook_name_out
    layer = hook_name.split(".")[1]
    if (hook_name, hook_name_out) != (f"blocks.{layer}.hook_resid_mid", f"blocks.{layer}.hook_mlp_out"):
        return {}
    x, y = (clean.at(name).flatten(0, 1) for name in (hook_name, hook_name_out))
    J, root = mlp_jacobians(network, int(layer), x), _root(torch.cov(x.T))
    if input is None:
        cosine, error = _agreement(root @ J, root @ dictionary_jacobians(dictionary, x))
        return {"jacobian_cosine": cosine, "jacobian_error": error}
    cosine, error = _agreement(
        root @ J, root @ dictionary_jacobians(input, x) @ J @ dictionary_jacobians(dictionary, y)
    )
    between = torch.einsum("ni,Mio,oq->Mnq", input.W_dec, J, dictionary.W_enc)
    between *= (input.encode(x) > 0)[:, :, None] & (dictionary.encode(y) > 0)[:, None]
    return {"jacobian_cosine": cosine, "jacobian_error": error, "effective_inputs": effective_inputs(between)}


@torch.no_grad()
def true_jacobians(network: Network, clean: Pass, layer: int) -> dict[str, Any]:
    """Of a compiled model, whose directions are variables: what a dictionary's numbers can be held against."""
    x, y = (clean.at(f"blocks.{layer}.{hook}").flatten(0, 1) for hook in ("hook_resid_mid", "hook_mlp_out"))
    J, root = mlp_jacobians(network, layer, x), _root(torch.cov(x.T))
    cosine, _ = _agreement(root @ J, root @ ((x != 0)[:, :, None] * J * (y != 0)[:, None]))
    return {"effective_inputs_true": effective_inputs(J), "jacobian_cosine_directions": cosine}


def _root(covariance: Tensor) -> Tensor:
    values, vectors = torch.linalg.eigh(covariance)
    root: Tensor = vectors * values.clamp(min=0).sqrt() @ vectors.T
    return root


def _agreement(J: Tensor, found: Tensor) -> tuple[float | None, float | None]:
    """Mean cosine, and squared distance over squared size, of two times (M, d, d)."""
    sizes, others = J.norm(dim=(1, 2)), found.norm(dim=(1, 2))
    some = sizes > SMALLEST
    if not some.any():
        return None, None
    cosine = (J * found).sum((1, 2)) / (sizes * others).clamp(min=SMALLEST**2)
    return cosine[some].mean().item(), ((J - found).square().sum() / J.square().sum()).item()
