"""Makes results/report.html of a finished experiment, unless it shows its figures already; names what to look at."""

import argparse
import os
import shlex
import subprocess
import sys
from pathlib import Path

from saeflow.config import ConfigError
from saeflow.figures.whereabouts import ROOT, report_is_current, whereabouts
from saeflow.planning.digests import DIGESTS_FILE
from saeflow.planning.expansion import compose
from saeflow.planning.ledger import save_ledger
from saeflow.planning.overrides import split


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("overrides", nargs="*", help="the Hydra overrides of the run")
    parser.add_argument("--conf", default=ROOT / "conf", help="folder of the groups")
    parser.add_argument(
        "--directory", help="that of the run, as of snakemake: results/ and relative paths are below it"
    )
    args = parser.parse_args()
    hydra, conf = " ".join(args.overrides), Path(args.conf).resolve()
    try:
        if args.directory:
            os.chdir(args.directory)
        overrides = split(hydra)
        plan = compose(conf, overrides, digests=DIGESTS_FILE)
    except (ConfigError, ValueError, OSError) as error:
        sys.exit(f"report: {error}")
    (key,) = plan.stages["figures"]
    if not plan.done("figures", key):
        sys.exit(f"report: {plan.folder('figures', key)}/ is not there; run the workflow first: make run HYDRA=...")
    save_ledger(plan)
    if not report_is_current(plan):
        report = Path(plan.results) / "report.html"
        command = [sys.executable, "-m", "snakemake", "-s", str(ROOT / "Snakefile"), "--report", str(report), "--quiet"]
        command += ["--config", f"conf={conf}", f"hydra={hydra}"]
        done = subprocess.run(command, stderr=subprocess.PIPE, text=True)
        if done.returncode:
            sys.exit(f"report: {shlex.join(command)} failed:\n{done.stderr}")
    print(whereabouts(plan, overrides))


main()
