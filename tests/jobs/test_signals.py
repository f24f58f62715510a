"""Who learns of SIGTERM: on a node, Slurm tells the Snakemake that runs a job, and that alone."""

import signal
import subprocess
import sys
import time
from pathlib import Path

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
