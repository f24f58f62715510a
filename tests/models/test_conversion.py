"""The check of a conversion: at the length that is used, at every hook, and right models are let through."""

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from conftest import save_model

from saeflow.config import ModelConfig
from saeflow.models import loading
from saeflow.models.folder import ModelError
from saeflow.models.loading import load_model
from saeflow.models.splicing import read_hooks

SIZES: dict[str, Any] = {
    "vocab_size": 300,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 48,
    "max_position_embeddings": 256,
}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 10_000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
IDS = torch.randint(0, 300, (1, 200), generator=torch.Generator().manual_seed(1))


def make(folder: Path, family: str, **settings: Any) -> Path:
    config = getattr(transformers, f"{family}Config")(**SIZES | settings)
    return save_model(getattr(transformers, f"{family}ForCausalLM")(config), folder)


def open_at(folder: Path, context_size: int, **processing: Any) -> Any:
    return load_model(folder, ModelConfig("tiny", path=str(folder), **processing), "cpu", context_size)


@pytest.mark.parametrize(
    ("family", "settings"),
    [
        ("Qwen2", {"use_sliding_window": True, "sliding_window": 100, "max_window_layers": 0}),
        ("Qwen2", {"use_sliding_window": True, "sliding_window": 100, "max_window_layers": 1}),
        ("Qwen2", {"use_sliding_window": False, "sliding_window": 100, "max_window_layers": 0}),
        ("Mistral", {"sliding_window": 100}),
        ("Mistral", {"sliding_window": None}),
        ("Llama", {"rope_parameters": LLAMA3}),
        ("Llama", {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 10_000.0, "factor": 2.0}}),
        ("Llama", {"tie_word_embeddings": True}),
    ],
)
@torch.no_grad()
def test_hooks_and_logits_are_those_of_transformers_beyond_every_window(
    tmp_path: Path, family: str, settings: dict[str, Any]
) -> None:
    folder = make(tmp_path / "m", family, **settings)
    original = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    wanted = original(input_ids=IDS, output_hidden_states=True)
    model = open_at(folder, 200)
    (found,) = read_hooks(model, IDS, ["blocks.0.hook_resid_post"])
    assert (found - wanted.hidden_states[1]).abs().max() < 1e-3
    assert (model(IDS) - wanted.logits).abs().max() < 1e-3


def without_window(monkeypatch: pytest.MonkeyPatch) -> None:
    """TransformerLens as it is: it knows no window of Qwen2."""
    make_config = loading._hooked_config

    def drop(*args: Any) -> Any:
        config = make_config(*args)
        config.use_local_attn, config.window_size, config.attn_types = False, None, None
        return config

    monkeypatch.setattr(loading, "_hooked_config", drop)


def test_a_window_that_is_dropped_shows_at_the_length_that_is_used(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    window = {"use_sliding_window": True, "sliding_window": 100, "max_window_layers": 1}
    folder = make(tmp_path / "m", "Qwen2", **window)
    without_window(monkeypatch)
    open_at(folder, 100)  # within the window there is nothing to see
    message = (
        r"on a row of 128 tokens they differ from token 10\d on, in blocks\.1\.hook_attn_out by .*cannot be used here"
    )
    with pytest.raises(ModelError, match=message):
        open_at(folder, 128)


def test_what_is_written_to_another_place_is_seen_though_logits_agree(
    neox_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A constant moved from the one bias to the other leaves a parallel block's output, and the logits, as they are."""
    convert = loading._convert

    def moved(*args: Any) -> Any:
        model, expected = convert(*args)
        model.blocks[1].attn.b_O += 1.0
        model.blocks[1].mlp.b_out -= 1.0
        return model, expected

    monkeypatch.setattr(loading, "_convert", moved)
    with pytest.raises(ModelError, match=r"from token 0 on, in blocks\.1\.hook_attn_out by"):
        open_at(neox_folder, 64)


def test_first_layers_are_judged_by_what_they_write_and_not_by_the_unembedding(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """SmolLM2's unembedding makes 0.7 nats of bfloat16's rounding at layer 15, on a processor with AMX."""
    without_window(monkeypatch)
    window = {"use_sliding_window": True, "sliding_window": 100, "max_window_layers": 0}
    folder = make(tmp_path / "m", "Qwen2", **window)
    with pytest.raises(ModelError, match=r"in blocks\.0\.hook_attn_out by"):
        load_model(folder, ModelConfig("tiny", path=str(folder)), "cpu", 200, n_layers=1)
    convert = loading._convert

    def otherwise_unembedded(*args: Any) -> Any:
        model, expected = convert(*args)
        model.unembed.W_U *= -1
        return model, expected

    monkeypatch.setattr(loading, "_convert", otherwise_unembedded)
    for n_layers in (None, 2):
        with pytest.raises(ModelError, match="in log-probabilities by"):
            load_model(folder, ModelConfig("tiny", path=str(folder)), "cpu", 64, n_layers)
    load_model(folder, ModelConfig("tiny", path=str(folder)), "cpu", 64, n_layers=1)


@pytest.mark.parametrize(
    "processing", [{}, {"fold_ln": True}, {"center_writing_weights": True}, {"center_unembed": True}]
)
def test_every_processing_of_a_right_model_passes(neox_folder: Path, gpt2_folder: Path, processing: Any) -> None:
    for folder in (neox_folder, gpt2_folder):
        open_at(folder, 64, **processing)


def test_a_weight_that_is_not_finite_is_named_as_such(neox_folder: Path, tmp_path: Path) -> None:
    original = transformers.AutoModelForCausalLM.from_pretrained(neox_folder)
    with torch.no_grad():
        original.gpt_neox.layers[1].mlp.dense_h_to_4h.weight[3, 4] = torch.nan
    original.save_pretrained(tmp_path)
    message = r"are not finite: of 2,048 values of gpt_neox\.layers\.1\.mlp\.dense_h_to_4h\.weight 1 are not, nan first"
    with pytest.raises(ModelError, match=message):
        open_at(tmp_path, 64)
