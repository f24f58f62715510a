"""What every job does around its work: options, log, seeds, threads, an atomic output folder, provenance.

A script of `scripts/` is one call of `run`. An artifact is a folder that appears whole, by a rename, with `config.yaml`
(what the job read) and `provenance.json` (where it came from). `provenance.json` is what the rules declare as output;
it holds times and hosts, so it is the one file that differs between two runs; all others are identical.
"""

import argparse
import dataclasses
import datetime
import importlib.metadata
import json
import logging
import os
import platform
import random
import resource
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from saeflow.planning.digests import file_digest
from saeflow.planning.graph import Instance, Plan

log = logging.getLogger("saeflow")
PACKAGES = ("torch", "transformer-lens", "sae-lens", "transformers", "zarr", "numpy", "snakemake", "hydra-core")
HASHED_UP_TO = 256 << 20  # larger files are guarded by their own checksums, and hashing them would cost minutes


TEMPORARY_FAILURE = 75  # EX_TEMPFAIL of sysexits.h: run it again


class Preempted(Exception):
    """The job was asked to stop (SIGTERM, SIGINT, SIGUSR1) and has saved its state; run again, it goes on."""


@dataclasses.dataclass
class Job:
    """One instance of a stage: its configuration, its inputs and the folder that it fills."""

    instance: Instance
    plan: Plan
    device: str
    started: float = dataclasses.field(default_factory=time.perf_counter)

    @property
    def config(self) -> dict[str, Any]:
        """Exactly what the stage declared to read."""
        return self.instance.config

    @property
    def path(self) -> Path:
        return self.plan.folder(self.instance.stage, self.instance.key)

    def inputs(self, stage: str) -> list[Path]:
        """Artifact folders of the instances of `stage` that this one needs, in the declared order."""
        return [self.plan.folder(stage, key) for key in self.instance.needs.get(stage, [])]

    def input(self, stage: str) -> Path:
        (folder,) = self.inputs(stage)
        return folder

    def dictionaries(self) -> list[Path]:
        """Folders of the dictionaries that this instance needs: a pair that was trained as one has two, or the named
        `part` is meant. Those of heads are one."""
        folders = self.inputs("train") + self.inputs("foreign")
        if "part" in self.config:
            return [folders[0] / self.config["part"]]
        return [part for f in folders for part in ([f / "input", f / "output"] if (f / "input").is_dir() else [f])]

    def source(self, name: str) -> Path:
        """Path of a file or folder from outside the pipeline: `model` or `corpus`."""
        return Path(self.instance.sources[name])

    @contextmanager
    def writing(self) -> Iterator[Path]:
        """Gives a fresh folder to fill; on success adds `config.yaml` and `provenance.json` and moves it into place.

        On an error, or when killed, the final folder is not touched; the next try starts with an empty one.
        """
        partial = self.path.with_name(self.path.name + ".partial")
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        yield partial
        self.instance.write_config(partial / "config.yaml")
        (partial / "provenance.json").write_text(json.dumps(self._provenance(partial), indent=1) + "\n")
        shutil.rmtree(self.path, ignore_errors=True)
        partial.rename(self.path)

    def _provenance(self, folder: Path) -> dict[str, Any]:
        files = sorted(p for p in folder.rglob("*") if p.is_file())
        sizes = {p.relative_to(folder).as_posix(): p.stat().st_size for p in files}
        return {
            "stage": self.instance.stage,
            "key": self.instance.key,
            "needs": self.instance.needs,
            "seed": self.config.get("seed"),
            "device": self.device,
            "host": socket.gethostname(),
            "python": platform.python_version(),
            "packages": _versions(),
            "git": _git_state(),
            "finished": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
            "wall_s": round(time.perf_counter() - self.started, 3),
            "peak_memory_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
            "bytes": sum(sizes.values()),
            "blake2s": {name: file_digest(folder / name) for name, size in sizes.items() if size <= HASHED_UP_TO},
        }


def run(stage: str, work: Callable[[list[Job]], str]) -> None:
    """Entry of a script: parses the options, calls `work` on the jobs, prints the sentence that it returns."""
    parser = argparse.ArgumentParser(description=f"{stage}: makes artifacts below results/{stage}/ from a frozen plan.")
    parser.add_argument("--plan", default=".snakemake/plan.json", help="frozen plan (scripts/plan.py --freeze FILE)")
    parser.add_argument("--key", action="append", required=True, help=f"key of an instance of {stage}; may be repeated")
    parser.add_argument("--device", default="cpu", help="torch device, such as cpu, cuda or cuda:1")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads")
    parser.add_argument("--log", help="file for the log; default: stderr")
    args = parser.parse_args()
    start_log(args.log)
    limit_threads(args.threads)
    try:
        plan = Plan.load(args.plan)
        jobs = [Job(plan.instance(stage, key), plan, args.device) for key in args.key]
        random.seed(0)  # nothing should draw from the global generators; if a library does, it does so equally
        last_line = work(jobs)
    except Preempted as stop:
        log.warning("%s", stop)
        print(f"{stage} {stop}", file=sys.stderr)
        sys.exit(TEMPORARY_FAILURE)
    except Exception as error:
        log.exception("failed")
        if args.log:
            print(f"{stage} failed: {error}\n(log: {args.log})", file=sys.stderr)
        sys.exit(1)
    log.info(last_line)
    print(last_line, flush=True)
    logging.shutdown()
    sys.stderr.flush()
    os._exit(0)  # all is written and renamed; taking the libraries down would cost another second


def progress(iterable: Any, description: str, total: int | None = None) -> Any:
    """A progress bar on stderr; none where stderr is no terminal."""
    from tqdm import tqdm

    return tqdm(iterable, desc=description, total=total, disable=not sys.stderr.isatty(), leave=False)


def start_log(path: str | None) -> None:
    """Sends the log to a file, or to stderr."""
    if path:
        Path(path).parent.mkdir(parents=True, exist_ok=True)
    handler = logging.FileHandler(path, mode="w") if path else logging.StreamHandler()
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
    logging.basicConfig(level=logging.INFO, handlers=[handler], force=True)


def limit_threads(threads: int) -> None:
    """Limits the CPU threads of numerical libraries; must come before torch and numpy are imported."""
    for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "RAYON_NUM_THREADS"):
        os.environ[name] = str(threads)
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true" if threads > 1 else "false")


def _versions() -> dict[str, str]:
    found = {}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def _git_state() -> dict[str, Any]:
    """Commit of the library's checkout and whether it has changes; empty outside a checkout."""

    def git(*command: str) -> str:
        root = Path(__file__).resolve().parent
        return subprocess.run(["git", *command], cwd=root, capture_output=True, text=True, check=True).stdout.strip()

    try:
        return {"commit": git("rev-parse", "HEAD"), "dirty": bool(git("status", "--porcelain", "--untracked-files=no"))}
    except (OSError, subprocess.CalledProcessError):
        return {}
