"""Attributions of latents of attention outputs: what they add up to, and what autograd says."""

from pathlib import Path
from typing import Any

import pytest
import torch
from tests.heads.test_geometry import HEAD, HOOK, TOKENS, H, random, sae

from saeflow.config import ModelConfig
from saeflow.features.logits import logit_effects
from saeflow.heads.attribution import bias, by_head, by_source, de_embedding
from saeflow.heads.weights import encoder_by_head, read_attention
from saeflow.models.loading import load_model

LATENTS = [3, 17, 30]


def opened(folder: Path, dtype: torch.dtype, fold_ln: bool = False) -> Any:
    return load_model(folder, ModelConfig("tiny", path=str(folder), fold_ln=fold_ln), "cpu").to(dtype)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-10), (torch.float32, 1e-5)])
@pytest.mark.parametrize("subtract", [False, True])
def test_attributions_add_up_to_the_pre_activation(
    model_folder: Path, dtype: torch.dtype, tolerance: float, subtract: bool
) -> None:
    """Over heads, and over heads and sources: the pre-activation less its bias. Llama's query heads share values."""
    model = opened(model_folder, dtype)
    made = sae(H * HEAD, 40, apply_b_dec_to_input=subtract)
    for name, tensor in made.tensors.items():
        setattr(made, name, (tensor / 10).to(dtype))  # pre-activations of about 1
    _, cache = model.run_with_cache(TOKENS)
    z, pattern, v = cache[HOOK], cache["blocks.1.attn.hook_pattern"], cache["blocks.1.attn.hook_v"]
    w = encoder_by_head(made, H)[:, :, LATENTS]
    wanted = (made.pre_activations(z.flatten(0, 1).flatten(1)) - bias(made)).view(*TOKENS.shape, -1)[..., LATENTS]
    heads = by_head(z.flatten(0, 1), w).view(*TOKENS.shape, H, -1)
    torch.testing.assert_close(heads.sum(2), wanted, rtol=0, atol=tolerance)
    for row in range(len(TOKENS)):
        for m in range(len(LATENTS)):
            sources = by_source(pattern[row], v[row], w[:, :, m])
            torch.testing.assert_close(sources.sum(2).T, heads[row, :, :, m], rtol=0, atol=tolerance)
            torch.testing.assert_close(sources.sum((0, 2)), wanted[row, :, m], rtol=0, atol=tolerance)
            assert not sources.triu(1).any()  # nothing from later tokens


def test_an_attribution_by_source_is_the_gradient_times_the_value(model_folder: Path) -> None:
    """With patterns held: v . d pre / d v, by autograd through the model's own attention layer."""
    model = opened(model_folder, torch.float64)
    made = sae(H * HEAD, 40)
    _, cache = model.run_with_cache(TOKENS[:1])
    v, pattern = cache["blocks.1.attn.hook_v"], cache["blocks.1.attn.hook_pattern"]
    leaf = v.clone().requires_grad_()
    found = {}
    hooks = [("blocks.1.attn.hook_v", lambda _, hook: leaf), ("blocks.1.attn.hook_pattern", lambda _, hook: pattern)]
    hooks += [(HOOK, lambda value, hook: found.update(z=value))]
    with torch.enable_grad(), model.hooks(fwd_hooks=hooks):
        model(TOKENS[:1])
    token, latent = 9, 17
    made.pre_activations(found["z"][0, token].flatten()[None])[0, latent].backward()
    assert leaf.grad is not None
    by_gradient = (leaf.grad * v).sum(-1)[0]  # (P, G)
    sources = by_source(pattern[0], v[0], encoder_by_head(made, H)[:, :, latent])[:, token]  # (H, P)
    groups = sources.view(v.shape[2], -1, sources.shape[1]).sum(1)
    torch.testing.assert_close(groups.T, by_gradient, rtol=0, atol=1e-10)


@pytest.mark.parametrize("fold_ln", [False, True])
def test_de_embedding_is_what_a_head_reads_of_a_token_alone(model_folder: Path, fold_ln: bool) -> None:
    """A stream that is a token's embedding: its value times the encoder, times the norm's scale, less its bias."""
    model = opened(model_folder, torch.float64, fold_ln)
    made = sae(H * HEAD, 40)
    attention = read_attention(model, 1)
    w = encoder_by_head(made, H)[:, :, LATENTS]
    found = de_embedding(model, attention, w)
    assert found.shape == (H, 3, model.cfg.d_vocab)
    block = model.blocks[1]
    seen: dict[str, Any] = {}
    with model.hooks(fwd_hooks=[("blocks.1.ln1.hook_scale", lambda value, hook: seen.update(scale=value))]):
        x = block.ln1(model.embed.W_E[None])
    values = torch.einsum("ve,hed->vhd", x[0], block.attn.W_V) + block.attn.b_V
    given = torch.einsum("vhd,hdm->hmv", values - attention.b_V, w)
    torch.testing.assert_close(found, given * seen["scale"][0, :, 0], rtol=0, atol=1e-9)


@pytest.mark.parametrize("fold_ln", [False, True])
def test_logit_effects_are_the_change_of_the_logits(model_folder: Path, fold_ln: bool) -> None:
    """By autograd through the last norm with its scale held: the derivative along the direction."""
    model = opened(model_folder, torch.float64, fold_ln)
    directions = random(2, 32)
    found = logit_effects(model, directions)
    stream = random(5, 32, seed=3)
    seen: dict[str, Any] = {}

    def hold(value: Any, hook: Any) -> Any:
        return seen.setdefault("scale", value)

    with model.hooks(fwd_hooks=[("ln_final.hook_scale", hold)]):
        before, after = (model.unembed(model.ln_final(x[None]))[0] for x in (stream, stream + directions[0]))
    torch.testing.assert_close((after - before) * seen["scale"][0], found[0].expand(5, -1), rtol=0, atol=1e-9)


def test_the_bias_is_what_an_input_of_zeros_gives() -> None:
    for subtract in (False, True):
        made = sae(H * HEAD, 40, apply_b_dec_to_input=subtract)
        zero = made.pre_activations(torch.zeros(1, H * HEAD, dtype=torch.float64))[0]
        torch.testing.assert_close(bias(made), zero)
        assert zero.isfinite().all()
