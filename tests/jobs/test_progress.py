"""Loops leave lines in logs at growing intervals, and `make status` reads from them and from locks what jobs are at."""

import logging
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from saeflow.jobs import progress as module
from saeflow.jobs import status
from saeflow.jobs.progress import Seen, first_line, progress, read_progress
from saeflow.jobs.status import FAILED, QUEUED, READY, RUNNING, STOPPED, WAITS, unfinished
from saeflow.planning.graph import Instance, Plan
from saeflow.storage.locks import EXPIRES


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    now = [0.0]
    monkeypatch.setattr(module.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(module, "peak_memory", lambda: 1_234_000_000)
    return now


def test_lines_come_at_growing_intervals(clock: list[float], caplog: pytest.LogCaptureFixture) -> None:
    at = []
    with caplog.at_level(logging.INFO, "saeflow"):
        for _ in progress(range(300), "caching", unit="tokens", each=1000):
            clock[0] += 1.0
            if len(caplog.messages) > len(at):
                at.append(clock[0] - 1)
    assert at == [10, 30, 90, 150, 210, 270]
    assert caplog.messages[0] == "caching: 10,000 of 300,000 tokens (3 %), 1,000 a second, 5 min left, 1.2 GB of memory"
    assert (
        caplog.messages[-1] == "caching: 270,000 of 300,000 tokens (90 %), 1,000 a second, 30 s left, 1.2 GB of memory"
    )


def test_a_short_loop_leaves_none(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "saeflow"):
        assert list(progress(range(3), "steps")) == [0, 1, 2]
    assert not caplog.messages


def test_what_an_earlier_process_did_is_no_speed_of_this_one(
    clock: list[float], caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO, "saeflow"), progress(None, "3 dictionaries", 1000, "steps", start=800) as bar:
        clock[0] = 50.0
        bar.update(100)
    assert caplog.messages == ["3 dictionaries: 900 of 1,000 steps (90 %), 2 a second, 50 s left, 1.2 GB of memory"]


def test_the_last_part_may_be_smaller(clock: list[float], caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "saeflow"):
        for _ in progress(range(0, 50, 32), "evaluating", 50, "rows", each=32):
            clock[0] += 20.0
    assert caplog.messages[-1].startswith("evaluating: 50 of 50 rows (100 %)")


@pytest.mark.parametrize(
    ("line", "seen"),
    [
        ("caching: 12 of 96 tokens (12 %), 1.5 a second, 56 s left, 1.2 GB of memory", Seen("caching", 12, "56 s")),
        ("heads: 0,1: 7 of 9 (78 %), 2 a second, 1 s left, 0.1 GB of memory", Seen("heads: 0,1", 78, "1 s")),
        ("rows: 1,200 rows, 30 a second, 0.5 GB of memory", Seen("rows", None, "")),
        ("wrote 12 of 96 tokens (12 %)", None),
        ("makes train a", None),
    ],
)
def test_lines_are_read_again(line: str, seen: Seen | None) -> None:
    assert read_progress(line) == seen


def test_written_lines_are_read_again(clock: list[float]) -> None:
    for total, unit in ((None, ""), (None, "rows"), (1000, ""), (1000, "steps")):
        bar = progress(None, "a (b), c: d", total, unit)
        bar.done = 500
        share = (50, "50 s") if total else (None, "")
        assert read_progress(bar.line(50.0)) == Seen("a (b), c: d", *share)


# -------------------------------------------------------------------- status
@pytest.fixture
def plan(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Plan:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(status, "slurm_queue", dict)
    columns = {"store/col-1": Instance("activations", "store/col-1", {}, {}, {})}
    trained = {f"sae-{i}": Instance("train", f"sae-{i}", {}, {"activations": ["store/col-1"]}, {}) for i in range(3)}
    figures = {"f-1": Instance("figures", "f-1", {}, {"train": list(trained)}, {})}
    from saeflow.planning.stages import stages

    tables = {name: {} for name in stages()} | {"activations": columns, "train": trained, "figures": figures}
    plan = Plan("test", tables, {})
    for name, table in tables.items():
        plan.to_make[name], plan.found[name] = list(table), []
    plan.batches = {"train": [["sae-0", "sae-1"], ["sae-2"]]}
    return plan


def states(plan: Plan) -> list[tuple[str, tuple[str, ...], str, str]]:
    return [(s.stage, s.keys, s.state, s.about) for s in unfinished(plan)]


def log_of(name: str, *messages: str, stage: str = "train", ago: float = 600) -> Path:
    path = Path("logs") / stage / f"{name}.log"
    path.parent.mkdir(parents=True, exist_ok=True)
    when = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(time.time() - ago))
    path.write_text("".join(f"{when},123 {m if m.startswith('ERROR') else f'INFO {m}'}\n" for m in messages))
    return path


def lock_of(plan: Plan, key: str, age: float = 0.0) -> None:
    path = plan.folder("train", key).with_name(f"{key}.lock")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("")
    os.utime(path, (time.time() - age,) * 2)


LINE = "2 dictionaries: 430 of 1,000 steps (43 %), 2 a second, 6 min left, 1.2 GB of memory"


def test_what_has_not_begun_waits_or_is_next(plan: Plan) -> None:
    assert states(plan) == [
        ("activations", ("store/col-1",), READY, ""),
        ("train", ("sae-0", "sae-1"), WAITS, "for 1 other"),
        ("train", ("sae-2",), WAITS, "for 1 other"),
        ("figures", ("f-1",), WAITS, "for 3 others"),
    ]


def test_who_holds_a_lock_is_at_work(plan: Plan) -> None:
    """Whichever jobs share it by now: those that its log names do."""
    log_of("sae-1", first_line("train", ["sae-1", "sae-2"]), LINE)
    lock_of(plan, "sae-1")
    assert states(plan)[1:3] == [
        ("train", ("sae-0",), WAITS, "for 1 other"),
        ("train", ("sae-1", "sae-2"), RUNNING, "2 dictionaries at 43 %, 6 min left"),
    ]


def test_who_gave_no_sign_of_life_has_stopped(plan: Plan) -> None:
    log = log_of("sae-2", first_line("train", ["sae-2"]), LINE)
    lock_of(plan, "sae-2", EXPIRES + 1)
    about = f"at 43 %, last word 10 min ago; run the workflow again (log: {log})"
    assert states(plan)[2] == ("train", ("sae-2",), STOPPED, about)


def test_who_failed_says_why(plan: Plan) -> None:
    log = log_of("sae-2", first_line("train", ["sae-2"]), LINE, "ERROR train failed: the loss is not finite")
    assert states(plan)[2][2:] == (FAILED, f"train failed: the loss is not finite (log: {log})")
    log_of("later", first_line("train", ["sae-2"]), ago=60)
    assert states(plan)[2][2] == STOPPED


def test_the_queue_says_what_waits(plan: Plan, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    squeue = tmp_path / "bin" / "squeue"
    squeue.parent.mkdir()
    lines = [
        "rule_activations_wildcards_store_col-1\tPENDING\tResources\t7",
        "(null)\tRUNNING\tNone\t8",
        "rule_train_wildcards_sae-0\tPENDING\tPriority\t9_[1-2]",
    ]
    squeue.write_text("#!/bin/sh\ncat <<'END'\n" + "\n".join(lines) + "\nEND\n")
    squeue.chmod(0o755)
    monkeypatch.undo()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PATH", f"{squeue.parent}:{os.environ['PATH']}")
    assert states(plan)[0][2:] == (QUEUED, "in Slurm as 7: pending (Resources)")
    assert states(plan)[1][2:] == (QUEUED, "in Slurm as 9_[1-2]: pending (Priority)")
    assert states(plan)[2][2] == WAITS  # for the column: it cannot be in the array
    plan.to_make["activations"] = []
    assert states(plan)[1][2] == QUEUED  # of an array Slurm knows the first job's name alone


def test_a_part_is_a_job_of_its_own(plan: Plan, monkeypatch: pytest.MonkeyPatch) -> None:
    plan.parts = {"activations": {"store/col-1": ["1-of-3", "2-of-3", "3-of-3"]}}
    folder = Path("results/activations/store")
    folder.mkdir(parents=True)
    (folder / "col-1.part-2-of-3.lock").write_text("")
    for part, line in (
        ("2-of-3", "caching part 2-of-3: 40 of 100 tokens (40 %), 2 a second, 30 s left, 1 GB of memory"),
    ):
        name = f"store/col-1.part-{part}"
        log_of(name, first_line("activations", [name]), line, stage="activations")
    log_of(
        "store/col-1.part-1-of-3",
        "makes activations store/col-1.part-1-of-3 (process 1 on a)",
        "ERROR failed",
        stage="activations",
    )
    monkeypatch.setattr(status, "slurm_queue", lambda: {"store_col-1_3-of-3": "in Slurm as 5: pending"})
    found = states(plan)
    assert [state[2] for state in found[:4]] == [FAILED, RUNNING, QUEUED, WAITS]
    assert found[1][3] == "caching part 2-of-3 at 40 %, 30 s left" and found[3][3] == "for 3 others"
    assert "store/col, part 2 of 3" in str(list(unfinished(plan))[1])


def test_torn_logs_say_nothing(plan: Plan) -> None:
    for name, text in {"a": "", "b": "\0\xff", "c": "2026-01-01 00:00:00,000 INFO something else\n"}.items():
        path = log_of(name)
        path.write_text(text)
    assert [s[2] for s in states(plan)] == [READY, WAITS, WAITS, WAITS]


def test_the_command(tmp_path: Path) -> None:
    root = Path(__file__).resolve().parents[2]
    command = [sys.executable, root / "scripts/status.py", "--directory", tmp_path, "--conf", root / "conf"]
    (tmp_path / "resources").symlink_to(root / "resources")
    done = subprocess.run([*command, "dictionary.k=[4,8]"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert lines[0].startswith("tokens       not started")
    assert lines[-1].startswith("default: 0 artifacts are there; ")
    done = subprocess.run([*command, "dictionary.k=[4,x]"], capture_output=True, text=True)
    assert done.returncode == 1 and done.stderr.startswith("status: dictionary.k")
