"""One process at a time: locks that work on every file system and outlive no process for long.

A lock is a small file that says which process of which host holds it, and since when, and that the holder touches
every few seconds (`filelock.SoftFileLease`): a file system needs no `flock` for it. The lock of a process that died is
taken over at once on its own host, and elsewhere after `EXPIRES` seconds without a sign of life, by the waiting
process's own clock. A process that was stopped for longer than that and wakes up is no danger: it publishes the same
bytes.
"""

import contextlib
import logging
import time
from collections.abc import Iterator
from pathlib import Path

from filelock import SoftFileLease, Timeout

from saeflow.storage.publish import make_folder

log = logging.getLogger("saeflow")
EXPIRES = 120.0  # seconds; all processes must agree on it
WAIT = 0.25  # seconds between two looks
EMPTY_FOR = 5.0  # seconds after which a lock that names nobody is nobody's


class Lock:
    """Held by one process from `acquire` to `release`."""

    def __init__(self, path: Path) -> None:
        self.path, self._lease = path, SoftFileLease(path, lease_duration=EXPIRES)

    def acquire(self, what: str) -> bool:
        """Waits until no other process holds it, and logs who does; `what`: what is made under it. Returns whether it
        had to wait."""
        make_folder(self.path.parent)
        started, waited = time.monotonic(), False
        while True:
            try:
                self._lease.acquire(timeout=EMPTY_FOR if waited else 0, poll_interval=WAIT)
            except Timeout:
                if not waited:
                    log.info("waiting for %s, which makes %s", self.holder(), what)
                waited = True
                self._remove_if_empty()
            else:
                self._say_since_when()
                if waited:
                    log.info("waited %.0f s for %s", time.monotonic() - started, what)
                return waited

    def _say_since_when(self) -> None:
        """In a line of its own, as filelock lets a marker have: who waits wants to know whether to go on waiting."""
        with contextlib.suppress(OSError), open(self.path, "a") as file:
            file.write(f"since={time.strftime('%Y-%m-%d %H:%M:%S %z')}\n")

    def try_acquire(self) -> bool:
        """Takes it unless another process holds it; returns whether it did."""
        try:
            self._lease.acquire(timeout=4 * WAIT, poll_interval=WAIT)  # of a process that has died, it is nobody's
        except Timeout:
            return False
        self._say_since_when()
        return True

    def taken(self) -> bool:
        """Whether another process holds it."""
        free = self.try_acquire()
        self.release()
        return not free

    def _remove_if_empty(self) -> None:
        """A power cut may leave a lock that names nobody. Who takes one writes into it in the same instant."""
        with contextlib.suppress(FileNotFoundError):
            stat = self.path.stat()
            if stat.st_size == 0 and time.time() - stat.st_mtime > EMPTY_FOR:
                self.path.unlink()

    def release(self) -> None:
        """May be called again."""
        if self._lease.is_locked:
            self._lease.release()

    def holder(self) -> str:
        """Who holds it, in words."""
        with contextlib.suppress(OSError):
            seen = time.time() - self.path.stat().st_mtime
            lines = dict(line.partition("=")[::2] for line in self.path.read_text().splitlines())
            since = f" since {lines['since']}" if "since" in lines else ""
            if owner := self._lease.owner:
                return f"process {owner.pid} on {owner.hostname}{since} (last sign of life {max(0.0, seen):.0f} s ago)"
        return "another process"


@contextlib.contextmanager
def locked(path: Path, what: str) -> Iterator[None]:
    """Holds the lock at `path` inside the block."""
    lock = Lock(path)
    lock.acquire(what)
    try:
        yield
    finally:
        lock.release()
