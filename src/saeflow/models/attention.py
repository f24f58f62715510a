"""Causal attention in one fused call, where nobody looks at scores or patterns.

TransformerLens computes scores, mask, softmax and pattern as separate tensors of (rows, H, positions, positions), so
that each can be hooked; in a small model they cost more than all matrix products together. Inside `fused_attention`
a model's attention runs through `scaled_dot_product_attention` instead. Values agree up to rounding. All hooks fire
but `hook_attn_scores`, `hook_pattern` and `hook_result`.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from saeflow.models.protocol import LanguageModel, full


def read_values(model: LanguageModel, layer: int) -> tuple[Tensor, Tensor]:
    """W_V (H, D, d) and b_V (H, d) of a layer by query head, the gain and bias of the norm before it folded in, whether
    or not the model was loaded with `fold_ln`."""
    block: Any = model.blocks[layer]
    norm = getattr(block, "ln1", None)
    gain, bias = getattr(norm, "w", None), getattr(norm, "b", None)
    W_V, b_V = full(block.attn.W_V.detach()), full(block.attn.b_V.detach())
    if bias is not None:
        b_V = b_V + torch.einsum("e,hed->hd", full(bias), W_V)
    return W_V if gain is None else full(gain)[:, None] * W_V, b_V


@contextmanager
def fused_attention(model: LanguageModel) -> Iterator[None]:
    """Within it, the layers of `model` whose attention is plain causal attention compute it in one call.

    Layers with anything else (a sliding window, ALiBi, soft-capped scores, ...) stay as they are.
    """
    changed = [block.attn for block in model.blocks if is_plain(block.attn)]
    for attention in changed:
        attention.forward = plain_forward(attention, fused)
    try:
        yield
    finally:
        for attention in changed:
            del attention.forward  # uncovers the method of its class


def is_plain(attention: Any) -> bool:
    """Whether the layer computes softmax(mask(q kᵀ / scale)) v W_O + b_O and nothing else."""
    from transformer_lens.components import Attention, GroupedQueryAttention

    if type(attention) not in (Attention, GroupedQueryAttention):
        return False
    c = attention.cfg
    return (
        attention.attn_type == "global"
        and (attention._attention_dir_override or c.attention_dir) == "causal"
        and c.positional_embedding_type in ("standard", "rotary")
        and c.original_architecture not in ("OlmoeForCausalLM", "Olmo2ForCausalLM", "Olmo3ForCausalLM")
        and c.attn_scores_soft_cap <= 0
        and c.clip_qkv is None
        and not (c.use_attention_sinks or c.use_logn_attn or c.use_attn_result or c.load_in_4bit)
    )


Attend = Callable[[Tensor, Tensor, Tensor, float], Tensor]
"""From queries (B, P, H, d_head), keys and values (B, P, G, d_head) and the factor of scores to z (B, P, H, d_head)."""


def fused(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    """Plain causal attention: an `Attend`."""
    grouped = k.shape[2] != q.shape[2]
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale, enable_gqa=grouped).transpose(1, 2)


def plain_forward(attention: Any, attend: Attend) -> Callable[..., Tensor]:
    """The forward pass of one plain layer, with its attention by `attend`. B rows, P positions, H query heads, G key
    and value heads."""

    def forward(query_input: Tensor, key_input: Tensor, value_input: Tensor, **rest: Any) -> Tensor:
        """Inputs (B, P, d_model) -> (B, P, d_model); without a cache of past keys, padding or position bias."""
        assert all(value is None for value in rest.values()), f"fused attention takes no {', '.join(rest)}"
        q, k, v = attention.calculate_qkv_matrices(query_input, key_input, value_input)  # (B, P, H or G, d_head)
        if attention.cfg.positional_embedding_type == "rotary":
            q = attention.hook_rot_q(attention.apply_rotary(q, 0))
            k = attention.hook_rot_k(attention.apply_rotary(k, 0))
        z = attention.hook_z(attend(q, k, v, 1 / attention.attn_scale))
        W_O = attention.W_O.flatten(0, 1)  # (H d_head, d_model)
        return F.linear(z.flatten(2), W_O.T, attention.b_O)

    return forward
