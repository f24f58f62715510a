"""What lies below `results/` that nobody refers to any longer: listed first, and removed only by what the list says.

A list has a token, a hash of all that is on it; who removes gives the token back, so that nothing goes that has not
been read. Links are not followed.
"""

import os
import stat
import time
from collections.abc import Collection, Iterable, Iterator
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from functools import cache, cached_property
from pathlib import Path

from saeflow.config import ConfigError
from saeflow.planning.digests import short_hash
from saeflow.planning.explain import readable
from saeflow.planning.keeping import MAY_BE, Artifact, Kept, all_of, makers_of, on_disk, plan_states, read_plan
from saeflow.planning.removal import artifacts, goes_with, remove_path, top_of
from saeflow.planning.stages import stages
from saeflow.storage.locks import Lock
from saeflow.storage.publish import abandoned, escaped
from saeflow.storage.receipts import RECEIPT

LEFTOVERS = "leftovers"


@dataclass(frozen=True)
class Size:
    """Of files together; links are not followed, and locks do not count."""

    n_bytes: int = 0
    n_files: int = 0
    changed: int = 0
    """When one of them was last written, in nanoseconds since the epoch."""

    def __add__(self, other: "Size") -> "Size":
        return Size(self.n_bytes + other.n_bytes, self.n_files + other.n_files, max(self.changed, other.changed))


@dataclass(frozen=True)
class Item:
    """Something that may go."""

    stage: str
    """Or `LEFTOVERS`, of killed jobs."""
    key: str
    """Of an artifact; empty for a leftover."""
    paths: tuple[Path, ...]
    size: Size
    used: float
    """When it was made or last used, as far as receipts and plans tell, in seconds since the epoch."""
    why: str
    lock: Path | None = None
    """That of the job which makes it."""
    store: Path | None = None
    """The folder of several artifacts in which it lies: all locks in it are taken."""

    @property
    def name(self) -> str:
        return f"{self.stage}/{self.key}" if self.key else str(self.paths[0])


@dataclass
class Listing:
    """What may go, those first that were made from others."""

    results: Path
    kept: Kept
    items: list[Item]
    links: list[Path]
    """Links where artifacts could be: left alone, with all that they point to."""

    @property
    def size(self) -> Size:
        return sum((item.size for item in self.items), Size())

    @cached_property
    def paths(self) -> frozenset[Path]:
        """All that is listed: what lies in an item and is one itself, counts there."""
        return frozenset(path for item in self.items for path in item.paths)

    @property
    def token(self) -> str:
        """Of exactly what is listed, and in which state."""
        found = [[[str(p) for p in i.paths], i.size.n_bytes, i.size.n_files, i.size.changed] for i in self.items]
        return short_hash([str(self.results), found], 12)


def listing(results: Path, kept: Kept, days: float) -> Listing:
    """All that may go from a results folder. `days`: what a killed job has left for the next stays for so long after
    its last change."""
    there, used, makers = on_disk(results), _last_uses(results, kept), makers_of(results)
    items: list[Item] = []
    listed: set[Path] = set()
    for name, stage in reversed(stages().items()):
        root = results / name
        stay = {root / key for s, key in (*kept.why, *there) if s == name}
        for key in sorted((k for s, k in there if s == name and (s, k) not in kept.why), reverse=True):
            folder = root / key
            stay.discard(folder)
            paths = tuple(path for path in goes_with(stage, results, folder, stay) if os.path.lexists(path))
            paths = tuple(path for path in paths if not _through_link(path, results))
            top, lock = top_of(stage, results, folder), folder.with_name(f"{folder.name}.lock")
            why = _why(makers.get((name, key), set()), kept)
            store = top if top != folder else None
            size = measure(paths, listed)
            listed |= {*paths}
            items.append(Item(name, key, paths, size, used.get((name, key), 0.0), why, lock, store))
    items += _leftovers(results, kept, there, items, time.time() - days * 86400)
    links = [path for s in stages() for path in (results / s, *sorted((results / s).glob("*"))) if path.is_symlink()]
    return Listing(results, kept, items, links)


def remove(found: Listing, token: str) -> Iterator[tuple[Item, str]]:
    """Removes what is on a list, of which `token` is; yields each item, with the reason why it was left, if it was.

    An artifact is removed under its lock, and left where another process holds that, where it has changed, or where a
    run began meanwhile that refers to it. Raises `ConfigError` where the list is another than the token's.
    """
    if token != found.token:
        raise ConfigError(
            f"nothing was removed: what may go is not what REMOVE={token} was told for; read the list of make gc again"
        )
    for item in found.items:
        yield item, _remove(found, item)


def _remove(found: Listing, item: Item) -> str:
    """Returns why it was left, or nothing."""
    with ExitStack() as held:
        in_store = [*item.store.glob("*.lock"), item.store / ".lock"] if item.store and item.store.is_dir() else []
        own = [item.lock, *item.lock.parent.glob(f"{escaped(item.lock.stem)}.part-*.lock")] if item.lock else []
        for file in dict.fromkeys([*own, *sorted(in_store)]):
            if not file.parent.is_dir():
                continue
            lock = Lock(file)
            if not lock.try_acquire():
                return f"{lock.holder()} holds {file}"
            held.callback(lock.release)
        if _begun_since(found, item):
            return "a run that began meanwhile refers to it"
        if measure(item.paths, found.paths) != item.size:
            return "it has changed meanwhile"
        for path in _still_alone(found, item):
            remove_path(path)
    return ""


def _still_alone(found: Listing, item: Item) -> list[Path]:
    """Of what is to go with an artifact, what belongs to no other that was left, or came meanwhile."""
    if not item.key:
        return list(item.paths)
    stage, root = stages()[item.stage], found.results / item.stage
    others = {root / key for s, key in found.kept.why if s == item.stage} if item.store else set()
    others |= set(artifacts(item.store)) if item.store else set()
    may = goes_with(stage, found.results, root / item.key, others)
    return [path for path in item.paths if path in may] or [root / item.key]


def _begun_since(found: Listing, item: Item) -> bool:
    for file, changed in plan_states().items():
        if found.kept.states.get(file) != changed:
            for stage, key in _artifacts_of(file, changed):
                folder = found.results / stage / key
                if (stage, key) == (item.stage, item.key) or (not item.key and _concerns(item, stage, folder)):
                    return True
    return False


def _concerns(item: Item, stage: str, folder: Path) -> bool:
    """Whether a leftover lies in or around an artifact, or belongs to it."""
    around = {folder, *folder.parents, *stages()[stage].outside(folder)} if stage in stages() else {folder}
    return any(path in around or path.is_relative_to(folder) for path in item.paths)


@cache
def _artifacts_of(file: Path, changed: int) -> list[Artifact]:
    return all_of(raw) if (raw := read_plan(file)) else []


def measure(paths: Iterable[Path], apart: Collection[Path] = ()) -> Size:
    """Size of files and of all files in folders, but for what lies in those that count `apart`."""
    size = Size()
    for path in paths:
        found = [] if path.is_symlink() else [path]
        for folder, folders, names in os.walk(path):  # nothing of a file
            folders[:] = [name for name in folders if Path(folder, name) not in apart]
            found += [file for name in names if (file := Path(folder, name)) not in apart]
        for file in found:
            with suppress(FileNotFoundError):
                state = file.lstat()
                if stat.S_ISREG(state.st_mode) and file.suffix != ".lock" and file.name != ".lock":
                    size += Size(state.st_size, 1, state.st_mtime_ns)
    return size


def _last_uses(results: Path, kept: Kept) -> dict[Artifact, float]:
    """When each artifact was made, something was made from it, or a run was begun that has it in its plan."""
    used: dict[Artifact, float] = {}
    for one in on_disk(results):
        receipt = results.joinpath(*one, RECEIPT)
        if receipt.is_file():
            made = receipt.stat().st_mtime
            for each in (one, *kept.needs.get(one, [])):
                used[each] = max(made, used.get(each, 0.0))
    for raw in kept.runs.values():
        for one in all_of(raw):
            used[one] = max(raw["used"], used.get(one, 0.0))
    return used


def _why(makers: set[str], kept: Kept) -> str:
    if not makers:
        return "no experiment refers to it"
    gone = sorted(makers - kept.named)
    if gone:
        return f"made for {', '.join(gone)}, which conf/experiment/ does not have"
    return f"made for {', '.join(sorted(makers))}, which does not refer to it now"


# -------------------------------------------------------------------- for people
def overview(found: Listing, command: str) -> str:
    """The list, by stage, what is kept, and how to remove what is listed: by `command`, with the token."""
    groups: dict[str, list[Item]] = {}
    for item in reversed(found.items):
        groups.setdefault(item.stage, []).append(item)
    text = []
    for stage, items in groups.items():
        title = stages()[stage].noun[len(items) != 1] if stage in stages() else "leftovers of killed jobs"
        text.append(f"{len(items)} {title}, {_size(sum((item.size for item in items), Size()))}:")
        for item in sorted(items, key=lambda item: -item.size.n_bytes):
            used = time.strftime("%Y-%m-%d", time.localtime(item.used)) if item.used else "unknown"
            text.append(f"  {_size(item.size):>22}  last used {used}  {item.name}  ({item.why})")
    there, kinds = set(on_disk(found.results)), dict[str, int]()
    for one, why in found.kept.why.items():
        if one in there:
            kinds[why] = kinds.get(why, 0) + 1
    text += [f"kept: {n} for {why}" if "=" in why else f"kept: {n}: {why}" for why, n in kinds.items()]
    text += [f"experiment={name} cannot be planned here: {why}" for name, why in found.kept.unplanned.items()]
    if any(MAY_BE in why for why in kinds):
        text.append(f'to have them listed all the same: {command} WITHOUT="{" ".join(found.kept.unplanned)}"')
    text += [f"a link, left alone: {path} -> {os.readlink(path)}" for path in found.links]
    if not found.items:
        return "\n".join([*text, f"nothing below {found.results}/ may go"])
    text.append(f"{_size(found.size)} in all; nothing was removed. To remove exactly this:")
    return "\n".join([*text, f"{command} REMOVE={found.token}"])


def _size(size: Size) -> str:
    return f"{readable(size.n_bytes)} in {size.n_files:,} file{'' if size.n_files == 1 else 's'}"


# -------------------------------------------------------------------- what killed jobs have left
def _leftovers(results: Path, kept: Kept, there: list[Artifact], items: list[Item], oldest: float) -> Iterator[Item]:
    gone = {path for item in items for path in item.paths}

    def is_gone(path: Path) -> bool:
        return not gone.isdisjoint((path, *path.parents))

    for name, stage in stages().items():
        root = results / name
        if root.is_symlink():
            continue
        wanted = {root / key for s, key in (*kept.why, *there) if s == name}
        tops = {top_of(stage, results, folder) for folder in wanted}
        strays = [(path, "it holds no artifact") for path in sorted(root.glob("*")) if path.is_dir()]
        belongs = {path for folder in wanted for path in stage.outside(folder)}
        strays = [(p, why) for p, why in strays if p not in tops | belongs and p.suffix != ".partial"]
        why = f"belongs to no {stage.noun[0]}"
        strays += [(path, why) for path in stage.all_outside(results) if path not in belongs]
        for path, why in strays:
            size = measure([path])
            if is_gone(path) or _through_link(path, results) or size.changed / 1e9 > oldest:
                continue
            gone.add(path)
            inside = path.is_relative_to(root)
            top = top_of(stage, results, path) if inside else None
            lock = (top or root / path.name).with_name(f"{path.name if top is None else top.name}.lock")
            yield Item(LEFTOVERS, "", (path,), size, size.changed / 1e9, why, lock, top)
    for folder, folders, files in os.walk(results):
        for name in [*folders, *files]:
            path = Path(folder, name)
            if not name.endswith(".partial") or path.is_symlink() or is_gone(path):
                continue
            size = measure([path])
            with suppress(FileNotFoundError):
                changed = max(size.changed / 1e9, path.lstat().st_mtime)
                if abandoned(path, changed):
                    yield Item(LEFTOVERS, "", (path,), size, changed, "a killed job was writing it")
        folders[:] = [name for name in folders if not name.endswith(".partial") and not is_gone(Path(folder, name))]


def _through_link(path: Path, results: Path) -> bool:
    """Whether it is a link, or lies behind one."""
    return any(part.is_symlink() for part in (path, *path.parents) if part != results and results in part.parents)
