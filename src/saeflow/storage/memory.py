"""How much memory there is."""

import os
from functools import cache
from pathlib import Path


def installed_memory() -> int:
    """Bytes of memory of the machine, whoever may take them."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


@cache
def machine_memory() -> int:
    """Bytes of memory that this process and the pages it reads may take: those of the machine, or what the control
    groups of the process leave of them, as Slurm and containers set them."""
    return min([installed_memory(), *_limits(Path("/proc/self/cgroup"), Path("/sys/fs/cgroup"))])


def _limits(groups: Path, mounted: Path) -> list[int]:
    """Of the control groups that a file like /proc/self/cgroup lists, and all above them; none where there are none."""
    found: list[int] = []
    for line in groups.read_text().splitlines() if groups.is_file() else ():
        _, controllers, name = line.split(":", 2)
        if controllers not in ("", "memory"):
            continue
        root, file = (mounted, "memory.max") if not controllers else (mounted / "memory", "memory.limit_in_bytes")
        group = root / name.strip("/")
        for folder in (group, *group.parents):
            if (limit := folder / file).is_file() and limit.read_text().strip().isdecimal():
                found.append(int(limit.read_text()))
            if folder == root:
                break
    return found
