"""Shuffled batches of activations in a bucket against the same from the local disk; part of benchmarks/cluster.py.

The server is moto's, a process on this machine behind loopback, so what is measured is this code and that server, and
no network. By hand: python benchmarks/_remote.py [--tokens 131072] [--d 512]
"""

import argparse
import json
import os
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))
from bucket import KEY_ID, SECRET, make_bucket, server
from stores import write_rows

from saeflow.activations import carrier, elsewhere
from saeflow.activations.reader import READ_AHEAD, BatchReader, InMemoryRows
from saeflow.activations.remote import RemoteRows
from saeflow.activations.store import ActivationStore, Column, open_column, write_column
from saeflow.activations.writer import ColumnRequest, ColumnWriter
from saeflow.config import ActivationsConfig
from saeflow.storage.remote import Remote

HOOK = "blocks.0.hook_mlp_out"
BATCH = 4096


def remote_over_local(folder: Path, n_tokens: int, d: int, repeats: int = 3) -> dict[str, float]:
    """Bytes a second of one epoch of shuffled batches from a bucket over the same from the disk, opening included.

    `remote_over_local`: what is read ahead holds the whole column; `remote_over_local_in_quarters`: it holds a quarter
    of it, so that every chunk is read four times. Medians; that the batches are the same is checked.
    """
    column = write(folder / "store", n_tokens, d)
    steps, n_bytes = n_tokens // BATCH, 4 * n_tokens * d
    with server(folder / "log") as url:
        names = {"AWS_ENDPOINT_URL": url, "AWS_ACCESS_KEY_ID": KEY_ID, "AWS_SECRET_ACCESS_KEY": SECRET}
        os.environ.update(names | {"AWS_REGION": "us-east-1"})
        make_bucket(url, "lab")
        root = Remote("s3://lab/results")
        started = time.perf_counter()
        carrier.push(root, column.folder)
        say(f"pushed {n_bytes / 1e6:.0f} MB in {time.perf_counter() - started:.1f} s")
        far = in_bucket(folder / "far" / "store", column, root)
        kinds = {"local": (column, READ_AHEAD), "far": (far, 2 * n_bytes), "quarters": (far, n_bytes // 2)}
        readers = {name: BatchReader([c], BATCH, 0, None, ahead) for name, (c, ahead) in kinds.items()}
        assert isinstance(readers["far"].columns[0], InMemoryRows)
        assert isinstance(readers["quarters"].columns[0], RemoteRows) and readers["quarters"].at_once == steps // 4
        for name in ("far", "quarters"):
            for one, other in zip(readers[name].iterate(0, steps), readers["local"].iterate(0, steps), strict=True):
                assert torch.equal(one[0], other[0]), f"a batch of {name} differs"
        say(f"{steps} batches from the bucket are those of the local store")
        rates: dict[str, list[float]] = {name: [] for name in kinds}
        for _ in range(repeats):
            for name, (one, ahead) in kinds.items():
                rates[name].append(n_bytes / seconds(one, ahead, steps))
    found = {name: statistics.median(several) for name, several in rates.items()}
    say(", ".join(f"{name} {rate / 1e9:.2f} GB/s" for name, rate in found.items()))
    ratios = {"remote_over_local": "far", "remote_over_local_in_quarters": "quarters"}
    return {name: round(found[kind] / found["local"], 3) for name, kind in ratios.items()}


def seconds(column: Column, read_ahead: int, steps: int) -> float:
    started = time.perf_counter()
    for _ in batches(column, read_ahead, steps):
        pass
    return time.perf_counter() - started


def batches(column: Column, read_ahead: int, steps: int) -> Iterator[tuple[torch.Tensor, ...]]:
    return BatchReader([column], BATCH, 0, None, read_ahead).iterate(0, steps)


def in_bucket(store: Path, column: Column, root: Remote) -> Column:
    """The column in a store of which nothing else is here."""
    shutil.copytree(column.folder, store / column.folder.name)
    elsewhere.point_to(store, f"{root.url}/activations/store/activations.zarr", column.hook_name, column.n_tokens)
    return open_column(store / column.folder.name)


def write(folder: Path, n_tokens: int, d: int) -> Column:
    """A store of random numbers, written by the writer that caching uses."""
    store, wanted = ActivationStore(folder, ActivationsConfig()), ColumnRequest(HOOK, (d,), n_tokens)
    generator = torch.Generator().manual_seed(0)
    rows = write_rows(folder.parent / "tokens", torch.zeros(n_tokens // 256, 256, dtype=torch.int32).numpy())
    with store.locked(), ThreadPoolExecutor(1) as thread:
        store.create(HOOK, wanted.size, {})
        writer = ColumnWriter(store, [wanted], "cpu", thread)
        for first in range(0, n_tokens, BATCH):
            writer.append(first, torch.randn(BATCH, d, generator=generator))
        writer.wait()
        store.commit({HOOK: n_tokens}, rows, {})
    column = Column(folder / "column", HOOK, n_tokens, wanted.size, "float32")
    column.folder.mkdir()
    write_column(column, writer.statistics[wanted])
    return column


def say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokens", type=int, default=131_072)
    parser.add_argument("--d", type=int, default=512)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="saeflow-bench-") as directory:
        print(json.dumps(remote_over_local(Path(directory), args.tokens, args.d)))
