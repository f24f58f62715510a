"""Makes results/report.html of a finished experiment, unless it shows its figures already; names what to look at."""

import argparse
import shlex
import subprocess
import sys
from pathlib import Path

from saeflow.planning.digests import DIGESTS_FILE
from saeflow.planning.expansion import compose
from saeflow.storage.receipts import RECEIPT


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("overrides", nargs="*", help="the Hydra overrides of the run")
    args = parser.parse_args()
    root = Path(__file__).resolve().parent.parent
    plan = compose(root / "conf", args.overrides, digests=DIGESTS_FILE)
    (key,) = plan.stages["figures"]
    folder, report = plan.folder("figures", key), Path(plan.results) / "report.html"
    if not plan.done("figures", key):
        sys.exit(f"report: {folder}/ is not there; run the workflow first")
    receipt = folder / RECEIPT
    if not report.exists() or report.stat().st_mtime < receipt.stat().st_mtime or key not in report.read_text():
        hydra = " ".join(args.overrides)
        command = [sys.executable, "-m", "snakemake", "-s", str(root / "Snakefile"), "--report", str(report), "--quiet"]
        done = subprocess.run([*command, "--config", f"hydra={hydra}"], stderr=subprocess.PIPE, text=True)
        if done.returncode:
            sys.exit(f"report: {shlex.join(command)} failed:\n{done.stderr}")
    figures = ", ".join(str(p) for p in sorted(folder.glob("*.png")))
    print(f"report: {report}\nfigures: {figures} (with .pdf and .csv beside them)")


main()
