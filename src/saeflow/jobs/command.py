"""The command line of every stage's jobs: `scripts/job.py`."""

import argparse
import logging
import os
import random
import sys

from saeflow.config.checks import escape_controls
from saeflow.jobs.claims import claimed
from saeflow.jobs.job import Job
from saeflow.jobs.log import limit_threads, start_log
from saeflow.jobs.signals import Preempted
from saeflow.planning.graph import Plan
from saeflow.planning.stages import stages
from saeflow.storage.receipts import DamagedError

log = logging.getLogger("saeflow")
TEMPORARY_FAILURE = 75  # EX_TEMPFAIL of sysexits.h: run it again


def main() -> None:
    """Parses the options, lets the stage do its work on the jobs, prints the lines that it returns."""
    parser = argparse.ArgumentParser(description="Makes artifacts of a stage below results/ from a frozen plan.")
    parser.add_argument("stage", choices=stages(), help="what to make")
    parser.add_argument("--plan", default=".snakemake/plan.json", help="frozen plan (scripts/plan.py --freeze FILE)")
    parser.add_argument(
        "--key", action="append", required=True, help="key of an artifact of the stage; may be repeated"
    )
    parser.add_argument("--device", default="cpu", help="torch device, such as cpu, cuda or cuda:1")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads")
    parser.add_argument("--log", help="file for the log; default: stderr")
    parser.add_argument("--quiet", action="store_true", help="say nothing but in the log, which the workflow reads")
    args = parser.parse_args()
    start_log(args.log)
    limit_threads(args.threads)
    try:
        plan = Plan.load(args.plan)
        jobs = [Job(plan.instance(args.stage, key), plan, args.device) for key in args.key]
        random.seed(0)  # nothing should draw from the global generators; if a library does, it does so equally
        with claimed(jobs) as left:
            last_line = stages()[args.stage].work(left) if left else "another run has made it meanwhile"
    except Preempted as stop:
        log.warning("%s %s", args.stage, stop)
        if args.log and not args.quiet:
            print(f"{args.stage} {stop}", file=sys.stderr)
        sys.exit(TEMPORARY_FAILURE)
    except Exception as error:
        log.exception("failed")
        reason = escape_controls(f"{args.stage} failed: {error or type(error).__name__}")
        if isinstance(error, DamagedError):
            for folder in error.set_aside():
                log.warning("%s counts as missing from now on", folder)
        log.error(reason)  # after the traceback: the last record is the reason in one sentence
        if args.log and not args.quiet:
            print(f"{reason}\n(log: {args.log})", file=sys.stderr)
        sys.exit(1)
    log.info(last_line)
    if not args.quiet:
        print(escape_controls(last_line), flush=True)
    logging.shutdown()
    sys.stderr.flush()
    os._exit(0)  # all is written and renamed; taking the libraries down would cost another second
