"""The receipt of an artifact, `provenance.json`: what says that its folder is whole, and what its files hold.

A receipt has the size and the crc32c of every file. Sizes are compared whenever a plan looks at an artifact, checksums
by every job that reads it. An artifact that is not what its receipt says counts as missing: its receipt is set aside
under another name, and the next run makes it again.
"""

import contextlib
import json
import os
import time
from collections.abc import Collection, Iterable
from pathlib import Path
from typing import Any

from saeflow.storage.checksums import crc32c, file_digest

RECEIPT = "provenance.json"
SET_ASIDE = "provenance.damaged.json"
_verified: dict[Path, tuple[int, ...]] = {}
"""State of each file at the time when this process found it to be what its receipt says."""


class DamagedError(ValueError):
    """A file that is not what was written; the message names it, its artifact and what to do."""

    def __init__(self, file: Path, problem: str, artifact: Path) -> None:
        self.file, self.problem, self.artifact = file, problem, artifact
        super().__init__(f"{file} is damaged ({problem}); run the workflow again, it makes {artifact} anew")

    def affected(self) -> list[Path]:
        """The artifacts that are to be made again."""
        return [self.artifact]

    def set_aside(self) -> list[Path]:
        """Makes them count as missing; returns those that did not."""
        return [folder for folder in self.affected() if set_aside(folder)]


def contents(folder: Path) -> dict[str, Any]:
    """The part of a receipt that says what the files of `folder` hold."""
    own = (folder / RECEIPT, folder / SET_ASIDE)
    files = {p.relative_to(folder).as_posix(): p for p in sorted(folder.rglob("*")) if p.is_file() and p not in own}
    return {
        "sizes": {name: file.stat().st_size for name, file in files.items()},
        "crc32c": {name: crc32c(file) for name, file in files.items()},
    }


def read_receipt(folder: Path) -> dict[str, Any] | None:
    """None where there is none, or where the file is no whole receipt."""
    try:
        receipt = json.loads((folder / RECEIPT).read_bytes())
    except (OSError, ValueError):
        return None
    return receipt if is_receipt(receipt) else None


def is_receipt(receipt: Any) -> bool:
    """Whether what was read as JSON is a whole receipt."""
    try:
        files = receipt["blake2s"] | receipt.get("sizes", {}) | receipt.get("crc32c", {})
        return isinstance(receipt["stage"], str) and isinstance(receipt["key"], str) and "config.yaml" in files
    except (KeyError, TypeError, AttributeError):
        return False


def problem(folder: Path, receipt: dict[str, Any] | None) -> tuple[Path, str] | None:
    """The first file that is missing or of another size, and what is wrong with it; None where all are as they should
    be. Reads none of them."""
    if receipt is None:
        file = folder / RECEIPT
        return file, "it is no whole receipt" if file.exists() else "there is no receipt"
    sizes: dict[str, int | None] = dict.fromkeys(receipt["blake2s"]) | receipt.get("sizes", {})
    for name, size in sizes.items():
        try:
            found = (folder / name).stat().st_size
        except OSError:
            return folder / name, "it is missing"
        if size is not None and found != size:
            return folder / name, f"{found:,} bytes instead of {size:,}"
    return None


def is_whole(folder: Path) -> bool:
    """Whether an artifact is there, as far as can be seen without reading its files."""
    return problem(folder, read_receipt(folder)) is None


def is_damaged(folder: Path) -> bool:
    """Whether an artifact that is not whole once was: it has a receipt, if one that has been set aside. What was
    deleted with its folder has none."""
    return (folder / RECEIPT).exists() or (folder / SET_ASIDE).exists()


def verify(folder: Path, names: Collection[str] = ()) -> None:
    """Compares the files of an artifact with their checksums, or only those of some names. What this process has
    compared, and what has not changed since, is not read again. Raises `DamagedError`."""
    receipt = read_receipt(folder)
    if found := problem(folder, receipt):
        raise DamagedError(*found, folder)
    assert receipt is not None
    checksums = receipt.get("crc32c", {})
    for name in {**receipt["blake2s"], **checksums}:
        file = folder / name
        if names and name not in names and file.name not in names:
            continue
        stat = file.stat()
        state = (stat.st_ino, stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns)
        if _verified.get(file) == state:
            continue
        if name in checksums:
            as_written = crc32c(file) == checksums[name]
        else:  # artifacts of earlier versions have the BLAKE2s alone
            as_written = file_digest(file) == receipt["blake2s"][name]
        if not as_written:
            raise DamagedError(file, "its checksum is another", folder)
        _verified[file] = state


def set_aside(folder: Path) -> bool:
    """Makes an artifact count as missing; False where it did already."""
    try:
        (folder / RECEIPT).replace(folder / SET_ASIDE)
    except FileNotFoundError:
        return False
    return True


def bring_to_now(receipts: Iterable[str | Path]) -> None:
    """Takes receipts out of the future, where a clock that was ahead left them: Snakemake throws away what a job has
    made that is older than an input."""
    for receipt in receipts:
        with contextlib.suppress(OSError):
            if Path(receipt).stat().st_mtime > time.time():
                os.utime(receipt)
