"""What jobs have made below a results folder, and how long it took: `made.jsonl`, a line an artifact.

It outlives artifacts that are deleted. It is what tells "deleted" from "new", and what predictions of time are from; no
result depends on it, and it may be deleted too.
"""

import json
import platform
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

from saeflow.config.device import n_gpus
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
    memory_mb: dict[str, float]
    """Of the largest job of each stage: by what earlier ones here had at most, else what it asks for; stages that
    neither is known of are left out."""

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
    peak_bytes: int,
    part: str = "",
) -> None:
    """Adds a line for each artifact of a job that took `seconds`, and `cpu_seconds` of all cores, on a device, and had
    `peak_bytes` of memory: its share of the times and of the work, and, of the job that ends what several have shared,
    what each `part` took. In one write, so that several jobs may do so at once."""
    memory = {"peak_mb": round(1e-6 * peak_bytes), "asked_mb": asked_mb(stage, plan, instances)}
    n, work = len(instances), work_of(stage, plan, instances)
    parts = _parts(plan.results, stage.name) if stage.parts is not None and not part else {}
    text = ""
    for instance in instances:
        took, cpu = parts.get(instance.key, (0.0, 0.0))
        line = _line(plan, instance, device, seconds / n + took, cpu_seconds / n + cpu, work / n, n) | memory
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
    """A job has its GPUs as long as it runs."""
    return n_gpus(device) * seconds


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
    by_stage, measured, guessed, memory = dict[str, float](), 0, list[str](), dict[str, float]()
    for name, keys in plan.to_make.items():
        if not keys:
            continue
        stage, here = stages()[name], (platform.node(), plan.device_of(name))
        of_stage = [m for m in made if m["stage"] == name and "sharing" in m]
        alike = [m for m in of_stage if (m.get("host"), m.get("device")) == here][-RECENT:]
        jobs = [[plan.stages[name][key] for key in keys] for keys in plan.jobs(name)]
        if alike:
            by_stage[name] = sum(_seconds(alike, work_of(stage, plan, job)) for job in jobs)
            measured += len(alike)
        else:
            operations = sum(stage.operations(plan, job) for job in jobs)
            by_stage[name] = len(jobs) * START_SECONDS + operations / float(plan.device["flops"])
            guessed.append(name)
        held = [(m["peak_mb"], m["asked_mb"]) for m in alike if "peak_mb" in m]
        start, rate = _fit(held) if held else (0.0, 1.0)
        if most := max(start + rate * asked_mb(stage, plan, job) for job in jobs):
            memory[name] = most
    return Prediction(by_stage, measured, guessed, memory)


def measured_seconds(stage: Stage, plan: Plan, instances: Sequence[Instance]) -> float:
    """What a job may take by earlier ones on devices of the same kind, wherever they ran; 0 where there are none. Looks
    at the disk once a minute at most."""
    file = Path(plan.results) / FILE
    if not file.is_file():
        return 0.0
    kind = _kind(plan.device_of(stage.name))
    known = _by_stage_and_kind(plan.results, file.stat().st_mtime // 60).get((stage.name, kind))
    return _seconds(known, work_of(stage, plan, instances)) if known else 0.0


@lru_cache(1)
def _by_stage_and_kind(results: str, minute: float) -> dict[tuple[str, str], list[dict[str, Any]]]:
    found: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for line in lines(results):
        if "sharing" in line and "device" in line:
            found.setdefault((line["stage"], _kind(line["device"])), []).append(line)
    return {name: alike[-RECENT:] for name, alike in found.items()}


def _kind(device: str) -> str:
    return device.split(":")[0]


def asked_mb(stage: Stage, plan: Plan, instances: Sequence[Instance]) -> int:
    """Memory that a job asks for by its sizes; 0 where the stage does not say."""
    return int(stage.resources(plan, instances).get("mem_mb", 0))


def _seconds(alike: list[dict[str, Any]], work: float) -> float:
    """What a job takes by others of its stage."""
    start, rate = _fit([(m["seconds"] * m["sharing"], m["work"] * m["sharing"]) for m in alike])
    return start + rate * work


def _fit(jobs: Sequence[tuple[float, float]]) -> tuple[float, float]:
    """Of what jobs took (seconds, say) and their work: what each takes to start, and for each unit of its work: those
    that leave the least squares of relative errors, none of them negative. Jobs of one size do not tell the two apart:
    all is then work."""
    starts = [1 / max(took, 1e-3) for took, _ in jobs]
    rates = [work / max(took, 1e-3) for took, work in jobs]
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
    return (0.0, sum(rates) / rr) if rr else (sum(starts) / ss, 0.0)


def work_of(stage: Stage, plan: Plan, instances: Sequence[Instance]) -> float:
    """What the time of a job goes by: operations, else bytes, else 1 for each artifact."""
    if n_operations := stage.operations(plan, instances):
        return float(n_operations)
    return float(sum(stage.n_bytes(plan, instance) for instance in instances) or len(instances))
