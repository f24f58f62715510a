"""Sets of transcoders: by a reading of the files from their description, and what is refused."""

import dataclasses
import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file
from tests.export.peers import ask
from torch import Tensor

from saeflow.config import ConfigError
from saeflow.dictionaries import load_dictionary
from saeflow.export.circuit_tracer import refusal, write
from saeflow.export.run import export
from saeflow.export.subjects import subjects
from saeflow.planning.graph import Plan

SCHEMA = json.loads((Path(__file__).parent / "schemas.json").read_text())["circuit-tracer"]


@pytest.fixture
def sets(exported: Any) -> tuple[Path, dict[str, Any]]:
    return exported("circuit-tracer")


def read(file: Path, x: Tensor) -> tuple[Tensor, Tensor]:
    """Latents and output of one transcoder, from what the format says and nothing else. x (N, D)."""
    held = load_file(file)
    assert set(held) - set(SCHEMA["optional"]) == set(SCHEMA["tensors"])
    n, D = len(held["b_enc"]), len(held["b_dec"])
    sizes = {"n": n, "D": D}
    for name, shape in (SCHEMA["tensors"] | SCHEMA["optional"]).items():
        if name in held:
            assert list(held[name].shape) == [sizes[size] for size in shape] and held[name].dtype == torch.float32
    f = torch.nn.functional.linear(x, held["W_enc"], held["b_enc"])
    threshold = held.get("activation_function.threshold", torch.zeros(n))
    f = f * (f > threshold)
    y = f @ held["W_dec"] + held["b_dec"]
    return f, y + x @ held["W_skip"].T if "W_skip" in held else y


def test_every_set_computes_what_its_transcoders_do(sets: tuple[Path, dict[str, Any]], plan: Plan) -> None:
    folder, about = sets
    by_name = {one.name: one for one in subjects(plan)}
    found = {}
    for name, (entry,) in about["entries"].items():
        spec = by_name[name].dictionary.spec
        layer = int(spec.hook_name.split(".")[1])
        config = yaml.safe_load((folder / entry / "config.yaml").read_text())
        assert set(SCHEMA["config"]) <= set(config)
        assert f"blocks.{layer}.{config['feature_input_hook']}" == spec.hook_name
        assert f"blocks.{layer}.{config['feature_output_hook']}" == spec.hook_name_out
        assert (config["model_kind"], config["model_name"]) == ("transcoder_set", "tiny-neox")
        assert config["activation"] == spec.activation and config["scan"] == entry
        ours = load_dictionary(plan.folder("train", name))
        x = torch.randn(80, 32, generator=torch.Generator().manual_seed(layer))
        f, y = read(folder / entry / f"layer_{layer}.safetensors", x)
        torch.testing.assert_close(f, ours.encode(x))
        torch.testing.assert_close(y, ours.forward(x))
        found.setdefault(entry, []).append((layer, spec.activation))
    assert sorted(sorted(one) for one in found.values()) == [
        [(0, "jumprelu"), (1, "jumprelu")],
        [(0, "relu"), (1, "relu")],
    ]
    for entry in found:
        assert sorted(p.name for p in (folder / entry).iterdir()) == [
            "config.yaml", "layer_0.safetensors", "layer_1.safetensors"]  # fmt: skip


def test_what_it_cannot_compute_is_left_out_with_the_reason(sets: tuple[Path, dict[str, Any]], plan: Plan) -> None:
    _, about = sets
    assert about["entries"].keys() | about["left_out"].keys() == {one.name for one in subjects(plan)}
    reasons = {}
    for name, why in about["left_out"].items():
        config = plan.stages["train"][name.split("/")[0]].config["dictionary"]
        reasons[config["kind"], config["activation"]] = why
    assert "would compute its topk as a ReLU" in reasons["transcoder", "topk"]
    for kind in ("sae", "heads", "jacobian"):
        assert "it reconstructs what it reads" in reasons[kind, "topk"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"d_out": 16}, "it reads 32 entries and writes 16"),
        ({"hook_name_out": "blocks.1.hook_mlp_out"}, "which are not of one layer"),
        ({"hook_name": "ln_final.hook_normalized"}, "which are not of one layer"),
        ({"origin.fold_ln": True}, "trained with model.fold_ln=true, and circuit-tracer opens models as they were"),
        ({"activation": "saelens"}, "would compute its saelens as a ReLU"),
        ({}, ""),
    ],
)
def test_refusals(plan: Plan, monkeypatch: pytest.MonkeyPatch, change: dict[str, Any], message: str) -> None:
    (one, *_) = (s for s in subjects(plan) if s.dictionary.spec.kind == "transcoder")
    spec = one.dictionary.spec
    assert spec.activation == "relu" and spec.hook_name.startswith("blocks.0.")
    if "origin.fold_ln" in change:
        spec = dataclasses.replace(spec, origin=dataclasses.replace(spec.origin, fold_ln=True))
    else:
        spec = dataclasses.replace(spec, **change)
    monkeypatch.setattr(one.dictionary, "spec", spec)
    assert message in refusal(one.dictionary) and bool(message) == bool(refusal(one.dictionary))


def test_a_set_without_a_layer_is_refused(plan: Plan, tmp_path: Path) -> None:
    found = {s.name: s for s in subjects(plan)}
    (last,) = (
        name for name, s in found.items() if s.dictionary.spec.hook_name.startswith("blocks.1.ln2")
        and s.dictionary.spec.kind == "transcoder" and s.dictionary.spec.activation == "relu"
    )  # fmt: skip
    del plan.stages["train"][last]
    lacks = r"replaces the MLP of every layer, and there is none like it of layer 1: sweep site.layer=\[0,1\]"
    _, about = export(plan, "circuit-tracer", tmp_path / "x")
    left = [why for why in about["left_out"].values() if re.search(lacks, why)]
    assert len(left) == 1 and len(about["entries"]) == 2  # the other set is whole
    for name in about["entries"]:
        del plan.stages["train"][name]
    with pytest.raises(ConfigError, match="circuit-tracer cannot take"):
        export(plan, "circuit-tracer", tmp_path / "y/z")
    assert not (tmp_path / "y").exists()
    with pytest.raises(ConfigError, match="differ in nothing but their weights: export one of them alone"):
        one = next(s for s in subjects(plan) if not refusal(s.dictionary))
        write([one, one], tmp_path)


def test_an_experiment_without_transcoders_is_refused(plan: Plan, tmp_path: Path) -> None:
    saes = {key for key, one in plan.stages["train"].items() if one.config["dictionary"]["kind"] == "sae"}
    plan.stages["train"] = {key: one for key, one in plan.stages["train"].items() if key in saes}
    assert len(saes) == 2
    with pytest.raises(ConfigError, match=r"cannot take sae-.*, nor the other 1: it reconstructs what it reads"):
        export(plan, "circuit-tracer", tmp_path / "x")


def test_its_own_loader_computes_the_same(sets: tuple[Path, dict[str, Any]], plan: Plan, tmp_path: Path) -> None:
    folder, about = sets
    for entry in sorted({one for (one,) in about["entries"].values()}):
        names = [name for name, (one,) in about["entries"].items() if one == entry]
        x = torch.randn(2, 30, 32, generator=torch.Generator().manual_seed(0))
        save_file({"x": x}, tmp_path / "x.safetensors")
        found = ask("circuit-tracer", folder / entry, tmp_path / "x.safetensors")
        ours = sorted(names, key=lambda name: load_dictionary(plan.folder("train", name)).spec.hook_name)
        for layer, name in enumerate(ours):
            dictionary = load_dictionary(plan.folder("train", name))
            torch.testing.assert_close(torch.tensor(found["latents"][layer]), dictionary.encode(x[layer]))
            torch.testing.assert_close(torch.tensor(found["outputs"][layer]), dictionary.forward(x[layer]))
