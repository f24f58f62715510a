"""Dry runs of sweeps of many points, timed, for `plan` and `cluster`."""

import re
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
TOGETHER = 4
SWEEPS = {100: (10, 10), 1000: (25, 40), 5000: (50, 100), 20000: (100, 200)}  # points: seeds × L1 coefficients


def timed(command: list[str], cwd: str | Path) -> tuple[float, str]:
    started = time.perf_counter()
    done = subprocess.run(command, cwd=cwd, capture_output=True, text=True)
    seconds = time.perf_counter() - started
    if done.returncode:
        sys.exit(f"{' '.join(command)} failed:\n{done.stdout}{done.stderr}")
    return seconds, done.stdout + done.stderr


def dry_run(points: int, directory: str) -> float:
    """Seconds of a dry run below `directory`, where nothing is made; checked to list a training for four points."""
    seeds, coefficients = SWEEPS[points]
    values = ",".join(f"{0.001 * (i + 1):.4f}" for i in range(coefficients))
    axes = f"seed:[{','.join(map(str, range(seeds)))}],dictionary.l1_coefficient:[{values}]"
    hydra = f"training.together={TOGETHER} sweep={{dictionary:relu,site:mlp_out,{axes}}}"
    command = [sys.executable, "-m", "snakemake", "-n", "-s", str(ROOT / "Snakefile"), "--directory", directory]
    seconds, said = timed([*command, "--quiet", "rules", "--config", f"hydra={hydra}"], directory)
    jobs = {int(n) for n in re.findall(r"^train +(\d+)$", said, re.MULTILINE)}  # the table may stand there twice
    if jobs != {points // TOGETHER}:
        sys.exit(
            f"the dry run of {points} points lists {jobs} training jobs, not one for {TOGETHER} points:\n{said[-2000:]}"
        )
    return seconds
