"""Artifacts are made by one process at a time: two runs that want the same one share what the first of them makes."""

import logging
import time
from collections.abc import Collection, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from saeflow.jobs.job import Job
from saeflow.planning.parts import Part, lock_of
from saeflow.storage.locks import Lock
from saeflow.storage.receipts import DamagedError, verify

log = logging.getLogger("saeflow")
LATE = 60.0
"""Seconds after which a network disk shows on one node what another wrote, at the latest: `acdirmax` of nfs(5)."""
LOOK = 0.5  # seconds between two looks


@contextmanager
def claimed(jobs: list[Job], again: Collection[str] = ()) -> Iterator[list[Job]]:
    """Gives those of the jobs that are still to be done, when no other process makes an artifact of them, and keeps
    others from making them.

    What is there by now, another run has made: since this one's plan, or while this process waited for it. Of what was
    there before (`again`: keys), only the latter; otherwise it is made again, since that is what was asked for.
    """
    with ExitStack() as held:
        done = set()
        for job in sorted(jobs, key=lambda job: job.path):  # all processes in one order: none waits for another's wait
            job.lock = Lock(job.path.with_name(job.path.name + ".lock"))
            waited = job.lock.acquire(str(job.path))
            held.callback(job.lock.release)
            job.is_new = not job.path.exists()
            if (waited or job.instance.key not in again) and _is_there(job):
                log.info("%s was made by another run meanwhile", job.path)
                job.lock.release()
                done.add(job.path)
        yield [job for job in jobs if job.path not in done]


@contextmanager
def claimed_part(jobs: list[Job], part: Part) -> Iterator[list[Job]]:
    """Gives the jobs of which a part is to be made, while no other process makes that; none where all are there by
    now."""
    lock = Lock(lock_of(jobs[0].path, part))
    lock.acquire(f"part {part} of {jobs[0].path}")
    try:
        yield [] if all(map(_is_there, jobs)) else jobs
    finally:
        lock.release()


def _is_there(job: Job) -> bool:
    try:
        verify(job.path)
    except DamagedError:
        return False
    return True


def wait_for(receipts: Collection[str]) -> None:
    """Waits until this machine sees what a job needs and another has written; what stays away, the job itself names."""
    started, missing = time.monotonic(), [r for r in receipts if not Path(r).exists()]
    if missing:
        log.info("waiting up to %.0f s for %s, which this machine does not see yet", LATE, missing[0])
    while (missing := [r for r in missing if not Path(r).exists()]) and time.monotonic() - started < LATE:
        time.sleep(LOOK)
