"""The command line of a part, and of the job that joins parts: marks, locks, logs, costs, and the same bytes."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from stores import contents

from saeflow.jobs.claims import claimed_part
from saeflow.jobs.job import Job
from saeflow.planning.expansion import compose
from saeflow.planning.graph import Plan
from saeflow.planning.history import FILE, lines
from saeflow.planning.parts import Part, lock_of, mark
from saeflow.storage.locks import Lock
from saeflow.storage.receipts import RECEIPT

ROOT = Path(__file__).resolve().parents[2]


def planned(home: Path, *more: str) -> tuple[Plan, str]:
    """A plan in `home`, frozen there, and the key of its training tokens."""
    plan = compose(ROOT / "conf", ["dictionary=topk", "tokens.train_tokens=150_000", *more])
    plan.freeze(home / "plan.json")
    return plan, next(key for key in plan.stages["tokens"] if key.startswith("train"))


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "resources").symlink_to(ROOT / "resources")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def job(key: str, *options: str, stage: str = "tokens", ok: bool = True) -> str:
    command = [sys.executable, f"{ROOT}/scripts/job.py", stage, "--plan", "plan.json", "--job", key, *options]
    done = subprocess.run([*command, "--log", "log", "--quiet"], capture_output=True, text=True)
    assert (done.returncode == 0) == ok, done.stderr
    return Path("log").read_text()


def test_parts_and_their_join_leave_what_one_job_leaves(home: Path) -> None:
    plan, key = planned(home)
    job(key)
    folder = plan.folder("tokens", key)
    expected = contents(folder)
    shutil.rmtree(folder)
    Path(plan.results, FILE).unlink()
    plan, key = planned(home, "device.parts.tokens=2")
    assert plan.parts == {"tokens": {key: ["1-of-2", "2-of-2"]}}
    for part in ("2-of-2", "1-of-2"):
        said = job(key, "--part", part)
        assert f"makes tokens {key}.part-{part} (process" in said and "blocks of documents tokenised ahead" in said
        assert Path(mark("tokens", key, part)).is_file() and not folder.exists()
        assert not list(folder.parent.glob("*.lock"))
    assert lines(plan.results) == []  # nothing is made yet
    assert planned(home, "device.parts.tokens=2")[0].parts == {}
    job(key)
    found = contents(folder)
    assert {name: found[name] for name in found if name != RECEIPT} == {
        name: expected[name] for name in expected if name != RECEIPT
    }
    assert [path.name for path in folder.parent.iterdir()] == [key]
    parts = [json.loads(line) for line in Path(plan.results, FILE).read_text().splitlines()]
    assert [line.get("part") for line in parts] == ["2-of-2", "1-of-2", None]
    assert parts[2]["cpu_s"] > parts[0]["cpu_s"] + parts[1]["cpu_s"] > 0
    assert "another run has made" in job(key, "--part", "1-of-2") and not folder.with_name(f"{key}.parts").exists()


def test_what_cannot_be_made_in_parts_says_so(home: Path) -> None:
    _, key = planned(home)
    assert "--part 3-of-2: it must be like 2-of-8" in job(key, "--part", "3-of-2", ok=False)
    plan, _ = planned(home)
    (training,) = plan.stages["train"]
    assert "jobs of train cannot be shared" in job(training, "--part", "1-of-2", stage="train", ok=False)


def test_a_part_that_another_process_makes_is_waited_for(home: Path) -> None:
    plan, key = planned(home)
    jobs = [Job(plan.instance("tokens", key), plan, "cpu")]
    with claimed_part(jobs, Part(1, 2)) as mine, claimed_part(jobs, Part(2, 2)) as others:
        assert mine == others == jobs
        assert Lock(lock_of(jobs[0].path, Part(1, 2))).taken()
    assert not Lock(lock_of(jobs[0].path, Part(1, 2))).taken()
