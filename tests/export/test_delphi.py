"""The latent cache against the activations of all tokens, by a reading of the files from their description."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file
from tests.export.peers import ask, fits

from saeflow.config import ModelConfig
from saeflow.export import delphi
from saeflow.export.subjects import Subject, subjects
from saeflow.features.firings import Firings
from saeflow.features.text import Text
from saeflow.models.loading import load_model
from saeflow.models.splicing import flattened, read_hooks
from saeflow.planning.graph import Plan
from saeflow.text.tokens import open_tokens

SCHEMA = json.loads((Path(__file__).parent / "schemas.json").read_text())["delphi"]
PROCESSING = {"fold_ln": False, "center_writing_weights": False, "center_unembed": False}
P, ROWS = 32, 16  # all that are held out


@pytest.fixture
def caches(exported: Any) -> tuple[Path, dict[str, Any]]:
    return exported("delphi")


@pytest.fixture(scope="module")
def model(neox_folder: Path) -> Any:
    return load_model(neox_folder, ModelConfig("tiny", path=str(neox_folder), **PROCESSING), "cpu")


def dense(model: Any, subject: Subject) -> tuple[np.ndarray, np.ndarray]:
    """Activations (R, P, n), 0 at BOS, and tokens (R, P)."""
    _, rows = open_tokens(subject.features().input("tokens")).spread_rows(ROWS, 0)
    tokens = torch.from_numpy(rows.tokens.astype(np.int64))
    with torch.no_grad():
        (value,) = read_hooks(model, tokens, [subject.dictionary.spec.hook_name])
    f = subject.dictionary.encode(flattened(value[:, 1:], None)).view(ROWS, P - 1, -1).numpy()
    return np.concatenate([np.zeros_like(f[:, :1]), f], axis=1), rows.tokens


def read(folder: Path) -> tuple[np.ndarray, np.ndarray, np.ndarray, list[tuple[int, int]]]:
    """Locations (A, 3) of whole numbers of latents, activations, tokens, and which latents each file has."""
    edges = sorted(tuple(map(int, file.stem.split("_"))) for file in folder.glob("*.safetensors"))
    parts = [load_file(folder / f"{first}_{last}.safetensors") for first, last in edges]
    for (first, last), part in zip(edges, parts, strict=True):
        assert part.keys() == SCHEMA["tensors"].keys()
        assert part["locations"].dtype == np.uint16 and part["activations"].dtype == np.float32
        assert part["locations"].shape == (len(part["activations"]), 3)
        assert part["locations"][:, 2].max(initial=0) <= last - first
        assert np.array_equal(part["tokens"], parts[0]["tokens"])
    whole = [
        part["locations"].astype(np.int64) + np.array([0, 0, first])
        for (first, _), part in zip(edges, parts, strict=True)
    ]
    activations = np.concatenate([part["activations"] for part in parts])
    return np.concatenate(whole), activations, parts[0]["tokens"], edges


def test_every_firing_is_there_once(caches: tuple[Path, dict[str, Any]], plan: Plan, model: Any) -> None:
    folder, about = caches
    for subject in subjects(plan):
        (entry,) = about["entries"][subject.name]
        (module,) = (folder / entry).iterdir()
        assert module.name == subject.dictionary.spec.hook_name
        locations, activations, tokens, edges = read(module)
        f, ids = dense(model, subject)
        n = subject.dictionary.d_sae
        assert len(edges) == 5 and [first for first, _ in edges] == [0, *(last + 1 for _, last in edges[:-1])]
        assert edges[-1][1] == n - 1
        np.testing.assert_array_equal(tokens, ids)
        found = np.zeros_like(f)
        found[tuple(locations.T)] = activations
        np.testing.assert_allclose(found, f, atol=1e-5)
        assert len(np.unique(locations, axis=0)) == len(locations) == np.count_nonzero(found)
        for latent in range(0, n, 9):  # delphi takes the firings of a latent for those of ascending tokens
            own = locations[locations[:, 2] == latent]
            assert np.all(np.diff(own[:, 0] * P + own[:, 1]) > 0)
        config = json.loads((module / "config.json").read_text())
        assert config.keys() == SCHEMA["config"].keys() and fits(config, "config", SCHEMA)
        assert (config["cache_ctx_len"], config["n_tokens"], config["n_splits"]) == (P, ROWS * P, 5)
        assert not [*(folder / entry).rglob("*.npy")]


def test_memory_and_width_follow_the_firings(tmp_path: Path) -> None:
    """A file has about as many firings as may be held, and wide numbers only where they are needed."""
    rng = np.random.default_rng(0)
    text = Text(rng.integers(0, 9, (70_000, 2)), np.zeros((70_000, 2), int), np.arange(70_000), 0)
    latent = rng.integers(0, 40, 140_000)
    firings = Firings(40, tmp_path / "scratch", segment=10_000)  # as with more than fits: through the disk
    for start in range(0, 140_000, 20_000):
        values = rng.random(20_000).astype(np.float32) + 1
        firings.add(20_000, np.arange(20_000), latent[start : start + 20_000], values)
    assert delphi.write_splits(firings, text, tmp_path, held=10_000) == 14 == len([*tmp_path.glob("*_*.s*")])
    first = load_file(tmp_path / "0_2.safetensors")
    assert first["locations"].dtype == np.uint32 and first["locations"][:, 0].max() > 65_535
    token = first["locations"][:, 0].astype(int) * 2 + first["locations"][:, 1]
    np.testing.assert_array_equal(latent[token], first["locations"][:, 2])


def test_delphis_own_reader_finds_the_same(caches: tuple[Path, dict[str, Any]], plan: Plan, neox_folder: Path) -> None:
    folder, about = caches
    subject = next(one for one in subjects(plan) if one.dictionary.spec.kind == "transcoder")
    (entry,) = about["entries"][subject.name]
    (module,) = (folder / entry).iterdir()
    found = ask("delphi", folder / entry, neox_folder)
    locations, activations, tokens, _ = read(module)
    assert found["tokens"] == tokens.tolist()
    assert {int(i) for i in found["latents"]} == set(locations[:, 2].tolist())
    for latent, theirs in found["latents"].items():
        own = locations[:, 2] == int(latent)
        assert theirs["locations"] == locations[own].tolist()
        assert theirs["activations"] == activations[own].tolist()
        assert found["frequency"][latent] == pytest.approx(own.sum() / tokens.size)
    assert found["config"]["cache_ctx_len"] == P
