"""What jobs have made below a results folder, and how long it took: `made.jsonl`, a line an artifact.

It outlives artifacts that are deleted. It is what tells "deleted" from "new", and what predictions of time are from; no
result depends on it, and it may be deleted too.
"""

import json
import platform
from collections.abc import Sequence
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
    by_stage: dict[str, float]
    """Seconds of all jobs of a run, one after another, of each stage that has some."""
    measured: int
    """Earlier artifacts made on this machine that it is from."""
    guessed: list[str]
    """Stages of which nothing was ever made here: by `device.flops` where their operations are known."""

    @property
    def seconds(self) -> float:
        return sum(self.by_stage.values())


def record(
    stage: Stage,
    plan: Plan,
    instances: Sequence[Instance],
    device: str,
    seconds: float,
    cpu_seconds: float,
    part: str = "",
) -> None:
    """Adds a line for each artifact of a job that took `seconds`, and `cpu_seconds` of all cores, on a device: its
    share of them and of the work, and, of the job that ends what several have shared, what each `part` took. In one
    write, so that several jobs may do so at once."""
    n, work = len(instances), work_of(stage, plan, instances)
    parts = _parts(plan.results, stage.name) if stage.parts is not None and not part else {}
    text = ""
    for instance in instances:
        took, cpu = parts.get(instance.key, (0.0, 0.0))
        line = _line(plan, instance, device, seconds / n + took, cpu_seconds / n + cpu, work / n, n)
        text += json.dumps(line | ({"part": part} if part else {})) + "\n"
    with open(Path(plan.results) / FILE, "a") as file:
        file.write(text)


def _line(
    plan: Plan, instance: Instance, device: str, seconds: float, cpu_seconds: float, work: float, sharing: int
) -> dict[str, Any]:
    return {
        "experiment": plan.experiment,
        "stage": instance.stage,
        "key": instance.key,
        "host": platform.node(),
        "device": device,
        "seconds": round(seconds, 3),
        "cpu_s": round(cpu_seconds, 3),
        "gpu_s": round(gpu_seconds(device, seconds), 3),
        "work": work,
        "sharing": sharing,
    }


def gpu_seconds(device: str, seconds: float) -> float:
    """A job has its GPU as long as it runs."""
    return seconds if device.startswith("cuda") else 0.0


def lines(results: str | Path) -> list[dict[str, Any]]:
    """All that was ever made below a results folder, the oldest first; lines that a power cut tore are left out."""
    return [line for line in _all_lines(results) if "part" not in line]


def _parts(results: str | Path, stage: str) -> dict[str, tuple[float, float]]:
    """Of each artifact of a stage, seconds and time of cores that parts of it took since it was last made."""
    found: dict[str, tuple[float, float]] = {}
    for line in _all_lines(results):
        if line["stage"] == stage:
            seconds, cpu = found.pop(line["key"], (0.0, 0.0))
            if "part" in line:
                found[line["key"]] = seconds + line["seconds"], cpu + line["cpu_s"]
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
    by_stage, measured, guessed = dict[str, float](), 0, list[str]()
    for stage, keys in plan.to_make.items():
        if not keys:
            continue
        here = (platform.node(), plan.device_of(stage))
        alike = [m for m in made if (m.get("host"), m.get("device")) == here and m["stage"] == stage and "sharing" in m]
        jobs = [[plan.stages[stage][key] for key in keys] for keys in plan.jobs(stage)]
        if alike:
            start, rate = _fit(alike[-RECENT:])
            by_stage[stage] = sum(start + rate * work_of(stages()[stage], plan, job) for job in jobs)
            measured += len(alike[-RECENT:])
        else:
            operations = sum(stages()[stage].operations(plan, job) for job in jobs)
            by_stage[stage] = len(jobs) * START_SECONDS + operations / float(plan.device["flops"])
            guessed.append(stage)
    return Prediction(by_stage, measured, guessed)


def _fit(made: list[dict[str, Any]]) -> tuple[float, float]:
    """Seconds that a job takes to start, and for each unit of its work: those that leave the least squares of relative
    errors, none of them negative. Jobs of one size do not tell the two apart: all is then work."""
    job_seconds = [max(m["seconds"], 1e-3) * m["sharing"] for m in made]
    starts = [1 / s for s in job_seconds]
    rates = [m["work"] * m["sharing"] / s for m, s in zip(made, job_seconds, strict=True)]
    ss, rr = (sum(v * v for v in values) for values in (starts, rates))
    sr = sum(a * b for a, b in zip(starts, rates, strict=True))
    determinant = ss * rr - sr * sr
    if determinant > 1e-3 * ss * rr:
        start = (sum(starts) * rr - sum(rates) * sr) / determinant
        rate = (ss * sum(rates) - sr * sum(starts)) / determinant
        if start >= 0 and rate >= 0:
            return start, rate
        if rate < 0:
            return sum(starts) / ss, 0.0
    return 0.0, sum(rates) / rr


def work_of(stage: Stage, plan: Plan, instances: Sequence[Instance]) -> float:
    """What the time of a job goes by: operations, else bytes, else 1 for each artifact."""
    if n_operations := stage.operations(plan, instances):
        return float(n_operations)
    return float(sum(stage.n_bytes(plan, instance) for instance in instances) or len(instances))
