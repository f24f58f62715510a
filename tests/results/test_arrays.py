"""Activations as xarray, of stores of every type: the numbers that were written, of one column's rows alone."""

from pathlib import Path

import numpy as np
import pytest
import torch
from stores import write_store

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
