"""What a results folder holds, by its receipts: artifacts that are whole, what is left out and why, and plans of what
some of them were made from, as far as anything on disk tells of it.
"""

import dataclasses
import difflib
import json
from collections.abc import Iterable, Iterator
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from saeflow.config import ConfigError
from saeflow.jobs.job import Job
from saeflow.planning.frozen import FOLDER
from saeflow.planning.graph import Instance, Plan
from saeflow.planning.keeping import read_plan
from saeflow.planning.parts import without_hash
from saeflow.planning.removal import artifacts
from saeflow.planning.stages import stages
from saeflow.storage.receipts import SET_ASIDE, problem, read_receipt

FIGURES = "figures"
HOLDS_DICTIONARIES = ("train", "foreign")
_LISTED = 8
"""Keys that an error names."""
_Loader: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)


class ResultsError(LookupError):
    """Something that a results folder does not have; the message says what it has."""


class LeftOut(NamedTuple):
    """An artifact that is not whole."""

    stage: str
    key: str
    problem: str


class Disk:
    """A results folder as it was when it was first asked."""

    def __init__(self, root: str | Path) -> None:
        self.root = Path(root)
        if not any((self.root / stage).is_dir() for stage in stages()):
            raise ResultsError(
                f"{self.root.absolute()} holds no results of saeflow (no folder {', '.join(list(stages())[:3])}, …): "
                "run the workflow there first, or name the folder results/ of a run"
            )

    # ---------------------------------------------------------------- what is there
    @cached_property
    def _looked(self) -> tuple[dict[str, dict[str, dict[str, Any]]], list[LeftOut]]:
        whole: dict[str, dict[str, dict[str, Any]]] = {name: {} for name in stages()}
        left_out = []
        for name, stage in stages().items():
            for folder in artifacts(self.root / name):
                key, receipt = folder.relative_to(self.root / name).as_posix(), read_receipt(folder)
                if receipt is None and (folder / SET_ASIDE).exists():
                    left_out.append(LeftOut(name, key, "it was found to be damaged"))
                elif found := problem(folder, receipt):
                    left_out.append(LeftOut(name, key, f"{found[0].name}: {found[1]}"))
                elif receipt is not None and stage.whole(folder):
                    whole[name][key] = receipt
                else:
                    left_out.append(LeftOut(name, key, "what lies outside of its folder is gone"))
        return whole, left_out

    @property
    def whole(self) -> dict[str, dict[str, dict[str, Any]]]:
        """Receipts by stage and key of the artifacts that are there, as far as can be seen without reading them."""
        return self._looked[0]

    @property
    def left_out(self) -> list[LeftOut]:
        """Artifacts that are damaged or have lost something."""
        return self._looked[1]

    def folder(self, stage: str, key: str) -> Path:
        return self.root / stage / key

    def find(self, text: str, *among: str) -> tuple[str, str]:
        """Stage and key of an artifact of some stages, by its key, by the beginning of it, or by the hash that ends it.

        Raises `ResultsError` for none, and for several.
        """
        known = [(stage, key) for stage in among or stages() for key in self.whole[stage]]
        tests = (str.__eq__, str.startswith, lambda key, text: key.endswith(f"-{text}"))
        for test in tests:
            found = [one for one in known if test(one[1], text)]
            if len(found) == 1:
                return found[0]
            if found:
                raise ResultsError(f"{text!r} may be {_named(found)}: give more of the key")
        what = " or ".join(among) or "artifact"
        lost = next((one for one in self.left_out if one.key == text and one.stage in (among or stages())), None)
        if lost:
            raise ResultsError(f"{lost.stage} {text} is not whole ({lost.problem}): run the workflow again")
        near = difflib.get_close_matches(text, [key for _, key in known], n=2, cutoff=0.8)
        hint = f"did you mean {' or '.join(near)}? " if near else ""
        raise ResultsError(f"there is no {what} {text!r} in {self.root}; {hint}there are: {_named(known)}")

    # ---------------------------------------------------------------- experiments
    @cached_property
    def experiments(self) -> dict[str, list[str]]:
        """Of every experiment that has figures the keys of these: first those of its last run, then the newest."""
        found: dict[str, list[str]] = {}
        by_age = sorted(self.whole[FIGURES].items(), key=lambda one: (one[1].get("finished", ""), one[0]), reverse=True)
        for key, _ in by_age:
            found.setdefault(key.rsplit("-", 1)[0], []).append(key)
        for raw in self.runs:
            for key in raw["stages"].get(FIGURES, {}):
                keys = found.get(key.rsplit("-", 1)[0], [])
                if key in keys:
                    keys.remove(key)
                    keys.insert(0, key)
        return found

    @cached_property
    def runs(self) -> list[dict[str, Any]]:
        """Frozen plans of the runs in this folder, of each experiment the last that was used."""
        newest: dict[str, dict[str, Any]] = {}
        for raw in self._plans():
            newest.setdefault(str(raw["experiment"]), raw)
        return list(newest.values())

    def _plans(self) -> Iterator[dict[str, Any]]:
        """The newest first; what cannot be read is left out."""
        found = []
        for file in (self.root.absolute().parent / FOLDER).glob("*.json"):
            try:
                found.append((file.stat().st_mtime_ns, file.name, file))
            except FileNotFoundError:  # another run has removed it
                continue
        for *_, file in sorted(found, reverse=True):
            try:
                raw = read_plan(file)
            except ConfigError:
                continue
            if raw is not None:
                yield raw

    # ---------------------------------------------------------------- plans
    def job(self, needs: dict[str, list[str]], config: dict[str, Any] | None = None) -> Job:
        """A job that reads some artifacts, as those do that draw figures."""
        plan = self.plan((stage, key) for stage, keys in needs.items() for key in keys)
        return Job(Instance(FIGURES, "", config or {}, needs, {}), plan, "cpu")

    def plan(self, wanted: Iterable[tuple[str, str]]) -> Plan:
        """Of some artifacts and all that they were made from. Of what is gone, frozen plans tell; what nothing tells of
        is left out."""
        found: dict[str, dict[str, Instance]] = {name: {} for name in stages()}
        left = list(wanted)
        while left:
            stage, key = left.pop()
            if key not in found[stage] and (instance := self._instance(stage, key)) is not None:
                found[stage][key] = dataclasses.replace(instance)
                left += [(s, k) for s, keys in instance.needs.items() if s in found for k in keys]
        for instance in (one for table in found.values() for one in table.values()):
            known = {s: [k for k in keys if k in found.get(s, {})] for s, keys in instance.needs.items()}
            instance.needs = {s: keys for s, keys in known.items() if keys}
        return Plan("", found, {"default": "cpu"}, results=str(self.root))

    def _instance(self, stage: str, key: str) -> Instance | None:
        if (stage, key) not in self._instances:
            self._instances[stage, key] = self._read_instance(stage, key)
        return self._instances[stage, key]

    @cached_property
    def _instances(self) -> dict[tuple[str, str], Instance | None]:
        return {}

    def _read_instance(self, stage: str, key: str) -> Instance | None:
        planned = self._planned(stage, key)
        try:
            tree = yaml.load((self.folder(stage, key) / "config.yaml").read_bytes(), Loader=_Loader)
            made = Instance(stage, key, tree["config"], tree["needs"] or {}, {}, tree["version"])
        except (OSError, yaml.YAMLError, KeyError, TypeError):
            if planned is None:
                return None
            made = Instance(stage, key, planned["config"], planned["needs"], {}, planned.get("version", 1))
        # What people call things: now, or else when it was made. A dictionary from elsewhere is called something.
        names = (planned or {}).get("sources") or self.whole[stage].get(key, {}).get("names", {})
        made.sources = {"label": without_hash(key), **names}
        return made

    def _planned(self, stage: str, key: str) -> dict[str, Any] | None:
        """As the newest frozen plan has it that has it."""
        while True:
            for raw in self._read_plans:
                if key in raw["stages"].get(stage, {}):
                    return dict(raw["stages"][stage][key])
            if (another := next(self._unread_plans, None)) is None:
                return None
            self._read_plans.append(another)

    @cached_property
    def _read_plans(self) -> list[dict[str, Any]]:
        return []

    @cached_property
    def _unread_plans(self) -> Iterator[dict[str, Any]]:
        return self._plans()


def read_config(folder: Path) -> dict[str, Any]:
    """`config.yaml` of an artifact; empty where it cannot be read."""
    try:
        return dict(yaml.load((folder / "config.yaml").read_bytes(), Loader=_Loader))
    except (OSError, yaml.YAMLError, TypeError, ValueError):
        return {}


def read_json(file: Path) -> dict[str, Any]:
    return dict(json.loads(file.read_bytes()))


def _named(found: list[tuple[str, str]]) -> str:
    told = [f"{stage} {key}" for stage, key in found[:_LISTED]]
    more = f" and {len(found) - _LISTED} more" if len(found) > _LISTED else ""
    return ", ".join(told) + more if told else "none"
