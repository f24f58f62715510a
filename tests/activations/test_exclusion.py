"""Which tokens `training.exclude` names, and the statistics of the others: against plain numpy on what was stored."""

import numpy as np
import pytest
import torch
from stores import write_store

from saeflow.activations import exclusion
from saeflow.activations.coordinates import CoordinateError
from saeflow.activations.exclusion import find_left_out, kept_statistics, measure_massive
from saeflow.activations.reader import open_rows
from saeflow.activations.store import StoreError
from saeflow.config.training import ExcludeConfig

CONTEXT, ROWS = 16, 13
N = CONTEXT * ROWS
HOOK, HEADS = "blocks.0.hook_mlp_out", "blocks.0.attn.hook_z"
SHARDS = {"chunk_tokens": 16, "shard_tokens": 64}


@pytest.fixture
def held():
    """What is stored: rows of 16 tokens, of which the first is massive at one hook, and token 77 at the other."""
    generator = torch.Generator().manual_seed(0)
    values = {HOOK: torch.randn(N, 6, generator=generator), HEADS: torch.randn(N, 2, 5, generator=generator)}
    values[HOOK][::CONTEXT] *= 500
    values[HEADS][77] *= 100
    return values


@pytest.fixture
def tokens():
    return np.random.default_rng(0).integers(0, 9, (ROWS, CONTEXT))


@pytest.fixture
def columns(tmp_path, held, tokens):
    return write_store(tmp_path / "store", held, tokens, **SHARDS)


@pytest.mark.parametrize("slab", [7, 4096])
def test_what_is_left_out_is_what_is_named(columns, held, tokens, monkeypatch, slab):
    monkeypatch.setattr(exclusion, "SLAB_TOKENS", slab)
    exclude = ExcludeConfig(positions=(0, 3), token_ids=(4, 5), norm_above=1.5)
    found = find_left_out(columns, exclude, CONTEXT)
    position, ids = np.arange(N) % CONTEXT, tokens.reshape(-1)
    by_position, by_id = np.isin(position, [0, 3]), np.isin(ids, [4, 5])
    named = by_position | by_id
    norms = {hook: x.flatten(1).norm(dim=1).numpy() for hook, x in held.items()}
    medians = {hook: np.median(n[~named]) for hook, n in norms.items()}
    by_norm = np.any([n > 1.5 * medians[hook] for hook, n in norms.items()], axis=0)
    assert by_norm[77] and (by_norm & ~named).sum() > 3
    assert np.array_equal(found.tokens, np.flatnonzero(named | by_norm))
    assert found.by_reason == {
        "positions": by_position.sum(),
        "token_ids": (by_id & ~by_position).sum(),
        "norm_above": (by_norm & ~named).sum(),
    }
    assert found.median_norms == pytest.approx(medians)
    record = found.record()
    assert record["n_kept"] + sum(record["left_out"].values()) == record["n_stored"] == N


@pytest.mark.parametrize(
    ("exclude", "left_out"),
    [
        (ExcludeConfig(positions=(0,)), list(range(0, N, CONTEXT))),
        (ExcludeConfig(positions=(15,)), list(range(15, N, CONTEXT))),
        (ExcludeConfig(norm_above=20.0), sorted({*range(0, N, CONTEXT), 77})),
        (ExcludeConfig(token_ids=(11,)), []),  # in the vocabulary, but not in this text
    ],
)
def test_each_field_alone(columns, exclude, left_out):
    assert find_left_out(columns, exclude, CONTEXT).tokens.tolist() == left_out


def test_statistics_are_those_of_the_tokens_that_are_kept(columns, held, monkeypatch):
    monkeypatch.setattr(exclusion, "SLAB_TOKENS", 50)
    left_out = find_left_out(columns, ExcludeConfig(positions=(0,)), CONTEXT)
    kept = np.arange(N) % CONTEXT != 0
    for column, x in zip(columns, held.values(), strict=True):
        x = x.flatten(1).double().numpy()[kept]
        found = kept_statistics(column, left_out)
        assert np.allclose(found.mean, x.mean(0), rtol=1e-12)
        assert np.allclose(found.mean_square, (x**2).mean(0), rtol=1e-12)
        assert float(found.mean_norm) == pytest.approx(np.linalg.norm(x, axis=1).mean(), rel=1e-12)


def massive(column, left_out):
    return measure_massive(open_rows(column), column.n_tokens, CONTEXT, left_out)


def test_massive_first_tokens_are_found_until_they_are_left_out(columns):
    first, others, n = massive(columns[0], None)
    assert 300 < first < 700 and others == 0 and n == N
    ordinary, others, _ = massive(columns[1], None)
    assert 0.5 < ordinary < 2 and others == 1
    left_out = find_left_out(columns, ExcludeConfig(positions=(0,)), CONTEXT)
    assert np.isnan(massive(columns[0], left_out).first)
    assert massive(columns[1], left_out).n_others == 1
    both = find_left_out(columns, ExcludeConfig(norm_above=10.0), CONTEXT)
    assert massive(columns[1], both).n_others == 0


def test_a_store_in_which_nothing_is_left_is_refused(columns):
    exclude = ExcludeConfig(token_ids=tuple(range(9)))
    with pytest.raises(StoreError, match=rf"leaves out all {N} tokens .* name fewer"):
        find_left_out(columns, exclude, CONTEXT)


def test_a_median_of_zero_leaves_nothing_out(tmp_path, tokens):
    x = torch.zeros(N, 3)
    x[: N // 2 - 1] = 1
    (column,) = write_store(tmp_path / "zeros", {HOOK: x}, tokens, **SHARDS)
    with pytest.raises(StoreError, match="half of the tokens or more are 0"):
        find_left_out([column], ExcludeConfig(norm_above=10.0), CONTEXT)
    assert np.isnan(massive(column, None).first) and massive(column, None).n_others == 0


@pytest.mark.parametrize("damage", ["flip", "remove chunk", "remove array"])
def test_damaged_coordinates_are_no_tokens(columns, damage):
    array = columns[0].store / "activations.zarr" / "token_id"
    chunk = array / "c" / "1"
    if damage == "flip":
        data = bytearray(chunk.read_bytes())
        data[len(data) // 2] ^= 1
        chunk.write_bytes(data)
    elif damage == "remove chunk":
        chunk.unlink()
    else:
        for file in sorted(array.rglob("*"), reverse=True):
            file.unlink() if file.is_file() else file.rmdir()
        array.rmdir()
    with pytest.raises(CoordinateError, match="run the workflow again") as caught:
        find_left_out(columns, ExcludeConfig(token_ids=(3,)), CONTEXT)
    assert caught.value.affected() == sorted(column.folder for column in columns)
