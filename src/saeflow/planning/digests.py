"""Content hashes: what enters a key is what a file holds, never where it lies or when it was written."""

import hashlib
import json
import os
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, TypeVar

T = TypeVar("T")


def canonical(value: Any) -> str:
    """The one JSON text of a plain value: sorted keys, no spaces, no NaN."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False)


def short_hash(value: Any, digits: int = 8) -> str:
    """Hexadecimal digits of the BLAKE2s of a plain value's canonical JSON."""
    return text_hash(canonical(value), digits)


def text_hash(text: str, digits: int = 16) -> str:
    """Hexadecimal digits of the BLAKE2s of a text."""
    return hashlib.blake2s(text.encode(), digest_size=digits // 2).hexdigest()


def file_digest(path: str | Path) -> str:
    """BLAKE2s of a file's bytes, 32 hexadecimal digits."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, lambda: hashlib.blake2s(digest_size=16)).hexdigest()


class DigestCache:
    """File digests remembered by size, inode and both times of change, so that a large model is hashed once.

    A change of a single bit changes the times, even where a tool restores the time of modification: the inode's time of
    change cannot be set.
    """

    def __init__(self, path: str | Path | None) -> None:
        self.path = Path(path) if path else None
        self.known: dict[str, list] = {}
        self.found: dict[Any, Any] = {}
        self.changed = False
        if self.path and self.path.is_file():
            try:
                self.known = json.loads(self.path.read_text())
            except json.JSONDecodeError:
                self.known = {}  # a torn cache only costs hashing again

    def file(self, path: str | Path) -> str:
        path = os.path.realpath(path)
        stat = os.stat(path)
        state = [stat.st_size, stat.st_ino, stat.st_mtime_ns, stat.st_ctime_ns]
        entry = self.known.get(path)
        if entry is None or entry[0] != state:
            entry = [state, file_digest(path)]
            self.known[path] = entry
            self.changed = True
        return entry[1]

    def files(self, root: Path, paths: Iterable[Path]) -> str:
        """One digest of several files and their names below `root`, 32 hexadecimal digits."""
        return short_hash([[p.relative_to(root).as_posix(), self.file(p)] for p in sorted(paths)], 32)

    def once(self, name: Any, find: Callable[[], T]) -> T:
        """What `find` returns; asked once a name, since points of a sweep share models and corpora."""
        if name not in self.found:
            self.found[name] = find()
        found: T = self.found[name]
        return found

    def save(self) -> None:
        if self.path and self.changed:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            partial = self.path.with_suffix(".partial")
            partial.write_text(json.dumps(self.known))
            partial.replace(self.path)
            self.changed = False
