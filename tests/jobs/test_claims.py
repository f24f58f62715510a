"""Two runs that want the same artifact: one makes it, the other takes it."""

import os
import re
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from stores import contents

from saeflow.jobs import claims
from saeflow.jobs.claims import claimed
from saeflow.jobs.job import Job
from saeflow.planning.graph import Instance, Plan

SCRIPT = """
import dataclasses, time
from pathlib import Path

from saeflow.jobs import command
from saeflow.jobs.signals import stoppable
from saeflow.planning.stages import stages

def work(jobs):
    for job in jobs:
        with open("made.txt", "a") as file:
            print(job.instance.key, file=file)
        with job.writing() as folder:
            (folder / "a.txt").write_text("a")
            while not Path("go").exists():
                time.sleep(0.02)
            (folder / "b.txt").write_text("b")
    return f"made {len(jobs)}"

sizes = dict(operations=lambda *_: 1.0, resources=lambda *_: {})
command.stages = lambda: {"train": dataclasses.replace(stages()["train"], work=work, **sizes)}
with stoppable():
    command.main()
"""


@pytest.fixture
def plan(tmp_path: Path) -> Plan:
    instances = {key: Instance("train", key, {}, {}, {}) for key in ("one", "two")}
    plan = Plan("test", {"train": instances}, {}, results=str(tmp_path / "results"))
    plan.freeze(tmp_path / "plan.json")
    (tmp_path / "script.py").write_text(SCRIPT)
    return plan


def start(home: Path, log: str, *keys: str, environment: dict[str, str] | None = None) -> subprocess.Popen:
    options = [option for key in keys for option in ("--key", key)]
    command = [sys.executable, "script.py", "train", "--plan", "plan.json", "--log", log, *options]
    pipe = subprocess.PIPE
    return subprocess.Popen(command, cwd=home, stdout=pipe, stderr=pipe, text=True, env=environment)


def wait_for(condition) -> None:
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_the_second_waits_and_finds_it_done(plan: Plan, tmp_path: Path) -> None:
    """Whatever else each of them makes, and in whichever order it is told to."""
    first = start(tmp_path, "first.log", "one", "two")
    wait_for((tmp_path / "made.txt").exists)
    second = start(tmp_path, "second.log", "two", "one")
    wait_for(lambda: (tmp_path / "second.log").exists() and "waiting for" in (tmp_path / "second.log").read_text())
    (tmp_path / "go").touch()
    outputs = [process.communicate() for process in (first, second)]
    assert [first.returncode, second.returncode] == [0, 0], outputs
    assert (tmp_path / "made.txt").read_text().split().count("one") == 1
    log = (tmp_path / "second.log").read_text()
    assert re.search(rf"waiting for process {first.pid} on \S+ since \d{{4}}-\d\d-\d\d \d\d:\d\d:\d\d", log)
    assert "one was made by another run meanwhile" in log
    assert sorted(p.name for p in (tmp_path / "results/train").iterdir()) == ["one", "two"]


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGTERM])
def test_what_a_killed_process_held_is_taken_over(plan: Plan, tmp_path: Path, how: signal.Signals) -> None:
    first = start(tmp_path, "first.log", "one")
    wait_for((tmp_path / "made.txt").exists)
    second = start(tmp_path, "second.log", "one")
    wait_for(lambda: (tmp_path / "second.log").exists() and "waiting for" in (tmp_path / "second.log").read_text())
    os.kill(first.pid, how)
    first.communicate()
    (tmp_path / "go").touch()
    assert second.communicate() and second.returncode == 0
    assert (tmp_path / "made.txt").read_text() == "one\none\n"
    assert [p.name for p in (tmp_path / "results/train").iterdir()] == ["one"]  # no lock, nothing half written


@pytest.mark.parametrize("there", [False, True])
def test_what_appears_while_a_job_works_stays_and_what_was_there_is_replaced(plan: Plan, there: bool) -> None:
    """As on a disk that shows late what the holder of the lock before has made."""

    def make(name: str, job: Job) -> None:
        with job.writing() as folder:
            (folder / name).touch()

    job = Job(plan.instance("train", "one"), plan, "cpu")
    if there:
        make("other", Job(plan.instance("train", "one"), plan, "cpu"))
    with claimed([job], again=["one"]) as left:
        assert left == [job]
        if not there:
            make("other", Job(plan.instance("train", "one"), plan, "cpu"))
        make("own", job)
    names = {path.name for path in job.path.iterdir()}
    assert names == {"own" if there else "other", "config.yaml", "provenance.json"}
    assert [path.name for path in job.path.parent.iterdir()] == ["one"]


def test_a_job_waits_for_what_its_node_does_not_see_yet(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(claims, "LOOK", 0.01)
    late, never = tmp_path / "late", tmp_path / "never"
    timer = threading.Timer(0.1, late.touch)
    timer.start()
    with caplog.at_level("INFO"):
        claims.wait_for([str(late)])
    assert late.exists() and f"waiting up to 60 s for {late}" in caplog.text
    monkeypatch.setattr(claims, "LATE", 0.05)
    claims.wait_for([str(late), str(never)])  # what stays away, the job itself names
    assert not never.exists()


def fake_scontrol(home: Path, preempted: str) -> dict[str, str]:
    """The environment of a job of Slurm, of which `scontrol` says when it was preempted, and notes what it is asked."""
    script = home / "bin/scontrol"
    script.parent.mkdir()
    script.write_text(
        f'#!/bin/sh\necho "$@" >>{home}/asked.txt\n'
        f'[ "$1" = requeue ] || echo "JobId=7 PreemptEligibleTime=2026-11-28T20:00:00 PreemptTime={preempted}"\n'
    )
    script.chmod(0o755)
    return os.environ | {"PATH": f"{script.parent}:{os.environ['PATH']}", "SLURM_JOB_ID": "7"}


@pytest.mark.parametrize(
    ("preempted", "asked"),
    [("2026-11-28T20:10:00", ["show job 7", "requeue 7"]), ("None", ["show job 7"]), (None, [])],
)
def test_a_job_that_is_asked_to_stop_gives_all_up_and_is_queued_again_where_slurm_preempts_it(
    plan: Plan, tmp_path: Path, preempted: str | None, asked: list[str]
) -> None:
    """Without a state to save; a training that has one ends with the same code."""
    environment = None if preempted is None else fake_scontrol(tmp_path, preempted)
    process = start(tmp_path, "job.log", "one", environment=environment)
    wait_for((tmp_path / "made.txt").exists)
    process.send_signal(signal.SIGTERM)
    _, said = process.communicate()
    assert process.returncode == 75
    assert "train stopped by SIGTERM; run again" in said
    assert not list((tmp_path / "results/train").iterdir())  # no lock, nothing half written
    found = (tmp_path / "asked.txt").read_text().splitlines() if (tmp_path / "asked.txt").exists() else []
    assert found == asked


def test_what_another_run_made_since_the_plan_is_done_and_what_was_asked_for_again_is_not(plan: Plan) -> None:
    one, two = (Job(plan.instance("train", key), plan, "cpu") for key in ("one", "two"))
    for again, expected in ((), [one, two]), (("one",), [one]), ((), []), (("one", "two"), [one, two]):
        with claimed([one, two], again) as left:
            assert left == expected
            for job in left:
                with job.writing() as folder:
                    (folder / "a.txt").write_text("a")


def test_the_lock_ends_when_the_artifact_is_there(plan: Plan) -> None:
    """Not when the last of a job's artifacts is."""
    one, two = (Job(plan.instance("train", key), plan, "cpu") for key in ("one", "two"))
    folder = Path(plan.results) / "train"
    with claimed([one, two]):
        assert {p.name for p in folder.iterdir()} == {"one.lock", "two.lock"}
        with one.writing() as partial:
            (partial / "a.txt").write_text("a")
        assert {p.name for p in folder.iterdir()} == {"one", "two.lock"}
    assert {p.name for p in folder.iterdir()} == {"one"}


def test_what_a_waiting_process_finds_damaged_it_makes_again(plan: Plan, monkeypatch: pytest.MonkeyPatch) -> None:
    job = Job(plan.instance("train", "one"), plan, "cpu")
    with job.writing() as folder:
        (folder / "a.txt").write_text("a")
    before = contents(job.path)
    monkeypatch.setattr("saeflow.storage.locks.Lock.acquire", lambda self, what: True)
    with claimed([job]) as left:
        assert left == []
    (job.path / "a.txt").write_text("b")
    with claimed([job]) as left:
        assert left == [job]
    assert before.keys() == contents(job.path).keys()
