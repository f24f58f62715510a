"""A working directory on a cluster's shared disk, Snakemake called on it as a person would, and the test Slurm."""

import hashlib
import os
import re
import shutil
import signal
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
HERE = Path(__file__).resolve().parent
SLURM = Path(os.environ.get("SLURM_TEST_ROOT", "/var/tmp/saeflow-slurm"))
APART = {"provenance.json"}
"""Files that say when, where and how fast: two runs differ in them."""
TRACE = re.compile(r"\.partial|\.old|\.lock|^checkpoints/")
"""Of jobs that were killed: neither read nor in the way."""


def slurm(*command: str) -> str:
    """Output of one of Slurm's clients; empty where it fails, as while the controller is away."""
    done = subprocess.run(command, env=environment(), capture_output=True, text=True, check=False)
    return done.stdout if done.returncode == 0 else ""


def daemons(*command: str) -> None:
    """Calls up.sh; its nodes see this checkout and the folder of the test."""
    subprocess.run([str(HERE / "up.sh"), *command], env=environment(), check=True, stdout=subprocess.DEVNULL)


def shared(folder: Path) -> list[str]:
    """What a node has to see besides its own disk."""
    return [str(ROOT), str(folder)]


def environment() -> dict[str, str]:
    """Of a login shell in which no environment of Python is active."""
    path = os.pathsep.join(p for p in os.environ["PATH"].split(os.pathsep) if ".venv" not in p)
    own = {"PATH": path, "SLURM_CONF": str(SLURM / "slurm.conf"), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    own["PYTHONPATH"] = str(ROOT / "src")
    return {k: v for k, v in os.environ.items() if k not in ("VIRTUAL_ENV", "SNAKEMAKE_PROFILE")} | own


def jobs(stage: str) -> list[str]:
    """Numbers of the jobs of a stage that Slurm runs."""
    said = slurm("squeue", "--noheader", "--states=RUNNING", "--format=%A %k").splitlines()
    return [line.split()[0] for line in said if line.split()[1].startswith(f"rule_{stage}_")]


def ended(since: int = 0) -> dict[str, str]:
    """State of every job of Snakemake after number `since`, by number."""
    said = slurm("squeue", "--noheader", "--states=all", "--format=%A %T %k").splitlines()
    rows = [line.split() for line in said]
    return {row[0]: row[1] for row in rows if row[-1].startswith("rule_") and int(row[0]) > since}


def last_job() -> int:
    return max((int(number) for number in ended()), default=0)


@dataclass
class Run:
    """How one call of Snakemake ended."""

    code: int
    said: str
    seconds: float


class Folder:
    """A working directory with its own conf/, resources/ and results/."""

    def __init__(self, home: Path, hydra: str) -> None:
        self.home, self.hydra = home, hydra
        for name in ("conf", "resources"):
            if not (home / name).exists():
                shutil.copytree(ROOT / name, home / name)
        shutil.copy(HERE / "slurm.yaml", home / "conf/experiment")

    @property
    def results(self) -> Path:
        return self.home / "results"

    def start(self, *options: str, hydra: str = "") -> subprocess.Popen:
        """Snakemake, from a folder that is no node's, in a session of its own."""
        command = [f"{ROOT}/.venv/bin/snakemake", "-s", f"{ROOT}/Snakefile", "--directory", str(self.home), *options]
        command += ["--config", f"conf={self.home}/conf", f"hydra={self.hydra} {hydra}".strip()]
        self.began = time.monotonic()
        with (self.home / "said").open("ab") as out:
            self.before = out.tell()
            return subprocess.Popen(
                command, cwd="/", env=environment(), stdout=out, stderr=subprocess.STDOUT, start_new_session=True
            )

    def end(self, process: subprocess.Popen, seconds: float = 1800) -> Run:
        """Waits; what takes longer than `seconds` is stuck, and killed (code -1)."""
        try:
            code = process.wait(seconds)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            code = -1
        said = (self.home / "said").read_bytes()[self.before :].decode(errors="replace")
        return Run(code, said, time.monotonic() - self.began)

    def here(self, *options: str, hydra: str = "") -> Run:
        return self.end(self.start("--cores", "2", *options, hydra=hydra))

    def submit(self, *options: str, hydra: str = "") -> subprocess.Popen:
        """The same through Slurm, looking at the queue more often than the profile says."""
        often = ("--slurm-init-seconds-before-status-checks", "1", "--seconds-between-status-checks", "1")
        profile = ("--workflow-profile", f"{ROOT}/profiles/slurm", "--latency-wait", "5", "--jobs", "4")
        return self.start(*profile, *often, *options, hydra=hydra)

    def contents(self) -> dict[str, str]:
        """A digest of every file of every artifact, by its path."""
        return {
            name: hashlib.blake2s(p.read_bytes()).hexdigest()
            for p in sorted(self.results.glob("*/**/*"))  # below, not beside them: the front page, made.jsonl
            if p.is_file() and p.name not in APART and not TRACE.search(name := p.relative_to(self.results).as_posix())
        }

    def steps(self) -> int:
        """Up to which step a training has saved its state; -1: it has not."""
        saved = self.results.glob("checkpoints/*/step-*.safetensors")
        return max((int(re.sub(r"\D", "", p.stem)) for p in saved), default=-1)

    def went_on(self) -> int:
        """The step that the training's last try went on from; -1: it began anew."""
        logs = "".join(p.read_text() for p in sorted(self.home.glob("logs/train/*.log")))
        return max((int(step) for step in re.findall(r"goes on from step (\d+)", logs)), default=-1)

    def copy(self, home: Path) -> "Folder":
        shutil.copytree(self.home, home, symlinks=True)
        return Folder(home, self.hydra)


TINY = (
    "experiment=slurm sweep={dictionary:topk,site:mlp_out,dictionary.k:4} training.n_tokens=4_096 blind=null "
    "training.lr_decay_steps=2 training.lr_warm_up_steps=2 figures=[]"
)


def overhead(work: Path) -> float:
    """Seconds that a job takes longer through Slurm than here: of six small ones, one after another."""
    here, there = Folder(work / "overhead-here", TINY), Folder(work / "overhead-there", TINY)
    before = last_job()
    local, remote = here.here(), there.end(there.submit("--jobs", "1"))
    for run in (local, remote):
        if run.code:
            raise RuntimeError(run.said)
    return (remote.seconds - local.seconds) / len(ended(before))


def until(holds: Callable[[], bool], seconds: float = 120, what: str = "") -> None:
    """Waits for something. Raises `TimeoutError`."""
    stop = time.monotonic() + seconds
    while not holds():
        if time.monotonic() > stop:
            raise TimeoutError(f"{what or 'what was waited for'} did not come within {seconds:.0f} s")
        time.sleep(0.2)
