"""Removing artifacts: whole, with all that belongs to them alone, and none that another process is making."""

import shutil
from collections.abc import Collection, Iterator
from pathlib import Path

from saeflow.config import ConfigError
from saeflow.planning.graph import Plan
from saeflow.planning.stages import Stage, stages
from saeflow.storage.locks import Lock
from saeflow.storage.publish import beside, escaped, remove_leftovers
from saeflow.storage.receipts import RECEIPT, SET_ASIDE


def remove(plan: Plan, dry: bool = False) -> Iterator[Path]:
    """Removes every artifact of a plan, with what killed jobs left of them, those last that others were made
    from; yields each file or folder that was there. `dry`: only says them. What other experiments made of the same
    artifacts stays.

    Raises `ConfigError`, before anything is removed, where another process makes one of them.
    """
    folders = [(stage, plan.folder(name, key)) for name, stage in stages().items() for key in plan.stages[name]]
    for _, folder in folders:
        near = (*folder.parent.glob(f"{escaped(folder.name)}.part-*.lock"), *folder.parent.glob(".*.lock"))
        for file in (folder.with_name(folder.name + ".lock"), folder.parent / ".lock", *near):
            if file.exists() and (lock := Lock(file)).taken():
                raise ConfigError(f"nothing was removed: {lock.holder()} makes {folder}; stop it first")
    there = {name: set(artifacts(Path(plan.results) / name)) for name in stages()}
    for stage, folder in reversed(folders):
        there[stage.name].discard(folder)
        for path in goes_with(stage, Path(plan.results), folder, there[stage.name]):
            if path.exists():
                if not dry:
                    remove_path(path)
                yield path
        if not dry:
            remove_leftovers(folder)


def artifacts(folder: Path, depth: int = 2) -> Iterator[Path]:
    """Folders of artifacts of a stage, whole or not, below its folder; links are not followed. Keys have two parts at
    most."""
    if depth == 0 or folder.is_symlink() or not folder.is_dir():
        return
    for entry in sorted(folder.iterdir()):
        if entry.name.endswith(".partial") or entry.is_symlink() or not entry.is_dir():
            continue
        if any((entry / name).exists() for name in (RECEIPT, SET_ASIDE, "config.yaml")):
            yield entry
        else:
            yield from artifacts(entry, depth - 1)


def top_of(stage: Stage, results: Path, folder: Path) -> Path:
    """The folder of the stage that an artifact lies in: its own, or that of the store which it is a column of."""
    root = results / stage.name
    return root / folder.relative_to(root).parts[0]


def goes_with(stage: Stage, results: Path, folder: Path, others: Collection[Path]) -> list[Path]:
    """What is removed with an artifact while `others` of its stage stay, or are wanted: its folder, and what lies
    outside of it and belongs to none of these; all of its store, where none of them is in there."""
    top = top_of(stage, results, folder)
    if top == folder:
        return [folder, *stage.outside(folder)]
    near = [other for other in others if other != folder and other.is_relative_to(top)]
    if not near:
        return [top]
    shared = {path for other in near for path in stage.outside(other)}
    return [folder, *(path for path in stage.outside(folder) if path not in shared)]


def remove_path(path: Path) -> None:
    """Removes a file, or a folder with all that is in it, which is out of the way at once: a folder that is half
    removed does not say that it is whole. A link is removed, and what it points to is not."""
    if path.is_dir() and not path.is_symlink():
        going = beside(path)
        shutil.rmtree(going, ignore_errors=True)
        path.rename(going)
        shutil.rmtree(going)
    else:
        path.unlink(missing_ok=True)
