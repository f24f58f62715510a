"""Arrays of activations to a bucket and back, shard by shard: what of a column lies outside of its folder.

A shard is put when its chunks have been compared with their checksums, and again only where the bucket has fewer rows
or other bytes. Coordinates and metadata there are those of the longest column that was put.
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from saeflow.activations.elsewhere import point_to
from saeflow.activations.remote import NOT_THERE, RemoteRows, RemoteShardError
from saeflow.activations.shards import COORDINATES, ROWS, Layout, Shard, ShardError, shard_path, shards_are_there
from saeflow.activations.store import Column, StoreError, array_layout, layout_of, open_column
from saeflow.jobs.progress import progress
from saeflow.planning.removal import remove_path
from saeflow.storage.locks import locked
from saeflow.storage.publish import beside, publish, publish_text
from saeflow.storage.receipts import RECEIPT
from saeflow.storage.remote import Remote, RemoteError, Stat
from saeflow.storage.transfer import each, get, put

GROUP = "activations.zarr"


def push(root: Remote, folder: Path) -> int:
    """Puts the shards of a column, and what describes them; returns the bytes that were not there yet. What was
    dropped here has been put already."""
    if not shards_are_there(folder):
        return 0
    column, there = open_column(folder), _group(root, folder.parent)
    layout = array_layout(column)
    if layout is None:
        raise StoreError(f"{column.array} is not laid out as saeflow writes it: it cannot be pushed")

    known = dict(there.names(column.hook_name))

    def put_shard(number: int) -> int:
        path = _shard(column, number)
        file, n_rows = column.array / path, layout.rows_of(number, column.n_tokens)
        shard, place = Shard(file, layout, n_rows), f"{column.hook_name}/{path}"
        shard.check_all()
        n_bytes = file.stat().st_size
        if known.get(place, 0) > n_bytes:
            return 0  # a longer column's, which begins with the same rows
        return n_bytes if put(there, file, place, maybe_there=place in known) else 0

    sent = sum(each(range(layout.n_shards(column.n_tokens)), put_shard, _shown("pushing", column, layout)))
    _put_longer(there, column.array.parent, column.hook_name)
    if _put_longer(there, column.array.parent, ""):
        files = [p for name in COORDINATES for p in (column.array.parent / name).rglob("*") if p.is_file()]
        known = {name: n for one in COORDINATES for name, n in there.names(one)}

        def put_file(file: Path) -> None:
            path = file.relative_to(column.array.parent).as_posix()
            put(there, file, path, maybe_there=path in known)

        each(files, put_file)
    about = there.get("zarr.json")
    for name in there.folders():
        if longer := _lengthened(there.get(f"{name}/zarr.json"), _length(about)):
            there.upload(longer, f"{name}/zarr.json")
    return sent


def drop(root: Remote, store: Path) -> Iterator[str]:
    """Removes the arrays of a store whose columns are all in the bucket, which are read there from then on; yields the
    name of each, or why it was kept."""
    there = _group(root, store)
    columns = [open_column(file.parent) for file in sorted(store.glob("*/column.json"))]
    with locked(store / ".lock", str(store)):
        for hook in sorted({column.hook_name for column in columns if shards_are_there(column.folder)}):
            of_hook = [column for column in columns if column.hook_name == hook]
            missing = [c for c in of_hook if root.stat(f"activations/{store.name}/{c.folder.name}/{RECEIPT}") is None]
            sizes = dict(there.names(hook))
            array = of_hook[0].array
            found = [path for path in array.rglob("*") if path.is_file() and path.suffix != ROWS]
            files = {path.relative_to(array).as_posix(): path.stat().st_size for path in found}
            short = [name for name, n_bytes in files.items() if sizes.get(f"{hook}/{name}", 0) < n_bytes]
            if missing or short:
                yield f"kept {array}, since {(missing[0].folder if missing else array / short[0])} is not in the bucket"
                continue
            point_to(store, there.url, hook, max(column.n_tokens for column in of_hook))
            remove_path(array)
            yield f"dropped {array}"


def pull(root: Remote, folder: Path, arrays: bool) -> int:
    """Notes that the array of a column is to be read in the bucket, or brings it (`arrays`); returns the bytes that
    came. Its folder may come afterwards. Raises `RemoteError` where the array is not there or damaged."""
    store, there = folder.parent, _group(root, folder.parent)
    column = _column(root, folder)
    about = there.get(f"{column.hook_name}/zarr.json")
    if about is None:
        raise RemoteError(f"{there.name(column.hook_name)} is not there; {NOT_THERE}")
    with locked(store / ".lock", str(store)):
        came = _pull_group(there, store / GROUP)
        if not arrays:
            point_to(store, there.url, column.hook_name, column.n_tokens)
            return came
        layout = layout_of(json.loads(about), column)
        if layout is None:
            raise StoreError(f"{there.name(column.hook_name)} is not laid out as saeflow writes it")
        bring = lambda number: _pull_shard(there, column, layout, number)  # noqa: E731
        came += sum(each(range(layout.n_shards(column.n_tokens)), bring, _shown("pulling", column, layout)))
        if _length(_read(column.array / "zarr.json")) < _length(about):
            publish_text(column.array / "zarr.json", about.decode())
        _lengthen_all(store / GROUP)
        return came


def damaged(root: Remote, folder: Path) -> Iterator[tuple[str, str]]:
    """Reads all shards of a column there; yields the name below the store of each that is damaged, and why."""
    there, column = _group(root, folder.parent), _column(root, folder)
    try:
        rows = RemoteRows(column, f"{there.url}/{column.hook_name}")
    except RemoteShardError as error:
        yield f"{GROUP}/{column.hook_name}/{error.path}", str(error)
        return
    for number in range(rows.layout.n_shards(column.n_tokens)):
        try:
            n_chunks = rows.layout.chunks_of(rows.layout.rows_of(number, column.n_tokens))
            for run in rows.runs(number * rows.layout.chunks + np.arange(n_chunks)):
                rows.chunks(run)
        except RemoteShardError as error:
            yield f"{GROUP}/{column.hook_name}/{error.path}", str(error)


# -------------------------------------------------------------------- shards
def _pull_shard(there: Remote, column: Column, layout: Layout, number: int) -> int:
    path, n_rows = _shard(column, number), layout.rows_of(number, column.n_tokens)
    file = column.array / path
    if layout.holds(file, n_rows):
        return 0
    found = there.stat(f"{column.hook_name}/{path}")
    if found is None:
        raise RemoteError(f"{there.name(f'{column.hook_name}/{path}')} is missing: push it again from where it is")
    partial = beside(file)
    try:
        get(there, f"{column.hook_name}/{path}", partial, found)
        shard = Shard(partial, layout, n_rows)
        shard.check_all()
        shard.write_row_checksums(file)
        publish(partial, file)
    except ShardError as error:
        raise RemoteError(f"{there.name(f'{column.hook_name}/{path}')} is damaged ({error.problem})") from None
    finally:
        partial.unlink(missing_ok=True)
    return found.n_bytes


def _shown(what: str, column: Column, layout: Layout) -> Any:
    """What says how far a loop over all shards is."""
    return lambda done: progress(done, f"{what} {column.hook_name}", layout.n_shards(column.n_tokens), "shards")


def _shard(column: Column, number: int) -> str:
    return shard_path(Path(), number, len(column.size) + 1).as_posix()


# -------------------------------------------------------------------- metadata and coordinates
def _group(root: Remote, store: Path) -> Remote:
    return root.below(f"activations/{store.name}/{GROUP}")


def _column(root: Remote, folder: Path) -> Column:
    """As its file in the bucket says."""
    path = f"activations/{folder.parent.name}/{folder.name}/column.json"
    try:
        about = json.loads(root.get(path) or b"")
        return Column(folder, about["hook_name"], int(about["n_tokens"]), tuple(about["size"]), about["dtype"])
    except (ValueError, KeyError, TypeError):
        raise RemoteError(f"{root.name(path)} is missing or damaged: push the column again from where it is") from None


def _pull_group(there: Remote, group: Path) -> int:
    """Brings coordinates, and what describes the group, unless those here are as long."""
    about = there.get("zarr.json")
    if about is None or _length(_read(group / "zarr.json")) >= _length(about):
        return 0
    names = [(name, n) for one in COORDINATES for name, n in there.names(one)]

    def bring(item: tuple[str, int]) -> int:
        name, n_bytes = item
        partial = beside(group / name)
        get(there, name, partial, there.stat(name) or Stat(n_bytes, None))
        publish(partial, group / name)
        return n_bytes

    came = sum(each(names, bring))
    publish_text(group / "zarr.json", about.decode())
    _lengthen_all(group)
    return came


def _lengthen_all(group: Path) -> None:
    """All arrays have the length of the longest, without which xarray opens none."""
    for file in group.glob("*/zarr.json"):
        if longer := _lengthened(file.read_bytes(), _length(_read(group / "zarr.json"))):
            publish_text(file, longer.decode())


def _lengthened(about: bytes | None, n_tokens: int) -> bytes | None:
    """What describes an array of at least so many tokens; None where it does already, or there is none."""
    try:
        metadata = json.loads(about or b"")
        if metadata["shape"][0] >= n_tokens:
            return None
        metadata["shape"][0] = n_tokens
    except (ValueError, KeyError, TypeError, IndexError):
        return None
    return json.dumps(metadata, indent=2).encode()


def _put_longer(there: Remote, group: Path, array: str) -> bool:
    """Puts what describes an array, or the group, unless what is there describes more tokens; returns whether ours is
    at least as long."""
    path = "/".join(filter(None, [array, "zarr.json"]))
    ours, theirs = _length(_read(group / path)), _length(there.get(path))
    if ours >= theirs:
        put(there, group / path, path)
    return ours >= theirs


def _read(file: Path) -> bytes | None:
    return file.read_bytes() if file.is_file() else None


def _length(about: bytes | None) -> int:
    """Tokens that metadata speak of; -1 where there are none."""
    try:
        attributes: dict[str, Any] = json.loads(about or b"")["attributes"]
        return int(attributes.get("n_tokens", 0))
    except (ValueError, KeyError, TypeError):
        return -1
