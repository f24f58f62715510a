"""Being asked to stop: the step at work is finished, the state saved, and the job ends so that it is run again."""

import contextlib
import logging
import os
import signal
import sys
import threading
from collections.abc import Iterator
from itertools import takewhile
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

from saeflow.jobs.log import RECORD, start_log
from saeflow.jobs.slurm import queue_again

if TYPE_CHECKING:
    import psutil

TEMPORARY_FAILURE = 75  # EX_TEMPFAIL of sysexits.h: run it again
MOST_STOPS = 10
"""Times that a job is run again because it was asked to stop: one that has not finished after so many never will."""
STOPPED_BY = "stopped by "
"""How the message of `Preempted` and `Stopped` begins."""


class Preempted(BaseException):
    """The job was asked to stop (SIGTERM, SIGINT, SIGUSR1) and has saved its state; run again, it goes on."""


class Stopped(BaseException):
    """SIGTERM reached a job where it has no state to save: it gives up its locks and half-written folders, and ends."""


_raised: list[Stopped] = []


def stop_on_term() -> None:
    """Has SIGTERM raise `Stopped` in the main thread, where nothing handles it otherwise, as `StopSignals` does."""
    own = os.getpid()

    def answer(number: int, _: object) -> None:
        if os.getpid() != own:  # a process that a library has forked
            os._exit(128 + number)
        signal.signal(number, signal.SIG_IGN)  # asked again, it is ending already
        stop = Stopped(f"{STOPPED_BY}{signal.Signals(number).name}; run again")
        _raised.append(stop)
        raise stop

    signal.signal(signal.SIGTERM, answer)


def raise_again(error: Exception) -> None:
    """Raises the `Stopped` that an error is, or hides: Python turns what is raised while it makes a class into a
    `RuntimeError`."""
    if _raised:
        raise _raised[0] from error


@contextlib.contextmanager
def stoppable() -> Iterator[None]:
    """The life of a job, its imports included: asked to stop, it ends with code 75, and its log says so last."""
    stop_on_term()
    try:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGTERM])
        yield
    except (Preempted, Stopped) as stop:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)  # it is ending already
        stage, file = sys.argv[1], sys.argv[sys.argv.index("--log") + 1] if "--log" in sys.argv else None
        if not logging.root.handlers:
            start_log(file)
        logging.getLogger("saeflow").warning("%s %s", stage, stop)
        queue_again()
        if file and "--quiet" not in sys.argv:
            sys.stderr.write(f"{stage} {stop}\n")
        end(TEMPORARY_FAILURE)


def end(code: int) -> NoReturn:
    """Ends the process now: all is written and renamed. Taking libraries down would cost another second, and some log
    what they did then, where the reason stands last."""
    logging.shutdown()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def pass_on_term() -> None:
    """Has a SIGTERM that this process handles reach the jobs below it too.

    For the Snakemake that runs a job on a node: Slurm tells it, and no other process, that the job is to stop, and it
    then waits for a job that knows nothing of that. The shell between the two is not told: it would not wait.
    """
    read, write = os.pipe()
    os.set_blocking(write, False)
    signal.set_wakeup_fd(write, warn_on_full_buffer=False)
    threading.Thread(target=_pass_on, args=(read,), daemon=True).start()


def _pass_on(read: int) -> None:
    import psutil

    while received := os.read(read, 64):
        if signal.SIGTERM in received:
            for job in jobs_below(os.getpid()):
                with contextlib.suppress(psutil.Error):
                    job.terminate()


def jobs_below(pid: int) -> "list[psutil.Process]":
    """The processes of jobs that a process has started, without the shells between; none where it has ended."""
    import psutil

    found = []
    with contextlib.suppress(psutil.Error):
        for process in psutil.Process(pid).children(recursive=True):
            with contextlib.suppress(psutil.Error):
                if process.cmdline()[1:2] and process.cmdline()[1].endswith("scripts/job.py"):
                    found.append(process)
    return found


def was_stopped(log: str | Path) -> bool:
    """Whether the last that a job's log says is that the job was asked to stop, which is no failure. Executors do not
    tell the scheduler its exit code, which says the same."""
    try:
        lines = Path(log).read_text(errors="replace").splitlines()
    except OSError:
        return False
    records = filter(None, map(RECORD.match, reversed(lines)))
    last = takewhile(lambda record: record[2] == "WARNING", records)
    return any(record[3].split(" ", 1)[-1].startswith(STOPPED_BY) for record in last)


class StopSignals:
    """While open, SIGTERM, SIGINT and SIGUSR1 only set `received`, so that the step at work is finished first."""

    def __init__(self) -> None:
        self.received: str | None = None

    def __enter__(self) -> "StopSignals":
        self._before = {s: signal.signal(s, self._receive) for s in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _receive(self, number: int, _: object) -> None:
        if self.received and number == signal.SIGINT:
            os._exit(130)  # asked twice at the keyboard
        self.received = signal.Signals(number).name
