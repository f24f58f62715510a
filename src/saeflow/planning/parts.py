"""Parts: jobs that share the work of one, and run ahead of it.

A stage whose work falls into units, such as shards of a store, may declare `Parts`. With `device.parts.<stage>=N`, N
jobs make every N-th unit each, at the same time, wherever they run; the job that makes the artifact, with or without
them, takes what it finds of units and makes the rest. So parts change neither keys nor bytes; what is lost of them
costs time, and units outlive a change of N.
"""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from saeflow.config import ConfigError

if TYPE_CHECKING:
    from saeflow.planning.graph import Instance, Plan

MARKS = Path(".snakemake/parts")
"""Where files say that parts are done, for the rules, which wait for files; the plan looks at the units themselves."""
_NAME = re.compile(r"(\d+)-of-(\d+)")
_IN_NAME = re.compile(rf"\.part-{_NAME.pattern}$")


class Part(NamedTuple):
    """One of `of` jobs that share the work of one."""

    number: int
    """From 1 on."""
    of: int

    def __str__(self) -> str:
        return f"{self.number}-of-{self.of}"

    def has(self, unit: int) -> bool:
        """Whether it makes a unit, by its number from 0 on."""
        return unit % self.of == self.number - 1

    @classmethod
    def parse(cls, name: str) -> "Part":
        """Raises `ConfigError` for what is no `2-of-8`."""
        found = _NAME.fullmatch(name)
        if not found or not 1 <= int(found[1]) <= int(found[2]):
            raise ConfigError(f"--part {name}: it must be like 2-of-8")
        return cls(int(found[1]), int(found[2]))


@dataclass(frozen=True)
class Parts:
    """How the work of a stage's jobs is shared."""

    most: Callable[["Plan", Sequence["Instance"]], int]
    """Parts of a job beyond which one would have nothing to do."""
    missing: Callable[["Plan", Sequence["Instance"], list[Part]], list[Part]]
    """Those of all parts of a job that have something to make, as far as can be seen without reading it."""
    work: Callable[[list[Any], Part], str]
    """Makes the units of a part of the `Job`s that share a job; returns a line that says what it wrote where."""


def mark(stage: str, key: str, part: str) -> str:
    """The file that says that a part of the job known by `key` is done."""
    return f"{MARKS}/{stage}/{part_name(key, part)}"


def part_name(key: str, part: str) -> str:
    """What logs call it."""
    return f"{key}.part-{part}"


def without_hash(name: str) -> str:
    """A key for people, `L1.mlp_out-1200rows`, or a part of what it stands for: `L1.mlp_out-1200rows, part 2 of 8`."""
    part = _IN_NAME.search(name)
    label = _IN_NAME.sub("", name).rsplit("-", 1)[0]
    return f"{label}, part {part[1]} of {part[2]}" if part else label


def lock_of(folder: Path, part: Part) -> Path:
    """The lock of who makes a part of the artifact in `folder`, and of what shares its job."""
    return folder.with_name(f"{part_name(folder.name, str(part))}.lock")


def without_part(key: str) -> str:
    """The key of the artifact that a lock is of, whether it is of a part or not."""
    return _IN_NAME.sub("", key)


def told_together(labels: Sequence[str], most: int) -> str:
    """Names of several artifacts, without hashes, in short: what all have in common in brackets, then what tells them
    apart, of `most` of them: `(sae L3.mlp_out seed0): k8, k16 and 2 more`."""
    if len(labels) == 1:
        return labels[0]
    parts = [label.split("-") for label in labels]
    front = _shared(parts)
    back = _shared([part[front:][::-1] for part in parts])
    own = ["-".join(part[front : len(part) - back]) for part in parts]
    told = ", ".join(own[:most]) + (f" and {len(own) - most} more" if len(own) > most else "")
    common = " ".join([*parts[0][:front], *parts[0][len(parts[0]) - back :]])
    return f"({common}): {told}" if common else f": {told}"


def _shared(parts: list[list[str]]) -> int:
    """How many first elements all lists have in common, leaving one of each."""
    most = min(map(len, parts)) - 1
    return next((n for n in range(most) if len({part[n] for part in parts}) > 1), most)
