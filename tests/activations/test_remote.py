"""Activations in a bucket: read there as they would be here, carried there and back, and damage found."""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import xarray
import zarr
from bucket import Proxy
from stores import TRAINING, TRAINING_STORE, contents, training_plan, write_store

from saeflow.activations import carrier, elsewhere, exclusion
from saeflow.activations import reader as reader_module
from saeflow.activations.coordinates import damaged_coordinates
from saeflow.activations.reader import BatchReader, InMemoryRows, MappedRows, open_rows
from saeflow.activations.remote import RemoteRows, RemoteShardError
from saeflow.activations.store import Column, open_column
from saeflow.config import ConfigError
from saeflow.config.training import ExcludeConfig
from saeflow.jobs.job import Job
from saeflow.planning.graph import Plan
from saeflow.planning.remote import check_remote, damaged, notes_of_bucket, pull, push, remote_of
from saeflow.storage import transfer
from saeflow.storage.locks import Lock
from saeflow.storage.receipts import RECEIPT, is_whole
from saeflow.storage.remote import Remote, RemoteError
from saeflow.training import loop as training
from saeflow.training import stage as training_stage
from saeflow.training.stage import resources

GEOMETRY = {"chunk_tokens": 16, "shard_tokens": 64}
N = 200  # three whole shards and one with half of its second chunk
MLP, Z = "blocks.0.hook_mlp_out", "blocks.0.attn.hook_z"
PLACE = "s3://lab/results"
ROOT = "activations/store"
ROOT_FOLDER = Path(__file__).parents[2]


@pytest.fixture
def values() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {MLP: torch.randn(N, 6, generator=generator), Z: torch.randn(N, 2, 5, generator=generator)}


@pytest.fixture
def bucket(s3: Proxy, monkeypatch: pytest.MonkeyPatch) -> None:
    """The server without the proxy, which is faster, where nothing is to fail on the way."""
    monkeypatch.setenv("AWS_ENDPOINT_URL", s3.target)


def push_all(columns: list[Column], drop: bool = True) -> Remote:
    """Pushes columns of one store, and drops their arrays here."""
    root = Remote(PLACE)
    for column in columns:
        carrier.push(root, column.folder)
        transfer.push(root.below(f"{ROOT}/{column.folder.name}"), column.folder)
    if drop:
        said = list(carrier.drop(root, columns[0].store))
        assert [line for line in said if not line.startswith("dropped")] == []
    return root


@pytest.fixture
def far(s3: Proxy, tmp_path: Path, values: dict[str, torch.Tensor], monkeypatch: pytest.MonkeyPatch) -> list[Column]:
    """Columns whose arrays are in a bucket alone, none of them held in memory only because it is small."""
    monkeypatch.setattr(reader_module, "IN_MEMORY_TOKENS", 0)
    columns = write_store(tmp_path / "store", values, **GEOMETRY)
    shutil.copytree(tmp_path / "store", tmp_path / "kept" / "store")
    with monkeypatch.context() as patch:
        patch.setenv("AWS_ENDPOINT_URL", s3.target)  # faster, where nothing is to fail
        push_all(columns)
    return columns


@pytest.fixture
def near(far: list[Column], tmp_path: Path) -> list[Column]:
    """The same here."""
    return [open_column(tmp_path / "kept" / "store" / column.folder.name) for column in far]


def chunk_reads(s3: Proxy) -> list[str]:
    return [path for method, path in s3.requests if method == "GET" and "/c/" in path]


def test_rows_are_those_that_were_stored(far: list[Column], near: list[Column], s3: Proxy) -> None:
    rows = np.array([199, 0, 63, 64, 64, 17, 150])
    for there, here in zip(far, near, strict=True):
        assert not there.array.exists() and elsewhere.rows_are_somewhere(there.folder)
        found = open_rows(there)
        assert isinstance(found, RemoteRows) and isinstance(open_rows(here), MappedRows)
        s3.requests.clear()
        assert torch.equal(found.take(rows), open_rows(here).take(rows))
        assert len(chunk_reads(s3)) == 5  # chunks of 16: of rows 0 and 17 together, 63, 64 (twice), 150, 199


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_half_precision_is_read_alike(bucket: None, tmp_path: Path, values: dict, dtype: str) -> None:
    columns = write_store(tmp_path / "store", {MLP: values[MLP]}, dtype=dtype, **GEOMETRY)
    here = open_rows(columns[0]).take(np.arange(N))
    push_all(columns)
    assert torch.equal(open_rows(columns[0]).take(np.arange(N)), here)


@pytest.mark.parametrize(("read_ahead", "at_once"), [(1, 1), (2 * 12 * 64 * 2, 2), (2 * 12 * 64 * 5 + 1, 5)])
def test_batches_are_those_of_the_store_here(
    far: list[Column], near: list[Column], s3: Proxy, read_ahead: int, at_once: int
) -> None:
    """6 and 10 float32 a token, 12 tokens a batch: 64 * 12 bytes a batch."""
    reader, local = BatchReader(far, 12, 3, None, read_ahead), BatchReader(near, 12, 3)
    assert reader.at_once == at_once
    s3.requests.clear()
    s3.fault = lambda method, path, n: {3: "drop", 7: "busy", 11: "short", 15: "flip", 20: "lost"}.get(n, "")
    for one, other in zip(reader.iterate(2, 9), local.iterate(2, 9), strict=True):
        assert all(torch.equal(a, b) and a.dtype == torch.float32 for a, b in zip(one, other, strict=True))
    groups = -(-9 // at_once)
    assert len(chunk_reads(s3)) <= groups * 2 * 9 + 5  # 13 chunks a column, read once a group, and again after faults
    assert torch.equal(reader.batch(7)[1], local.batch(7)[1])


@pytest.mark.parametrize("buffer_tokens", [None, 64])
def test_tokens_left_out_and_a_far_and_a_near_column_together(
    far: list[Column], near: list[Column], buffer_tokens: int | None
) -> None:
    left_out = np.arange(0, N, 10)
    here = BatchReader(near, 8, 5, left_out, buffer_tokens=buffer_tokens)
    shutil.copytree(near[0].array, far[0].array)  # one of the two is here again
    reader = BatchReader(far, 8, 5, left_out, 10_000, buffer_tokens)
    assert [type(rows) for rows in reader.columns] == [MappedRows, RemoteRows] and reader.at_once > 1
    for one, other in zip(reader.iterate(0, 50), here.iterate(0, 50), strict=True):
        assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


def test_what_fits_into_memory_is_read_once(far: list[Column], near: list[Column], s3: Proxy) -> None:
    reader = BatchReader(far, 48, 3, None, 1 << 20)
    assert all(isinstance(rows, InMemoryRows) for rows in reader.columns)
    s3.requests.clear()
    found = list(reader.iterate(0, 30))
    assert len(chunk_reads(s3)) == 2 * 4  # shards
    assert all(torch.equal(a[0], b[0]) for a, b in zip(found, BatchReader(near, 48, 3).iterate(0, 30), strict=True))


def test_zarr_opens_what_was_pushed(far: list[Column], values: dict[str, torch.Tensor]) -> None:
    """By its own store of objects, with the library that knows nothing of ours."""
    from zarr.storage import ObjectStore

    store = ObjectStore(Remote(f"{PLACE}/{ROOT}/activations.zarr")._store, read_only=True)
    group = zarr.open_group(store, mode="r")
    for hook, held in values.items():
        assert np.array_equal(group[hook][:], held.numpy())
    assert group.attrs["n_tokens"] == N and group["token_id"].shape == (N,)


def test_runs_are_chunks_that_follow_each_other_in_a_shard(far: list[Column], monkeypatch: pytest.MonkeyPatch) -> None:
    rows = open_rows(far[0])
    assert [*rows.runs(np.array([0, 1, 3, 4, 5, 9, 12]))] == [
        range(2),
        range(3, 4),
        range(4, 6),
        range(9, 10),
        range(12, 13),
    ]
    monkeypatch.setattr("saeflow.activations.remote.PIECE", 2 * rows.layout.chunk_bytes)
    assert [*rows.runs(np.arange(13))] == [range(s, min(s + 2, 13)) for s in range(0, 13, 2)]


def test_what_is_left_out_is_found_there_as_here(
    far: list[Column], near: list[Column], monkeypatch: pytest.MonkeyPatch
) -> None:
    """In slabs of the same tokens, of which several are read at once."""
    monkeypatch.setattr(exclusion, "SLAB_TOKENS", 16)
    exclude = ExcludeConfig(positions=(0,), token_ids=(3,), norm_above=1.1)
    ours, theirs = (exclusion.find_left_out(columns, exclude, 10) for columns in (far, near))
    assert np.array_equal(ours.tokens, theirs.tokens) and ours.by_reason["norm_above"] > 0
    for one, other in zip(far, near, strict=True):
        found, wanted = (exclusion.kept_statistics(column, ours) for column in (one, other))
        assert all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True))


# -------------------------------------------------------------------- damage
def other_bytes(path: str, change) -> None:
    remote = Remote(f"{PLACE}/{ROOT}/activations.zarr/{MLP}")
    content = change(bytearray(remote.get(path)))
    remote.delete(path)
    if content is not None:
        remote.put_new(path, bytes(content))


def flipped(content: bytearray, at: int = 100) -> bytearray:
    content[at] ^= 4
    return content


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (flipped, "crc32c of chunk 0 .*read 5 times"),
        (lambda content: flipped(content, -9), "index does not match"),
        (lambda content: content[: len(content) // 2], "index does not match"),
        (lambda content: content[:30], "gave 30 bytes instead of 68, 5 times"),
        (lambda content: None, "it is missing"),
    ],
)
def test_damage_there_is_found_and_the_column_made_anew(far: list[Column], bucket: None, change, said: str) -> None:
    other_bytes("c/1/0", change)
    with pytest.raises(
        RemoteShardError, match=rf"{PLACE}/.*/c/1/0 at .* is damaged \(.*{said}.*run the workflow again"
    ) as e:
        list(BatchReader(far[:1], 48, 0, None, 10_000).iterate(0, 30))
    assert e.value.set_aside() == [far[0].folder]
    assert not is_whole(far[0].folder) and elsewhere.array_url(far[0].folder) is None
    assert is_whole(far[1].folder) and elsewhere.array_url(far[1].folder)


def test_another_server_is_no_damage(far: list[Column]) -> None:
    Remote(f"{PLACE}/{ROOT}/activations.zarr/{MLP}").delete("zarr.json")
    with pytest.raises(RemoteError, match=r"zarr\.json at .* is not there; is AWS_ENDPOINT_URL the server"):
        open_rows(far[0])


def test_a_bit_flipped_on_the_way_is_read_again(far: list[Column], near: list[Column], s3: Proxy) -> None:
    rows = open_rows(far[0])
    flips = iter(["flip", "flip"])
    s3.fault = lambda method, path, n: next(flips, "") if "/c/" in path else ""
    assert torch.equal(rows.take(np.arange(N)), open_rows(near[0]).take(np.arange(N)))


# -------------------------------------------------------------------- there and back
def test_a_column_is_read_there_from_another_machine(far: list[Column], near: list[Column], tmp_path: Path) -> None:
    root = Remote(PLACE)
    for column in far:
        folder = tmp_path / "other" / "store" / column.folder.name
        carrier.pull(root, folder, arrays=False)
        assert transfer.pull(root.below(f"{ROOT}/{column.folder.name}"), folder)
    others = [open_column(tmp_path / "other" / "store" / column.folder.name) for column in far]
    assert not any(other.array.exists() for other in others)
    reader = BatchReader(others, 48, 3, None, 10_000)
    for one, other in zip(reader.iterate(0, 9), BatchReader(near, 48, 3).iterate(0, 9), strict=True):
        assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))
    for column in others:  # and now the arrays too
        carrier.pull(root, column.folder, arrays=True)
    ours, theirs = contents(tmp_path / "other" / "store"), contents(near[0].store)
    ours.pop("remote.json")
    assert {name: held for name, held in theirs.items() if not name.startswith(("tokens/", "progress/"))} == ours
    assert all(isinstance(open_rows(other), MappedRows) for other in others)


def test_an_interrupted_push_goes_on_and_shards_are_put_once(s3: Proxy, tmp_path: Path, values: dict) -> None:
    (column, _) = write_store(tmp_path / "store", values, **GEOMETRY)
    root = Remote(PLACE, patience=0.1)
    s3.fault = lambda method, path, n: "busy" if "c/2/0" in path else ""
    with pytest.raises(RemoteError, match="503"):
        carrier.push(root, column.folder)
    s3.fault = lambda method, path, n: ""
    before = {name for name, _ in root.names() if "/c/" in name}
    s3.requests.clear()
    carrier.push(root, column.folder)
    put = {path.removeprefix("/lab/results/") for method, path in s3.requests if method == "PUT" and MLP in path}
    assert before and not put & before and f"{ROOT}/activations.zarr/{MLP}/c/2/0" in put
    s3.requests.clear()
    assert carrier.push(root, column.folder) == 0
    assert not [path for method, path in s3.requests if method == "PUT"]


def test_a_damaged_shard_is_not_pushed(bucket: None, tmp_path: Path, values: dict) -> None:
    (column, _) = write_store(tmp_path / "store", values, **GEOMETRY)
    file = column.array / "c/1/0"
    file.write_bytes(flipped(bytearray(file.read_bytes())))
    with pytest.raises(ValueError, match="crc32c of chunk 0"):
        carrier.push(Remote(PLACE), column.folder)
    assert Remote(PLACE).stat(f"{ROOT}/activations.zarr/{MLP}/c/1/0") is None


def test_a_longer_column_stays_the_longer(bucket: None, tmp_path: Path, values: dict) -> None:
    long = write_store(tmp_path / "long" / "store", values, **GEOMETRY)
    short = write_store(tmp_path / "short" / "store", {hook: v[:150] for hook, v in values.items()}, **GEOMETRY)
    push_all(short, drop=False)
    push_all(long, drop=False)
    push_all(short)
    there = Remote(f"{PLACE}/{ROOT}/activations.zarr")
    assert json.loads(there.get("zarr.json"))["attributes"]["n_tokens"] == N
    assert json.loads(there.get(f"{MLP}/zarr.json"))["shape"] == [N, 6]
    assert torch.equal(open_rows(short[0]).take(np.arange(150)), values[MLP][:150])
    push_all(long)
    assert torch.equal(open_rows(long[0]).take(np.arange(N)), values[MLP])


def test_arrays_stay_of_one_length_there_and_here(bucket: None, tmp_path: Path, values: dict) -> None:
    """Of hooks with columns of different lengths, pushed from different machines: xarray opens no others."""
    from zarr.storage import ObjectStore

    (short,) = write_store(tmp_path / "a" / "store", {MLP: values[MLP][:150]}, **GEOMETRY)
    (long,) = write_store(tmp_path / "b" / "store", {Z: values[Z]}, **GEOMETRY)
    root = push_all([short])
    push_all([long], drop=False)
    there = ObjectStore(root.below(f"{ROOT}/activations.zarr")._store, read_only=True)
    for store in (there, tmp_path / "b" / "store" / "activations.zarr"):
        data = xarray.open_zarr(store, consolidated=False)
        assert data.sizes["token"] == N
        assert np.array_equal(data[Z].values, values[Z].numpy())
        if MLP in data:
            assert (
                np.array_equal(data[MLP].values[:150], values[MLP][:150].numpy())
                and np.isnan(data[MLP].values[150:]).all()
            )
        carrier.pull(root, long.store / short.folder.name, arrays=True)  # and then the same with both here
    assert MLP in xarray.open_zarr(tmp_path / "b" / "store" / "activations.zarr", consolidated=False)
    assert list(damaged_coordinates(long.store, N)) == []


def test_what_is_not_in_the_bucket_is_not_dropped(bucket: None, tmp_path: Path, values: dict) -> None:
    columns = write_store(tmp_path / "store", values, **GEOMETRY)
    root = push_all(columns[:1], drop=False)
    said = sorted(carrier.drop(root, columns[0].store))
    assert [line.split()[0] for line in said] == ["dropped", "kept"] and "is not in the bucket" in said[1]
    assert not columns[0].array.exists() and columns[1].array.exists()
    carrier.push(root, columns[1].folder)
    transfer.push(root.below(f"{ROOT}/{columns[1].folder.name}"), columns[1].folder)
    root.delete(f"{ROOT}/activations.zarr/{Z}/c/2/0/0")
    (said,) = carrier.drop(root, columns[0].store)
    assert said.startswith("kept") and columns[1].array.exists()


def test_a_store_has_its_arrays_in_one_bucket(far: list[Column]) -> None:
    with pytest.raises(ValueError, match="a store can have them in one bucket"):
        elsewhere.point_to(far[0].store, "s3://other/results", MLP, N)


def test_more_rows_than_the_bucket_has_are_not_there(far: list[Column]) -> None:
    about = json.loads((far[0].folder / "column.json").read_text())
    (far[0].folder / "column.json").write_text(json.dumps(about | {"n_tokens": N + 1}))
    assert elsewhere.array_url(far[0].folder) is None and not elsewhere.rows_are_somewhere(far[0].folder)


# -------------------------------------------------------------------- a plan
HOOKS = [MLP, Z]


@pytest.fixture
def results(tmp_path: Path) -> Path:
    x = torch.relu(torch.randn(1000, 8, generator=torch.Generator().manual_seed(0)))
    store = tmp_path / "results" / "activations" / TRAINING_STORE
    write_store(store, {MLP: x, Z: x[:, :6] * 3 + 1}, chunk_tokens=64, shard_tokens=256)
    return tmp_path / "results"


def plan_of(results: Path, **device: object) -> Plan:
    dictionary = {"kind": "transcoder", "activation": "relu", "l1_coefficient": 0.1, "expansion": 2}
    plan = training_plan(str(results), HOOKS, {"it-1234": dictionary}, TRAINING | {"n_tokens": 1024})
    plan.device = {"default": "cpu", "flops": 1e11, "remote": PLACE, **device}
    plan.stages = {name: plan.stages.get(name, {}) for name in ("tokens", "activations", "train")}
    return plan


def look(plan: Plan) -> Plan:
    from saeflow.planning.stages import stages

    plan.stages = {name: plan.stages.get(name, {}) for name in stages()}
    plan.found = {
        s: [key for key in table if is_whole(plan.folder(s, key)) and stages()[s].whole(plan.folder(s, key))]
        for s, table in plan.stages.items()
    }
    plan.to_make = {s: [key for key in table if key not in plan.found[s]] for s, table in plan.stages.items()}
    return plan


def train(plan: Plan) -> dict[str, bytes]:
    training.train([Job(plan.instance("train", "it-1234"), plan, "cpu")])
    found = contents(plan.folder("train", "it-1234"))
    return {name: held for name, held in found.items() if name != RECEIPT}  # which holds the time


def test_a_training_from_a_bucket_has_the_bytes_of_one_from_here(
    s3: Proxy, results: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Read in groups, and whole; with a server that fails now and then; and what it made goes there, and comes back."""
    plan = look(plan_of(results))
    here = train(plan)
    shutil.rmtree(plan.folder("train", "it-1234"))
    look(plan)
    said = list(push(plan, remote_of(plan), drop=True))
    assert all(well for _, well in said) and sum("dropped" in line for line, _ in said) == 2
    assert look(plan).to_make["activations"] == []
    check_remote(plan)
    with monkeypatch.context() as patch:
        for name in ("operations", "holds"):
            patch.setattr(training_stage, name, lambda plan, instances: 0)
        asked = resources(plan, [plan.instance("train", "it-1234")])["mem_mb"]
        patch.setattr(training_stage, "array_url", lambda column: None)
        assert resources(plan, [plan.instance("train", "it-1234")])["mem_mb"] == asked - plan.read_ahead_mb
    s3.fault = lambda method, path, n: {0: "drop", 1: "busy", 2: "short", 3: "lost", 4: "flip"}.get(n % 23, "")
    assert train(plan) == here
    shutil.rmtree(plan.folder("train", "it-1234"))
    monkeypatch.setattr(reader_module, "IN_MEMORY_TOKENS", 0)
    monkeypatch.setattr(Plan, "read_ahead_mb", 0)
    assert train(plan) == here

    s3.fault = lambda method, path, n: ""
    assert all(well for _, well in push(look(plan), remote_of(plan)))
    elsewhere_plan = look(plan_of(results.parent / "another"))
    said = list(pull(elsewhere_plan, remote_of(plan)))
    assert sum(line.startswith("pulled: ") for line, _ in said) == 3 and all(well for _, well in said)
    assert contents(elsewhere_plan.folder("train", "it-1234")) == contents(plan.folder("train", "it-1234"))
    assert all(line.startswith("whole: ") for line, _ in damaged(plan, remote_of(plan)))


def test_what_is_damaged_there_is_taken_away_and_pushed_again(bucket: None, results: Path) -> None:
    plan = look(plan_of(results))
    root = remote_of(plan)
    assert all(well for _, well in push(plan, root))
    path = f"activations/{TRAINING_STORE}/activations.zarr/{MLP}/c/1/0"
    content = flipped(bytearray(root.get(path)))
    root.delete(path)
    root.put_new(path, bytes(content))
    said = [line for line, well in damaged(plan, root, set_aside=True) if not well]
    assert len(said) == 1 and "c/1/0" in said[0] and root.stat(path) is None
    said = list(push(plan, root))
    assert sum(line.startswith("pushed: ") for line, _ in said) == 1 and all(well for _, well in said)
    assert all(well for _, well in damaged(plan, root))


def test_a_run_says_first_that_it_cannot_read_a_bucket(
    s3: Proxy, results: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = look(plan_of(results))
    list(push(plan, remote_of(plan), drop=True))
    look(plan)
    monkeypatch.setattr("saeflow.storage.remote.QUICK", 0.2)
    monkeypatch.setattr("saeflow.planning.remote.QUICK", 0.2)
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    with pytest.raises(ConfigError, match=r"^device\.remote: s3://lab/results at .*: no connection; tried"):
        check_remote(plan)
    plan.device["remote"] = None
    with pytest.raises(
        ConfigError, match=r"^activations .* is to be read in a bucket: s3://lab/.*: no connection; tried"
    ):
        check_remote(plan)
    plan.to_make["train"] = []  # what nothing reads is not asked for
    check_remote(plan)


def test_arrays_that_a_job_may_be_reading_are_kept(bucket: None, results: Path) -> None:
    plan = look(plan_of(results))
    lock = Lock(results / "train" / "it-1234.lock")
    lock.acquire("it-1234")
    said = [line for line, well in push(plan, remote_of(plan), drop=True) if not well]
    assert len(said) == 1 and f"makes {results}/train/it-1234, which may be reading them" in said[0]
    assert (results / "activations" / TRAINING_STORE / "activations.zarr" / MLP / "c/0/0").exists()
    lock.release()
    assert sum(line.startswith("dropped") for line, _ in push(plan, remote_of(plan), drop=True)) == 2


def test_an_array_that_is_dropped_while_it_is_opened_is_read_there(
    far: list[Column], near: list[Column], monkeypatch: pytest.MonkeyPatch
) -> None:
    urls = iter([None, elsewhere.array_url(far[0].folder)])  # as before it was dropped, and after
    monkeypatch.setattr(reader_module, "array_url", lambda folder: next(urls))
    assert torch.equal(open_rows(far[0]).take(np.arange(N)), MappedRows(near[0]).take(np.arange(N)))


def test_a_plan_says_what_the_bucket_has_already(bucket: None, results: Path) -> None:
    plan = look(plan_of(results))
    assert notes_of_bucket(plan) == []
    train(plan)
    list(push(look(plan), remote_of(plan)))
    fresh = look(plan_of(results.parent / "fresh"))
    assert notes_of_bucket(fresh) == [f"3 of 4 artifacts to make are in {PLACE}: make pull brings them instead"]
    assert notes_of_bucket(look(plan_of(results, remote=None))) == []


def test_the_script_says_in_one_sentence_what_is_wrong(s3: Proxy, tmp_path: Path) -> None:
    """Before any job, and by the same command that a person types: no credentials, no traceback."""
    command = [sys.executable, str(ROOT_FOLDER / "scripts/remote.py"), "push", "--directory", str(tmp_path)]
    done = subprocess.run(
        [*command, "experiment=demo device.remote=s3://nobody-has-this/x"], capture_output=True, text=True
    )
    assert done.returncode == 1 and done.stdout == ""
    assert re.fullmatch(r"remote: s3://nobody-has-this/x at http://[\d.:]+: there is no such bucket; .*\n", done.stderr)


def test_no_place_to_push_to_is_said(results: Path) -> None:
    with pytest.raises(ConfigError, match=r"device\.remote says no place"):
        remote_of(plan_of(results, remote=None))


def test_more_rows_are_cached_here_beside_what_lies_there(bucket: None, tmp_path: Path, values: dict) -> None:
    """A dropped array that is asked for again is written anew from its first token on, and then read here."""
    columns = write_store(tmp_path / "store", {MLP: values[MLP][:128]}, **GEOMETRY)
    push_all(columns)
    shutil.rmtree(tmp_path / "store" / "tokens")
    longer = write_store(tmp_path / "store", values, **GEOMETRY)
    assert torch.equal(open_rows(longer[0]).take(np.arange(N)), values[MLP])
    assert isinstance(open_rows(columns[0]), MappedRows)
