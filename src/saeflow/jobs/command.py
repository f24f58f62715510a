"""The command line of every stage's jobs: `scripts/job.py`."""

import argparse
import logging
import os
import random
import signal
import sys
import time
from collections.abc import Iterable

from saeflow.config.checks import escape_controls
from saeflow.jobs.claims import claimed
from saeflow.jobs.job import Job
from saeflow.jobs.log import limit_threads, start_log
from saeflow.jobs.signals import Preempted, Stopped, stop_on_term
from saeflow.jobs.slurm import queue_again
from saeflow.planning.frozen import touch
from saeflow.planning.graph import Plan
from saeflow.planning.history import record, work_of
from saeflow.planning.stages import stages
from saeflow.storage.receipts import DamagedError

log = logging.getLogger("saeflow")
TEMPORARY_FAILURE = 75  # EX_TEMPFAIL of sysexits.h: run it again


def left_to_make(plan: Plan, stage: str, keys: Iterable[str]) -> list[str]:
    """Those that no other run has made since this one's plan; what was there when it was planned is made again, since
    only who forces its job asks for it."""
    before = set(plan.found.get(stage, ()))
    return [key for key in keys if key in before or not plan.done(stage, key)]


def main() -> None:
    """Parses the options, lets the stage do its work on the jobs, prints the lines that it returns."""
    parser = argparse.ArgumentParser(description="Makes artifacts of a stage below results/ from a frozen plan.")
    parser.add_argument("stage", choices=stages(), help="what to make")
    parser.add_argument("--plan", required=True, help="frozen plan (scripts/plan.py --freeze FILE)")
    which = parser.add_mutually_exclusive_group(required=True)
    which.add_argument("--key", action="append", default=[], help="key of an artifact of the stage; may be repeated")
    which.add_argument("--job", metavar="KEY", help="key of an artifact, to be made with all that share its job")
    parser.add_argument("--device", default="cpu", help="torch device, such as cpu, cuda or cuda:1")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads")
    parser.add_argument("--log", help="file for the log; default: stderr")
    parser.add_argument("--quiet", action="store_true", help="say nothing but in the log, which the workflow reads")
    args = parser.parse_args()
    start_log(args.log)
    limit_threads(args.threads)
    stop_on_term()
    try:
        plan, stage = Plan.load(args.plan), stages()[args.stage]
        touch(args.plan)
        wanted = plan.members(args.stage, args.job) if args.job else list(dict.fromkeys(args.key))
        jobs = [Job(plan.instance(args.stage, key), plan, args.device) for key in wanted]
        with claimed(jobs) as left:
            keys = left_to_make(plan, args.stage, wanted) if args.job else wanted
            left = [job for job in left if job.instance.key in keys]
            random.seed(0)  # nothing should draw from the global generators; if a library does, it does so equally
            started = time.perf_counter()
            last_line = stage.work(left) if left else f"another run has made {args.stage} {', '.join(wanted)}"
            for job in left:
                work = work_of(stage, plan, job.instance)
                record(plan, job.instance, work, args.device, (time.perf_counter() - started) / len(left))
    except (Preempted, Stopped) as stop:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)  # it is ending already
        log.warning("%s %s", args.stage, stop)
        queue_again()
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
