"""Who may read what is written: whoever the umask lets, as with any other file."""

import os
from functools import cache
from pathlib import Path


def share(path: Path) -> None:
    """Gives a file, or a folder and all below it, the mode that the umask leaves: safetensors writes its files for
    their owner alone, whoever else works on the same disk."""
    for one in [path, *path.rglob("*")] if path.is_dir() else [path]:
        if not one.is_symlink():
            one.chmod((0o777 if one.is_dir() else 0o666) & ~_umask())


@cache
def _umask() -> int:
    """It can only be read by setting it; so once."""
    mask = os.umask(0o077)
    os.umask(mask)
    return mask
