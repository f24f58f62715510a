"""The command line of every stage's jobs: `scripts/job.py`."""

import argparse
import errno
import logging
import random
import re
import sys
import time
from pathlib import Path

from saeflow.config.checks import ConfigError, escape_controls, loud
from saeflow.config.device import devices_of, missing
from saeflow.jobs.claims import claimed, claimed_part, wait_for
from saeflow.jobs.job import Job
from saeflow.jobs.log import limit_threads, start_log
from saeflow.jobs.progress import cpu_seconds, first_line, peak_memory
from saeflow.jobs.signals import end, raise_again
from saeflow.planning.frozen import touch
from saeflow.planning.graph import Plan
from saeflow.planning.history import record
from saeflow.planning.parts import Part, mark, part_name
from saeflow.planning.stages import Stage, stages
from saeflow.storage.publish import publish_text
from saeflow.storage.receipts import DamagedError, bring_to_now

log = logging.getLogger("saeflow")
NO_MEMORY = re.compile(r"out of memory|(?:can't|cannot|unable to) allocate|bad_alloc", re.IGNORECASE)


def in_words(error: Exception, stage: str) -> str:
    """What went wrong. Libraries do not say which disk is full, nor what asks for more memory, and not all do it by an
    errno."""
    said = str(error) or type(error).__name__
    if isinstance(error, MemoryError) or NO_MEMORY.search(said):
        return (
            f"there is not enough memory ({said}): device.mem_mb.{stage}=... asks a cluster for more, and on one "
            "machine fewer jobs at a time (--cores 1) have more each; what is finished is kept"
        )
    full = isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT)
    if (full or "No space left on device" in said or "Disk quota exceeded" in said) and "results/" not in said:
        return (
            f"the disk or quota of results/ is full ({said}): make room, or put results/ on another disk, and run the "
            "workflow again; what is finished is kept"
        )
    return said


def part_of(stage: Stage, name: str) -> Part:
    """Raises `ConfigError` for a stage whose jobs cannot be shared."""
    if stage.parts is None:
        raise ConfigError(f"--part {name}: jobs of {stage.name} cannot be shared")
    return Part.parse(name)


def main() -> None:
    """Parses the options, lets the stage do its work on the jobs, prints the lines that it returns."""
    parser = argparse.ArgumentParser(description="Makes artifacts of a stage below results/ from a frozen plan.")
    parser.add_argument("stage", choices=stages(), help="what to make")
    parser.add_argument("--plan", required=True, help="frozen plan (scripts/plan.py --freeze FILE)")
    which = parser.add_mutually_exclusive_group(required=True)
    which.add_argument("--key", action="append", default=[], help="key of an artifact of the stage; may be repeated")
    which.add_argument("--job", metavar="KEY", help="key of an artifact, to be made with all that share its job")
    parser.add_argument("--part", metavar="I-of-N", help="only this part of what --job makes, ahead of it: 2-of-8")
    parser.add_argument("--device", default="cpu", help="torch device, such as cpu, cuda or cuda:1")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads")
    parser.add_argument("--log", help="file for the log; default: stderr")
    parser.add_argument("--quiet", action="store_true", help="say nothing but in the log, which the workflow reads")
    args = parser.parse_args()
    if args.part and not args.job:
        parser.error("--part goes with --job")
    start_log(args.log)
    limit_threads(args.threads)
    try:
        plan, stage = Plan.load(args.plan), stages()[args.stage]
        touch(args.plan)
        wanted = plan.members(args.stage, args.job) if args.job else list(dict.fromkeys(args.key))
        first = devices_of(args.device)[0]
        jobs = [Job(plan.instance(args.stage, key), plan, first, model_device=args.device) for key in wanted]
        part = part_of(stage, args.part) if args.part else None
        needed = [plan.receipt(s, k) for job in jobs for s, keys in job.instance.needs.items() for k in keys]
        wait_for(needed)
        again = plan.found.get(args.stage, ()) if args.job else wanted
        with claimed(jobs, again=again) if part is None else claimed_part(jobs, part) as left:
            random.seed(0)  # nothing should draw from the global generators; if a library does, it does so equally
            named = [job.instance.key for job in left] if part is None else [part_name(args.job, args.part)]
            log.info("%s", first_line(args.stage, named))
            started, cpu_started = time.perf_counter(), cpu_seconds()
            for job in left:
                job.sharing = len(left)
            if left and (reason := missing(args.device)):
                raise ConfigError(f"device.{args.stage}={args.device}, but {reason}")
            if not left:
                last_line = f"another run has made {args.stage} {', '.join(wanted)}"
            else:
                last_line = stage.parts.work(left, part) if part and stage.parts else stage.work(left)
                seconds, cpu = time.perf_counter() - started, cpu_seconds() - cpu_started
                made = [job.instance for job in left]
                record(stage, plan, made, args.device, seconds, cpu, peak_memory(), args.part or "")
            if part is not None:
                publish_text(Path(mark(args.stage, args.job, args.part)), f"{last_line}\n")
        bring_to_now([*plan.inputs(args.stage, wanted[0], again=True), *needed, *plan.marks(args.stage, wanted[0])])
    except Exception as error:
        raise_again(error)
        log.exception("failed")
        reason = escape_controls(f"{args.stage} failed: {in_words(error, args.stage)}")
        if isinstance(error, DamagedError):
            for folder in error.set_aside():
                log.warning("%s counts as missing from now on", folder)
        log.error(reason)  # after the traceback: the last record is the reason in one sentence
        if args.log and not args.quiet:
            print(f"{loud(reason, sys.stderr)}\n(log: {args.log})", file=sys.stderr)
        end(1)
    log.info(last_line)
    if not args.quiet:
        print(escape_controls(last_line))
    end(0)
