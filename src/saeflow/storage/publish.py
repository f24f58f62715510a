"""Files and folders that appear whole or not at all, also where the process is killed or the power fails.

All that is published is written beside its place, flushed to the disk (fsync), moved into place by a rename, and the
folder that holds the name is flushed after it. Without the first flush a file system may keep the name and lose the
bytes: what a power cut then leaves is an empty file that looks finished.
"""

import contextlib
import ctypes
import errno
import os
import shutil
import socket
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from saeflow.storage.modes import share

ABANDONED_AFTER = 24 * 3600  # seconds without a change, of what a process of another host was writing


def beside(path: Path) -> Path:
    """Where this process writes what is to be `path`: no other process has the same place."""
    return path.with_name(f"{path.name}.{socket.gethostname()}-{os.getpid()}.partial")


def publish(partial: Path, path: Path, unless: Callable[[Path], bool] = lambda path: False) -> None:
    """Moves a file or folder, written beside its place, into it. A folder that is there is replaced, `unless` it
    says that it may stay; what was written is then removed."""
    share(partial)
    flush(partial)
    try:
        partial.replace(path)
    except OSError as error:
        if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
            raise
        # A folder is there. To look for it first would not do: a network disk may not show it yet.
        if unless(path):
            return shutil.rmtree(partial)
        old = beside(path.with_name(path.name + ".old"))
        shutil.rmtree(old, ignore_errors=True)
        path.rename(old)
        partial.rename(path)
        shutil.rmtree(old)
    _flush_one(path.parent)


@contextlib.contextmanager
def writing(path: Path) -> Iterator[Path]:
    """Gives the place beside `path` to write a file to, which is published at the end; on an error it is removed."""
    partial = beside(path)
    make_folder(path.parent)
    try:
        yield partial
        publish(partial, path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise


def publish_text(path: Path, text: str) -> None:
    with writing(path) as partial:
        partial.write_text(text, encoding="utf-8")


def make_folder(path: Path) -> None:
    """Makes a folder and those above it so that their names outlive a power cut."""
    missing = [path, *path.parents]
    missing = missing[: next(i for i, folder in enumerate(missing) if folder.is_dir())]
    path.mkdir(parents=True, exist_ok=True)
    for folder in missing:
        _flush_one(folder.parent)


def flush(path: Path) -> None:
    """Flushes a file, or a folder with all that is in it, to the disk."""
    if path.is_dir():
        for entry in path.iterdir():
            flush(entry)
    _flush_one(path)


def begin_flush(descriptor: int) -> None:
    """Lets the disk begin with what was written to an open file, so that `flush` has less to wait for. It is only an
    early start: on systems other than Linux nothing happens, and what goes wrong `flush` will say."""
    if write := getattr(ctypes.CDLL(None), "sync_file_range", None):
        begin, whole_file = 2, ctypes.c_int64(0)  # SYNC_FILE_RANGE_WRITE of fcntl.h
        write(descriptor, whole_file, whole_file, begin)


def _flush_one(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:  # some file systems flush no folders: names are as safe there as they can be
        if not (path.is_dir() and error.errno in (errno.EINVAL, errno.ENOTSUP, errno.EBADF)):
            raise
    finally:
        os.close(descriptor)


def remove_leftovers(path: Path, *, locked: bool = False) -> None:
    """Removes what processes that were killed had begun to write as `path`: all of it where the caller holds a lock
    on `path`, else what is of dead processes of this host, or a day old."""
    for partial in path.parent.glob(f"{escaped(path.name)}.*partial"):
        if locked or abandoned(partial):
            shutil.rmtree(partial) if partial.is_dir() else partial.unlink(missing_ok=True)


def abandoned(partial: Path, changed: float | None = None) -> bool:
    """Whether nobody is writing any longer what `beside` named: its process has died on this host, or it was last
    `changed` (seconds since the epoch; by default, what the file or folder itself says) a day ago on another."""
    head, _, pid = partial.name.removesuffix(".partial").rpartition("-")
    if head.endswith(f".{socket.gethostname()}") and pid.isdecimal():
        return not Path(f"/proc/{pid}").exists() if Path("/proc/self").exists() else False
    with contextlib.suppress(FileNotFoundError):
        return time.time() - (partial.stat().st_mtime if changed is None else changed) > ABANDONED_AFTER
    return False


def escaped(name: str) -> str:
    return "".join(f"[{c}]" if c in "*?[" else c for c in name)
