"""Folders of models in TransformerLens's own format: what they compute, and what of it is refused."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from saeflow.config import ModelConfig
from saeflow.heads.weights import head_outputs, read_attention
from saeflow.models.folder import ModelError, read_geometry
from saeflow.models.hooked import convert
from saeflow.models.loading import load_model

IDS = torch.randint(0, 300, (2, 40), generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module")
def made(hooked_source: Path, tokenizer_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("made")
    convert(hooked_source, tokenizer_folder, folder)
    return folder


@pytest.fixture(scope="module")
def source(hooked_source: Path) -> Any:
    """The model as TransformerLens itself opens a state dict."""
    from transformer_lens import HookedTransformer, HookedTransformerConfig

    sizes = {"n_layers": 2, "d_model": 32, "d_mlp": 64, "d_head": 8, "n_heads": 4, "n_ctx": 64, "d_vocab": 300}
    model = HookedTransformer(HookedTransformerConfig(**sizes, act_fn="gelu", normalization_type="LN", device="cpu"))
    state = torch.load(hooked_source / "tiny_1000_final.pth", weights_only=True)  # noqa: TID251
    model.load_state_dict(state, strict=False)
    return model.eval()


def opened(folder: Path, **more: Any) -> Any:
    return load_model(folder, ModelConfig("tiny", path=str(folder), **more), "cpu")


@torch.no_grad()
def test_it_computes_what_the_source_does(made: Path, source: Any) -> None:
    torch.testing.assert_close(opened(made)(IDS), source(IDS))
    processed = opened(made, fold_ln=True, center_writing_weights=True, center_unembed=True)
    assert processed.cfg.normalization_type == "LNPre"
    torch.testing.assert_close(processed(IDS).log_softmax(-1), source(IDS).log_softmax(-1), rtol=1e-4, atol=1e-4)
    assert (opened(made, randomise="permuted")(IDS) - source(IDS)).abs().max() > 0.1


def test_its_geometry_and_hooks_are_those_of_the_model(made: Path) -> None:
    geometry, model = read_geometry(made), opened(made)
    for name in ("n_layers", "d_model", "n_heads", "d_head", "d_mlp", "n_ctx"):
        assert getattr(geometry, name) == getattr(model.cfg, name)
    _, cache = model.run_with_cache(IDS, return_cache_object=False)
    for hook, size in geometry.block_hooks().items():
        assert tuple(cache[f"blocks.1.{hook}"].shape) == (2, 40, *size), hook


@torch.no_grad()
def test_its_attention_is_the_sum_of_its_heads(made: Path) -> None:
    for fold_ln in (False, True):
        model = opened(made, fold_ln=fold_ln).to(torch.float64)
        _, cache = model.run_with_cache(IDS)
        attention = read_attention(model, 1)
        written = head_outputs(cache["blocks.1.attn.hook_z"].flatten(0, 1), attention.W_O).sum(1) + attention.b_O
        wanted = cache["blocks.1.hook_attn_out"].flatten(0, 1)
        torch.testing.assert_close(written, wanted, rtol=0, atol=1e-10)


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"attn_only": True}, "with attn_only=True, which is not supported"),
        ({"shortformer_pos": True}, "with shortformer_pos=True"),
        ({"normalization": "RMS"}, "with normalization=RMS"),
        ({"architecture": "mingpt"}, "with architecture=mingpt"),
    ],
)
def test_what_is_not_supported_is_refused(made: Path, tmp_path: Path, keys: dict[str, Any], message: str) -> None:
    shutil.copytree(made, tmp_path / "m")
    config = tmp_path / "m" / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | keys))
    with pytest.raises(ModelError, match=message):
        read_geometry(tmp_path / "m")


def test_weights_that_do_not_fit_are_refused(made: Path, tmp_path: Path, hooked_source: Path) -> None:
    shutil.copytree(made, tmp_path / "m")
    state = load_file(made / "model.safetensors")
    del state["blocks.1.attn.b_O"]
    save_file(state, tmp_path / "m" / "model.safetensors")
    with pytest.raises(ModelError, match=r"in 1 tensors: blocks.1.attn.b_O is missing where \(32,\) belongs"):
        opened(tmp_path / "m")
    with pytest.raises(ModelError, match=r"has 0 files \*final.pth"):
        convert(made, hooked_source, tmp_path / "n")
