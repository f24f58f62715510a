"""Shuffled reading of a store of random activations, warm and cold, against reading it in order.

Last line: {"gb_per_s", "random_over_sequential", "consumer_wait_fraction", ...}.

gb_per_s: shuffled batches of 4,096 tokens, float32, as training gets them. random_over_sequential: the same over the
throughput of copying the column out chunk by chunk in the order on disk. consumer_wait_fraction: share of the time that
a consumer waits for `iterate`, when it does one encoder product (batch x d x 16 d) a batch, which is less than a
training step does. Medians of alternating passes; that every row read is the row stored is checked.

cold_amplification: bytes that come from the disk over bytes of the rows that are used, of an epoch in the buffered
order (`training.order=buffered`) when nothing of the store is in memory, in a process whose control group has no room
for all of it (cold_memory_limited: 1, or 0 where none can be made). cold_over_sequential: its rate over that of reading
the files in order, as cold (cold_disk_mb_per_s). cold_cpu_s_per_gb: processor time of that epoch, which limits it where
the disk is faster. cold_first_batch: share of the store that is read before the first batch is there.
cold_uniform_amplification: of some batches in the uniform order, which cannot read less than a page a row.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokens", type=int, default=262_144, help="512 MiB at d = 512 in float32")
    parser.add_argument("--d", type=int, default=512)
    parser.add_argument("--batch", type=int, default=4096)
    parser.add_argument("--dtype", default="float32", choices=["float32", "float16", "bfloat16"])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    return parser.parse_args()


args = parse()
os.environ["OMP_NUM_THREADS"] = str(args.threads)

import torch  # noqa: E402 (after the number of threads is set)

from saeflow.activations.reader import BatchReader, MappedRows  # noqa: E402
from saeflow.activations.shards import ITEMSIZE  # noqa: E402
from saeflow.activations.store import ActivationStore, Column  # noqa: E402
from saeflow.activations.writer import ColumnRequest, ColumnWriter  # noqa: E402
from saeflow.config import ActivationsConfig  # noqa: E402

PROCESS_BYTES = 300 << 20  # what a process holds that has imported torch
HOOK = "blocks.0.hook_mlp_out"


def main() -> None:
    torch.set_num_threads(args.threads)
    generator = torch.Generator().manual_seed(0)
    values = torch.randn(args.tokens, args.d, generator=generator)
    with tempfile.TemporaryDirectory(prefix="saeflow-bench-") as directory:
        column = write(Path(directory), values)
        expected = values.to(getattr(torch, args.dtype)).float()
        del values
        found = warm(column, expected) | cold(column)
        print(json.dumps({name: round(value, 4) for name, value in found.items()}))


def warm(column: Column, expected: torch.Tensor) -> dict[str, float]:
    reader = BatchReader([column], args.batch, seed=0)
    rows = reader.columns[0]
    assert isinstance(rows, MappedRows)
    steps = args.tokens // args.batch
    check(reader, expected, steps)  # also touches every chunk: the passes below are warm

    random, sequential, waited = [], [], []
    for repeat in range(args.repeats):
        random.append(timed(lambda: shuffled(reader, steps)))
        sequential.append(timed(lambda: in_order(rows)))
        waited.append(wait_fraction(reader, min(steps, 16)))
        say(f"pass {repeat}: random {random[-1]:.2f} s, in order {sequential[-1]:.2f} s, waited {waited[-1]:.1%}")
    gigabytes = {"random": steps * args.batch * args.d * 4 / 1e9, "sequential": args.tokens * args.d * 4 / 1e9}
    speed = gigabytes["random"] / statistics.median(random)
    in_order_speed = gigabytes["sequential"] / statistics.median(sequential)
    return {
        "gb_per_s": speed,
        "sequential_gb_per_s": in_order_speed,
        "random_over_sequential": speed / in_order_speed,
        "consumer_wait_fraction": statistics.median(waited),
    }


def cold(column: Column) -> dict[str, float]:
    """What `_cold.py` measures of a store that is not in memory."""
    buffered = in_little_memory(column, args.tokens // args.batch, args.tokens // 8)
    uniform = in_little_memory(column, 4, None)
    return {
        "cold_amplification": buffered["amplification"],
        "cold_over_sequential": buffered["over_sequential"],
        "cold_disk_mb_per_s": buffered["disk_mb_per_s"],
        "cold_cpu_s_per_gb": buffered["cpu_s_per_gb"],
        "cold_first_batch": buffered["first_batch_bytes"] / (args.tokens * args.d * ITEMSIZE[args.dtype]),
        "cold_uniform_amplification": uniform["amplification"],
        "cold_memory_limited": float(bool(buffered["group"])),
    }


def in_little_memory(column: Column, steps: int, buffer_tokens: int | None) -> dict[str, Any]:
    n_bytes = args.tokens * args.d * ITEMSIZE[args.dtype]
    given = {
        **{"folder": str(column.folder), "hook_name": HOOK, "n_tokens": args.tokens, "d": args.d, "dtype": args.dtype},
        **{"batch": args.batch, "steps": steps, "buffer_tokens": buffer_tokens, "memory": n_bytes // 2 + PROCESS_BYTES},
    }
    script = Path(__file__).with_name("_cold.py")
    ran = subprocess.run([sys.executable, script, json.dumps(given)], capture_output=True, text=True, check=True)
    found: dict[str, Any] = json.loads(ran.stdout)
    if found["group"]:
        os.rmdir(found["group"])
    say(f"cold, {buffer_tokens or 'no'} tokens in a buffer: {found}")
    return found


def write(folder: Path, values: torch.Tensor) -> Column:
    """A store written by the writer that caching uses."""
    store = ActivationStore(folder / "store", ActivationsConfig(dtype=args.dtype))
    hook = ColumnRequest(HOOK, (args.d,), args.tokens)
    started = time.perf_counter()
    with store.locked(), ThreadPoolExecutor(1) as thread:
        store.create(HOOK, hook.size, {})
        writer = ColumnWriter(store, [hook], "cpu", thread)
        for first in range(0, args.tokens, 4096):
            writer.append(first, values[first : first + 4096])
        writer.wait()
    say(f"wrote {args.tokens:,} x {args.d} {args.dtype} in {time.perf_counter() - started:.1f} s")
    return Column(store.folder / "column", HOOK, args.tokens, hook.size, args.dtype)


def check(reader: BatchReader, expected: torch.Tensor, steps: int) -> None:
    for s in range(steps):
        (batch,) = reader.batch(s)
        assert torch.equal(batch, expected[reader.rows(s)]), f"batch {s} differs from what was stored"
    say(f"{steps} shuffled batches hold the rows that were stored")


def shuffled(reader: BatchReader, steps: int) -> None:
    for s in range(steps):
        reader.batch(s)


def in_order(rows: MappedRows) -> None:
    """Every chunk copied out as float32, in the order on disk."""
    dtype = getattr(torch, rows.column.dtype)
    for number, shard in enumerate(rows.shards):
        held = min(rows.column.n_tokens - number * rows.layout.shard_tokens, rows.layout.shard_tokens)
        for c in range(rows.layout.chunks_of(held)):
            torch.from_numpy(shard.chunk(c).copy()).view(dtype).float()


def wait_fraction(reader: BatchReader, steps: int) -> float:
    weights = torch.randn(args.d, 16 * args.d)
    batches = reader.iterate(0, steps)
    waited, started = 0.0, time.perf_counter()
    for _ in range(steps):
        asked = time.perf_counter()
        (x,) = next(batches)
        waited += time.perf_counter() - asked
        x @ weights
    batches.close()
    return waited / (time.perf_counter() - started)


def timed(work: Callable[[], None]) -> float:
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


def say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


main()
