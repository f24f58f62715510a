"""Caching in parts: the same bytes for any number of them, whatever was killed, lost or damaged between them."""

import errno
import os
import signal
import threading
from collections.abc import Callable
from multiprocessing import get_context
from pathlib import Path

import pytest
import torch
from stores import contents, write_rows
from tests.activations.test_caching import (  # noqa: F401 (some are fixtures)
    GEOMETRY,
    HIDDEN,
    HOOK_Z,
    MLP_OUT,
    _jobs,
    model,
    never,
    rows,
    tokens_by_rows,
    wanted,
)

from saeflow.activations import parts
from saeflow.activations.ahead import Ahead, missing
from saeflow.activations.caching import DiskFullError, cache, cache_jobs
from saeflow.activations.parts import compute_ahead, lock_of
from saeflow.activations.shards import ShardWriter
from saeflow.activations.store import ActivationStore, TokenRows
from saeflow.activations.writer import ActivationError, ColumnRequest
from saeflow.config import ActivationsConfig
from saeflow.planning.parts import Part
from saeflow.planning.stages import stages
from saeflow.storage.locks import locked
from saeflow.storage.receipts import RECEIPT, is_whole

COLUMNS = wanted(MLP_OUT, HOOK_Z, rows=33)  # 6 shards each, the last of 56 tokens
SHARDS = 6


class Stores:
    """Stores of one test, of the same rows and model."""

    def __init__(self, folder: Path, rows: TokenRows, model: object) -> None:  # noqa: F811
        self.folder, self.rows, self.model = folder, rows, model

    def open(self, name: str) -> ActivationStore:
        return ActivationStore(self.folder / name, ActivationsConfig(**GEOMETRY))

    def part(self, name: str, number: int, of: int, columns: list[ColumnRequest] = COLUMNS, **more: object) -> int:
        load: Callable = more.get("load", lambda: self.model)  # type: ignore[assignment]
        return compute_ahead(self.open(name), columns, more.get("rows", self.rows), load, Part(number, of))

    def join(self, name: str, columns: list[ColumnRequest] = COLUMNS, load: Callable = never) -> dict:
        """By default the joining job may compute nothing itself."""
        store = self.open(name)
        with store.locked():
            return cache(store, columns, self.rows, load, attributes={"model": "0123"})

    def whole(self, name: str, columns: list[ColumnRequest] = COLUMNS) -> dict:
        return self.join(name, columns, lambda: self.model)

    def contents(self, name: str) -> dict[str, bytes]:
        return contents(self.folder / name)

    def ready(self, name: str) -> dict[str, tuple[int, int]]:
        """Files of shards that lie ready, with what tells whether they were written again."""
        found = sorted((self.folder / name).glob("parts/*/*.shard"))
        return {f"{file.parent.name}/{file.stem.split('-')[0]}": _state(file) for file in found}


def _state(file: Path) -> tuple[int, int]:
    return file.stat().st_mtime_ns, file.stat().st_ino


@pytest.fixture
def stores(tmp_path, rows, model) -> Stores:  # noqa: F811
    return Stores(tmp_path, rows, model)


def same(a: dict, b: dict) -> bool:
    return a.keys() == b.keys() and all(torch.equal(x, y) for k in a for x, y in zip(a[k], b[k], strict=True))


@pytest.mark.parametrize("of", [1, 2, 3, 8])
def test_any_number_of_parts_in_any_order_gives_the_bytes_of_one_job(stores, of) -> None:
    expected = stores.whole("whole")
    numbers = list(range(1, of + 1))
    computed = [stores.part("parts", number, of) for number in numbers[::2] + numbers[1::2]]
    assert sum(computed) == 2 * SHARDS and min(computed) == (0 if of > SHARDS else 2 * (SHARDS // of))
    assert same(stores.join("parts"), expected)
    assert stores.contents("parts") == stores.contents("whole")


def test_what_lies_ready_is_nobodys_column_and_goes_with_the_join(stores) -> None:
    stores.part("parts", 1, 2)
    assert not (stores.folder / "parts" / "activations.zarr").exists()
    assert set(stores.ready("parts")) == {f"{hook}/{n}" for hook in (MLP_OUT, HOOK_Z) for n in (0, 2, 4)}
    stores.part("parts", 2, 2)
    stores.join("parts")
    assert not (stores.folder / "parts" / "parts").exists()


def test_a_part_that_was_killed_goes_on_and_the_others_are_not_touched(stores, monkeypatch) -> None:
    expected = stores.whole("whole")
    stores.part("parts", 2, 2)
    others = stores.ready("parts")
    child = os.fork()
    if child == 0:
        written = []
        close = ShardWriter.close

        def kill(self: ShardWriter) -> None:
            written.append(self.path)
            if len(written) == 4:
                os.kill(os.getpid(), signal.SIGKILL)
            close(self)

        ShardWriter.close = kill  # type: ignore[method-assign]
        stores.part("parts", 1, 2)
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
    after = stores.ready("parts")
    assert others.items() < after.items() and len(after) < 2 * SHARDS
    assert list((stores.folder / "parts").rglob("*.partial"))
    assert stores.part("parts", 1, 2) == 2 * SHARDS - len(after)  # and no more
    assert after.items() < stores.ready("parts").items()
    assert not list((stores.folder / "parts").rglob("*.partial"))
    assert same(stores.join("parts"), expected) and stores.contents("parts") == stores.contents("whole")


def _shard(stores: Stores, number: int) -> Path:
    (file,) = (stores.folder / "parts" / "parts" / MLP_OUT).glob(f"{number}-*.shard")
    return file


def _flip(file: Path) -> None:
    data = bytearray(file.read_bytes())
    data[100] ^= 1
    file.write_bytes(data)


@pytest.mark.parametrize("seen", [True, False])
def test_a_shard_that_was_lost_is_made_again_alone(stores, seen) -> None:
    """By its part, where the plan can see that it is gone; of a flipped bit the joining job finds out."""
    expected = stores.whole("whole")
    for number in (1, 2, 3):
        stores.part("parts", number, 3)
    before, store = stores.ready("parts"), stores.open("parts")
    for number in (1, 4):  # both of part 2
        file = _shard(stores, number)
        if not seen:
            _flip(file)
        elif number == 1:
            file.unlink()
        else:
            os.truncate(file, file.stat().st_size - 1)
    gone = missing(store.folder, MLP_OUT, 2, store.layout((32,)), 33 * 32)
    assert gone == ([1, 4] if seen else [])
    if seen:
        assert [stores.part("parts", number, 3) for number in (1, 2, 3)] == [0, 2, 0]
        again = {name for name, state in stores.ready("parts").items() if before[name] != state}
        assert again == {f"{MLP_OUT}/1", f"{MLP_OUT}/4"}
        found = stores.join("parts")
    else:
        with pytest.raises(AssertionError, match="the model was asked for"):
            stores.join("parts")
        found = stores.whole("parts")
    assert same(found, expected) and stores.contents("parts") == stores.contents("whole")


def test_parts_of_another_number_are_as_good(stores) -> None:
    stores.part("parts", 1, 2)
    assert [stores.part("parts", number, 3) for number in (1, 2, 3)] == [2, 2, 2]  # of shards 0 to 5, the odd ones
    assert stores.join("parts") and stores.whole("whole") and stores.contents("parts") == stores.contents("whole")


def test_one_job_after_unfinished_parts_takes_what_they_made(stores, monkeypatch) -> None:
    stores.part("parts", 2, 3)
    blocks = []
    real = parts.run_block
    monkeypatch.setattr("saeflow.activations.caching.run_block", lambda *a: (blocks.append(a[3]), real(*a)))
    expected = stores.whole("whole")
    all_blocks, blocks[:] = len(blocks), []
    assert same(stores.whole("parts"), expected) and stores.contents("parts") == stores.contents("whole")
    assert len(blocks) <= all_blocks


def test_a_store_grows_by_parts_to_more_rows_and_more_hooks(stores) -> None:
    short = wanted(MLP_OUT, rows=20)  # 640 tokens: ends within a shard, which is replaced
    longer = wanted(MLP_OUT, HIDDEN, rows=33)
    for name in ("parts", "whole"):
        stores.whole(name, short)
    expected = stores.whole("whole", longer)
    assert sum(stores.part("parts", number, 4, longer) for number in (1, 2, 3, 4)) == 3 + SHARDS
    assert same(stores.join("parts", longer), expected)
    assert stores.contents("parts") == stores.contents("whole")
    assert sum(stores.part("parts", number, 4, longer, load=never) for number in (1, 2, 3, 4)) == 0


def test_columns_of_several_lengths_are_joined(stores) -> None:
    columns = wanted(MLP_OUT, rows=20) + wanted(MLP_OUT, HOOK_Z, rows=33)
    expected = stores.whole("whole", columns)
    for number in (1, 2):
        stores.part("parts", number, 2, columns)
    assert same(stores.join("parts", columns), expected) and stores.contents("parts") == stores.contents("whole")


def test_a_kill_between_two_shards_of_the_join_costs_nothing_but_time(stores) -> None:
    expected = stores.whole("whole")
    for number in (1, 2):
        stores.part("parts", number, 2)
    child = os.fork()
    if child == 0:
        taken = []
        take = Ahead.take

        def kill(self: Ahead, *asked: object) -> int:
            taken.append(asked)
            if len(taken) == 9:
                os.kill(os.getpid(), signal.SIGKILL)
            return take(self, *asked)

        Ahead.take = kill  # type: ignore[method-assign, assignment]
        stores.join("parts")
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
    assert 0 < len(stores.ready("parts")) < 2 * SHARDS
    assert same(stores.whole("parts"), expected) and stores.contents("parts") == stores.contents("whole")


def test_shards_of_other_tokens_are_not_taken(stores, tmp_path) -> None:
    other = stores.rows.tokens(0, 33).copy()
    other[8:] = other[8:][::-1]
    stores.part("parts", 1, 1, rows=write_rows(tmp_path / "other", other))
    assert stores.part("parts", 1, 1) == 2 * (SHARDS - 1)  # shard 0 is of the same rows
    expected = stores.whole("whole")
    assert same(stores.join("parts"), expected)
    whole = stores.contents("whole")
    assert stores.contents("parts") == whole  # nor do those of other tokens stay


def in_processes(*calls: Callable[[], object]) -> list[int]:
    """Runs each in a forked child, all at once; returns how they ended."""
    children = []
    for call in calls:
        children.append(os.fork())
        if children[-1] == 0:
            code = 1
            try:
                call()
                code = 0
            finally:
                os._exit(code)
    return [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]


def test_an_orphan_and_its_successor_compute_no_shard_twice(stores, monkeypatch, tmp_path) -> None:
    """Nor do two runs that share the work in other parts."""
    real, computed = parts._compute, tmp_path / "computed"

    def compute(store, asked, number, *rest):
        with computed.open("a") as file:
            file.write(f"{number}\n")
        real(store, asked, number, *rest)

    monkeypatch.setattr(parts, "_compute", compute)
    assert in_processes(lambda: stores.part("parts", 1, 1), lambda: stores.part("parts", 1, 2)) == [0, 0]
    assert sorted(map(int, computed.read_text().split())) == list(range(SHARDS))
    stores.whole("whole")
    stores.join("parts")
    assert stores.contents("parts") == stores.contents("whole")


def test_the_parts_of_a_store_do_not_wait_for_each_other_nor_for_who_writes_it(stores, monkeypatch) -> None:
    """Each holds its shard until both are at work, while another process has the store's lock."""
    both, real = get_context("fork").Barrier(2), parts._compute
    monkeypatch.setattr(parts, "_compute", lambda *a: (both.wait(20), real(*a)))
    with stores.open("parts").locked():
        assert in_processes(lambda: stores.part("parts", 1, 2), lambda: stores.part("parts", 2, 2)) == [0, 0]
    assert len(stores.ready("parts")) == 2 * SHARDS


def test_a_shard_is_waited_for(stores) -> None:
    store, done = stores.open("parts"), threading.Event()
    with locked(lock_of(store, 0), "shard 0"):
        thread = threading.Thread(target=lambda: (stores.part("parts", 1, 3), done.set()))
        thread.start()
        assert not done.wait(0.5) and not stores.ready("parts")
    thread.join()
    assert len(stores.ready("parts")) == 4


def test_jobs_of_parts_and_the_job_that_joins_them(tmp_path, neox_folder, tokens_by_rows) -> None:  # noqa: F811
    """As the plan calls them; what is missing, it sees on disk."""
    asked = [(MLP_OUT, 20), (MLP_OUT, 33), (HOOK_Z, 33)]
    jobs, whole = (_jobs(tmp_path / name, neox_folder, tokens_by_rows, asked) for name in ("parts", "whole"))
    cache_jobs(whole)
    declared = stages()["activations"].parts
    assert declared is not None
    plan, instances = jobs[0].plan, [job.instance for job in jobs]
    assert declared.most(plan, instances) == SHARDS
    for done, part in enumerate(both := [Part(1, 2), Part(2, 2)]):
        assert declared.missing(plan, instances, both) == both[done:]
        assert "6 shards computed ahead" in declared.work(jobs, part)
        assert "0 shards computed ahead" in declared.work(jobs, part)
    assert declared.missing(plan, instances, both) == []
    cache_jobs(jobs)
    assert declared.missing(plan, instances, both) == []
    for job, alone in zip(jobs, whole, strict=True):
        assert is_whole(job.path)
        ours, theirs = contents(job.path), contents(alone.path)
        assert {name: ours[name] for name in ours if name != RECEIPT} == {
            name: theirs[name] for name in theirs if name != RECEIPT
        }
    zarr = [contents(job.path.parent / "activations.zarr") for job in (jobs[0], whole[0])]
    assert zarr[0] == zarr[1]
    cache_jobs(jobs[1:])  # made again, though it is there: none of what lies ready is of use then
    (jobs[0].path.parent / "parts" / MLP_OUT).mkdir(parents=True)
    cache_jobs(jobs[1:])
    assert not (jobs[0].path.parent / "parts" / MLP_OUT).exists()


def test_a_part_refuses_what_one_job_does(stores, neox_folder, monkeypatch) -> None:
    from saeflow.config import ModelConfig
    from saeflow.models.loading import load_model

    broken = load_model(neox_folder, ModelConfig(name="tiny", path=str(neox_folder)), "cpu")
    broken.blocks[1].mlp.b_out[3] = float("nan")
    with pytest.raises(ActivationError, match="hook_mlp_out: NaN or infinity among tokens 200 to 239"):
        stores.part("parts", 2, 2, load=lambda: broken)
    assert not stores.ready("parts") and not list((stores.folder / "parts").rglob("*.partial"))
    add = ShardWriter.add

    def full(self, chunk):
        if self.path.name.startswith("2-"):
            raise OSError(errno.ENOSPC, "No space left on device")
        add(self, chunk)

    monkeypatch.setattr(ShardWriter, "add", full)
    with pytest.raises(DiskFullError, match=r"became full while caching: .* GB are still needed"):
        stores.part("parts", 1, 2)
    assert len(stores.ready("parts")) == 2 and not list((stores.folder / "parts").rglob("*.partial"))
