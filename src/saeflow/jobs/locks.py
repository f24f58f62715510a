"""One process at a time makes an artifact: two runs that share some wait for each other instead of making it twice."""

import contextlib
import fcntl
import logging
import os
import platform
from collections.abc import Iterable, Iterator
from pathlib import Path

log = logging.getLogger("saeflow")


@contextlib.contextmanager
def held(folders: Iterable[Path]) -> Iterator[None]:
    """Holds the locks of some artifacts, named by their folders, and waits for those that others hold.

    A lock is a file beside the folder that says who has it; it ends with its process, however that ends. All are taken
    in one order, so that no two jobs wait for each other. Where a file system has no locks, the log says so.
    """
    with contextlib.ExitStack() as stack:
        for folder in sorted(set(folders)):
            stack.enter_context(_one(folder.with_name(folder.name + ".lock")))
        yield


@contextlib.contextmanager
def _one(path: Path) -> Iterator[None]:
    path.parent.mkdir(parents=True, exist_ok=True)
    while True:
        file = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            log.info("waiting for %s, which has %s", os.read(file, 200).decode(errors="replace") or "another", path)
            fcntl.flock(file, fcntl.LOCK_EX)
        except OSError as error:
            log.warning("%s cannot be locked (%s): start no other run that makes the same", path, error.strerror)
        if _is(path, file):  # else who had it removed it meanwhile
            break
        os.close(file)
    try:
        os.truncate(file, 0)
        os.pwrite(file, f"process {os.getpid()} on {platform.node()}".encode(), 0)
        yield
    finally:
        with contextlib.suppress(FileNotFoundError):
            path.unlink()
        os.close(file)


def _is(path: Path, file: int) -> bool:
    try:
        return os.path.samestat(os.stat(path), os.fstat(file))
    except FileNotFoundError:
        return False
