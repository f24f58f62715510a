"""A part of caching: every N-th shard of a store, computed ahead of the job that makes the columns.

Rows go through the model in the same blocks as there, counted from row 0, and into chunks and shards by the same steps,
so a shard has the same bytes whoever computes it. Statistics are the joining job's, which reads every shard anyway: so
their sums are in one order, and every byte that a part wrote is compared with its checksum before a column exists.

Each shard is computed under a lock of its own: parts of one store work side by side, and what two runs want of it, one
computes.
"""

import errno
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from functools import cache
from pathlib import Path

from saeflow.activations.ahead import Ahead
from saeflow.activations.caching import check_space, disk_full, longest_rows, opened, run_block
from saeflow.activations.store import ActivationStore, TokenRows
from saeflow.activations.writer import AheadWriter, ColumnRequest
from saeflow.jobs.job import Job
from saeflow.jobs.progress import progress
from saeflow.models.attention import fused_attention
from saeflow.models.protocol import LanguageModel
from saeflow.planning.parts import Part
from saeflow.storage.locks import locked
from saeflow.storage.publish import make_folder, remove_leftovers


def cache_part(jobs: list[Job], part: Part) -> str:
    """Computes the shards of a part of the columns that the jobs are to make. Raises what `cache_jobs` does."""
    store, columns, load = opened(jobs)
    rows = longest_rows(job.input("tokens") for job in jobs)
    computed = compute_ahead(store, columns, rows, load, part, jobs[0].device)
    return f"{computed} shards computed ahead in {store.folder}"


def compute_ahead(
    store: ActivationStore,
    columns: list[ColumnRequest],
    rows: TokenRows,
    load: Callable,
    part: Part,
    device: str = "cpu",
) -> int:
    """Brings every shard of a part of the columns onto the disk that is not there yet; returns how many that were.

    `load` opens the model, and is called only if there is a row to compute.
    """
    ahead, open_model = Ahead(store, rows), cache(load)
    longest = {column.hook_name: column for column in sorted(columns)}  # sorted: the longest of each hook
    most = max(column.n_tokens for column in columns)
    layouts = {column: store.layout(column.size) for column in longest.values()}
    shards = next(iter(layouts.values())).shards(most)
    numbers = [(number, n) for number, n in shards if part.has(number)]

    def missing(number: int) -> list[tuple[ColumnRequest, Path]]:
        """Of a shard, the hooks that lack it, and where it is to lie."""
        found = []
        for column in longest.values():
            n = layouts[column].rows_of(number, column.n_tokens)
            if n > 0 and not ahead.is_there(column.hook_name, column.size, number, n):
                found.append((column, ahead.path(column.hook_name, number, n)))
        return found

    def needed() -> int:
        wanted = (column for number, _ in numbers for column, _ in missing(number))
        return sum(layouts[column].shard_bytes(store.config.shard_tokens) for column in wanted)

    make_folder(store.folder)
    check_space(store, needed())
    computed = 0
    with progress(None, f"caching part {part}", sum(n for _, n in numbers), "tokens") as bar:
        for number, n in numbers:
            with locked(lock_of(store, number), f"shard {number} of {store.folder}"):
                if wanted := missing(number):
                    try:
                        _compute(store, wanted, number, rows, open_model(), device)
                    except OSError as error:
                        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
                            raise
                        raise disk_full(store, needed(), error) from error
                computed += len(wanted)
            bar.update(n)
    return computed


def lock_of(store: ActivationStore, number: int) -> Path:
    """In the store's folder, where who removes from it looks for locks."""
    return store.folder / f".shard-{number}.lock"


def _compute(
    store: ActivationStore,
    wanted: list[tuple[ColumnRequest, Path]],
    number: int,
    rows: TokenRows,
    model: LanguageModel,
    device: str,
) -> None:
    """One shard of several hooks, in one pass over its blocks of rows."""
    with ExitStack() as undo, ThreadPoolExecutor(1, thread_name_prefix="shards") as thread:
        writers = []
        for column, path in wanted:
            remove_leftovers(path, locked=True)
            writers.append(AheadWriter(store, column, number, path, device, thread))
            undo.callback(writers[-1].discard)
        block_tokens = store.config.batch_rows * rows.context_size
        first, last = number * store.config.shard_tokens, max(writer.last for writer in writers)
        with fused_attention(model):
            for block in range(first // block_tokens, -(-last // block_tokens)):
                run_block(model, writers, rows, block, device)
        for writer in writers:
            writer.wait()
