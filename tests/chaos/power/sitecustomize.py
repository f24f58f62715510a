"""What a power cut would leave, for processes that have this folder on PYTHONPATH: notes what was flushed to the disk.

Every `os.fsync` of a file or folder writes a line `inode size mtime` into $CHAOS_FLUSHED. What is on no line, as it is
when the cut comes, had not reached the disk: see `faults.power_cut`.
"""

import os

_note = os.environ.get("CHAOS_FLUSHED")
_fsync = os.fsync


def fsync(fd: int) -> None:
    _fsync(fd)
    if _note:
        about = os.fstat(fd)
        line = f"{about.st_ino} {about.st_size} {about.st_mtime_ns}\n".encode()
        out = os.open(_note, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
        os.write(out, line)
        os.close(out)


os.fsync = fsync
