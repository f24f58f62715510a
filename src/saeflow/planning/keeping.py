"""Which artifacts somebody still refers to: the experiments of `conf/`, runs, jobs that are at work, and all that those
need. What cannot be known counts as referred to."""

import json
import re
import time
from collections.abc import Collection, Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from saeflow.config import ConfigError
from saeflow.planning.expansion import compose
from saeflow.planning.frozen import FOLDER, KEPT_DAYS
from saeflow.planning.graph import Plan
from saeflow.planning.history import lines
from saeflow.planning.overrides import split
from saeflow.planning.parts import without_part
from saeflow.planning.removal import artifacts
from saeflow.planning.stages import stages
from saeflow.planning.sweep import Sweep
from saeflow.storage.locks import Lock
from saeflow.storage.receipts import RECEIPT, SET_ASIDE

Artifact = tuple[str, str]
"""Stage and key."""
MAY_BE = "may be of"
_ONE = re.compile(r"(?:'[^']*'|\"[^\"]*\"|[^;'\"])+")


@dataclass
class Kept:
    """What stays, and why."""

    why: dict[Artifact, str] = field(default_factory=dict)
    """Of every artifact that is referred to, there or not, by whom: the first that was found."""
    needs: dict[Artifact, list[Artifact]] = field(default_factory=dict)
    """Of every artifact that some plan or receipt tells of, what it was or will be made from."""
    named: set[str] = field(default_factory=set)
    """Names of the experiments that could be planned."""
    states: dict[Path, int] = field(default_factory=dict)
    """`plan_states` before anything was looked at."""
    runs: dict[Path, dict[str, Any]] = field(default_factory=dict)
    """Frozen plans by file, with when they were `used`."""
    unplanned: dict[str, str] = field(default_factory=dict)
    """Experiments that could not, and why not."""

    def add(self, found: Iterable[Artifact], why: str) -> None:
        """Keeps artifacts and all that they need."""
        left = list(found)
        while left:
            one = left.pop()
            if one not in self.why:
                self.why[one] = why
                left += self.needs.get(one, [])


def experiments_of(text: str) -> list[list[str]]:
    """Experiments as overrides, with `;` between them: `experiment=demo dictionary.k=[8,16]; experiment=jsae`."""
    return [split(one) for one in _ONE.findall(text) if one.strip()]


def referred_to(
    conf: Path, results: Path, keep: Iterable[list[str]], without: Collection[str], days: float, digests: str | None
) -> Kept:
    """`keep`: overrides of experiments that no file of `conf/experiment` names. `without`: experiments that do not
    count although they cannot be planned here. `days`: what was made or run in the last so many stays.

    Raises `ConfigError` where nothing may be removed: one of `keep` cannot be planned, a frozen plan cannot be read, or
    something is being made of which nobody knows what it needs.
    """
    kept = Kept(states=plan_states(), needs=_needs_on_disk(results))
    wanted: list[tuple[str, list[Artifact]]] = []
    for name in sorted(_experiments(conf)):
        try:
            wanted.append((f"experiment={name}", _planned(kept, conf, results, [f"experiment={name}"], digests)))
        except (ConfigError, ValueError, OSError) as error:
            kept.unplanned[name] = str(error)
    if unknown := sorted(set(without) - kept.unplanned.keys()):
        cannot = ", ".join(kept.unplanned) or "there is none"
        raise ConfigError(f"WITHOUT={' '.join(unknown)}: name experiments that cannot be planned here: {cannot}")
    for overrides in keep:
        text = " ".join(overrides)
        try:
            wanted.append((f'KEEP="{text}"', _planned(kept, conf, results, overrides, digests)))
        except (ConfigError, ValueError, OSError) as error:
            raise ConfigError(f'KEEP="{text}" cannot be planned: {error}') from None
    kept.runs = frozen_plans(days)
    for raw in kept.runs.values():
        _learn(kept, raw)
    for why, found in wanted:
        kept.add(found, why)
    for file, raw in kept.runs.items():
        if raw["recent"] or _unfinished(raw, results):
            kept.add(all_of(raw), f"the run of {raw['experiment']} that {file.name} is the plan of")
    _add_what_is_made_now(kept, results)
    _add_recent(kept, results, days)
    _add_what_may_be_theirs(kept, conf, results, set(kept.unplanned) - set(without))
    return kept


def _experiments(conf: Path) -> list[str]:
    root = conf / "experiment"
    return [file.relative_to(root).with_suffix("").as_posix() for file in root.rglob("*.yaml")]


def _planned(kept: Kept, conf: Path, results: Path, overrides: list[str], digests: str | None) -> list[Artifact]:
    plan = compose(conf, overrides, results=str(results), digests=digests)
    kept.named.add(plan.experiment)
    found = []
    for stage, table in plan.stages.items():
        for key, instance in table.items():
            kept.needs[stage, key] = [(s, k) for s, keys in instance.needs.items() for k in keys]
            found.append((stage, key))
    return found


# -------------------------------------------------------------------- runs
def frozen_plans(days: float) -> dict[Path, dict[str, Any]]:
    """Plans of runs that may have jobs left, as they lie on disk, of this version or another; `used`: when, in seconds
    since the epoch, and `recent`: whether in the last `days`."""
    found, now = {}, time.time()
    for file in sorted(FOLDER.glob("*.json")):
        with suppress(FileNotFoundError):  # another run has removed it
            used = file.stat().st_mtime
            if used > now - KEPT_DAYS * 86400 and (raw := read_plan(file)):
                found[file] = raw | {"used": used, "recent": used > now - days * 86400}
    return found


def read_plan(file: Path) -> dict[str, Any] | None:
    """A frozen plan; None where it is gone. Raises `ConfigError` for one that cannot be read."""
    try:
        raw = dict(json.loads(file.read_bytes()))
        all_of(raw), raw["to_make"].items(), raw["experiment"]
    except FileNotFoundError:
        return None
    except (ValueError, KeyError, TypeError, AttributeError):
        raise ConfigError(
            f"nothing may be removed: {file}, the plan of a run, cannot be read; remove it if no job waits for it"
        ) from None
    return raw


def plan_states() -> dict[Path, int]:
    """Of each frozen plan the time of its last change or use, in nanoseconds."""
    states = {}
    for file in FOLDER.glob("*.json"):
        with suppress(FileNotFoundError):
            states[file] = file.stat().st_mtime_ns
    return states


def last_run(plan: Plan) -> tuple[Path, dict[str, Any]] | None:
    """The frozen plan of the last run of a plan's artifacts, and its file."""
    mine = {(stage, key) for stage, table in plan.stages.items() for key in table}
    states = plan_states()
    for file in sorted(states, key=lambda file: states[file], reverse=True):
        with suppress(ConfigError):  # one that cannot be read
            if (raw := read_plan(file)) and raw["experiment"] == plan.experiment and set(all_of(raw)) == mine:
                return file, raw
    return None


def all_of(raw: Mapping[str, Any]) -> list[Artifact]:
    """All artifacts of a frozen plan."""
    return [(stage, key) for stage, table in raw["stages"].items() for key in table]


def _learn(kept: Kept, raw: Mapping[str, Any]) -> None:
    for stage, table in raw["stages"].items():
        for key, instance in table.items():
            needs = [(s, k) for s, keys in instance["needs"].items() for k in keys]
            kept.needs.setdefault((stage, key), needs)


def _unfinished(raw: Mapping[str, Any], results: Path) -> bool:
    """Whether jobs of it may still wait somewhere."""
    keys = ((stage, key) for stage, found in raw["to_make"].items() for key in found)
    return not all((results / stage / key / RECEIPT).is_file() for stage, key in keys)


# -------------------------------------------------------------------- what is on disk
def on_disk(results: Path) -> list[Artifact]:
    """Every artifact that is there, whole or not."""
    roots = {stage: results / stage for stage in stages()}
    return [(s, folder.relative_to(root).as_posix()) for s, root in roots.items() for folder in artifacts(root)]


def _needs_on_disk(results: Path) -> dict[Artifact, list[Artifact]]:
    return {(stage, key): _needs(results / stage / key) for stage, key in on_disk(results)}


def _needs(folder: Path) -> list[Artifact]:
    """By its receipt, set aside or not, or else by its configuration."""
    import yaml

    for name, read in ((RECEIPT, json.loads), (SET_ASIDE, json.loads), ("config.yaml", yaml.safe_load)):
        try:
            needs = read((folder / name).read_text())["needs"]
            return [(stage, key) for stage, keys in needs.items() for key in keys]
        except (OSError, ValueError, KeyError, TypeError, AttributeError, yaml.YAMLError):
            continue
    return []


def _add_what_is_made_now(kept: Kept, results: Path) -> None:
    for stage in stages():
        root = results / stage
        found = [] if root.is_symlink() else sorted({*root.glob("*.lock"), *root.glob("*/*.lock")})
        for file in (file for file in found if not file.parent.is_symlink()):
            if not (lock := Lock(file)).taken():
                continue
            made = [(stage, without_part(file.with_suffix("").relative_to(root).as_posix()))]
            if file.name.startswith("."):  # of a store
                store = file.parent.relative_to(root).as_posix()
                made = [one for one in kept.needs if one[0] == stage and one[1].startswith(f"{store}/")]
            if not made or any(one not in kept.needs for one in made):
                raise ConfigError(
                    f"nothing may be removed: {lock.holder()} holds {file}, and no plan here says what for and what it "
                    "needs; wait until it has ended"
                )
            kept.add(made, f"{lock.holder()} makes it")


def _add_recent(kept: Kept, results: Path, days: float) -> None:
    oldest = time.time() - days * 86400
    for stage, key in on_disk(results):
        receipt = results / stage / key / RECEIPT
        if receipt.is_file() and receipt.stat().st_mtime > oldest:
            kept.add([(stage, key)], f"made in the last {days:g} days")


def _add_what_may_be_theirs(kept: Kept, conf: Path, results: Path, unplanned: set[str]) -> None:
    """Of experiments whose keys nobody can know here: what their runs have made, by `made.jsonl`, and what nobody knows
    the maker of."""
    if not unplanned:
        return
    names = set(unplanned)
    for name in unplanned:
        try:
            names.add(Sweep(conf.resolve(), [f"experiment={name}"]).experiment)
        except (ConfigError, ValueError, OSError):
            names.add("")  # not even what it calls itself is known
    makers = makers_of(results)
    why = f"{MAY_BE} {', '.join(sorted(unplanned))}, which cannot be planned here"
    for one in on_disk(results):
        of = makers.get(one, set())
        if not of or of & names or "" in names:
            kept.add([one], why)


def makers_of(results: Path) -> dict[Artifact, set[str]]:
    """The experiments whose runs have made an artifact; none where they did so before `made.jsonl` said it."""
    found: dict[Artifact, set[str]] = {}
    unknown = set()
    for line in lines(results):
        one = line["stage"], line["key"]
        if name := line.get("experiment"):
            found.setdefault(one, set()).add(name)
        else:
            unknown.add(one)
    return {one: names for one, names in found.items() if one not in unknown}
