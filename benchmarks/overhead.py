"""What a job costs before its first useful step: whole jobs with next to nothing to do, timed from the shell.

Training does one step of one batch, evaluation one row of tokens for one dictionary, the figures draw none; all read
real inputs, made first by the workflow itself. Last line: {"train_start_s", "evaluate_start_s", "figure_start_s"},
medians in seconds.
"""

import json
import os
import shlex
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
HYDRA = (
    "sweep={dictionary:topk,site:mlp_out} tokens.train_tokens=65_536 tokens.held_out_tokens=256 figures=[] "
    "training.n_tokens=1024 training.batch_size=1024 training.lr_warm_up_steps=0 training.lr_decay_steps=0"
)


def call(command: list[str], cwd: str) -> None:
    done = subprocess.run(command, cwd=cwd, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"{shlex.join(command)} failed:\n{done.stdout}{done.stderr}")


def main() -> None:
    found: dict[str, list[float]] = {}
    with tempfile.TemporaryDirectory() as directory:
        snakemake = [sys.executable, "-m", "snakemake", "-s", str(ROOT / "Snakefile"), "--directory", directory]
        call([*snakemake, "--cores", str(os.cpu_count()), "--config", f"hydra={HYDRA}"], directory)
        (file,) = (Path(directory) / ".snakemake/plans").glob("*.json")
        plan = json.loads(file.read_text())
        for repeat in range(5):
            for stage, name in (("train", "train"), ("evaluate", "evaluate"), ("figures", "figure")):
                (key,) = plan["stages"][stage]
                threads = str(plan["device"]["threads"][stage])
                started = time.perf_counter()
                script = [sys.executable, str(ROOT / "scripts/job.py"), stage]
                call([*script, "--plan", str(file), "--key", key, "--threads", threads, "--log", "job.log"], directory)
                found.setdefault(f"{name}_start_s", []).append(time.perf_counter() - started)
                print(f"{stage}, repeat {repeat}: {found[f'{name}_start_s'][-1]:.2f} s", file=sys.stderr)
    print(json.dumps({name: round(statistics.median(values), 2) for name, values in found.items()}))


main()
