"""Kills caching with SIGKILL at many steps, each in a forked child, and runs it again: called by test_activations.

    python kill_caching.py FOLDER MODEL TOKENS GEOMETRY

FOLDER gets a store for every kill, completed by a second run, and `undisturbed`, made in one. Half of the kills hit an
extension: of those, the rows that were there before must be readable right after the kill.
"""

import json
import os
import signal
import sys
from pathlib import Path

import numpy as np
import torch
import zarr

from saeflow.activations.caching import cache
from saeflow.activations.reader import open_rows
from saeflow.activations.shards import ShardWriter
from saeflow.activations.store import ActivationStore, Column, TokenRows, save_tensors
from saeflow.activations.writer import ColumnRequest
from saeflow.config import ActivationsConfig, ModelConfig
from saeflow.models.loading import load_model

COLUMNS = [ColumnRequest("blocks.1.hook_mlp_out", (32,), 1056), ColumnRequest("blocks.0.attn.hook_z", (4, 8), 1056)]
SHORTER = [column._replace(n_tokens=672) for column in COLUMNS]  # ends in the middle of a chunk and a shard
STEPS = [
    (ActivationStore, "create", 2),
    (ShardWriter, "add", 1),
    (ShardWriter, "add", 8),
    (ShardWriter, "close", 1),
    (ShardWriter, "close", 6),
    (ActivationStore, "save_progress", 1),
    (ActivationStore, "save_progress", 6),
    (Path, "replace", 3),
    (TokenRows, "coordinates", 1),
    (zarr.Array, "resize", 2),
    (zarr.Array, "resize", 5),
]


def main(folder: Path, model_folder: Path, tokens: Path, geometry: dict) -> None:
    torch.set_num_threads(1)  # a fork would not survive a pool of threads
    model = load_model(model_folder, ModelConfig(name="tiny", path=str(model_folder)), "cpu")

    def run(name: str, columns: list[ColumnRequest] = COLUMNS) -> None:
        store = ActivationStore(folder / name, ActivationsConfig(**geometry))
        with store.locked():
            found = cache(store, columns, TokenRows(tokens), lambda: model)
            for column, statistics in found.items():
                save_tensors(folder / name / "statistics" / column.hook_name, statistics._asdict())

    def read_shorter(name: str) -> list[torch.Tensor]:
        columns = [Column(folder / name / "column", c.hook_name, c.n_tokens, c.size, "float32") for c in SHORTER]
        return [open_rows(column).take(np.arange(column.n_tokens)) for column in columns]

    def killed(name: str, owner: type, function: str, count: int, after: bool) -> None:
        child = os.fork()
        if child == 0:
            die_at(owner, function, count, after)
            run(name)
            os._exit(0)
        status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        assert status == -signal.SIGKILL, f"{owner.__name__}.{function} was not called {count} times"

    for i, step in enumerate(STEPS):
        for after in (False, True):
            for extending in (False, True):
                name = f"{i}-{after}-{extending}"
                if extending:
                    run(name, SHORTER)
                    before = read_shorter(name)
                killed(name, *step, after)
                if step == (ShardWriter, "add", 8):  # and once more, on the way
                    killed(name, ShardWriter, "close", 2, after)
                if extending:
                    assert all(map(torch.equal, before, read_shorter(name))), f"{name}: rows from before are lost"
                run(name)
    run("undisturbed")


def die_at(owner: type, function: str, count: int, after: bool) -> None:
    """From now on this process kills itself when `function` is called for the `count`-th time, before or after it."""
    real, calls = getattr(owner, function), []

    def wrapped(*args, **kwargs):
        calls.append(function)
        if len(calls) == count and not after:
            os.kill(os.getpid(), signal.SIGKILL)
        result = real(*args, **kwargs)
        if len(calls) == count:
            os.kill(os.getpid(), signal.SIGKILL)
        return result

    setattr(owner, function, wrapped)


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:4]), json.loads(sys.argv[4]))
