"""Content hashes: what enters a key is what a file holds, never where it lies or when it was written."""

import hashlib
import json
import logging
import os
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, TypeVar

from saeflow.storage.checksums import file_digest
from saeflow.storage.publish import publish_text, remove_leftovers

log = logging.getLogger("saeflow")
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


DIGESTS_FILE = ".snakemake/digests.json"


class DigestCache:
    """File digests remembered by size, inode and both times of change, so that a large model is hashed once.

    A change of a single bit changes the times, even where a tool restores the time of modification: the inode's time of
    change cannot be set.
    """

    def __init__(self, path: str | Path | None) -> None:
        self.path = Path(path) if path else None
        self.known: dict[str, list] = _read(self.path) if self.path and self.path.is_file() else {}
        self.found: dict[Any, Any] = {}
        self.states: dict[str, tuple[int, ...]] = {}
        """State of every file when it was last asked for."""
        self.changed = False

    def file(self, path: str | Path) -> str:
        path = os.path.realpath(path)
        stat = os.stat(path)
        state = [stat.st_size, stat.st_ino, stat.st_mtime_ns, stat.st_ctime_ns]
        self.states[path] = tuple(state)
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
            publish_text(self.path, json.dumps(self.known))
            remove_leftovers(self.path)
            self.changed = False


def _read(path: Path) -> dict[str, list]:
    """The entries of a cache's file: of each path its state, and the digest. A torn one only costs hashing again."""
    try:
        known = json.loads(path.read_bytes())
        if all(isinstance(state, list) and isinstance(digest, str) for state, digest in known.values()):
            return dict(known)
    except (OSError, ValueError, TypeError, AttributeError):
        pass
    log.warning("%s is not whole: hashing models and corpora again", path)
    return {}
