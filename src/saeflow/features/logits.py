"""Which next tokens a latent raises and lowers directly: its decoder row through the unembedding.

    w = (d M) G W_U,  less its mean over the vocabulary, which no softmax sees

with d the decoder row, M what leads from its hook to the residual stream (`W_O` from hook_z, `W_out` from an MLP's
hidden units, the identity where the hook is as wide as the stream), and G the last norm's centring and gain; the norm's
scale, which depends on the text, is left out. Of a transcoder it is the side that it writes. Shapes: A latents, p what
the dictionary writes, D model width, V vocabulary.
"""

import re
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from saeflow.dictionaries import Dictionary
from saeflow.features.order import largest
from saeflow.models.protocol import LanguageModel, full, norms_of, unembedding


class LogitWeights(NamedTuple):
    """Token ids and weights of each latent, (A, most) each, the largest effect first."""

    raised: np.ndarray
    raised_by: np.ndarray
    lowered: np.ndarray
    lowered_by: np.ndarray


@torch.no_grad()
def direct_path(model: LanguageModel, hook_name: str, head: int | None = None) -> Tensor | None:
    """M (p, D) from a hook, or one head of it, to the residual stream; None where nothing leads there directly."""
    found = re.fullmatch(r"blocks\.(\d+)\.(.+)", hook_name)
    block = model.blocks[int(found[1])] if found else None
    if found and norms_of(model) != "before" and re.match(r"(attn|mlp)\.", found[2]):
        return None  # a norm is in between, whose scale depends on all that is written
    if block is not None and found is not None and found[2] == "attn.hook_z":
        W_O = full(block.attn.W_O)
        return W_O.flatten(0, 1) if head is None else W_O[head]
    if block is not None and found is not None and found[2] == "mlp.hook_post":
        return full(block.mlp.W_out)
    inside = found is not None and re.match(r"(attn|mlp)\.", found[2])
    return None if inside else torch.eye(model.cfg.d_model, device=model.cfg.device)


@torch.no_grad()
def logit_effects(model: LanguageModel, directions: Tensor) -> Tensor:
    """What directions (A, D) of the stream add to the logits directly, (A, V), but for the last norm's scale."""
    gain = getattr(getattr(model, "ln_final", None), "w", None)
    if str(model.cfg.normalization_type).startswith("LN"):
        directions = directions - directions.mean(dim=1, keepdim=True)
    if gain is not None:
        directions = directions * full(gain)
    return directions @ unembedding(model).W_U


@torch.no_grad()
def logit_weights(model: LanguageModel, dictionary: Dictionary, most: int) -> LogitWeights | None:
    """Of every latent the `most` tokens that it raises and lowers most, of equal ones the lower id first; None where
    its hook leads to no logits directly."""
    spec = dictionary.spec
    path = direct_path(model, spec.hook_name_out, spec.hook_head_index)
    if path is None or not most:
        return None
    most = min(most, model.cfg.d_vocab)
    size = max(1, (1 << 24) // model.cfg.d_vocab)
    found = []
    for rows in dictionary.W_dec.split(size):
        effects = logit_effects(model, rows.to(path) @ path)
        effects -= effects.mean(dim=1, keepdim=True)
        found.append([*largest(effects, most), *largest(-effects, most)])
    raised_by, raised, lowered_by, lowered = (np.concatenate(parts) for parts in zip(*found, strict=True))
    return LogitWeights(raised, raised_by, lowered, -lowered_by)
