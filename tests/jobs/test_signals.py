"""Who learns of SIGTERM: on a node, Slurm tells the Snakemake that runs a job, and that alone."""

import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from saeflow.jobs.signals import was_stopped

RUNNER = """
import signal, subprocess, sys
from saeflow.jobs.signals import pass_on_term

pass_on_term()
signal.signal(signal.SIGTERM, lambda *_: print("told", flush=True))  # as Snakemake, which then waits for its job
sys.exit(subprocess.call(["bash", "-c", f"{sys.executable} scripts/job.py; exit $?"]))
"""
JOB = """
import signal, sys, time
from pathlib import Path

signal.signal(signal.SIGTERM, lambda *_: sys.exit(75))
Path("ready").touch()
time.sleep(60)
"""


def test_sigterm_to_the_snakemake_on_a_node_reaches_the_job_behind_its_shell(tmp_path: Path) -> None:
    (tmp_path / "scripts").mkdir()
    (tmp_path / "scripts/job.py").write_text(JOB)
    (tmp_path / "runner.py").write_text(RUNNER)
    runner = subprocess.Popen([sys.executable, "runner.py"], cwd=tmp_path, stdout=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 30
    while not (tmp_path / "ready").exists():
        assert time.monotonic() < deadline
        time.sleep(0.02)
    runner.send_signal(signal.SIGTERM)
    said, _ = runner.communicate(timeout=30)
    assert (said, runner.returncode) == ("told\n", 75)


@pytest.mark.parametrize("delay", [0.05, 0.1, 0.2, 0.4])
def test_a_job_that_is_asked_to_stop_before_it_has_begun_says_so_too(tmp_path: Path, delay: float) -> None:
    log = tmp_path / "job.log"
    command = [sys.executable, "scripts/job.py", "train", "--plan", "/dev/stdin", "--key", "k", "--log", str(log)]
    job = subprocess.Popen(command, stdin=subprocess.PIPE, stderr=subprocess.PIPE)  # it waits for its plan
    time.sleep(delay)
    job.terminate()
    _, said = job.communicate(timeout=60)
    if job.returncode != -signal.SIGTERM or delay > 0.1:  # else Python itself had not begun
        assert job.returncode == 75 and was_stopped(log), said.decode()


STOP = "2026-11-28 20:22:11,001 WARNING train stopped by SIGTERM after step 7; run again to go on from there\n"
WORK = "2026-11-28 20:22:10,744 INFO training\n"
REQUEUED = "2026-11-28 20:22:11,400 WARNING Slurm preempts job 7: it is queued again\n"
FAILURE = "2026-11-28 20:22:11,001 ERROR train failed: a loss is not finite\n"


@pytest.mark.parametrize(
    ("log", "stopped"),
    [
        (WORK + STOP, True),
        (WORK + STOP + REQUEUED, True),
        (WORK, False),
        (WORK + FAILURE, False),
        (STOP + WORK, False),  # killed later
        ("", False),
        (WORK + REQUEUED, False),
    ],
)
def test_a_job_that_was_asked_to_stop_is_told_from_one_that_failed(tmp_path: Path, log: str, stopped: bool) -> None:
    (tmp_path / "job.log").write_text(log)
    assert was_stopped(tmp_path / "job.log") == stopped
    assert not was_stopped(tmp_path / "none.log")
