"""Arrays of single artifacts: activations as xarray, of stores of every type, and dictionaries that are of parts."""

from pathlib import Path

import numpy as np
import pytest
import torch
from stores import write_receipt, write_store

import saeflow
from saeflow.dictionaries import Dictionary, Spec, save_dictionary
from saeflow.dictionaries.sae import build
from saeflow.results import ResultsError
from saeflow.results.arrays import activations

HOOK, HEADS = "blocks.0.hook_mlp_out", "blocks.0.attn.hook_z"


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_numbers_are_those_that_were_written(tmp_path: Path, dtype: str) -> None:
    generator = torch.Generator().manual_seed(0)
    kind = getattr(torch, dtype)
    values = {
        HOOK: torch.randn(300, 8, generator=generator).to(kind),
        HEADS: torch.randn(300, 2, 4, generator=generator).to(kind),
    }
    one, of_heads = write_store(tmp_path / "s", values, chunk_tokens=64, shard_tokens=128, dtype=dtype)
    found = activations(one)
    assert found.dims == ("token", "d") and not found.variable._in_memory
    assert found.dtype == (np.float16 if dtype == "float16" else np.float32)
    np.testing.assert_array_equal(found.values, values[HOOK].float().numpy().astype(found.dtype))
    np.testing.assert_array_equal(found[70:130, 3].values, values[HOOK][70:130, 3].float().numpy().astype(found.dtype))
    assert found.sel(token=[5, 299]).shape == (2, 8)
    heads = activations(of_heads)
    assert heads.dims == ("token", "head", "d_head")
    np.testing.assert_array_equal(heads[:, 1].values, values[HEADS][:, 1].float().numpy().astype(heads.dtype))


def test_a_shorter_column_ends_where_it_ends(tmp_path: Path) -> None:
    (column,) = write_store(tmp_path / "s", {HOOK: torch.ones(300, 8)}, chunk_tokens=64, shard_tokens=128)
    shorter = column.__class__(column.folder, column.hook_name, 100, column.size, column.dtype)
    assert activations(shorter).shape == (100, 8) and activations(shorter).attrs["n_tokens"] == 100


def dictionary(seed: int, **fields: int) -> Dictionary:
    g = torch.Generator().manual_seed(seed)
    spec = Spec("sae", "topk", 4, 4, 6, HEADS, HEADS, k=2, **fields)  # type: ignore[arg-type]
    return build(spec, torch.randn(4, 6, generator=g), torch.zeros(6), torch.randn(6, 4, generator=g), torch.zeros(4))


def write(folder: Path, parts: dict[str, Dictionary]) -> None:
    for name, one in parts.items():
        (folder / name).mkdir(parents=True)
        save_dictionary(one, folder / name)
    write_receipt(folder, "train")


def test_of_a_pair_a_side_is_asked_for_and_heads_are_one(tmp_path: Path) -> None:
    pair = {"input": dictionary(0), "output": dictionary(1)}
    write(tmp_path / "train/pair-01234567", pair)
    write(tmp_path / "train/heads-12345678", {f"head_{h}": dictionary(h, hook_head_index=h) for h in range(2)})
    run = saeflow.open_results(tmp_path)
    for side, made in pair.items():
        assert torch.equal(run.dictionary(f"pair/{side}").W_enc, made.W_enc)
    with pytest.raises(ResultsError, match="is 2 dictionaries: ask for pair-01234567/input or /output"):
        run.dictionary("pair")
    assert run.dictionary("heads").d_sae == 12 and run.dictionary("heads/head_1").spec.hook_head_index == 1
    with pytest.raises(ResultsError, match="has no part 'head_7'; parts: head_0, head_1"):
        run.dictionary("heads/head_7")
