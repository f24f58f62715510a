"""`scripts/verify.py` finds whatever is not as it was written, says what a rerun makes again, and lets it."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import zarr
from stores import TRAINING_STORE, contents, write_receipt, write_store

from saeflow.activations.coordinates import damaged_coordinates
from saeflow.storage.checksums import save_state
from saeflow.storage.receipts import is_whole

ROOT = Path(__file__).resolve().parents[1]
HOOK = "blocks.0.hook_mlp_out"


@pytest.fixture
def results(tmp_path: Path) -> Path:
    """An artifact, a column of activations with its shards, a checkpoint and a progress file."""
    results = tmp_path / "results"
    write_store(results / "activations" / TRAINING_STORE, {HOOK: torch.randn(100, 6)}, chunk_tokens=16, shard_tokens=64)
    (results / "train/key/deep").mkdir(parents=True)
    (results / "train/key/deep/weights.bin").write_bytes(bytes(500))
    write_receipt(results / "train/key", "train")
    save_state(results / "checkpoints/other/step-000000010.safetensors", {"a": torch.ones(5)})
    (results / "train/half.host-1.partial").mkdir()
    (results / "train/half.host-1.partial/provenance.json").write_text("")
    return results


def verify(results: Path, *options: str) -> subprocess.CompletedProcess:
    command = [sys.executable, ROOT / "scripts/verify.py", "--results", results, *options]
    return subprocess.run(list(map(str, command)), capture_output=True, text=True)


def test_what_is_whole_is_left_alone(results: Path) -> None:
    before = contents(results)
    done = verify(results, "--set-aside")
    assert (done.returncode, done.stderr) == (0, "") and "damaged" not in done.stdout
    assert contents(results) == before


def test_everything_that_is_damaged_is_named_and_set_aside(results: Path) -> None:
    store = results / "activations" / TRAINING_STORE
    column = store / f"{HOOK}-100"
    damaged = [
        results / "train/key/deep/weights.bin",
        store / "activations.zarr" / HOOK / "c/1/0",
        store / "progress" / f"{HOOK}.safetensors",
        results / "checkpoints/other/step-000000010.safetensors",
    ]
    for file in damaged:
        data = bytearray(file.read_bytes())
        data[-60 if file.suffix else 40] ^= 1
        file.write_bytes(data)
    before = contents(results)
    done = verify(results)
    assert done.returncode == 1 and contents(results) == before
    for file in damaged:
        assert f"damaged: {file}" in done.stdout, done.stdout + done.stderr
    assert f"would be made again: {results}/train/key" in done.stdout
    assert f"would be made again: {column}" in done.stdout
    done = verify(results, "--set-aside")
    assert f"counts as missing now: {column}" in done.stdout
    assert not is_whole(results / "train/key") and not is_whole(column)
    assert not any(file.exists() for file in damaged[1:])
    assert "damaged" not in verify(results).stdout


@pytest.mark.parametrize("name", ["token_id", "document", "position"])
@pytest.mark.parametrize("damage", ["chunk", "metadata", "no chunk"])
def test_damaged_coordinates_are_named_and_made_again(results: Path, name: str, damage: str) -> None:
    store = results / "activations" / TRAINING_STORE
    array = store / "activations.zarr" / name
    file = array / ("zarr.json" if damage == "metadata" else "c/1")
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 4
    file.write_bytes(data[:60] if damage == "metadata" else data)
    if damage == "no chunk":
        file.unlink()
    assert [e.file for e in damaged_coordinates(store, 100)] == [array]
    if (name, damage) == ("position", "chunk"):
        done = verify(results, "--set-aside")
        assert f"damaged: {array}" in done.stdout and "counts as missing now" in done.stdout
        assert not is_whole(store / f"{HOOK}-100")


def test_the_bos_of_a_row_is_of_no_document_and_no_damage(results: Path) -> None:
    store = results / "activations" / TRAINING_STORE
    document = zarr.open_array(store / "activations.zarr" / "document", mode="r+")
    document[:] = np.where(np.arange(100) % 10 == 0, -1, 3)
    assert list(damaged_coordinates(store, 100)) == []
