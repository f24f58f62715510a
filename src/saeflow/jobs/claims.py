"""Artifacts are made by one process at a time: two runs that want the same one share what the first of them makes."""

import logging
import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

from saeflow.jobs.job import Job
from saeflow.storage.locks import Lock
from saeflow.storage.receipts import RECEIPT, DamagedError, verify

log = logging.getLogger("saeflow")
PLANNED = "SAEFLOW_PLANNED"
"""In the environment of a workflow's jobs: when it was planned, in seconds since 1970."""


@contextmanager
def claimed(jobs: list[Job]) -> Iterator[list[Job]]:
    """Gives those of the jobs that are still to be done, when no other process makes an artifact of them, and keeps
    others from making them.

    Done is what another process finished while this one waited for it, or after the workflow was planned that this
    job belongs to. What was there before is made again: that is what was asked for.
    """
    with ExitStack() as held:
        done = set()
        for job in sorted(jobs, key=lambda job: job.path):  # all processes in one order: none waits for another's wait
            job.lock = Lock(job.path.with_name(job.path.name + ".lock"))
            waited = job.lock.acquire(str(job.path))
            held.callback(job.lock.release)
            if _made_meanwhile(job, waited):
                log.info("%s was made by another run meanwhile", job.path)
                job.lock.release()
                done.add(job.path)
        yield [job for job in jobs if job.path not in done]


def _made_meanwhile(job: Job, waited: bool) -> bool:
    planned = os.environ.get(PLANNED)
    try:
        finished = (job.path / RECEIPT).stat().st_mtime
        if not waited and (planned is None or finished < float(planned)):
            return False
        verify(job.path)
    except (FileNotFoundError, DamagedError):
        return False
    return True
