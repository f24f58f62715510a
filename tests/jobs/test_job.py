"""What every job does around its work."""

import errno
import json
import os
import re
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from saeflow.jobs.command import in_words
from saeflow.jobs.job import Job
from saeflow.planning.graph import Instance, Plan
from saeflow.planning.history import lines

SCRIPT = """
import dataclasses

from saeflow.jobs import claims, command
from saeflow.planning.stages import stages

def work(jobs):
    (job,) = jobs
    with job.writing() as folder:
        (folder / "half.txt").write_text("half")
        if job.config["fail"]:
            raise ValueError("the reason")
        (folder / "rest.txt").write_text("rest")
    return f"wrote two files to {job.path}/"

claims.LATE = 0  # what the job needs is not there
sizes = dict(operations=lambda *_: 2.0, resources=lambda *_: {})
command.stages = lambda: {"train": dataclasses.replace(stages()["train"], work=work, **sizes)}
command.main()
"""


@pytest.fixture
def plan(tmp_path: Path) -> Plan:
    instances = {
        key: Instance("train", key, {"fail": fail, "seed": 3}, {"tokens": ["t"]}, {})
        for key, fail in (("good", False), ("bad", True))
    }
    plan = Plan("test", {"train": instances, "tokens": {}}, {}, results=str(tmp_path / "results"))
    plan.freeze(tmp_path / "plan.json")
    return plan


def call(home: Path, key: str, *options: str) -> subprocess.CompletedProcess:
    (home / "script.py").write_text(SCRIPT)
    command = [
        sys.executable,
        "script.py",
        "train",
        "--plan",
        "plan.json",
        "--key",
        key,
        "--log",
        "logs/job.log",
        *options,
    ]
    return subprocess.run(command, cwd=home, capture_output=True, text=True)


def test_artifact_is_whole_and_tells_where_it_came_from(plan: Plan, tmp_path: Path) -> None:
    done = call(tmp_path, "good", "--device", "cpu")
    folder = plan.folder("train", "good")
    assert done.stdout == f"wrote two files to {folder}/\n"
    assert sorted(p.name for p in folder.iterdir()) == ["config.yaml", "half.txt", "provenance.json", "rest.txt"]
    held = json.loads((folder / "provenance.json").read_text())
    assert (held["seed"], held["device"], held["needs"]) == (3, "cpu", {"tokens": ["t"]})
    assert (held["executable"], held["environment"], held["slurm_job"]) == (sys.executable, sys.prefix, None)
    assert held["bytes"] == sum((folder / n).stat().st_size for n in ("config.yaml", "half.txt", "rest.txt"))
    assert "wrote two files" in (tmp_path / "logs/job.log").read_text()
    (line,) = lines(plan.results)
    assert (line["stage"], line["key"], line["work"], line["device"]) == ("train", "good", 2.0, "cpu")
    assert line["seconds"] > 0 and line["experiment"] == "test"
    assert 0 <= line["cpu_s"] < held["wall_s"] + 60 and line["gpu_s"] == held["gpu_s"] == 0 and held["sharing"] == 1
    assert not list((tmp_path / "results").rglob("*.lock"))


def test_time_of_cores_is_that_of_the_process_and_its_children_shared_by_what_a_job_makes(
    plan: Plan, tmp_path: Path
) -> None:
    job = Job(plan.instance("train", "good"), plan, "cuda:0", sharing=2)
    assert job.model_device == "cuda:0"
    burn = "import time\nwhile time.process_time() < 0.4: pass"
    before = os.times()[:4]
    subprocess.run([sys.executable, "-c", burn], check=True)
    start = time.process_time()
    while time.process_time() < start + 0.4:
        pass
    with job.writing() as folder:
        (folder / "file").write_text("text")
    held = json.loads((job.path / "provenance.json").read_text())
    used = sum(os.times()[:4]) - sum(before)
    assert used >= 0.8 and held["cpu_s"] == pytest.approx(used / 2, abs=0.1)
    assert held["gpu_s"] == pytest.approx(held["wall_s"] / 2, abs=0.002)

    spread = Job(plan.instance("train", "good"), plan, "cuda:0", model_device="cuda:0-3")
    with spread.writing() as folder:
        (folder / "file").write_text("text")
    held = json.loads((spread.path / "provenance.json").read_text())
    assert held["device"] == "cuda:0-3" and held["gpu_s"] == pytest.approx(4 * held["wall_s"], abs=0.01)


def test_who_makes_the_same_waits(tmp_path: Path) -> None:
    """Eight processes count to eight in one file, each reading, waiting and writing."""
    code = (
        "import sys, time, pathlib\nfrom saeflow.jobs.claims import claimed\nfrom saeflow.jobs.job import Job\n"
        "from saeflow.planning.graph import Instance, Plan\nhome = pathlib.Path(sys.argv[1])\n"
        "plan = Plan('test', {}, {}, results=str(home))\n"
        "jobs = [Job(Instance('train', key, {}, {}, {}), plan, 'cpu') for key in 'ba']\n"
        "with claimed(jobs[::-1] if int(sys.argv[2]) % 2 else jobs):\n"
        "    n = int((home / 'count').read_text())\n    time.sleep(0.02)\n    (home / 'count').write_text(str(n + 1))\n"
    )
    (tmp_path / "count").write_text("0")
    several = [subprocess.Popen([sys.executable, "-c", code, str(tmp_path), str(i)]) for i in range(8)]
    assert [process.wait() for process in several] == [0] * 8
    assert (tmp_path / "count").read_text() == "8" and not list((tmp_path / "train").iterdir())


def test_failed_job_leaves_no_artifact_and_says_why(plan: Plan, tmp_path: Path) -> None:
    done = call(tmp_path, "bad")
    assert done.returncode == 1
    assert "the reason" in done.stderr and "Traceback" not in done.stderr
    assert "Traceback" in (tmp_path / "logs/job.log").read_text()
    assert not plan.folder("train", "bad").exists()


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.ENOSPC, "Error writing bytes to file"),
        OSError(errno.EDQUOT, "Disk quota exceeded"),
        RuntimeError("Error while serializing: I/O error: No space left on device (os error 28)"),
    ],
)
def test_a_full_disk_is_named_whichever_library_finds_it(error: Exception) -> None:
    assert in_words(error, "train").startswith(f"the disk or quota of results/ is full ({error}): make room")
    named = OSError(errno.ENOSPC, "results/activations/store became full while caching")
    assert in_words(named, "train") == str(named)
    assert in_words(ValueError("k"), "train") == "k" and in_words(KeyError(), "train") == "KeyError"


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        RuntimeError(
            "[enforce fail at alloc_cpu.cpp:127] DefaultCPUAllocator: can't allocate memory: you tried 4 bytes"
        ),
        RuntimeError("CUDA out of memory. Tried to allocate 20.00 MiB"),
        OSError(errno.ENOMEM, "Cannot allocate memory"),
        RuntimeError("Unable to allocate 8.00 GiB for an array with shape (1, 2)"),
    ],
)
def test_too_little_memory_is_named_whichever_library_finds_it(error: Exception) -> None:
    assert re.match(r"there is not enough memory \(.+\): device.mem_mb.train=... asks", in_words(error, "train"))


def test_a_stop_that_python_hides_in_an_error_is_a_stop(tmp_path: Path) -> None:
    code = """
import os, signal, sys
from saeflow.jobs.signals import raise_again, stoppable

class Name:
    def __set_name__(self, owner, name):
        os.kill(os.getpid(), signal.SIGTERM)

sys.argv = ["job.py", "train"]
with stoppable():
    try:
        type("Owner", (), {"name": Name()})
    except Exception as error:
        raise_again(error)
        raise
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 75 and "train stopped by SIGTERM; run again" in done.stderr


def test_a_log_that_cannot_be_written_stands_on_stderr(tmp_path: Path) -> None:
    (tmp_path / "logs").write_text("")
    code = "import logging, sys; from saeflow.jobs.log import start_log; start_log(sys.argv[1]); logging.info('work')"
    command = [sys.executable, "-c", code, str(tmp_path / "logs/train/a.log")]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert "WARNING the log stands here, since its file can't be written" in done.stderr and "work" in done.stderr


def test_failed_job_keeps_the_artifact_that_was_there(plan: Plan) -> None:
    job = Job(plan.instance("train", "good"), plan, "cpu")
    with job.writing() as folder:
        (folder / "a.txt").write_text("first")
    with pytest.raises(RuntimeError), job.writing() as folder:
        (folder / "a.txt").write_text("second")
        raise RuntimeError
    assert (job.path / "a.txt").read_text() == "first"


def test_what_a_killed_job_left_is_not_taken_over(plan: Plan) -> None:
    job = Job(plan.instance("train", "good"), plan, "cpu")
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    left = job.path.with_name(f"good.{socket.gethostname()}-{dead.pid}.partial")
    alive = job.path.with_name(f"good.{socket.gethostname()}-{os.getppid()}.partial")
    for folder in (left, alive):
        folder.mkdir(parents=True)
        (folder / "stale.txt").write_text("stale")
    with job.writing() as folder:
        (folder / "a.txt").write_text("fresh")
    assert not (job.path / "stale.txt").exists() and not left.exists()
    assert alive.exists()  # another process is at work there: its own folder is in nobody's way


def test_key_that_the_plan_does_not_have(plan: Plan, tmp_path: Path) -> None:
    done = call(tmp_path, "none")
    assert done.returncode == 1 and "the plan has no train 'none'; it has good, bad" in done.stderr


def test_no_progress_bar_where_stderr_is_no_terminal(plan: Plan, tmp_path: Path) -> None:
    code = "from saeflow.jobs.progress import progress\nfor _ in progress(range(3), 'steps'): pass"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stderr == ""


def test_fonts_in_a_pdf_are_not_told_of_in_the_log(tmp_path: Path) -> None:
    code = (
        "import sys; from saeflow.jobs.log import start_log; start_log(sys.argv[1]);"
        "import matplotlib; matplotlib.rcParams['pdf.fonttype'] = 42;"
        "from matplotlib.figure import Figure; figure = Figure(); figure.text(0, 0, 'λ'); figure.savefig(sys.argv[2])"
    )
    log, pdf = tmp_path / "log", tmp_path / "drawn.pdf"
    subprocess.run([sys.executable, "-c", code, str(log), str(pdf)], check=True)
    assert pdf.stat().st_size > 1000 and log.read_text() == ""
