"""Runs every preset that needs the hub end to end, over stand-ins and reduced: make presets NAME=notebook_004.

Says of each how many artifacts it made and in which time; ends with 1 where one failed.
"""

import argparse
import subprocess
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from tests.presets.stand_ins import ROOT, Preset, overrides, presets


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", help="an experiment, or an experiment and its model as they are printed")
    parser.add_argument("--cores", default=1, type=int)
    args = parser.parse_args()
    chosen = [preset for preset in presets() if args.only in (None, preset.experiment, preset.name)]
    if not chosen:
        parser.error(f"--only {args.only}: these are there: {', '.join(preset.name for preset in presets())}")
    with tempfile.TemporaryDirectory(prefix="saeflow-presets-") as folder:
        failed = [preset.name for preset in chosen if not run(preset, Path(folder), args.cores)]
    return print(f"failed: {', '.join(failed)}") or 1 if failed else 0


def run(preset: Preset, folder: Path, cores: int) -> bool:
    """Whether all of an experiment was made."""
    started, home = time.perf_counter(), folder / f"run-{preset.name}"
    home.mkdir()
    command = [sys.executable, "-m", "snakemake", "-s", str(ROOT / "Snakefile"), "--directory", str(home)]
    settings = " ".join(overrides(preset, folder / "hub"))
    ran = subprocess.run(
        [*command, f"--cores={cores}", "--config", f"hydra={settings}"], capture_output=True, text=True
    )
    made = len(list((home / "results").rglob("provenance.json")))
    print(f"{preset.name}: {made} artifacts, {time.perf_counter() - started:.0f} s", flush=True)
    if ran.returncode:
        print((ran.stdout + ran.stderr)[-3000:])
    return ran.returncode == 0


if __name__ == "__main__":
    sys.exit(main())
