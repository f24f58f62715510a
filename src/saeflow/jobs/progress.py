"""How far a loop is: a bar on a terminal, lines in a log.

A log gets a line after 10 seconds, after 30, and then every minute, so that a loop of a second leaves none and one of
hours some hundreds: done of total, rate, what is left, memory. `read_progress` reads such a line again, for `make
status`.
"""

import logging
import os
import platform
import re
import resource
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from types import TracebackType
from typing import Any, Generic, NamedTuple, Self, TypeVar

log = logging.getLogger("saeflow")
FIRST, SECOND, EVERY = 10.0, 30.0, 60.0
"""Seconds after which lines are logged."""

MAKES = "makes "

T = TypeVar("T")


class Progress(Generic[T]):
    """A loop over `iterable`, or, without one, a block in which `update` says what is done."""

    def __init__(
        self, iterable: Iterable[T] | None, what: str, total: int | None, unit: str = "", each: int = 1, start: int = 0
    ) -> None:
        from tqdm import tqdm

        self.iterable, self.what, self.unit, self.each = iterable, what, unit, each
        self.total = total
        self.start = self.done = start
        self._began = time.monotonic()
        self._next = self._began + FIRST
        terminal = sys.stderr.isatty()
        self._logs = not terminal or any(isinstance(h, logging.FileHandler) for h in logging.getLogger().handlers)
        self._bar = tqdm(
            desc=what, total=self.total, initial=self.done, unit=f" {unit}" if unit else "it", disable=not terminal,
            leave=False,
        )  # fmt: skip

    def __iter__(self) -> Iterator[T]:
        assert self.iterable is not None
        with self:
            for one in self.iterable:
                yield one
                self.update()

    def update(self, n: int = 1) -> None:
        """So many more are done."""
        before, self.done = self.done, self.done + n * self.each
        if self.total is not None:
            self.done = min(self.done, self.total)  # the last of them may be but a part
        self._bar.update(self.done - before)
        if self._logs and (now := time.monotonic()) >= self._next:
            log.info("%s", self.line(now - self._began))
            passed = now - self._began
            self._next = self._began + (SECOND if passed < SECOND else passed + EVERY)

    def line(self, seconds: float) -> str:
        """What is logged `seconds` after the loop began."""
        rate = (self.done - self.start) / seconds
        of = f" of {self.total:,}" if self.total is not None else ""
        share = f" ({100 * self.done / self.total:.0f} %)" if self.total else ""
        parts = [f"{self.what}: {self.done:,}{of}{f' {self.unit}' if self.unit else ''}{share}"]
        parts.append(f"{rate:,.0f} a second" if rate >= 10 else f"{rate:.2g} a second")
        if self.total is not None and rate:
            parts.append(f"{duration((self.total - self.done) / rate)} left")
        return ", ".join([*parts, f"{peak_memory() / 1e9:.1f} GB of memory"])

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._bar.close()


def progress(
    iterable: Any, what: str, total: int | None = None, unit: str = "", each: int = 1, start: int = 0
) -> Progress[Any]:
    """Progress of a loop, in units, of which each pass does `each` (the last perhaps fewer): `total` in all, of which
    an earlier process did `start`."""
    if total is None and hasattr(iterable, "__len__"):
        total = start + len(iterable) * each
    return Progress(iterable, what, total, unit, each, start)


def duration(seconds: float) -> str:
    """`8 s`, `6 min`, `2.5 h`."""
    if seconds < 60:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def peak_memory() -> int:
    """The most bytes that this process had in memory at once."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def cpu_seconds() -> float:
    """Time that the cores have spent on this process and on those that it started and waited for."""
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(one.ru_utime + one.ru_stime for one in used)


def first_line(stage: str, keys: Sequence[str]) -> str:
    """What a job logs first: what it makes, and where."""
    return f"{MAKES}{stage} {' '.join(keys)} (process {os.getpid()} on {platform.node()})"


class Seen(NamedTuple):
    """What a line of a log says of a loop."""

    what: str
    percent: int | None
    left: str
    """In words: `6 min`; empty where it is not known."""


def read_progress(message: str) -> Seen | None:
    """None where a message is of something else."""
    found = re.fullmatch(
        r"(.+?): [\d,]+(?: of [\d,]+)?(?: [^\d(,]+?)?(?: \((\d+) %\))?, \S+ a second(?:, (.+) left)?, \S+ GB of memory",
        message,
    )
    return Seen(found[1], int(found[2]) if found[2] else None, found[3] or "") if found else None
