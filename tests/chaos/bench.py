"""A small experiment over all stages, made once without a fault, and copies of it in which faults are injected."""

import hashlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from random import Random

ROOT = Path(__file__).resolve().parents[2]
HERE = Path(__file__).resolve().parent
APART = {"provenance.json", "provenance.damaged.json"}
"""Files that say when, where and how fast: two runs differ in them."""
START = 2.0  # seconds that Snakemake takes until its first job
TRACE = re.compile(r"\.partial|\.old|\.lock")
"""Of jobs that were killed: neither read nor in the way."""


def file_hash(path: Path) -> str:
    return hashlib.blake2s(path.read_bytes()).hexdigest()


class Impossible(Exception):
    """A kind of fault that can't be injected here; says why."""


@dataclass
class Run:
    """How one call of Snakemake ended."""

    code: int
    said: str

    @property
    def reasons(self) -> list[str]:
        """What failed jobs and refused plans say, a line each."""
        found = re.findall(
            r"^.*(?:failed: |refused: |damaged|plan: |WorkflowError:\s*\n?|Error: ).*$", self.said, re.MULTILINE
        )
        return list(dict.fromkeys(line.strip() for line in found))


def _environment(PYTHONPATH: str = "", **others: str) -> dict[str, str]:
    path = os.pathsep.join(p for p in (PYTHONPATH, str(ROOT / "src")) if p)
    return os.environ | others | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}


class Copy:
    """A working directory with its own conf/, resources/ and results/, and Snakemake called on this repository; a run
    in it takes `seconds`, about."""

    def __init__(self, home: Path, experiment: str, seconds: float = 0.0, said: str = "said") -> None:
        self.home, self.experiment, self.seconds, self.said = home, experiment, seconds, home / said

    @property
    def results(self) -> Path:
        return self.home / "results"

    def beside(self) -> "Copy":
        """The same folder, for a second run in it."""
        return Copy(self.home, self.experiment, self.seconds, "said-beside")

    def start(
        self, *options: str, hydra: str = "", environment: dict[str, str] | None = None
    ) -> subprocess.Popen[bytes]:
        """Snakemake in a session of its own, so that it and all its jobs can be hit at once."""
        command = [sys.executable, "-m", "snakemake", "-s", str(ROOT / "Snakefile"), "--directory", str(self.home)]
        command += ["--cores", "1", *options, "--config", f"conf={self.home}/conf"]
        command += [f"hydra=experiment={self.experiment} {hydra}".strip()]
        if self.said.exists():
            self.said.rename(self.said.with_name(f"{self.said.name}-{len(list(self.home.glob('said*')))}"))
        with self.said.open("wb") as out:
            return subprocess.Popen(
                command,
                cwd=self.home,
                env=_environment(**(environment or {})),
                stdout=out,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    def ended(self, process: subprocess.Popen[bytes], seconds: float = 900) -> Run:
        """Waits; what takes longer than `seconds` is stuck, and killed (code -1)."""
        try:
            code = process.wait(seconds)
        except subprocess.TimeoutExpired:
            strike(process, signal.SIGKILL)
            code = -1
        return Run(code, self.said.read_text(errors="replace"))

    def run(self, *options: str, hydra: str = "") -> Run:
        return self.ended(self.start(*options, hydra=hydra))

    def verify(self) -> Run:
        """`make verify` in this folder: what is damaged is then missing, for the next run."""
        command = [sys.executable, str(ROOT / "scripts/verify.py"), "--set-aside"]
        done = subprocess.run(command, cwd=self.home, capture_output=True, text=True, check=False, env=_environment())
        return Run(done.returncode, done.stdout + done.stderr)

    def finish(self, most: int = 4) -> list[Run]:
        """Runs as a person would who reads what it says, until there is nothing to do; at most so often."""
        runs: list[Run] = []
        for _ in range(most):
            runs.append(self.run())
            if runs[-1].code == 0:
                break
        return runs

    def files(self) -> dict[str, Path]:
        """Every file of every artifact but those that differ between any two runs, by its path."""
        return {
            p.relative_to(self.results).as_posix(): p
            for p in sorted(self.results.glob("*/**/*"))  # below, not beside them: the front page, made.jsonl
            if p.is_file() and p.name not in APART and not p.name.startswith(".") and not TRACE.search(p.as_posix())
        }

    def contents(self) -> dict[str, str]:
        return {name: file_hash(path) for name, path in self.files().items()}

    def receipts(self) -> dict[str, str]:
        """Artifacts that say they are whole, by folder; they are new whenever an artifact is made again."""
        return {p.parent.relative_to(self.results).as_posix(): file_hash(p) for p in self._receipts()}

    def _receipts(self) -> list[Path]:
        """Not those of jobs that are at work, or were killed."""
        return [p for p in self.results.rglob("provenance.json") if not TRACE.search(p.as_posix())]

    def needs(self) -> dict[str, list[str]]:
        """Artifacts that each artifact reads, by folder."""
        found = {}
        for path in self._receipts():
            needs = json.loads(path.read_text())["needs"]
            found[path.parent.relative_to(self.results).as_posix()] = [
                f"{stage}/{key}" for stage, keys in needs.items() for key in keys
            ]
        return found


def ended_within(process: subprocess.Popen[bytes], seconds: float) -> bool:
    try:
        process.wait(seconds)
    except subprocess.TimeoutExpired:
        return False
    return True


def strike(process: subprocess.Popen[bytes], number: signal.Signals, only: str = "") -> None:
    """Sends a signal to a session: Snakemake and all that it started; or to those alone whose command holds `only`, if
    there are any."""
    session = [f"-{number.name[3:]}", "-s", str(process.pid)]
    if only and subprocess.run(["pkill", *session, "-f", only], check=False).returncode == 0:
        return
    subprocess.run(["pkill", *session], check=False)
    if number == signal.SIGKILL:
        process.wait()
        while subprocess.run(["pgrep", "-s", str(process.pid)], capture_output=True, check=False).returncode == 0:
            time.sleep(0.01)


@dataclass
class Bench:
    """Keeps the undisturbed run, and gives copies of it, of its beginnings and of nothing."""

    folder: Path
    base: Copy
    seconds: float
    """That the undisturbed run took."""
    expected: dict[str, str]
    """Hash of every file that it wrote."""
    artifacts: dict[str, str]
    """Hash of every receipt."""

    @classmethod
    def undisturbed(cls, folder: Path, experiment: str) -> "Bench":
        """Raises `RuntimeError`, with what it said, where the experiment fails without any fault."""
        base = _fresh(folder / "base", experiment)
        started = time.monotonic()
        run = base.run()
        if run.code:
            raise RuntimeError(f"the undisturbed run failed:\n{run.said}")
        return cls(folder, base, time.monotonic() - started, base.contents(), base.receipts())

    def fresh(self, name: str) -> Copy:
        """A working directory in which nothing has run."""
        return _fresh(self.folder / name, self.base.experiment, self.seconds)

    def begun(self, name: str, rng: Random) -> Copy:
        """A working directory in which a run has come as far as a stage, drawn at random: the first is as likely as any
        other, and nothing has then run."""
        took: dict[str, float] = {}
        for line in (self.base.results / "made.jsonl").read_text().splitlines():
            made = json.loads(line)
            took[made["stage"]] = took.get(made["stage"], 0.0) + made["seconds"]
        order = list(took)
        first = rng.randrange(len(order))
        if not first:
            return self.fresh(name)
        copy = self.copy(name)
        for stage in order[first:]:
            shutil.rmtree(copy.results / stage)
        for artifact in self.readers({a for a in self.artifacts if a.split("/")[0] in order[first:]}):
            shutil.rmtree(copy.results / artifact, ignore_errors=True)
        copy.seconds = START + sum(took[stage] for stage in order[first:])
        return copy

    def readers(self, artifacts: set[str]) -> set[str]:
        """Artifacts, and all that were made from them."""
        needs, found = self.base.needs(), set(artifacts)
        while more := {a for a in needs if set(needs[a]) & found} - found:
            found |= more
        return found

    def copy(self, name: str) -> Copy:
        """A copy of the undisturbed run, times of files included."""
        home = self.folder / name
        shutil.copytree(self.base.home, home, symlinks=True)
        return Copy(home, self.base.experiment)


def _fresh(home: Path, experiment: str, seconds: float = 0.0) -> Copy:
    home.mkdir(parents=True)
    for folder in ("conf", "resources"):
        shutil.copytree(ROOT / folder, home / folder)
    for file in HERE.glob("*.yaml"):
        shutil.copy(file, home / "conf/experiment")
    return Copy(home, experiment, seconds)
