import pytest
import torch

from saeflow.config import ModelConfig
from saeflow.models.attention import fused_attention, is_plain
from saeflow.models.loading import load_model

UNHOOKABLE = ("hook_attn_scores", "hook_pattern")


@pytest.fixture
def model(model_folder):
    return load_model(model_folder, ModelConfig(name="tiny", path=str(model_folder)), "cpu")


@torch.inference_mode()
def test_every_hook_agrees_with_transformer_lens(model):
    tokens = torch.randint(0, 300, (3, 32), generator=torch.Generator().manual_seed(0))
    logits, expected = model.run_with_cache(tokens)
    with fused_attention(model):
        fused_logits, found = model.run_with_cache(tokens)
    assert {k for k in expected if not k.endswith(UNHOOKABLE)} == set(found)
    for hook, values in found.items():
        torch.testing.assert_close(values, expected[hook], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(fused_logits, logits, rtol=1e-4, atol=1e-4)


@torch.inference_mode()
def test_the_model_is_as_before_afterwards(model):
    tokens = torch.arange(32)[None]
    before = model(tokens)
    with pytest.raises(KeyError), fused_attention(model):
        raise KeyError
    logits, cache = model.run_with_cache(tokens)
    assert torch.equal(logits, before) and "blocks.0.attn.hook_pattern" in cache


@torch.inference_mode()
def test_layers_that_are_not_plain_stay_as_they_are(model):
    tokens = torch.arange(32)[None]
    attention = model.blocks[1].attn
    attention.attn_type, attention.cfg.window_size = "local", 8
    assert not is_plain(attention) and is_plain(model.blocks[0].attn)
    with fused_attention(model):
        _, cache = model.run_with_cache(tokens)
    assert "blocks.1.attn.hook_pattern" in cache and "blocks.0.attn.hook_pattern" not in cache


@torch.inference_mode()
def test_a_cache_of_past_keys_is_refused(model):
    with fused_attention(model), pytest.raises(AssertionError, match="fused attention takes no"):
        model.blocks[0].attn(*[torch.zeros(1, 4, 32)] * 3, past_kv_cache_entry=object())
