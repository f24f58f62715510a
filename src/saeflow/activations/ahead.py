"""Shards that were computed ahead of the job that makes the columns, by jobs that share its work.

    <store>/parts/<hook>/<number>-<tokens>-<crc>.shard    a shard that holds so many tokens, of which this is the crc32c

A file appears whole, and is called by what it holds, so nothing else has to be known of it: who needs the shard, looks
whether every chunk is what was written, and moves the file into the array. Shards are of the store, never of one number
of parts, so what an earlier run had begun in other parts is as good.
"""

import logging
import shutil
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import google_crc32c

from saeflow.activations.shards import Layout, LayoutError, Shard, ShardError, shard_path
from saeflow.storage.publish import publish

if TYPE_CHECKING:
    from saeflow.activations.store import ActivationStore, TokenRows

log = logging.getLogger("saeflow")
FOLDER = "parts"


class ShardAhead(NamedTuple):
    """A shard that lies ready."""

    path: Path
    n_tokens: int
    crc: str


def lying_ready(store: Path, hook_name: str, layout: Layout) -> dict[int, list[ShardAhead]]:
    """The files of each shard of a hook, by its number; several where it was computed for columns of different lengths.
    One that was cut short is none."""
    found: dict[int, list[ShardAhead]] = {}
    for path in sorted((store / FOLDER / hook_name).glob("*.shard")):
        number, n_tokens, crc = path.stem.split("-")
        if layout.holds(path, int(n_tokens)):
            found.setdefault(int(number), []).append(ShardAhead(path, int(n_tokens), crc))
    return found


def n_stored(store: Path, hook_name: str) -> int:
    """Tokens of a hook that are on record to be in its array; 0 where nothing can be read of that."""
    from safetensors import SafetensorError, safe_open

    with suppress(OSError, SafetensorError), safe_open(store / "progress" / f"{hook_name}.safetensors", "np") as file:
        return int(file.get_tensor("stored"))
    return 0


def missing(store: Path, hook_name: str, n_dims: int, layout: Layout, n_tokens: int) -> list[int]:
    """Numbers of those shards of a column that neither lie ready nor are in the array, as far as can be seen without
    reading them; of which tokens they are is not asked."""
    ready, stored = lying_ready(store, hook_name, layout), n_stored(store, hook_name)
    array = store / "activations.zarr" / hook_name
    return [
        number
        for number, needed in layout.shards(n_tokens)
        if not any(found.n_tokens >= needed for found in ready.get(number, ()))
        and not is_stored(array, n_dims, layout, stored, number, needed)
    ]


def is_stored(array: Path, n_dims: int, layout: Layout, stored: int, number: int, n_tokens: int) -> bool:
    """Whether the array of a hook, of which `stored` tokens are on record, has the first `n_tokens` of a shard."""
    on_record = stored - number * layout.shard_tokens >= n_tokens
    return on_record and layout.holds(shard_path(array, number, n_dims), n_tokens)


class Ahead:
    """What lies ready for a store, of the tokens `rows`."""

    def __init__(self, store: "ActivationStore", rows: "TokenRows") -> None:
        self.store, self.rows = store, rows
        self._crcs: dict[tuple[int, int], str] = {}

    def path(self, hook_name: str, number: int, n_tokens: int) -> Path:
        """Where a shard with so many tokens is to lie."""
        folder = self.store.folder / FOLDER / hook_name
        return folder / f"{number}-{n_tokens}-{self._crc(number, n_tokens)}.shard"

    def find(self, hook_name: str, size: tuple[int, ...], number: int, n_tokens: int) -> ShardAhead | None:
        """A shard that holds so many tokens or more, of these rows."""
        if not (self.store.folder / FOLDER / hook_name).is_dir():
            return None  # as where nobody shares the work: no row of tokens is read for it
        exact = self.path(hook_name, number, n_tokens)
        if self.store.layout(size).holds(exact, n_tokens):
            return ShardAhead(exact, n_tokens, self._crc(number, n_tokens))
        for found in lying_ready(self.store.folder, hook_name, self.store.layout(size)).get(number, ()):
            if found.n_tokens >= n_tokens and found.crc == self._crc(number, found.n_tokens):
                return found
        return None

    def is_there(self, hook_name: str, size: tuple[int, ...], number: int, n_tokens: int) -> bool:
        """Whether a shard lies ready, or is in the array."""
        array, stored = self.store.zarr / hook_name, n_stored(self.store.folder, hook_name)
        if is_stored(array, 1 + len(size), self.store.layout(size), stored, number, n_tokens):
            return True
        return self.find(hook_name, size, number, n_tokens) is not None

    def take(self, hook_name: str, size: tuple[int, ...], number: int, n_tokens: int) -> int:
        """Moves a shard into the array and returns how many tokens it holds; 0 where none lies ready that is whole."""
        found = self.find(hook_name, size, number, n_tokens)
        if found is None:
            return 0
        layout = self.store.layout(size)
        try:
            shard = Shard(found.path, layout, found.n_tokens)
            shard.check_all()
        except (ShardError, LayoutError) as error:
            log.warning("%s: computing it again", error)
            found.path.unlink()
            return 0
        target = self.store.shard(hook_name, size, number)
        shard.write_row_checksums(target)
        publish(found.path, target)
        return found.n_tokens

    def tidy(self, hook_name: str, size: tuple[int, ...], n_tokens: int) -> None:
        """Removes what holds none but the first `n_tokens` tokens of a hook, which are in the array by now."""
        folder, layout = self.store.folder / FOLDER / hook_name, self.store.layout(size)
        for number, ready in lying_ready(self.store.folder, hook_name, layout).items():
            for found in ready:
                if number * layout.shard_tokens + found.n_tokens <= n_tokens:
                    found.path.unlink(missing_ok=True)
        for empty in (folder, folder.parent):
            with suppress(OSError):
                empty.rmdir()

    def _crc(self, number: int, n_tokens: int) -> str:
        """crc32c of the ids of all rows of which a shard with `n_tokens` tokens has a part."""
        if (number, n_tokens) not in self._crcs:
            start, size = number * self.store.config.shard_tokens, self.rows.context_size
            last = -(-(start + n_tokens) // size)
            ids = self.rows.tokens(start // size, last) if last <= self.rows.n_rows else None
            crc = f"{google_crc32c.value(ids.tobytes()):08x}" if ids is not None else ""
            self._crcs[number, n_tokens] = crc
        return self._crcs[number, n_tokens]


def free(store: Path, hook_name: str) -> None:
    """Removes all that lies ready of a hook."""
    shutil.rmtree(store / FOLDER / hook_name, ignore_errors=True)
