"""The demo's training stage now and at an earlier commit, back to back, and how far their losses differ.

Each is a whole run of `experiment=demo` in a fresh checkout, with this .venv. Last line: {"before_over_now",
"before_s", "now_s", "largest_relative_fvu_difference", "mean_relative_fvu_difference"}. The stage lasts from the start
of its first job to the end of its last, by their receipts; differences are between the dictionaries' last rows of
metrics, the mean with its sign (above 0: more variance is left unexplained now).
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from datetime import datetime, timedelta
from pathlib import Path

import pyarrow.parquet as pq

ROOT = Path(__file__).resolve().parent.parent
BEFORE = "49c7a90"  # the last commit before the sparse step


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--before", default=BEFORE, help="commit")
    parser.add_argument("--now", default="HEAD", help="commit")
    args = parser.parse_args()
    (before_s, before), (now_s, now) = run(args.before), run(args.now)
    if before.keys() != now.keys():
        sys.exit(f"the two trained different dictionaries: {sorted(before.keys() ^ now.keys())}")
    differences = [now[name] / before[name] - 1 for name in now]
    found = {
        "before_over_now": before_s / now_s,
        "before_s": before_s,
        "now_s": now_s,
        "largest_relative_fvu_difference": max(map(abs, differences)),
        "mean_relative_fvu_difference": statistics.mean(differences),
    }
    print(json.dumps({name: float(f"{value:.3g}") for name, value in found.items()}))


def run(commit: str) -> tuple[float, dict[str, float]]:
    """Seconds of the training stage; of every dictionary, by its name without the hash, the variance unexplained."""
    with tempfile.TemporaryDirectory() as folder:
        tree = Path(folder) / "saeflow"
        git = ["git", "-C", str(ROOT), "worktree"]
        subprocess.run([*git, "add", "--detach", str(tree), commit], check=True, capture_output=True)
        try:
            (tree / ".venv").symlink_to(ROOT / ".venv")
            if (tree / "src/saeflow/kernels/__main__.py").is_file():  # what `make env` does
                compiling = [tree / ".venv/bin/python", "-m", "saeflow.kernels"]
                subprocess.run(compiling, cwd=tree, env=os.environ | {"PYTHONPATH": str(tree / "src")}, check=True)
            command = [tree / ".venv/bin/snakemake", "--cores", "2", "--config", "hydra=experiment=demo"]
            environment = os.environ | {"PYTHONPATH": str(tree / "src"), "HF_HUB_OFFLINE": "1"}
            done = subprocess.run(command, cwd=tree, env=environment, capture_output=True, text=True)
            if done.returncode:
                sys.exit(f"the demo of {commit} failed:\n{done.stderr[-3000:]}")
            folders = [path.parent for path in (tree / "results/train").glob("*/provenance.json")]
            receipts = [json.loads((f / "provenance.json").read_text()) for f in folders]
            ends = [datetime.fromisoformat(receipt["finished"]) for receipt in receipts]
            starts = [end - timedelta(seconds=r["wall_s"]) for end, r in zip(ends, receipts, strict=True)]
            rows = {f.name.rsplit("-", 1)[0]: pq.read_table(f / "metrics.parquet").to_pylist()[-1] for f in folders}
            seconds = (max(ends) - min(starts)).total_seconds()
            print(f"{commit}: {seconds:.1f} s for {len(rows)} dictionaries", file=sys.stderr)
            return seconds, {name: row["fvu"] for name, row in rows.items()}
        finally:
            subprocess.run([*git, "remove", "--force", str(tree)], check=True, capture_output=True)


main()
