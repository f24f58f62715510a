"""Caching: one forward pass of a model fills every column that is missing from an activation store.

    rows of tokens -> model, up to the last block that a hook needs -> one chunk in memory a hook -> shards on disk
                                                                       and mean, covariance, mean norm

What is on disk is a function of the model, the tokens and the hook alone. Rows go through the model in blocks of
`batch_rows` counted from row 0, and the last block is filled up with rows that are thrown away, so that a row's values
do not depend on where a column ends; the rest of the argument is in `saeflow.activations.writer`.

A store grows in place: another hook is another array, more rows are more shards. The one file that an extension
replaces is a last shard that was not full, by one that begins with the same rows, moved into place whole; columns that
were complete before stay valid.
"""

import errno
import math
import shutil
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from saeflow.activations.ahead import Ahead
from saeflow.activations.moments import Statistics
from saeflow.activations.store import ActivationStore, Column, StoreError, TokenRows, write_column
from saeflow.activations.writer import ActivationError, ColumnRequest, ColumnWriter, HookWriter
from saeflow.config import ActivationsConfig
from saeflow.jobs.job import Job
from saeflow.jobs.progress import progress
from saeflow.models.attention import fused_attention
from saeflow.models.folder import hook_layer
from saeflow.models.opening import open_model
from saeflow.models.protocol import LanguageModel, hooked
from saeflow.models.source import settings_of
from saeflow.models.splicing import run_until
from saeflow.storage.receipts import RECEIPT


class DiskFullError(OSError):
    """The disk cannot hold what is to be cached; the message says what is needed and what is free."""


def cache_jobs(jobs: list[Job]) -> str:
    """Fills columns of one store and writes their receipts: the work of `scripts/activations.py`."""
    store, columns, load = opened(jobs)
    config, device = jobs[0].config, jobs[0].device
    start = time.perf_counter()

    with store.locked():
        rows = longest_rows(job.input("tokens") for job in jobs)
        attributes = {"model": config["model"]["weights"], "processing": processing_of(config)}
        attributes["context_size"] = config["tokens"]["context_size"]
        again = {column.hook_name for job, column in zip(jobs, columns, strict=True) if (job.path / RECEIPT).exists()}
        for hook in again:  # it was finished, and yet asked for
            store.forget(hook, max(column.n_tokens for column in columns if column.hook_name == hook))
        statistics = cache(store, columns, rows, load, device, attributes)
        for job, column in zip(jobs, columns, strict=True):
            with job.writing() as folder:
                receipt = Column(folder, column.hook_name, column.n_tokens, column.size, store.config.dtype)
                write_column(receipt, statistics[column])
    tokens = max(column.n_tokens for column in columns)
    return f"{len(jobs)} columns, {tokens:,} tokens, in {store.folder}: {time.perf_counter() - start:.1f} s"


def opened(jobs: list[Job]) -> tuple[ActivationStore, list[ColumnRequest], Callable[[], LanguageModel]]:
    """The store of the jobs, the column that each is to make, and what opens the model. Raises `StoreError` for columns
    of several stores."""
    folders = sorted({job.path.parent for job in jobs})
    if len(folders) > 1:
        raise StoreError(f"columns of several stores in one job: {', '.join(map(str, folders))}")
    config, context_size = jobs[0].config, jobs[0].config["tokens"]["context_size"]
    asked = (job.config for job in jobs)
    columns = [ColumnRequest(c["hook_name"], tuple(c["size"]), c["n_rows"] * context_size) for c in asked]

    n_layers = max(1, *(hook_layer(column.hook_name, sys.maxsize) for column in columns))
    load = partial(open_model, jobs[0], context_size, n_layers)
    return ActivationStore(folders[0], ActivationsConfig(**config["activations"])), columns, load


def processing_of(config: dict[str, Any]) -> dict[str, Any]:
    """How a model is processed when it is opened."""
    return settings_of(config["model"])


def cache(
    store: ActivationStore,
    columns: Iterable[ColumnRequest],
    rows: TokenRows,
    load: Callable[[], LanguageModel],
    device: str = "cpu",
    attributes: dict[str, Any] | None = None,
) -> dict[ColumnRequest, Statistics]:
    """Brings columns onto the disk and returns their statistics. The caller holds the store's lock.

    `load` opens the model, and is called only if there is a row to compute. `attributes` go into the store's metadata.

    Raises `StoreError` for tokens other than those that the store was made from, `DiskFullError` before or while
    writing, `ActivationError` for values that are not finite or do not fit the dtype.
    """
    columns = sorted(set(columns))
    n_tokens = {column.hook_name: column.n_tokens for column in columns}  # sorted: the longest of each hook
    stored = rows.n_rows * rows.context_size
    if max(n_tokens.values()) > stored:
        raise StoreError(
            f"{max(n_tokens.values())} tokens are to be cached, but {rows.folder} has {stored} ({rows.n_rows} rows of "
            f"{rows.context_size}); lower tokens.train_tokens or use a longer corpus"
        )
    store.check_tokens(rows)
    ahead = Ahead(store, rows)
    check_space(store, _needed_bytes(store, columns, ahead))
    attributes = {"units": "dimensionless, as the model computes them", **(attributes or {})}
    for column in columns:
        store.create(column.hook_name, column.size, attributes)

    writers: list[ColumnWriter] = []
    try:
        with ThreadPoolExecutor(1, thread_name_prefix="shards") as thread:
            for hook in n_tokens:
                of_hook = [column for column in columns if column.hook_name == hook]
                take = partial(ahead.take, hook, of_hook[0].size)
                writers.append(ColumnWriter(store, of_hook, device, thread, take))
            _fill(writers, rows, load, device)
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        for writer in writers:
            writer.discard()
        raise disk_full(store, _needed_bytes(store, columns, ahead), error) from error
    store.commit(n_tokens, rows, attributes)
    for writer in writers:
        ahead.tidy(writer.hook_name, writer.size, n_tokens[writer.hook_name])
    return {column: statistics for writer in writers for column, statistics in writer.statistics.items()}


def longest_rows(folders: Iterable[Path]) -> TokenRows:
    """The longest of some tokens folders. Raises `StoreError` unless each of the others is a beginning of it."""
    *others, longest = sorted((TokenRows(folder) for folder in set(folders)), key=lambda rows: rows.n_rows)
    for other in others:
        if other.context_size != longest.context_size:
            raise StoreError(f"{other.folder} and {longest.folder} have rows of different lengths; use two stores")
        both = zip(longest.coordinates(0, other.n_rows), other.coordinates(0, other.n_rows), strict=True)
        for (where, ours), (_, its) in both:
            if any((ours[name] != its[name]).any() for name in ours):
                raise StoreError(
                    f"{other.folder} is not a beginning of {longest.folder}: they differ between tokens {where.start} "
                    f"and {where.stop}. Columns of one store hold the same rows; remove both folders and run again"
                )
    return longest


# -------------------------------------------------------------------- the forward pass
def _fill(writers: list[ColumnWriter], rows: TokenRows, load: Callable[[], LanguageModel], device: str) -> None:
    """Runs every block of rows of which some writer needs a row, up to the last layer that is needed there."""
    if not all(writer.done for writer in writers):
        model, batch_rows = load(), writers[0].store.config.batch_rows
        block_tokens = batch_rows * rows.context_size
        last = max(writer.last for writer in writers)
        with fused_attention(model):
            begin = min(writer.position for writer in writers if not writer.done) // block_tokens
            blocks = range(begin, math.ceil(last / block_tokens))
            for block in progress(blocks, "caching", last, "tokens", each=block_tokens, start=begin * block_tokens):
                run_block(model, writers, rows, block, device)
    for writer in writers:
        writer.wait()


@torch.inference_mode()
def run_block(model: LanguageModel, writers: Sequence[HookWriter], rows: TokenRows, block: int, device: str) -> None:
    """Gives the writers what they need of a block of rows: each as soon as its hook fires, while the values are still
    in the processor's cache and before memory for those of the next hook is taken. No block of the model above the last
    hook runs, and no logits are made.

    Raises `ActivationError` for a hook that does not fire in this model.
    """
    batch_rows = writers[0].store.config.batch_rows
    first, stop = block * batch_rows * rows.context_size, (block + 1) * batch_rows * rows.context_size
    waiting = {writer.hook_name: writer for writer in writers if not writer.done and writer.position < stop}
    if not waiting:
        return
    hooks = list(waiting)

    def give(value: Tensor, hook: Any) -> None:
        writer = waiting.pop(hook.name, None)
        if writer:  # ln1's fires for queries, keys and values, with the same value
            writer.append(first, value.flatten(0, 1))

    tokens = _block(rows, block * batch_rows, batch_rows).to(device)
    with hooked(model, [(name, give) for name in hooks]):
        run_until(model, tokens, hooks)
    if waiting:
        raise ActivationError(f"{min(waiting)} did not fire in the model's forward pass; use another site")


def _block(rows: TokenRows, first: int, batch_rows: int) -> Tensor:
    """A whole block of rows, (batch_rows, context_size) int64; beyond the last row, token 0."""
    block = torch.zeros(batch_rows, rows.context_size, dtype=torch.int64)
    ids = rows.tokens(first, min(first + batch_rows, rows.n_rows))
    block[: len(ids)] = torch.from_numpy(ids)
    return block


# -------------------------------------------------------------------- space
def check_space(store: ActivationStore, needed: int) -> None:
    """Raises `DiskFullError` where the disk has not so many bytes left."""
    if needed > shutil.disk_usage(store.folder).free:
        raise disk_full(store, needed)


def disk_full(store: ActivationStore, needed: int, error: OSError | None = None) -> DiskFullError:
    """`error`: with which the disk refused what was written; `needed`: bytes that are still to be."""
    free = shutil.disk_usage(store.folder).free
    what = "became full while caching" if error else "cannot hold the activations"
    said = (
        f"the disk of {store.folder} {what}: {needed / 1e9:.3g} GB are still needed and {free / 1e9:.3g} GB are free. "
        "Make room, or use activations.dtype=bfloat16, fewer hooks or fewer tokens.train_tokens; then run again: whole "
        "shards are kept, and caching continues after them"
    )
    return DiskFullError(error.errno if error else errno.ENOSPC, said)


def _needed_bytes(store: ActivationStore, columns: list[ColumnRequest], ahead: Ahead) -> int:
    """Bytes that are still to be written: shards that are not on disk, coordinates, statistics and progress."""
    needed = 0
    longest = {column.hook_name: column for column in columns}
    for column in longest.values():
        layout = store.layout(column.size)
        for number, n in layout.shards(column.n_tokens):
            there = layout.holds(store.shard(column.hook_name, column.size, number), n)
            if not there and not ahead.find(column.hook_name, column.size, number, n):
                needed += layout.shard_bytes(n)
    new = max(0, max(c.n_tokens for c in columns) - store.n_coordinates())
    sizes = [math.prod(c.size) for c in (*columns, *longest.values())]
    return needed + 12 * new + sum(8 * (d * d + d + 1) for d in sizes)
