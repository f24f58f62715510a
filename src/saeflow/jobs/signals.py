"""Being asked to stop: the step at work is finished, the state saved, and the job ends so that it is run again."""

import contextlib
import os
import signal
import threading


class Preempted(Exception):
    """The job was asked to stop (SIGTERM, SIGINT, SIGUSR1) and has saved its state; run again, it goes on."""


class Stopped(BaseException):
    """SIGTERM reached a job where it has no state to save: it gives up its locks and half-written folders, and ends."""


def stop_on_term() -> None:
    """Has SIGTERM raise `Stopped` in the main thread, where nothing handles it otherwise, as `StopSignals` does."""
    own = os.getpid()

    def stop(number: int, _: object) -> None:
        if os.getpid() != own:  # a process that a library has forked
            os._exit(128 + number)
        signal.signal(number, signal.SIG_IGN)  # asked again, it is ending already
        raise Stopped(f"stopped by {signal.Signals(number).name}; run again")

    signal.signal(signal.SIGTERM, stop)


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
            for process in psutil.Process().children(recursive=True):
                with contextlib.suppress(psutil.Error):
                    if process.cmdline()[1:2] and process.cmdline()[1].endswith("scripts/job.py"):
                        process.send_signal(signal.SIGTERM)


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
