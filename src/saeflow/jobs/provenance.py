"""Where an artifact came from: inputs, versions, machine, time and memory."""

import datetime
import importlib.metadata
import os
import platform
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

from saeflow.jobs.progress import peak_memory
from saeflow.planning.graph import Instance
from saeflow.planning.history import gpu_seconds
from saeflow.storage.checksums import file_digest
from saeflow.storage.receipts import contents

PACKAGES = ("torch", "transformer-lens", "sae-lens", "transformers", "zarr", "numpy", "snakemake", "hydra-core")
HASHED_UP_TO = 256 << 20  # larger files have a crc32c alone: a cryptographic hash of them would cost minutes


def provenance(
    instance: Instance, device: str, seconds: float, cpu_seconds: float, sharing: int, folder: Path
) -> dict[str, Any]:
    """Of the artifact in `folder`, whose job took `seconds`, and `cpu_seconds` of all cores, and makes `sharing`
    artifacts in all."""
    held = contents(folder)
    sizes = held["sizes"]
    return {
        "stage": instance.stage,
        "key": instance.key,
        "needs": instance.needs,
        "names": {name: value for name, value in instance.sources.items() if name.endswith("_name") or name == "label"},
        "seed": instance.config.get("seed"),
        "device": device,
        "host": socket.gethostname(),
        "slurm_job": os.environ.get("SLURM_JOB_ID"),
        "executable": sys.executable,
        "environment": sys.prefix,
        "python": platform.python_version(),
        "packages": _versions(),
        "git": _git_state(),
        "finished": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "wall_s": round(seconds, 3),
        "cpu_s": round(cpu_seconds / sharing, 3),
        "gpu_s": round(gpu_seconds(device, seconds) / sharing, 3),
        "sharing": sharing,
        "peak_memory_bytes": peak_memory(),
        "bytes": sum(sizes.values()),
        "blake2s": {name: file_digest(folder / name) for name, size in sizes.items() if size <= HASHED_UP_TO},
        **held,
    }


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
