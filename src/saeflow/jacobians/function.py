"""The Jacobian of any pair, in one call: `saeflow.jacobian`."""

from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor

from saeflow.dictionaries import Dictionary
from saeflow.dictionaries.spec import DictionaryError
from saeflow.jacobians.maps import JacobianBlocks, Pair
from saeflow.models.blocks import MLP, Block, ModuleBlock


def jacobian(
    sae_in: Dictionary,
    sae_out: Dictionary,
    mlp: MLP | Block | ModuleBlock | Callable[[Tensor], Tensor],
    x: Tensor,
    at: Literal["input", "reconstruction"] = "input",
) -> JacobianBlocks:
    """How the active latents of `sae_out` behind an MLP move with those of `sae_in` before it.

    `x` (N, d): what the MLP reads, one row a token. `mlp`: from there to what `sae_out` reads, (N, d) to (N, p): an
    `MLP` of weights, the block of a model (`saeflow.models.blocks.read_block`), or any function of torch that treats
    each token alone, which is differentiated forward and costs k passes. `at`: the Jacobian is taken at x (the JSAE
    paper, arXiv 2502.18147), or at what `sae_in` makes of it, where `sae_out` then has its latents (notebook 003).

    In what is returned `J[t, i, j]` (N, k_out, k_in) is the derivative of latent `outputs[t, i]` of token t by latent
    `inputs[t, j]`, and `values_out` and `values_in` are their activations. Entries of latents that are 0 are 0: the
    ReLU behind TopK lets nothing through. Where tokens differ in how many latents are active, blocks are padded with
    zeros to the widest, and `n_entries` (N,) counts the others.

    Raises `DictionaryError` for dictionaries that only SAELens computes, and for widths that do not fit.
    """
    for name, sae in (("sae_in", sae_in), ("sae_out", sae_out)):
        if sae.spec.activation == "saelens":
            said = sae.spec.saelens or "dictionary"
            raise DictionaryError(f"{name} is a {said} that only SAELens computes: use TopK, ReLU or JumpReLU")
    if x.ndim != 2 or x.shape[1] != sae_in.d_in:
        raise DictionaryError(f"x has shape {tuple(x.shape)}, but sae_in reads rows of {sae_in.d_in} values")
    block = Block(mlp) if isinstance(mlp, MLP) else mlp
    pair = Pair(block, sae_in, sae_out, at == "reconstruction", own_output=True)
    found = list(pair.blocks([x, x]))  # the second is what the model has there, which this does not know
    k_out, k_in = (max(blocks.J.shape[side] for blocks in found) for side in (1, 2))

    def joined(name: str, *widths: int) -> Tensor:
        parts = [getattr(blocks, name) for blocks in found]
        return torch.cat([_padded(part, widths) for part in parts])

    return JacobianBlocks(
        slice(0, len(x)),
        joined("J", k_out, k_in),
        joined("inputs", k_in),
        joined("outputs", k_out),
        joined("values_in", k_in),
        joined("values_out", k_out),
        joined("n_entries"),
    )


def _padded(values: Tensor, widths: tuple[int, ...]) -> Tensor:
    """(N, ...) to (N, *widths), zeros behind."""
    missing = [
        n for width, size in zip(reversed(widths), reversed(values.shape[1:]), strict=True) for n in (0, width - size)
    ]
    return torch.nn.functional.pad(values, missing)
