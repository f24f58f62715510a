"""A disk that many nodes share, for processes that have this folder on PYTHONPATH: it has no `flock`, and shows an
artifact that another process wrote only $CHAOS_LATE seconds later.

What a process opens for writing, makes or renames itself, it sees at once, with all that is below. Libraries that read
without Python's help (pyarrow, safetensors) see everything, as they come after a look by name.
"""

import builtins
import errno
import fcntl
import io
import os
import stat
import time

_LATE = float(os.environ.get("CHAOS_LATE") or 0)
_ROOT = os.path.join(os.getcwd(), "results") + os.sep
_stat, _own = os.stat, set()


def _path(path):
    """Below results/, absolute; None for all others."""
    if isinstance(path, int):
        return None
    whole = os.path.join(os.getcwd(), os.fsdecode(path))
    return whole if whole.startswith(_ROOT) else None


def _mine(path):
    if whole := _path(path):
        _own.add(whole)


def _is_folder(path):
    try:
        return stat.S_ISDIR(_stat(path).st_mode)
    except OSError:
        return False


def _is_late(path):
    whole = _path(path)
    if (
        not whole
        or whole.endswith((".lock", "made.jsonl"))
        or any((whole + os.sep).startswith(o + os.sep) for o in _own)
    ):
        return False
    folder = whole if _is_folder(whole) else os.path.dirname(whole)
    try:  # a file of an artifact that is written last, and never again: receipts Snakemake touches
        return time.time() - _stat(os.path.join(folder, "config.yaml")).st_ctime < _LATE
    except OSError:
        return False


def _looking(call):
    def look(path, *args, **kwargs):
        if kwargs.get("dir_fd") is None and _is_late(path):
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), os.fspath(path))
        return call(path, *args, **kwargs)

    return look


def _opening(call):
    def open_(path, mode="r", *args, **kwargs):
        if set(mode) & set("wax+"):
            _mine(path)
        elif _is_late(path):
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), os.fspath(path))
        return call(path, mode, *args, **kwargs)

    return open_


def _making(call):
    def make(path, *args, **kwargs):
        call(path, *args, **kwargs)
        _mine(path)

    return make


def _moving(call):
    def move(source, target, **kwargs):
        try:
            call(source, target, **kwargs)
        finally:  # the server's refusal tells what is there, too
            _mine(target)

    return move


def _refused(number):
    def refuse(*_, **__):
        raise OSError(number, os.strerror(number))

    return refuse


if _LATE:
    fcntl.flock = fcntl.lockf = _refused(errno.ENOLCK)
    os.stat, os.lstat = _looking(os.stat), _looking(os.lstat)
    builtins.open = io.open = _opening(io.open)
    os.mkdir, os.rename, os.replace = _making(os.mkdir), _moving(os.rename), _moving(os.replace)
