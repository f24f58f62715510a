"""What of an experiment is stale, missing, damaged or deleted: its last run's plan against what is on disk."""

from collections import Counter
from collections.abc import Iterable
from typing import Any, NamedTuple

from saeflow.planning.explain import counted
from saeflow.planning.stages import stages
from saeflow.results.disk import FIGURES, Disk


class Note(NamedTuple):
    kind: str
    """`missing`, `damaged`, `stale`, or `deleted`, which is no fault."""
    text: str


def notes(disk: Disk, raw: dict[str, Any] | None, shown: str | None) -> list[Note]:
    """`raw`: the frozen plan of the experiment's last run, if there is one; `shown`: the key of its figures on disk."""
    found: list[Note] = []
    lineage = _of_plan(raw) if raw else _of_figures(disk, shown)
    there = {(stage, key) for stage, keys in disk.whole.items() for key in keys}
    broken = {(one.stage, one.key): one.problem for one in disk.left_out}
    damaged = [one for one in lineage if one in broken]
    if damaged:
        first = f"{damaged[0][0]} {damaged[0][1]} ({broken[damaged[0]]})"
        found.append(Note("damaged", f"{_counts(damaged)} not whole, such as {first}; the next run makes them again"))
    to_make = {(stage, key) for stage, keys in (raw or {}).get("to_make", {}).items() for key in keys}
    missing = [one for one in lineage if one in to_make and one not in there and one not in broken]
    if missing:
        found.append(
            Note(
                "missing",
                f"{_counts(missing)} that the last run was to make; the same command goes on, unless it still runs",
            )
        )
    if raw and shown and shown not in raw["stages"].get(FIGURES, {}):
        found.append(Note("stale", f"the figures below are of an earlier state of this experiment, {shown}"))
    stale = [one for one in lineage if one in there and _is_old(one[0], lineage[one])]
    if stale:
        versions = ", ".join(
            f"{name} is at version {stages()[name].version}" for name in dict.fromkeys(s for s, _ in stale)
        )
        found.append(
            Note(
                "stale", f"{_counts(stale)} computed otherwise since ({versions}, CHANGELOG.md); a run makes them anew"
            )
        )
    gone = [one for one in lineage if one not in there and one not in broken and one not in to_make]
    if gone:
        found.append(Note("deleted", f"{_counts(gone)} not here; what was made from them stays valid"))
    return found


def _of_plan(raw: dict[str, Any]) -> dict[tuple[str, str], dict[str, Any]]:
    """What each artifact is, of stages that there still are."""
    return {
        (stage, key): instance for stage, table in raw["stages"].items() if stage in stages()
        for key, instance in table.items()
    }  # fmt: skip


def _of_figures(disk: Disk, shown: str | None) -> dict[tuple[str, str], dict[str, Any]]:
    if shown is None:
        return {}
    plan = disk.plan([(FIGURES, shown)])
    return {
        (stage, key): {"version": instance.version, "config": instance.config}
        for stage, table in plan.stages.items() for key, instance in table.items()
    }  # fmt: skip


def _is_old(stage: str, instance: dict[str, Any]) -> bool:
    declared = stages()[stage]
    return int(instance.get("version", 1)) < (declared.version_of(instance["config"]) or declared.version)


def _counts(found: Iterable[tuple[str, str]]) -> str:
    counts = Counter(stage for stage, _ in found)
    return ", ".join(counted(stage, n) for stage, n in counts.items())
