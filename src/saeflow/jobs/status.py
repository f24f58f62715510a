"""What has become of the jobs of an experiment: from its plan, locks, logs and, where there is one, Slurm's queue.

A job that is at work holds a lock for each of its artifacts, and touches it; its log says how far it is. Both work
wherever the results folder is seen, on a cluster's login node too. Only what waits in a queue Slurm alone knows.
"""

import re
import shutil
import subprocess
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

from saeflow.jobs.log import RECORD
from saeflow.jobs.progress import MAKES, Seen, read_progress
from saeflow.planning.graph import Plan
from saeflow.planning.parts import Part, lock_of, part_name, without_hash
from saeflow.storage.locks import EXPIRES

RUNNING, QUEUED, FAILED, STOPPED, WAITS, READY = "running", "queued", "failed", "stopped", "waiting", "not started"
"""Stopped: it had begun, and nobody is at work on it. Waiting: for what it needs; not started: for its turn."""


@dataclass(frozen=True)
class Log:
    """What a job's log says."""

    path: Path
    keys: frozenset[str]
    """Of what it makes."""
    seen: Seen | None
    """The loop that it was last in."""
    last: str
    """Time of its last record."""
    error: str
    """The reason why it ended, if it failed."""


@dataclass(frozen=True)
class State:
    """One unfinished job."""

    stage: str
    keys: tuple[str, ...]
    state: str
    about: str

    def __str__(self) -> str:
        names = [without_hash(key) for key in self.keys]
        more = f" and {len(names) - 1} more" if len(names) > 1 else ""
        return f"{self.stage:12} {self.state:12} {self.about}{'  ' if self.about else ''}{names[0]}{more}"


def read_log(path: Path) -> Log | None:
    """None where a file is no job's log, or is not there yet."""
    try:
        records = [found for line in path.read_text(errors="replace").splitlines() if (found := RECORD.match(line))]
    except OSError:
        return None
    made = [r[3].removeprefix(MAKES).split(" (process ")[0].split() for r in records if r[3].startswith(MAKES)]
    if not made:
        return None
    seen = [passed for record in records if (passed := read_progress(record[3]))]
    error = records[-1][3] if records[-1][2] == "ERROR" else ""
    return Log(path, frozenset(made[-1][1:]), seen[-1] if seen else None, records[-1][1], error)


def unfinished(plan: Plan, logs: Path = Path("logs")) -> Iterator[State]:
    """Every job that the plan has still to do, in the order of the data flow. Torn or missing logs say nothing."""
    queue = slurm_queue()
    making = {(stage, key) for stage, keys in plan.to_make.items() for key in keys}
    for stage, keys in plan.to_make.items():
        by_key: dict[str, Log] = {}
        for log in sorted(filter(None, map(read_log, (logs / stage).rglob("*.log"))), key=lambda log: log.last):
            by_key |= dict.fromkeys(log.keys, log)
        told: set[str] = set()
        for key, parts in plan.parts.get(stage, {}).items():
            for part in parts:
                name = part_name(key, part)
                yield State(stage, (name,), *_state_of_part(plan, stage, key, part, by_key.get(name), queue, making))
        for key in keys:
            if key in told:
                continue
            own = by_key.get(key)
            sharing = own.keys if own else set(plan.members(stage, plan.leaders.get((stage, key), key)))
            members = tuple(k for k in keys if k in sharing and by_key.get(k) == own)
            told |= {*members}
            state, about = _state(plan, stage, members, own, queue, making)
            yield State(stage, members, state, about)


def _state(
    plan: Plan, stage: str, keys: tuple[str, ...], log: Log | None, queue: dict[str, str], making: set[tuple[str, str]]
) -> tuple[str, str]:
    folders = [plan.folder(stage, key) for key in keys]
    held = any(_alive(folder.with_name(folder.name + ".lock")) for folder in folders)
    needs = {(s, k) for key in keys for s, found in plan.stages[stage][key].needs.items() for k in found} & making
    parts = sum(len(plan.marks(stage, key)) for key in keys)
    return _found(log, held, queue, keys, stage, len(needs) + parts)


def _found(
    log: Log | None, held: bool, queue: dict[str, str], names: Iterable[str], rule: str, n_needs: int
) -> tuple[str, str]:
    """`names`, `rule`: of the job in Slurm's queue; `n_needs`: how many others have to be done before it."""
    if held:
        return RUNNING, _how_far(log.seen) if log else ""
    for name in names:
        if where := queue.get(name.replace("/", "_")):
            return QUEUED, where
    if rule in queue and not n_needs:
        return QUEUED, queue[rule]
    if log and log.error:
        return FAILED, f"{log.error} (log: {log.path})"
    if log:
        share = f"at {log.seen.percent} %, " if log.seen and log.seen.percent is not None else ""
        return STOPPED, f"{share}last word {_ago(log.last)}; run the workflow again (log: {log.path})"
    return (WAITS, f"for {n_needs} other{'s' if n_needs > 1 else ''}") if n_needs else (READY, "")


def _state_of_part(
    plan: Plan,
    stage: str,
    key: str,
    part: str,
    log: Log | None,
    queue: dict[str, str],
    making: set[tuple[str, str]],
) -> tuple[str, str]:
    lock = lock_of(plan.folder(stage, key), Part.parse(part))
    needs = {(s, k) for m in plan.members(stage, key) for s, ks in plan.stages[stage][m].needs.items() for k in ks}
    return _found(log, _alive(lock), queue, [f"{key}_{part}"], f"{stage}_part", len(needs & making))


def _how_far(seen: Seen | None) -> str:
    if seen is None:
        return ""
    share = f" at {seen.percent} %" if seen.percent is not None else ""
    return f"{seen.what}{share}{f', {seen.left} left' if seen.left else ''}"


def _alive(lock: Path) -> bool:
    """Whether a process that holds it gave a sign of life lately."""
    try:
        return time.time() - lock.stat().st_mtime < EXPIRES
    except OSError:
        return False


def _ago(when: str) -> str:
    seconds = (datetime.now() - datetime.strptime(when, "%Y-%m-%d %H:%M:%S")).total_seconds()
    for unit, size in (("days", 86400), ("h", 3600), ("min", 60)):
        if seconds >= 2 * size:
            return f"{seconds / size:.0f} {unit} ago"
    return f"{max(seconds, 0):.0f} s ago"


def slurm_queue() -> dict[str, str]:
    """Of jobs that Slurm has in its queue, where they stand, by the key that Snakemake's plugin writes into their
    comment. An array has the comment of its first job alone: it stands under the name of its stage, too. Empty where
    there is no Slurm, or it does not answer."""
    if not shutil.which("squeue"):
        return {}
    command = ["squeue", "--me", "--noheader", "--format", "%k\t%T\t%r\t%i"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return {}
    found = {}
    for line in done.stdout.splitlines():
        comment, state, reason, job = [*line.split("\t"), "", "", ""][:4]
        if names := re.fullmatch(r"rule_(\w+?)_wildcards_(.+)", comment):
            why = f" ({reason})" if reason not in ("None", "") else ""
            found[names[2]] = f"in Slurm as {job}: {state.lower()}{why}"
            if "_" in job:
                found[names[1]] = found[names[2]]
    return found
