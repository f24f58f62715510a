"""Sparse sums over tokens against a dense n x n buffer, and what is on disk against what went in."""

import tempfile
from pathlib import Path

import numpy as np
import pytest
import torch
import zarr
from hypothesis import given, settings
from hypothesis import strategies as st
from stores import contents

from saeflow.config import JacobianConfig
from saeflow.jacobians import examples
from saeflow.jacobians import sums as jacobian_global
from saeflow.jacobians.examples import top_inputs_table, top_pairs_table
from saeflow.jacobians.maps import JacobianBlocks
from saeflow.jacobians.sums import Pairs, PairSums, TokenBlocks, exceedance_table, outputs_table, write_pairs

N_OUT, N_IN = 9, 11


def random_blocks(n: int, k_out: int, k_in: int, seed: int) -> JacobianBlocks:
    """`n` tokens, some of whose active latents are at 0, as TopK and ReLU leave them."""
    g = torch.Generator().manual_seed(seed)
    outputs = torch.stack([torch.randperm(N_OUT, generator=g)[:k_out] for _ in range(n)])
    inputs = torch.stack([torch.randperm(N_IN, generator=g)[:k_in] for _ in range(n)])
    values_out, values_in = ((torch.rand(n, k, generator=g) - 0.2).relu() for k in (k_out, k_in))
    J = torch.randn(n, k_out, k_in, generator=g) * (values_out > 0)[:, :, None] * (values_in > 0)[:, None]
    return JacobianBlocks(slice(0, n), J, inputs, outputs, values_in, values_out, torch.full((n,), k_out * k_in))


def parts(blocks: JacobianBlocks, size: int) -> list[JacobianBlocks]:
    n = len(blocks.J)
    return [
        JacobianBlocks(slice(a, min(a + size, n)), *(t[a : a + size] for t in blocks[1:])) for a in range(0, n, size)
    ]


def dense(blocks: JacobianBlocks) -> np.ndarray:
    """(N, N_OUT, N_IN)"""
    full = np.zeros((len(blocks.J), N_OUT, N_IN))
    for t, (J, outputs, inputs) in enumerate(zip(blocks.J, blocks.outputs, blocks.inputs, strict=True)):
        full[t][np.ix_(outputs, inputs)] = J.double()
    return full


SCRATCH = Path(tempfile.gettempdir())


def summed(blocks: JacobianBlocks, size: int = 4) -> Pairs:
    sums = PairSums(N_OUT, N_IN, SCRATCH)
    for part in parts(blocks, size):
        sums.add(part)
    return sums.pairs()


@given(
    n=st.integers(1, 30),
    k_out=st.integers(1, 5),
    k_in=st.integers(1, 5),
    size=st.integers(1, 9),
    gathered=st.integers(1, 60),
    seed=st.integers(0, 2**31),
)
@settings(deadline=None, max_examples=60)
def test_sums_equal_those_of_a_dense_buffer(n: int, k_out: int, k_in: int, size: int, gathered: int, seed: int) -> None:
    blocks = random_blocks(n, k_out, k_in, seed)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(jacobian_global, "GATHERED", gathered)
        pairs = summed(blocks, size)
    full = dense(blocks)
    count = np.zeros((N_OUT, N_IN), dtype=int)
    for t in range(n):
        out, into = (latents[t][values[t] > 0] for latents, values in
                     ((blocks.outputs, blocks.values_out), (blocks.inputs, blocks.values_in)))  # fmt: skip
        count[np.ix_(out, into)] += 1
    where = np.nonzero(count)
    assert (pairs.output.tolist(), pairs.input.tolist()) == tuple(w.tolist() for w in where)
    np.testing.assert_array_equal(pairs.count, count[where])
    np.testing.assert_allclose(pairs.sum, full.sum(0)[where], atol=1e-12)
    np.testing.assert_allclose(pairs.sum_absolute, np.abs(full).sum(0)[where], atol=1e-12)
    np.testing.assert_allclose(pairs.sum_squares, np.square(full).sum(0)[where], atol=1e-12)
    active = np.bincount(blocks.outputs[blocks.values_out > 0], minlength=N_OUT)
    np.testing.assert_array_equal(pairs.active_output, active)
    np.testing.assert_array_equal(pairs.active_input, np.bincount(blocks.inputs[blocks.values_in > 0], minlength=N_IN))
    mean = np.abs(full).sum(0) / np.maximum(active, 1)[:, None]
    np.testing.assert_allclose(pairs.mean_absolute("active"), mean[where], atol=1e-12)
    np.testing.assert_allclose(pairs.mean_absolute("all"), np.abs(full).mean(0)[where], atol=1e-12)


@given(
    n=st.integers(1, 30),
    k=st.integers(1, 5),
    gathered=st.integers(1, 20),
    in_memory=st.integers(1, 60),
    block=st.integers(1, 30),
    seed=st.integers(0, 2**31),
)
@settings(deadline=None, max_examples=60)
def test_runs_on_disk_give_the_bits_of_runs_in_memory(
    n: int, k: int, gathered: int, in_memory: int, block: int, seed: int
) -> None:
    """And their tables those of the whole, however small the blocks that are looked at."""
    blocks, config = random_blocks(n, k, k, seed), JacobianConfig(min_count=2, top_pairs=5, top_inputs=3)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(jacobian_global, "GATHERED", gathered)
        whole = summed(blocks)
        for name, value in (("IN_MEMORY", in_memory), ("BLOCK", block)):
            patch.setattr(jacobian_global, name, value)
        patch.setattr(examples, "BLOCK", block)
        found = summed(blocks)
        assert isinstance(found.output, np.memmap) == (len(found.count) > in_memory)
        of_found = [table(found, config) for table in (exceedance_table, top_pairs_table, top_inputs_table)]
    for name in ("output", "input", "count", "sum", "sum_absolute", "sum_squares", "active_output", "active_input"):
        np.testing.assert_array_equal(getattr(found, name), getattr(whole, name))
    assert of_found == [table(whole, config) for table in (exceedance_table, top_pairs_table, top_inputs_table)]
    assert outputs_table(found) == outputs_table(whole)


def test_exceedance_counts_the_entries_of_the_whole_matrix() -> None:
    blocks = random_blocks(40, 4, 5, seed=1)
    config = JacobianConfig(thresholds=(0.05, 0.2))
    table = exceedance_table(summed(blocks), config).to_pandas()
    full = np.abs(dense(blocks))
    active = np.bincount(blocks.outputs[blocks.values_out > 0], minlength=N_OUT)
    means = {"active": full.sum(0) / np.maximum(active, 1)[:, None], "all": full.mean(0)}
    assert {0.05, 0.2, 1e-3} <= set(table["threshold"])
    for convention, threshold, count, fraction in table.itertuples(index=False):
        assert count == (means[convention] > threshold).sum()
        assert fraction == count / (N_OUT * N_IN)


def test_inputs_for_90_percent_are_the_fewest() -> None:
    blocks = random_blocks(40, 4, 5, seed=2)
    full = np.abs(dense(blocks)).sum(0)
    for output, _, n_inputs, total, needed in outputs_table(summed(blocks)).to_pandas().itertuples(index=False):
        row = np.sort(full[output])[::-1]
        assert total == pytest.approx(row.sum())
        assert row[:needed].sum() >= 0.9 * total * (1 - 1e-12) > row[: needed - 1].sum() * (1 - 1e-12)
        assert needed <= n_inputs
    nothing = PairSums(N_OUT, N_IN, SCRATCH).pairs()
    assert len(outputs_table(nothing)) == len(nothing.count) == 0


def test_a_map_with_the_same_entries_on_all_tokens_is_summed_alike() -> None:
    g = torch.Generator().manual_seed(0)
    J = torch.randn(20, N_OUT, N_IN, generator=g)
    outputs, inputs = (torch.arange(n).expand(20, n) for n in (N_OUT, N_IN))
    ones = [torch.ones(()).expand(20, n) for n in (N_IN, N_OUT)]
    blocks = JacobianBlocks(slice(0, 20), J, inputs, outputs, *ones, torch.full((20,), N_OUT * N_IN))
    found = PairSums(N_OUT, N_IN, SCRATCH, shared=True)
    for part in parts(blocks, 7):
        found.add(part)
    one, other = found.pairs(), summed(blocks)
    for name in ("output", "input", "count", "active_output", "active_input"):
        np.testing.assert_array_equal(getattr(one, name), getattr(other, name))
    for name in ("sum", "sum_absolute", "sum_squares"):
        np.testing.assert_allclose(getattr(one, name), getattr(other, name), rtol=1e-12, atol=1e-12)


def test_stores_hold_what_was_measured_in_equal_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jacobian_global, "CHUNK", 37)
    blocks = random_blocks(25, 4, 5, seed=3)
    for folder, block in ((tmp_path / "a", 1 << 20), (tmp_path / "b", 74)):  # pairs in two chunks of a Zarr array
        monkeypatch.setattr(jacobian_global, "BLOCK", block)
        pairs = summed(blocks)
        write_pairs(folder / "global.zarr", pairs)
        stored = TokenBlocks(folder / "tokens.zarr", *(np.arange(10) * i for i in (1, 2, 3)))
        for part in parts(blocks, 4):  # the third of them is wanted in part, the rest not at all
            stored.add(part.tokens.start, part)
        stored.close()
    assert contents(tmp_path / "a") == contents(tmp_path / "b")

    group = zarr.open_group(tmp_path / "a" / "global.zarr", mode="r")
    full = np.zeros((N_OUT, N_IN))
    full[group["output"][:], group["input"][:]] = group["sum"][:]
    np.testing.assert_allclose(full, dense(blocks).sum(0), atol=1e-12)
    np.testing.assert_allclose(group["mean_absolute_all"][:], pairs.mean_absolute("all"), rtol=1e-6)
    assert group.attrs["shape"] == [N_OUT, N_IN] and group.attrs["n_tokens"] == 25

    group = zarr.open_group(tmp_path / "a" / "tokens.zarr", mode="r")
    full = np.zeros((10, N_OUT, N_IN))
    full[group["token"][:], group["output"][:], group["input"][:]] = group["jacobian"][:]
    np.testing.assert_array_equal(full, dense(blocks)[:10])
    assert group["position"][:].tolist() == list(range(0, 30, 3))


def test_stores_open_in_xarray(tmp_path: Path) -> None:
    import xarray

    write_pairs(tmp_path / "global.zarr", summed(random_blocks(5, 2, 3, seed=4)))
    opened = xarray.open_zarr(tmp_path / "global.zarr")
    assert opened["mean_absolute_active"].dims == ("pair",) and opened["active_input"].sizes == {"input_latent": N_IN}
