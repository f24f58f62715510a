"""What the weights alone say of a latent (Dunefsky, Chlenski, Nanda 2024, section 4.2): pullbacks of earlier latents,
of token embeddings and of heads, and what it does to the logits. All are but for the scale of the norm that reads.

Shapes: D model width, n latents, H heads, V vocabulary.
"""

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from saeflow.dictionaries import Dictionary

if TYPE_CHECKING:
    from transformer_lens import HookedTransformer


def ov(model: "HookedTransformer", layer: int, head: int) -> Tensor:
    """W_V W_O of a head (D, D): it writes x @ ov for an input x."""
    attention: Any = model.blocks[layer].attn
    return attention.W_V[head] @ attention.W_O[head]


def as_read(model: "HookedTransformer", direction: Tensor) -> Tensor:
    """`direction` (D,) of what a norm gives, as a direction of what it reads: centred where the norm centres."""
    return direction - direction.mean() if model.cfg.normalization_type == "LNPre" else direction


def connections(earlier: Dictionary, direction: Tensor, through: Tensor | None = None) -> Tensor:
    """How strongly each feature of `earlier` writes `direction` (D,), such as a later feature's column of W_enc: (n,).

    `through`: the `ov` of a head between the two.
    """
    return earlier.W_dec @ (direction if through is None else through @ direction)


def de_embedding(model: "HookedTransformer", direction: Tensor, through: Tensor | None = None) -> Tensor:
    """How strongly each token's embedding writes `direction` (D,), directly or through a head's `ov`: (V,)."""
    return model.embed.W_E @ (direction if through is None else through @ direction)


def ov_norms(model: "HookedTransformer", direction: Tensor, layer: int) -> Tensor:
    """|OV direction| of every head that can reach the MLP of `layer`: (layers, H)."""
    n_layers = layer + (0 if model.cfg.parallel_attn_mlp else 1)
    norms = [(ov(model, n, h) @ direction).norm() for n in range(n_layers) for h in range(model.cfg.n_heads)]
    return torch.stack(norms).view(n_layers, -1) if norms else torch.zeros(0, model.cfg.n_heads)


def logit_weights(written: Tensor, model: "HookedTransformer") -> Tensor:
    """What decoder rows `written` (..., D) add to the logits: (..., V)."""
    return written @ model.unembed.W_U
