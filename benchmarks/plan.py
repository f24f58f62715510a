"""How long Snakemake needs to answer: dry runs of sweeps of 100, 1,000 and 5,000 points, and `make demo` when done.

Last line: {"dry_run_s_100", "dry_run_s_1000", "dry_run_s_5000", "noop_s"}, medians in seconds. Each dry run is checked
to list a training job for every four points.
"""

import json
import re
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
TOGETHER = 4
SWEEPS = {100: (10, 10), 1000: (25, 40), 5000: (50, 100)}  # points: seeds × L1 coefficients


def timed(command: list[str], cwd: str | Path) -> tuple[float, str]:
    started = time.perf_counter()
    done = subprocess.run(command, cwd=cwd, capture_output=True, text=True)
    seconds = time.perf_counter() - started
    if done.returncode:
        sys.exit(f"{' '.join(command)} failed:\n{done.stdout}{done.stderr}")
    return seconds, done.stdout + done.stderr


def dry_run(points: int, directory: str) -> float:
    seeds, coefficients = SWEEPS[points]
    values = ",".join(f"{0.001 * (i + 1):.4f}" for i in range(coefficients))
    axes = f"seed:[{','.join(map(str, range(seeds)))}],dictionary.l1_coefficient:[{values}]"
    hydra = f"training.together={TOGETHER} sweep={{dictionary:relu,site:mlp_out,{axes}}}"
    command = [sys.executable, "-m", "snakemake", "-n", "-s", str(ROOT / "Snakefile"), "--directory", directory]
    seconds, said = timed([*command, "--quiet", "rules", "--config", f"hydra={hydra}"], directory)
    jobs = len(set(re.findall(r"^(train_\w+) +1$", said, re.MULTILINE)))  # the table may stand there twice
    if jobs != points / TOGETHER:
        sys.exit(
            f"the dry run of {points} points lists {jobs} training jobs, not one for {TOGETHER} points:\n{said[-2000:]}"
        )
    return seconds


def main() -> None:
    found: dict[str, list[float]] = {}
    with tempfile.TemporaryDirectory() as directory:
        for _ in range(3):
            for points in SWEEPS:
                seconds = dry_run(points, directory)
                print(f"{points} points: {seconds:.1f} s", file=sys.stderr)
                found.setdefault(f"dry_run_s_{points}", []).append(seconds)
    print("finishing the demo, if it is not", file=sys.stderr)
    timed(["make", "demo"], ROOT)
    for _ in range(3):
        seconds, said = timed(["make", "demo"], ROOT)
        if "Nothing to be done" not in said:
            sys.exit(f"the second `make demo` did something:\n{said}")
        found.setdefault("noop_s", []).append(seconds)
    print(json.dumps({name: round(statistics.median(values), 2) for name, values in found.items()}))


main()
