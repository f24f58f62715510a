"""A job that Slurm preempts goes back into the queue as it is: to be preempted is no failure, of which retries are."""

import logging
import os
import re
import subprocess

log = logging.getLogger("saeflow")


def queue_again() -> bool:
    """Where this process runs in a job that Slurm is preempting, has Slurm queue that job again; it then ends this one.

    A job that was asked to stop for another reason, such as the end of its time, is not: it would get no more the next
    time either.
    """
    job = os.environ.get("SLURM_JOB_ID", "")
    preempted = re.search(r"\bPreemptTime=(\S+)", _scontrol("show", "job", job)) if job else None
    if preempted is None or preempted[1] in ("None", "Unknown"):
        return False
    log.warning("Slurm preempts job %s: it is queued again, and goes on from what it has saved", job)
    _scontrol("requeue", job)
    return True


def _scontrol(*arguments: str) -> str:
    try:
        done = subprocess.run(["scontrol", *arguments], capture_output=True, text=True, timeout=30)
    except (OSError, subprocess.TimeoutExpired) as error:
        log.warning("scontrol: %s", error)
        return ""
    if done.returncode:
        log.warning("scontrol %s: %s", " ".join(arguments), done.stderr.strip())
    return done.stdout
