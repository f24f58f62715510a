"""Makes results/report.html of a finished experiment, unless it shows its figures already, and results/index.html anew;
names what to look at."""

import shlex
import subprocess
import sys
from pathlib import Path

from saeflow.figures.whereabouts import ROOT, report_is_current, whereabouts
from saeflow.planning.command import fail, parser_of, plan_of, refusals
from saeflow.planning.ledger import save_ledger
from saeflow.results.front import write_front_page


def main() -> None:
    args = parser_of(__doc__).parse_args()
    with refusals("report"):
        plan, overrides = plan_of(args)
    (key,) = plan.stages["figures"]
    if not plan.done("figures", key):
        fail(f"report: {plan.folder('figures', key)}/ is not there; run the workflow first: make run HYDRA=...")
    save_ledger(plan)
    if not report_is_current(plan):
        report = Path(plan.results) / "report.html"
        command = [sys.executable, "-m", "snakemake", "-s", str(ROOT / "Snakefile"), "--report", str(report), "--quiet"]
        command += ["--config", f"conf={args.conf}", f"hydra={' '.join(args.overrides)}"]
        done = subprocess.run(command, stderr=subprocess.PIPE, text=True)
        if done.returncode:
            fail(f"report: {shlex.join(command)} failed:\n{done.stderr}")
    write_front_page(plan.results, args.conf)
    print(whereabouts(plan, overrides))


main()
