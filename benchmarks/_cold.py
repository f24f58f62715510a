"""Reading a store that is larger than memory: `reading.py` calls it, in a process that has little memory.

Prints a line of JSON. Pages of the store are dropped before each pass, and its process is put into a control group
whose limit leaves no room for the whole store (`group`, which is left to be removed); where that is not allowed, none.
"""

import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path

from saeflow.activations.reader import BatchReader, MappedRows
from saeflow.activations.store import Column

BLOCK = 8 << 20


def main() -> None:
    given = json.loads(sys.argv[1])
    column = Column(Path(given["folder"]), given["hook_name"], given["n_tokens"], (given["d"],), given["dtype"])
    group = limit_memory(given["memory"])
    reader = BatchReader([column], given["batch"], 0, buffer_tokens=given["buffer_tokens"])
    rows = reader.columns[0]
    assert isinstance(rows, MappedRows)
    files = sorted(file for file in column.array.rglob("*") if file.is_file())
    used = given["steps"] * given["batch"] * rows.layout.row_bytes
    in_order = cold(files, lambda: read_in_order(files))
    batches, cpu = reader.iterate(0, given["steps"]), time.process_time()
    first = cold(files, lambda: next(batches))
    rest = cold([], lambda: [None for _ in batches])
    cpu = time.process_time() - cpu
    seconds, n_bytes = first[0] + rest[0], first[1] + rest[1]
    speed = sum(file.stat().st_size for file in files) / in_order[0]
    found = {
        "amplification": n_bytes / used,
        "over_sequential": used / seconds / speed,
        "cpu_s_per_gb": 1e9 * cpu / used,
    }
    print(json.dumps(found | {"first_batch_bytes": first[1], "disk_mb_per_s": speed / 1e6, "group": group}))


def limit_memory(n_bytes: int) -> str:
    """Puts this process into a new control group with so much memory; its folder, or "" where that is not allowed."""
    mounted = Path("/sys/fs/cgroup")
    for root, limit in ((mounted / "memory", "memory.limit_in_bytes"), (mounted, "memory.max")):
        group = root / f"saeflow-bench-{os.getpid()}"
        try:
            group.mkdir()
            (group / limit).write_text(str(n_bytes))
            (group / "cgroup.procs").write_text(str(os.getpid()))
            return str(group)
        except OSError:
            if group.is_dir():
                group.rmdir()
    return ""


def cold(files: list[Path], work: Callable[[], object]) -> tuple[float, int]:
    """Seconds, and bytes that came from the disk, once no page of `files` is in memory."""
    for file in files:
        descriptor = os.open(file, os.O_RDONLY)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(descriptor)
    before, started = from_disk(), time.perf_counter()
    work()
    return time.perf_counter() - started, from_disk() - before


def from_disk() -> int:
    """Bytes that this process has had read from disks."""
    lines = Path("/proc/self/io").read_text().splitlines()
    return int(next(line.split()[1] for line in lines if line.startswith("read_bytes")))


def read_in_order(files: list[Path]) -> None:
    block = bytearray(BLOCK)
    for path in files:
        with open(path, "rb", buffering=0) as file:
            while file.readinto(block):
                pass


main()
