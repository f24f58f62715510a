"""What jobs have made below a results folder, and how long it took: `made.jsonl`, a line an artifact.

It outlives artifacts that are deleted. It is what tells "deleted" from "new", and what predictions of time are from; no
result depends on it, and it may be deleted too.
"""

import json
import platform
from pathlib import Path
from typing import Any, NamedTuple

from saeflow.planning.graph import Instance, Plan
from saeflow.planning.stages import Stage, stages

FILE = "made.jsonl"
RECENT = 200
"""Artifacts of a stage, the newest, from which its speed is taken."""
START_SECONDS = 10.0
"""That a job takes of which nothing is known: most of it Python's imports."""


class Prediction(NamedTuple):
    seconds: float
    """Of all jobs of a run, one after another."""
    measured: int
    """Earlier artifacts made on this machine that it is from."""
    guessed: list[str]
    """Stages of which nothing was ever made here: by `device.flops` where their operations are known."""


def record(
    plan: Plan, instance: Instance, work: float, device: str, seconds: float, cpu_seconds: float, part: str = ""
) -> None:
    """Adds a line for an artifact that took `seconds`, and `cpu_seconds` of all cores, for its `work_of` on a device;
    in one write, so that several jobs may do so at once. The line of the whole has what its parts took, too."""
    if not part and stages()[instance.stage].parts is not None:
        for before in _parts(plan.results, instance):
            seconds, cpu_seconds = seconds + before["seconds"], cpu_seconds + before["cpu_s"]
    line = {
        "experiment": plan.experiment,
        "stage": instance.stage,
        "key": instance.key,
        "host": platform.node(),
        "device": device,
        "seconds": round(seconds, 3),
        "cpu_s": round(cpu_seconds, 3),
        "gpu_s": round(gpu_seconds(device, seconds), 3),
        "work": work,
    } | ({"part": part} if part else {})
    with open(Path(plan.results) / FILE, "a") as file:
        file.write(json.dumps(line) + "\n")


def gpu_seconds(device: str, seconds: float) -> float:
    """A job has its GPU as long as it runs."""
    return seconds if device.startswith("cuda") else 0.0


def lines(results: str | Path) -> list[dict[str, Any]]:
    """All that was ever made below a results folder, the oldest first; lines that a power cut tore are left out."""
    return [line for line in _all_lines(results) if "part" not in line]


def _parts(results: str | Path, instance: Instance) -> list[dict[str, Any]]:
    """The lines of parts of an artifact that were made since it was last made."""
    found: list[dict[str, Any]] = []
    for line in _all_lines(results):
        if (line["stage"], line["key"]) == (instance.stage, instance.key):
            found = [*found, line] if "part" in line else []
    return found


def _all_lines(results: str | Path) -> list[dict[str, Any]]:
    try:
        text = (Path(results) / FILE).read_text(errors="replace")
    except OSError:
        return []
    found = []
    for line in text.splitlines():
        try:
            found.append(json.loads(line))
        except json.JSONDecodeError:
            continue
    return [line for line in found if isinstance(line, dict) and line.keys() >= {"stage", "key", "seconds", "work"}]


def predict(plan: Plan, made: list[dict[str, Any]]) -> Prediction:
    """How long the run takes that the plan is for, from earlier jobs on this machine and these devices."""
    seconds, measured, guessed = 0.0, 0, []
    for stage, keys in plan.to_make.items():
        if not keys:
            continue
        here = (platform.node(), plan.device_of(stage))
        alike = [m for m in made if (m.get("host"), m.get("device")) == here and m["stage"] == stage][-RECENT:]
        work = [work_of(stages()[stage], plan, plan.stages[stage][key]) for key in keys]
        if alike:
            seconds += sum(m["seconds"] for m in alike) / sum(m["work"] for m in alike) * sum(work)
            measured += len(alike)
        else:
            jobs = len({plan.leaders.get((stage, key), key) for key in keys})
            operations = sum(stages()[stage].operations(plan, plan.stages[stage][key]) for key in keys)
            seconds += jobs * START_SECONDS + operations / float(plan.device["flops"])
            guessed.append(stage)
    return Prediction(seconds, measured, guessed)


def work_of(stage: Stage, plan: Plan, instance: Instance) -> float:
    """What the time of an artifact goes by: operations, else bytes, else 1 for each."""
    return float(stage.operations(plan, instance) or stage.n_bytes(plan, instance) or 1)
