"""Removing all that an experiment has made: whole artifacts, and none that another process is making."""

import shutil
from collections.abc import Iterator
from pathlib import Path

from saeflow.config import ConfigError
from saeflow.planning.graph import Plan
from saeflow.planning.stages import stages
from saeflow.storage.locks import Lock
from saeflow.storage.publish import remove_leftovers
from saeflow.storage.receipts import RECEIPT


def remove(plan: Plan, dry: bool = False) -> Iterator[Path]:
    """Removes every artifact of a plan, with what killed jobs left of them, those first that others were made from
    last; yields each file or folder that was there. `dry`: only says them. What other experiments made of the same
    artifacts stays.

    Raises `ConfigError`, before anything is removed, where another process makes one of them.
    """
    folders = [(stage, plan.folder(name, key)) for name, stage in stages().items() for key in plan.stages[name]]
    for _, folder in folders:
        for file in (folder.with_name(folder.name + ".lock"), folder.parent / ".lock"):
            if file.exists() and (lock := Lock(file)).taken():
                raise ConfigError(f"nothing was removed: {lock.holder()} makes {folder}; stop it first")
    for stage, folder in reversed(folders):
        for path in [folder, *stage.outside(folder)]:
            if path.exists():
                if not dry:
                    _remove(path)
                yield path
        if not dry:
            remove_leftovers(folder)


def _remove(path: Path) -> None:
    if path.is_dir():
        (path / RECEIPT).unlink(missing_ok=True)  # first: a folder that is half removed does not say that it is whole
        shutil.rmtree(path)
    else:
        path.unlink()
