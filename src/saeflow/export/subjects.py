"""What is exported: the finished dictionaries of an experiment, each with what was found out about it."""

import json
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from saeflow.config import ConfigError
from saeflow.dictionaries import Dictionary, load_dictionary
from saeflow.dictionaries.naming import dictionary_key
from saeflow.dictionaries.settings import settings
from saeflow.jobs.job import Job
from saeflow.planning.graph import Instance, Plan
from saeflow.storage.receipts import is_damaged, verify

PARTS = ("input", "output")
"""Folders of a pair that was trained as one."""


class Refusal(ConfigError):
    """What a format cannot express; the message says why, and what could be exported instead."""


@dataclass(frozen=True)
class Subject:
    """One dictionary of an experiment."""

    plan: Plan
    stage: str
    """Which has it: `train`, or `foreign`."""
    key: str
    part: str = ""
    """Of a pair that was trained as one."""

    @property
    def name(self) -> str:
        """What it is called, and its folder below that of the export."""
        return dictionary_key(self.key, self.part)

    @property
    def folder(self) -> Path:
        return self.plan.folder(self.stage, self.key) / self.part

    @cached_property
    def dictionary(self) -> Dictionary:
        """Raises `DictionaryError` where the folder holds none."""
        return load_dictionary(self.folder)

    @cached_property
    def settings(self) -> dict[str, Any]:
        """Everything that its making read, by dotted path."""
        return settings(self.plan, self.stage, self.key)

    @cached_property
    def evaluation(self) -> Path | None:
        """Folder of its evaluation on held-out text; None where there is none yet."""
        instance = self._of("evaluate")
        if instance is None or instance.key not in self.plan.found["evaluate"]:
            return None
        folder = self.plan.folder("evaluate", instance.key)
        verify(folder)
        return folder

    @cached_property
    def metrics(self) -> dict[str, Any]:
        """The summary of its evaluation, with `<metric>_low` and `_high`; nothing where there is none."""
        return json.loads((self.evaluation / "summary.json").read_text()) if self.evaluation else {}

    def features(self) -> Job:
        """The job that looks its latents up. Raises `ConfigError` where the experiment asks for none."""
        instance = self._of("features")
        if instance is None:
            raise ConfigError(
                f'the experiment looks no latents of {self.name} up: add features=all, HYDRA="… features=all", and run '
                "it again; what is there is not made anew"
            )
        return Job(instance, self.plan, self.plan.device_of("features"))

    def _of(self, stage: str) -> Instance | None:
        """What a stage makes of this dictionary: of several, as in a pair and alone, one that is there."""
        found = [
            instance
            for instance in self.plan.stages.get(stage, {}).values()
            if self.key in instance.needs.get(self.stage, ()) and instance.config.get("part", "") == self.part
        ]
        return next((one for one in found if one.key in self.plan.found[stage]), found[0] if found else None)


def subjects(plan: Plan) -> list[Subject]:
    """All dictionaries of an experiment, in the order of the plan, each compared with its checksums.

    Raises `ConfigError` where there are none, or not all are made, and `DamagedError` where one is not what was
    written.
    """
    keys = [(stage, key) for stage in ("train", "foreign") for key in plan.stages.get(stage, {})]
    if not keys:
        raise ConfigError(f"the experiment {plan.experiment} has no dictionaries: nothing to export")
    missing = [(stage, key) for stage, key in keys if not plan.done(stage, key)]
    for stage, key in missing:
        if is_damaged(plan.folder(stage, key)):
            verify(plan.folder(stage, key))
    if missing:
        raise ConfigError(
            f"{len(missing)} of the {len(keys)} dictionaries of {plan.experiment} are not made yet, such as "
            f"{plan.folder(*missing[0])}: run the experiment first (make run HYDRA=…), then export it"
        )
    found = []
    for stage, key in keys:
        folder = plan.folder(stage, key)
        verify(folder)
        found += [Subject(plan, stage, key, part) for part in PARTS if (folder / part).is_dir()] or [
            Subject(plan, stage, key)
        ]
    return found


def kept(subjects: list[Subject], why_not: dict[str, str], tool: str) -> list[Subject]:
    """The subjects that a tool can take; `why_not`: of the others, why, by name. Raises `Refusal` where all are."""
    found = [subject for subject in subjects if subject.name not in why_not]
    if not found:
        name, why = next(iter(why_not.items()))
        rest = f", nor the other {len(why_not) - 1}" if len(why_not) > 1 else ""
        raise Refusal(f"{tool} cannot take {name}{rest}: {why}")
    return found
