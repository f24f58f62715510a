"""What the plan reads of weights: headers alone, and every way in which files are not whole."""

import json
from pathlib import Path

import pytest
from conftest import write_weights

from saeflow.models.folder import ModelError
from saeflow.models.weights import INDEX, n_embeddings, read_shapes

SHAPES = {"gpt_neox.embed_in.weight": (300, 4), "gpt_neox.layers.0.b": (4,)}


def sharded(folder: Path) -> Path:
    """A folder of two shards and their index."""
    names = {tensor: f"model-0000{i}-of-00002.safetensors" for i, tensor in enumerate(SHAPES, 1)}
    for tensor, file in names.items():
        write_weights(folder / file, {tensor: SHAPES[tensor]})
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": names}))
    return folder


def test_shapes_are_those_of_the_tensors(neox_folder: Path, gpt2_folder: Path, llama_folder: Path) -> None:
    from safetensors.torch import load_file

    for folder in (neox_folder, gpt2_folder, llama_folder):
        tensors = load_file(folder / "model.safetensors")
        assert read_shapes(folder) == {name: tuple(t.shape) for name, t in tensors.items()}
        assert n_embeddings(read_shapes(folder)) == 300


def test_shards_are_read_by_their_index(tmp_path: Path) -> None:
    assert read_shapes(sharded(tmp_path)) == SHAPES
    (tmp_path / "adapter.safetensors").write_bytes(b"not read")
    assert read_shapes(tmp_path) == SHAPES


def test_a_missing_shard_is_named(tmp_path: Path) -> None:
    (sharded(tmp_path) / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(
        ModelError, match=r"names 1 files that are not there, model-00002-of-00002.safetensors first; copy"
    ):
        read_shapes(tmp_path)


def test_a_shard_without_a_tensor_is_named(tmp_path: Path) -> None:
    write_weights(sharded(tmp_path) / "model-00002-of-00002.safetensors", {"other": (1,)})
    with pytest.raises(
        ModelError, match=r"00002.safetensors lacks 1 tensors that .*promises, gpt_neox.layers.0.b first"
    ):
        read_shapes(tmp_path)


def test_shards_without_index_are_refused(tmp_path: Path) -> None:
    (sharded(tmp_path) / INDEX).unlink()
    with pytest.raises(
        ModelError, match=r"has model-00001-of-.*but neither model.safetensors nor model.safetensors.index"
    ):
        read_shapes(tmp_path)
    (tmp_path / INDEX).write_text("{}")
    with pytest.raises(ModelError, match="has no weight_map"):
        read_shapes(tmp_path)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (
            lambda data: data[:-7],
            r"are not whole: model.safetensors has [\d,]+ bytes where its header speaks of [\d,]+; copy",
        ),
        (lambda data: data + b"x", "are not whole: model.safetensors has"),
        (lambda data: data[:30], "is no safetensors file"),
        (lambda data: b"", "is no safetensors file"),
        (lambda data: bytes(1000), "is no safetensors file"),
        (lambda data: (5).to_bytes(8, "little") + b"[1,2]", "is no safetensors file"),
        (lambda data: b"version https://git-lfs.github.com/spec/v1\n", "is a pointer of Git LFS.*git lfs pull"),
    ],
)
def test_a_damaged_file_is_named_with_what_to_do(tmp_path: Path, damage, message: str) -> None:
    file = tmp_path / "model.safetensors"
    write_weights(file, SHAPES)
    file.write_bytes(damage(file.read_bytes()))
    with pytest.raises(ModelError, match=message):
        read_shapes(tmp_path)
