import dataclasses
import errno
import json
import math
import shutil
import subprocess
import sys
import threading
from collections import namedtuple
from pathlib import Path
from unittest.mock import patch

import numpy as np
import pytest
import torch
import zarr
from hypothesis import given, settings
from hypothesis import strategies as st
from stores import contents, write_receipt, write_rows, write_store

from saeflow.activations import shards
from saeflow.activations.caching import DiskFullError, cache, cache_jobs, longest_rows
from saeflow.activations.moments import STRIP, Moments
from saeflow.activations.reader import BatchReader, open_rows
from saeflow.activations.shards import ShardError, ShardWriter, predicted_bytes, shards_are_there
from saeflow.activations.stage import all_outside, outside
from saeflow.activations.store import ActivationStore, StoreError, TokenRows, open_column
from saeflow.activations.writer import ActivationError, ColumnRequest
from saeflow.config import ActivationsConfig, ModelConfig
from saeflow.jobs.job import Job
from saeflow.models.folder import model_digest
from saeflow.models.loading import load_model
from saeflow.planning.digests import DigestCache
from saeflow.planning.expansion import short_hook
from saeflow.planning.graph import Instance, Plan
from saeflow.planning.removal import goes_with
from saeflow.planning.stages import stages
from saeflow.storage.receipts import is_whole
from saeflow.text.tokenizer import tokenizer_digest

# Blocks of 96 tokens, chunks of 40 and shards of 200: no boundary of one kind is one of another.
GEOMETRY = {"batch_rows": 3, "chunk_tokens": 40, "shard_tokens": 200}
CONTEXT = 32
MLP_IN, MLP_OUT = "blocks.1.ln2.hook_normalized", "blocks.1.hook_mlp_out"
HOOK_Z, HIDDEN = "blocks.0.attn.hook_z", "blocks.0.mlp.hook_post"
SIZES = {MLP_IN: (32,), MLP_OUT: (32,), HOOK_Z: (4, 8), HIDDEN: (64,)}


def wanted(*hooks: str, rows: int = 33) -> list[ColumnRequest]:
    return [ColumnRequest(hook, SIZES[hook], rows * CONTEXT) for hook in hooks]


@pytest.fixture(scope="module")
def model(neox_folder):
    return load_model(neox_folder, ModelConfig(name="tiny", path=str(neox_folder)), "cpu")


@pytest.fixture
def rows(tokens_folder):
    return TokenRows(tokens_folder)


@pytest.fixture
def fill(tmp_path, rows, model):
    """Caches columns in a store below the test's folder, and returns the store and the statistics."""

    def run(columns, name="store", load=lambda: model, rows=rows, **config):
        store = ActivationStore(tmp_path / name, ActivationsConfig(**{**GEOMETRY, **config}))
        with store.locked():
            found = cache(store, columns, rows, load, attributes={"model": "0123", "processing": {"fold_ln": False}})
        return store, found

    return run


def never() -> None:
    raise AssertionError("the model was asked for")


def stored(store: ActivationStore, hook: str) -> torch.Tensor:
    """The values of a hook as zarr reads them."""
    values = torch.from_numpy(zarr.open_array(store.zarr / hook, mode="r")[:])
    return values.view(torch.bfloat16) if store.config.dtype == "bfloat16" else values


def shard_files(store: ActivationStore, hook: str) -> dict[str, bytes]:
    return contents(store.zarr / hook / "c")


# -------------------------------------------------------------------- values
@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_values_are_those_of_run_with_cache(fill, rows, model, dtype):
    store, _ = fill(wanted(*SIZES), dtype=dtype)
    with torch.inference_mode():
        _, held = model.run_with_cache(torch.from_numpy(rows.tokens(0, 33)).long())
    for hook, size in SIZES.items():
        found = stored(store, hook)
        assert found.shape == (33 * CONTEXT, *size) and found.dtype == getattr(torch, dtype)
        expected = held[hook].flatten(0, 1)
        tolerance = {"float32": 1e-5, "float16": 1e-3, "bfloat16": 1e-2}[dtype]
        torch.testing.assert_close(found.float(), expected, rtol=tolerance, atol=1e-5)


def test_any_architecture_is_cached(fill, rows, model_folder):
    other = load_model(model_folder, ModelConfig(name="tiny", path=str(model_folder)), "cpu")
    with torch.inference_mode():
        _, held = other.run_with_cache(torch.from_numpy(rows.tokens(0, 4)).long())
    thrice = "blocks.1.ln1.hook_normalized"  # fires for queries, keys and values
    hooks = ["hook_embed", thrice, "blocks.1.attn.hook_k", "blocks.1.hook_resid_post", "ln_final.hook_normalized"]
    columns = [ColumnRequest(hook, tuple(held[hook].shape[2:]), 4 * CONTEXT) for hook in hooks]
    store, _ = fill(columns, load=lambda: other)
    for hook in hooks:
        torch.testing.assert_close(stored(store, hook), held[hook].flatten(0, 1), rtol=1e-4, atol=1e-5)


def test_a_hook_that_does_not_fire_is_named(fill):
    silent = ColumnRequest("blocks.0.hook_mlp_in", (32,), 4 * CONTEXT)  # only where a model is told to split it off
    with pytest.raises(ActivationError, match=r"blocks\.0\.hook_mlp_in did not fire in the model's forward pass"):
        fill([*wanted(MLP_OUT, rows=4), silent])


def test_no_block_above_the_hooks_runs_and_no_logits(fill, model, monkeypatch):
    monkeypatch.setattr(model.blocks[1], "forward", lambda *_, **__: pytest.fail("block 1 ran"))
    monkeypatch.setattr(model.unembed, "forward", lambda *_, **__: pytest.fail("logits were computed"))
    fill(wanted(HOOK_Z, HIDDEN))


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_values_that_are_not_finite_are_refused(fill, neox_folder, value):
    broken = load_model(neox_folder, ModelConfig(name="tiny", path=str(neox_folder)), "cpu")
    broken.blocks[1].mlp.b_out[3] = value
    with pytest.raises(ActivationError, match="hook_mlp_out: NaN or infinity among tokens 0 to 39"):
        fill(wanted(MLP_OUT), load=lambda: broken)


def test_float16_overflow_is_refused_with_the_value(fill, neox_folder):
    large = load_model(neox_folder, ModelConfig(name="tiny", path=str(neox_folder)), "cpu")
    large.blocks[1].mlp.b_out[3] = 1e5
    with pytest.raises(ActivationError) as error:
        fill(wanted(MLP_OUT), load=lambda: large, dtype="float16")
    assert "blocks.1.hook_mlp_out reaches 1000" in str(error.value) and "bfloat16 or float32" in str(error.value)
    fill(wanted(MLP_OUT), load=lambda: large, dtype="bfloat16", name="wider")


# -------------------------------------------------------------------- statistics
def test_statistics_are_those_of_the_stored_values(fill):
    for dtype in ("float32", "bfloat16"):
        store, found = fill(wanted(*SIZES), dtype=dtype, name=dtype)
        for column, statistics in found.items():
            x = stored(store, column.hook_name).flatten(1).double()
            assert all(t.dtype == torch.float64 for t in statistics)
            torch.testing.assert_close(statistics.mean, x.mean(0))
            torch.testing.assert_close(statistics.covariance, torch.cov(x.T, correction=0), rtol=1e-5, atol=1e-6)
            torch.testing.assert_close(statistics.mean_norm, x.norm(dim=1).mean())


@given(
    st.integers(1, 6) | st.sampled_from([STRIP + 1, 3 * STRIP]),
    st.lists(st.integers(1, 300), min_size=1, max_size=6),
    st.floats(-1e4, 1e4),
)
@settings(deadline=None, max_examples=50)
def test_moments_are_accurate_however_far_the_mean_is(d, lengths, offset):
    """Float32 products of centred rows: errors are relative to the spread, and the mean cancels nothing."""
    generator = torch.Generator().manual_seed(len(lengths))
    x = offset + torch.randn(sum(lengths), d, generator=generator)
    moments = Moments(d)
    for chunk in x.split(lengths):
        moments.add(chunk)
    found, exact = moments.statistics(), x.double()
    torch.testing.assert_close(found.mean, exact.mean(0), rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(found.mean_norm, exact.norm(dim=1).mean(), rtol=1e-6, atol=1e-6)
    # rows - mean is exact up to the rounding of x itself, half a unit in the last place of `offset`
    tolerance = 1e-6 + 2e-7 * abs(offset) / 100
    torch.testing.assert_close(found.covariance, torch.cov(exact.T, correction=0).reshape(d, d), rtol=0, atol=tolerance)


@pytest.mark.parametrize("n", [1, 100, 1000, 4096])
@pytest.mark.parametrize("d", [1, 64, STRIP, STRIP + 1, STRIP + 2, 2 * STRIP + 1, 300, 576])
def test_means_by_strips_have_the_bits_of_means_of_whole_rows(d: int, n: int) -> None:
    """Of numbers over fourteen decades, whose sums in float64 depend on the order."""
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(n, d, generator=generator) * 10 ** (14 * torch.rand(n, d, generator=generator) - 8)
    moments = Moments(d)
    moments.add(rows)
    assert torch.equal(moments.mean, rows.mean(0, dtype=torch.float64))


# -------------------------------------------------------------------- the format
@given(
    n=st.integers(1, 70),
    size=st.sampled_from([(3,), (8,), (2, 3)]),
    chunk=st.integers(1, 8),
    per_shard=st.integers(1, 4),
    dtype=st.sampled_from(["float32", "float16"]),
)
@settings(deadline=None, max_examples=25)
def test_shards_are_the_bytes_that_zarr_writes(tmp_path_factory, n, size, chunk, per_shard, dtype):
    folder, shard = tmp_path_factory.mktemp("format"), chunk * per_shard
    values = torch.randn(n, *size).to(getattr(torch, dtype))
    with patch.object(shards, "WRITTEN", 7):  # bytes: a chunk is several pieces, the last of them shorter
        (column,) = write_store(
            folder / "ours", {"blocks.0.x": values}, dtype=dtype, chunk_tokens=chunk, shard_tokens=shard
        )
    array = zarr.create_array(
        folder / "theirs",
        shape=values.shape,
        chunks=(chunk, *size),
        shards=(shard, *size),
        dtype=dtype,
        filters=None,
        compressors=[zarr.codecs.Crc32cCodec()],
        fill_value=math.nan,
    )
    array[:] = values.numpy()
    ours, theirs = contents(column.array / "c"), contents(folder / "theirs" / "c")
    of_rows = {name: ours.pop(name) for name in list(ours) if name.endswith(".rows")}
    assert ours == theirs and of_rows.keys() == {f"{name}.rows" for name in theirs}
    assert sum(map(len, ours.values())) == predicted_bytes(n, size, dtype, chunk, shard)
    assert np.array_equal(zarr.open_array(column.array, mode="r")[:], values.numpy())


def test_bytes_per_token_are_within_three_percent(fill, rows):
    """Everything in the store but metadata and statistics, whose size does not grow with the tokens."""
    store, _ = fill(wanted(HIDDEN, rows=64), chunk_tokens=128, shard_tokens=1024, dtype="float32")
    data = sum(len(v) for name, v in contents(store.zarr).items() if not name.endswith("zarr.json"))
    assert data <= 1.03 * 64 * CONTEXT * 64 * 4


def test_xarray_opens_a_store_with_names_and_attributes(fill, rows):
    import xarray

    store, _ = fill([*wanted(MLP_OUT, HOOK_Z, HIDDEN), *wanted(MLP_IN, rows=10)], dtype="bfloat16")
    data = xarray.open_zarr(store.zarr, consolidated=False)
    assert data[HOOK_Z].dims == ("token", "head", "d_head") and data[HOOK_Z].shape == (33 * CONTEXT, 4, 8)
    assert data[MLP_OUT].dims == ("token", "d") and data[HIDDEN].dims == ("token", "d_mlp")
    assert set(data.coords) == {"token_id", "document", "position"}
    tokens, document, _ = rows.store.rows(0, 33)
    assert np.array_equal(data.token_id, tokens.reshape(-1)) and np.array_equal(data.document, document.reshape(-1))
    assert np.array_equal(data.position, np.tile(np.arange(CONTEXT), 33))
    attributes = data[MLP_OUT].attrs
    assert attributes["hook"] == MLP_OUT and attributes["torch_dtype"] == "bfloat16" and attributes["model"] == "0123"
    assert attributes["processing"] == {"fold_ln": False} and "dimensionless" in attributes["units"]
    # a shorter column reads as NaN beyond its end, and says where that is
    shorter = torch.from_numpy(data[MLP_IN].values).view(torch.bfloat16)
    assert data[MLP_IN].attrs["n_tokens"] == 10 * CONTEXT
    assert shorter[: 10 * CONTEXT].isfinite().all() and shorter[10 * CONTEXT :].isnan().all()


# -------------------------------------------------------------------- growth
def test_bytes_do_not_depend_on_which_hooks_are_cached_together(fill):
    together, found = fill(wanted(*SIZES), name="together")
    for hook in SIZES:
        alone, statistics = fill(wanted(hook), name=f"alone-{hook}")
        assert shard_files(alone, hook) == shard_files(together, hook)
        (column,) = statistics
        assert all(torch.equal(a, b) for a, b in zip(statistics[column], found[column], strict=True))


def test_another_hook_leaves_the_others_untouched(fill):
    store, _ = fill(wanted(MLP_IN, HOOK_Z))
    files = [p for hook in (MLP_IN, HOOK_Z) for p in (store.zarr / hook).rglob("*") if p.is_file()]
    before = [_state(p) for p in files]
    fill([*wanted(MLP_OUT), *wanted(MLP_IN)])
    assert before == [_state(p) for p in files]


@pytest.mark.parametrize(("first", "then"), [(1, 64), (20, 33), (25, 64), (33, 34), (50, 64)])
def test_more_rows_give_the_bytes_of_a_fresh_store(fill, first, then):
    """25 rows fill shards exactly; 33 rows end in the middle of a chunk, a shard and a block of rows."""
    store, short = fill(wanted(MLP_OUT, HOOK_Z, rows=first))
    whole = first * CONTEXT // GEOMETRY["shard_tokens"]
    full = [store.shard(MLP_OUT, (32,), number) for number in range(whole)]
    before = [_state(p) for p in full]
    early = stored(store, MLP_OUT)
    _, longer = fill(wanted(MLP_OUT, HOOK_Z, rows=then))
    assert before == [_state(p) for p in full]
    assert torch.equal(stored(store, MLP_OUT)[: len(early)], early)
    fresh, expected = fill(wanted(MLP_OUT, HOOK_Z, rows=then), name="fresh")
    assert contents(store.folder) == contents(fresh.folder)
    _assert_same(longer, expected)
    _, again = fill(wanted(MLP_OUT, HOOK_Z, rows=first), load=never)  # a shorter column, from what is on disk
    _assert_same(again, short)
    assert contents(store.folder) == contents(fresh.folder)


def test_two_lengths_of_a_hook_in_one_pass(fill):
    columns = [*wanted(MLP_OUT, rows=33), *wanted(MLP_OUT, rows=20), *wanted(MLP_IN, rows=50)]
    store, found = fill(columns)
    for column in columns:
        other, expected = fill([column], name=str(hash(column)))
        assert all(torch.equal(a, b) for a, b in zip(found[column], expected[column], strict=True))
        if column.n_tokens != 20 * CONTEXT:
            assert shard_files(other, column.hook_name) == shard_files(store, column.hook_name)


def test_what_is_on_disk_is_not_computed_again(fill):
    _, first = fill(wanted(*SIZES))
    _, second = fill(wanted(*SIZES), load=never)
    _assert_same(first, second)


def test_a_lost_or_short_shard_is_computed_again(fill):
    store, expected = fill(wanted(MLP_OUT, HOOK_Z))
    before = contents(store.folder)
    for number, damage in ((0, Path.unlink), (2, Path.unlink), (1, lambda p: p.write_bytes(p.read_bytes()[:-9]))):
        damage(store.shard(MLP_OUT, (32,), number))
        assert contents(store.folder) != before
        _, found = fill(wanted(MLP_OUT, HOOK_Z))
        assert contents(store.folder) == before
        _assert_same(found, expected)


def _state(path: Path) -> tuple:
    return path.read_bytes(), path.stat().st_mtime_ns, path.stat().st_ino


def _assert_same(a: dict, b: dict) -> None:
    assert a.keys() == b.keys()
    assert all(torch.equal(x, y) for key in a for x, y in zip(a[key], b[key], strict=True))


# -------------------------------------------------------------------- refusals
def test_other_tokens_are_refused(fill, rows, tmp_path):
    fill(wanted(MLP_OUT, rows=20))
    tokens = rows.tokens(0, 40).copy()
    tokens[19, 5] += 1
    with pytest.raises(StoreError, match="token_id differs between tokens 0 and 640"):
        fill(wanted(MLP_OUT, rows=40), rows=write_rows(tmp_path / "other", tokens))


def test_a_tokens_folder_must_begin_the_longer_one(rows, tmp_path):
    tokens = rows.tokens(0, 40)
    long, short = write_rows(tmp_path / "long", tokens), write_rows(tmp_path / "short", tokens[:10])
    assert longest_rows([short.folder, long.folder]).folder == long.folder
    other = write_rows(tmp_path / "other", tokens[1:10])
    with pytest.raises(StoreError, match="is not a beginning of"):
        longest_rows([long.folder, other.folder])


def test_more_rows_than_there_are_tokens_are_refused(fill):
    with pytest.raises(StoreError, match=r"2080 tokens are to be cached, but .* has 2048"):
        fill(wanted(MLP_OUT, rows=65))


def test_a_store_of_another_geometry_is_refused(fill):
    fill(wanted(MLP_OUT))
    with pytest.raises(StoreError, match="is asked for: remove"):
        fill(wanted(MLP_OUT), chunk_tokens=20)


def test_only_one_process_writes_a_store(tmp_path):
    first, second = (ActivationStore(tmp_path / "store", ActivationsConfig()) for _ in range(2))
    entered = threading.Event()

    def enter():
        with second.locked():
            entered.set()

    thread = threading.Thread(target=enter)
    with first.locked():
        thread.start()
        assert not entered.wait(0.2)
    thread.join(5)
    assert entered.is_set()


# -------------------------------------------------------------------- full disks
def test_a_disk_too_small_is_refused_before_the_model_is_opened(fill, monkeypatch):
    usage = namedtuple("usage", "total used free")
    columns = wanted(MLP_OUT, HOOK_Z)
    exact = sum(predicted_bytes(33 * CONTEXT, c.size, "float32", 40, 200) for c in columns)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(10**9, 10**9 - exact, exact))
    with pytest.raises(DiskFullError) as error:
        fill(columns, load=never)
    assert error.value.errno == errno.ENOSPC
    assert "GB are still needed" in str(error.value) and f"{exact / 1e9:.3g} GB are free" in str(error.value)


def test_space_for_what_is_on_disk_is_not_asked_for_again(fill, monkeypatch):
    fill(wanted(MLP_OUT))
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(10**9, 10**9 - 20_000, 20_000))
    fill(wanted(MLP_OUT), load=never)


def test_a_disk_that_fills_up_says_so_and_the_rerun_continues(fill, monkeypatch):
    """The seventh chunk does not fit. No partial file keeps the space, and the shard before it is not written again."""
    written = []
    real = ShardWriter.add

    def add(self, chunk):
        written.append(self.path)
        if len(written) == 7:
            raise OSError(errno.ENOSPC, "No space left on device")
        real(self, chunk)

    monkeypatch.setattr(ShardWriter, "add", add)
    with pytest.raises(DiskFullError, match=r"became full while caching: .* GB are still needed and .* GB are free"):
        fill(wanted(MLP_OUT))
    monkeypatch.undo()
    first = written[0]
    before = _state(first)
    assert not list(first.parents[3].rglob("*.partial"))
    store, found = fill(wanted(MLP_OUT))
    assert _state(first) == before
    fresh, expected = fill(wanted(MLP_OUT), name="fresh")
    assert contents(store.folder) == contents(fresh.folder)
    _assert_same(found, expected)


# -------------------------------------------------------------------- jobs
def _jobs(results: Path, model: Path, tokens: dict[int, Path], columns: list[tuple[str, int]]) -> list[Job]:
    """Jobs as the plan makes them, for (hook, rows)."""
    processing = {"fold_ln": False, "center_writing_weights": False, "center_unembed": False}
    shared = {
        "model": {"weights": model_digest(model, DigestCache(None)), **processing},
        "tokens": {"context_size": CONTEXT},
    }
    shared["activations"] = dataclasses.asdict(ActivationsConfig(**GEOMETRY))
    plan = Plan("test", {"activations": {}, "tokens": {}}, {}, results=str(results))
    (results / "tokens").mkdir(parents=True, exist_ok=True)
    jobs = []
    for hook, n_rows in columns:
        config = {**shared, "hook_name": hook, "n_rows": n_rows, "size": list(SIZES[hook])}
        target = results / "tokens" / tokens[n_rows].name
        if not target.exists():
            target.symlink_to(tokens[n_rows])
        tokenizer = {"tokenizer": tokenizer_digest(model, DigestCache(None))}
        plan.stages["tokens"][target.name] = Instance("tokens", target.name, tokenizer, {}, {})
        needs, sources = {"tokens": [target.name]}, {"model": str(model)}
        instance = Instance("activations", f"tiny-store/{hook}-{n_rows}", config, needs, sources)
        jobs.append(Job(instance, plan, "cpu"))
    return jobs


@pytest.fixture
def tokens_by_rows(tmp_path, rows):
    folders = {n: write_rows(tmp_path / f"tokens-{n}", rows.tokens(0, n)).folder for n in (20, 33)}
    for folder in folders.values():
        write_receipt(folder, "tokens")
    return folders


def test_jobs_write_receipts_that_open(tmp_path, neox_folder, tokens_by_rows):
    columns = [(MLP_IN, 33), (MLP_OUT, 33), (MLP_OUT, 20)]
    jobs = _jobs(tmp_path / "results", neox_folder, tokens_by_rows, columns)
    assert "3 columns" in cache_jobs(jobs)
    for job, (hook, n_rows) in zip(jobs, columns, strict=True):
        names = {p.name for p in job.path.iterdir()}
        assert names == {"column.json", "statistics.safetensors", "config.yaml", "provenance.json"}
        column = open_column(job.path)
        assert (column.hook_name, column.n_tokens, column.size, column.d) == (hook, n_rows * CONTEXT, (32,), 32)
        assert column.statistics.covariance.shape == (32, 32) and column.statistics.mean_norm.ndim == 0
        receipt = json.loads((job.path / "column.json").read_text())
        assert receipt == {"hook_name": hook, "n_tokens": n_rows * CONTEXT, "size": [32], "dtype": "float32"}
        assert len(open_rows(column).take(np.arange(n_rows * CONTEXT))) == n_rows * CONTEXT


def test_old_receipts_stay_valid_when_the_store_grows(tmp_path, neox_folder, tokens_by_rows):
    results = tmp_path / "results"
    (early,) = _jobs(results, neox_folder, tokens_by_rows, [(MLP_OUT, 20)])
    cache_jobs([early])
    before, column = contents(early.path), open_column(early.path)
    batch = BatchReader([column], 64, seed=0).batch(3)[0]
    cache_jobs(_jobs(results, neox_folder, tokens_by_rows, [(MLP_OUT, 33), (HOOK_Z, 33)]))
    assert contents(early.path) == before
    assert torch.equal(BatchReader([open_column(early.path)], 64, seed=0).batch(3)[0], batch)


@pytest.mark.parametrize("name", ["c/2/0", "zarr.json"])
def test_a_damaged_file_of_an_array_is_made_anew(tmp_path, neox_folder, tokens_by_rows, name):
    """Set aside, it makes the columns of its hook count as missing, and those of no other hook."""
    jobs = _jobs(tmp_path / "results", neox_folder, tokens_by_rows, [(MLP_OUT, 33), (MLP_OUT, 20), (MLP_IN, 33)])
    cache_jobs(jobs)
    expected = contents(jobs[0].path.parent / "activations.zarr")
    file = open_column(jobs[0].path).array / name
    data = bytearray(file.read_bytes())
    data[0 if name == "zarr.json" else 100] ^= 4
    file.write_bytes(data)
    with pytest.raises(ShardError, match="is damaged") as error:
        list(BatchReader([open_column(jobs[0].path)], 64, seed=0).iterate(0, 20))
    assert str(file) in str(error.value)
    assert sorted(error.value.set_aside()) == sorted(job.path for job in jobs[:2])
    assert [is_whole(job.path) for job in jobs] == [False, False, True]
    cache_jobs(jobs[:2])
    assert all(is_whole(job.path) for job in jobs)
    assert contents(jobs[0].path.parent / "activations.zarr") == expected
    list(BatchReader([open_column(jobs[0].path)], 64, seed=0).iterate(0, 20))


@pytest.mark.parametrize("torn", ["", '{"shape": [', "[]"])
def test_metadata_that_a_power_cut_tore_is_written_anew(tmp_path, neox_folder, tokens_by_rows, torn):
    results = tmp_path / "results"
    jobs = _jobs(results, neox_folder, tokens_by_rows, [(MLP_OUT, 33)])
    cache_jobs(jobs)
    store = jobs[0].path.parent / "activations.zarr"
    expected = contents(store)
    for name in ("zarr.json", f"{MLP_OUT}/zarr.json"):
        (store / name).write_text(torn)
        cache_jobs(jobs)
        assert contents(store) == expected
    for name in ("token_id", "document", "position"):
        chunk = sorted((store / name / "c").iterdir())[-1]
        chunk.write_bytes(b"no chunk")
        cache_jobs(jobs)
        assert contents(store) == expected
        chunk.unlink()  # which reads as the fill value, not as an error
        cache_jobs(jobs)
        assert contents(store) == expected


def test_a_damaged_progress_file_is_not_taken_over(tmp_path, neox_folder, tokens_by_rows):
    """Its moments would become the statistics of a longer column."""
    results = tmp_path / "results"
    wanted = _jobs(results / "undisturbed", neox_folder, tokens_by_rows, [(MLP_OUT, 33)])
    cache_jobs(wanted)
    jobs = _jobs(results / "damaged", neox_folder, tokens_by_rows, [(MLP_OUT, 33)])
    cache_jobs(_jobs(results / "damaged", neox_folder, tokens_by_rows, [(MLP_OUT, 20)]))
    file = jobs[0].path.parent / "progress" / f"{MLP_OUT}.safetensors"
    data = bytearray(file.read_bytes())
    data[-5] ^= 16
    file.write_bytes(data)
    cache_jobs(jobs)
    statistics = [(job.path / "statistics.safetensors").read_bytes() for job in (*wanted, *jobs)]
    assert statistics[0] == statistics[1]


def test_what_is_asked_for_again_is_computed_anew_unless_a_longer_column_needs_it(
    tmp_path, neox_folder, tokens_by_rows
):
    """Shard by shard, so that who reads them meanwhile goes on."""
    (short,) = _jobs(tmp_path / "results", neox_folder, tokens_by_rows, [(MLP_OUT, 20)])
    others = _jobs(tmp_path / "results", neox_folder, tokens_by_rows, [(MLP_OUT, 33), (MLP_IN, 33)])
    cache_jobs([short])
    cache_jobs(others)
    zarr_folder = short.path.parent / "activations.zarr"
    files = {hook: sorted((zarr_folder / hook / "c").rglob("0")) for hook in (MLP_OUT, MLP_IN)}
    before, expected = {f: _state(f) for found in files.values() for f in found if f.is_file()}, contents(zarr_folder)
    map_of_old = np.memmap(next(iter(before)), dtype=np.uint8, mode="r")
    cache_jobs([short])
    assert all(_state(file) == state for file, state in before.items())
    cache_jobs(others[:1])
    for file, (held, written, inode) in before.items():
        anew = MLP_OUT in str(file)
        assert (_state(file)[1:] != (written, inode)) == anew and file.read_bytes() == held
    assert map_of_old.tobytes() == next(iter(before.values()))[0]
    assert contents(zarr_folder) == expected and all(is_whole(job.path) for job in (short, *others))


def test_a_column_without_its_shards_is_not_there(tmp_path, neox_folder, tokens_by_rows):
    short, long = _jobs(tmp_path / "results", neox_folder, tokens_by_rows, [(MLP_OUT, 20), (MLP_OUT, 33)])
    cache_jobs([short, long])
    assert shards_are_there(short.path) and shards_are_there(long.path)
    array = open_column(long.path).array
    (array / "c/5/0").unlink()
    assert shards_are_there(short.path) and not shards_are_there(long.path)
    shutil.rmtree(array)
    assert not shards_are_there(short.path)


def test_with_the_last_column_of_a_hook_goes_its_array_and_with_that_of_a_store_the_store(
    tmp_path, neox_folder, tokens_by_rows
):
    results = tmp_path / "results"
    short, long, other = _jobs(results, neox_folder, tokens_by_rows, [(MLP_OUT, 20), (MLP_OUT, 33), (MLP_IN, 33)])
    cache_jobs([short, long, other])
    stage, store = stages()["activations"], short.path.parent
    array = [store / "activations.zarr" / MLP_OUT, store / f"progress/{MLP_OUT}.safetensors", store / "parts" / MLP_OUT]
    for hook in (MLP_IN, MLP_OUT):
        (store / "parts" / hook).mkdir(parents=True)  # of shards that were computed ahead
    assert all(path.exists() for path in array)
    assert goes_with(stage, results, short.path, [long.path, other.path]) == [short.path]
    assert goes_with(stage, results, short.path, [other.path]) == [short.path, *array]
    assert goes_with(stage, results, short.path, [short.path]) == [store]
    assert set(all_outside(results)) == {*array, *outside(other.path)}
    planned = store / f"{short_hook(MLP_OUT)}-64rows-01234567"  # no column yet: its hook stands in its name
    assert goes_with(stage, results, short.path, [planned]) == [short.path]
    assert (
        goes_with(stage, results, short.path, [planned.with_name(f"{short_hook(MLP_IN)}-9rows-01234567")])[1:] == array
    )


def test_a_folder_without_a_receipt_is_no_column(tmp_path):
    with pytest.raises(StoreError, match=r"has no column\.json"):
        open_column(tmp_path)


# -------------------------------------------------------------------- SIGKILL
@pytest.mark.slow
def test_killed_anywhere_the_rerun_gives_the_bytes_of_an_undisturbed_run(tmp_path, neox_folder, tokens_folder):
    """`kill_caching.py` is killed before and after each of eleven steps, in fresh stores and in extensions."""
    script = Path(__file__).parents[1].joinpath("kill_caching.py")
    command = [sys.executable, script, tmp_path, neox_folder, tokens_folder, json.dumps(GEOMETRY)]
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    *runs, undisturbed = sorted(tmp_path.iterdir(), key=lambda p: (p.name == "undisturbed", p.name))
    expected = contents(undisturbed)
    assert len(runs) == 44 and len(expected) > 10
    for folder in runs:
        assert contents(folder) == expected, folder.name
