"""What a run makes, which artifacts share a job, and what a job needs of the machine."""

import logging
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from saeflow.config.device import n_gpus
from saeflow.planning.digests import canonical
from saeflow.planning.graph import Plan
from saeflow.planning.history import measured_seconds
from saeflow.planning.parts import Part
from saeflow.planning.stages import Stage, stages
from saeflow.storage.receipts import is_damaged, problem, read_receipt, set_aside

log = logging.getLogger("saeflow")


def look(plan: Plan) -> None:
    """Looks at the disk and decides what a run makes, and by which jobs.

    What nothing needs is made where it is missing, and what is damaged, unless it is but a cache; of everything else
    only what is missing for something that is to be made. A finished artifact is never made again because something
    that it was made from is gone.
    """
    plan.found = {name: [key for key in table if not lacks(plan, name, key)] for name, table in plan.stages.items()}
    there = {(name, key) for name, keys in plan.found.items() for key in keys}
    wanted = [
        (name, key)
        for name, stage in stages().items()
        for key in plan.stages[name]
        if stage.target or (not stage.cached and (name, key) not in there and is_damaged(plan.folder(name, key)))
    ]
    making: set[tuple[str, str]] = set()
    while wanted:
        one = wanted.pop()
        if one not in there and one not in making:
            making.add(one)
            needs = plan.stages[one[0]][one[1]].needs
            wanted += [(stage, key) for stage, keys in needs.items() for key in keys]
    plan.to_make = {name: [key for key in table if (name, key) in making] for name, table in plan.stages.items()}
    assign_batches(plan)
    plan.forget()
    assign_parts(plan)


def lacks(plan: Plan, name: str, key: str) -> tuple[Path, str] | None:
    """What an artifact has lost, and in which words; None where it is there, as far as can be seen without reading."""
    folder = plan.folder(name, key)
    if found := problem(folder, read_receipt(folder)):
        return found
    return None if stages()[name].whole(folder) else (folder, "what lies outside of it is gone")


def set_aside_broken(plan: Plan) -> None:
    """Sets receipts aside that do not hold, since a rule only looks whether the file is there; logs each. For the same
    reason removes marks of parts that are to be made."""
    for name, jobs in plan.parts.items():
        for file in (file for key in jobs for file in plan.marks(name, key)):
            Path(file).unlink(missing_ok=True)
    for name, table in plan.stages.items():
        for key in table.keys() - set(plan.found[name]):
            if (found := lacks(plan, name, key)) and set_aside(plan.folder(name, key)):
                log.warning("%s: %s; %s counts as missing", *found, plan.folder(name, key))


def assign_batches(plan: Plan) -> None:
    """Groups the instances of stages that share jobs: what is to be made, what is there, and what is neither there nor
    needed, each for themselves. Of the last two a job runs only where Snakemake is told to force it."""
    plan.batches = {}
    for name, stage in stages().items():
        if stage.together is not None:
            making, there = set(plan.to_make[name]), set(plan.found[name])
            absent = [key for key in plan.stages[name] if key not in making and key not in there]
            plan.batches[name] = [
                batch
                for keys in (plan.to_make[name], plan.found[name], absent)
                for batch in _batches(plan, stage, keys)
            ]


def assign_parts(plan: Plan) -> None:
    """Of jobs that are to be done in parts, those that are missing."""
    plan.parts = {}
    for name, stage in stages().items():
        wanted = int(plan.device.get("parts", {}).get(name) or 1)
        if stage.parts is None or wanted == 1:
            continue
        for keys in plan.jobs(name):
            instances = [plan.stages[name][key] for key in keys]
            of = min(wanted, stage.parts.most(plan, instances))
            parts = [Part(number, of) for number in range(1, of + 1)]
            if of > 1 and (missing := stage.parts.missing(plan, instances, parts)):
                plan.parts.setdefault(name, {})[keys[0]] = list(map(str, missing))


def _batches(plan: Plan, stage: Stage, keys: list[str]) -> list[list[str]]:
    assert stage.together is not None
    table = plan.stages[stage.name]
    size = int(plan.device.get("batch", {}).get(stage.name, 1 << 30))
    groups: dict[tuple[str, int], list[str]] = {}
    for key in keys:
        group = canonical(stage.together(plan, table[key])), min(size, stage.most(table[key]))
        groups.setdefault(group, []).append(key)
    new = []
    for (_, most), sharing in groups.items():
        sharing.sort(key=lambda key: stage.order(table[key]))
        new += _even_parts(sharing, [stage.cost(table[key]) for key in sharing], most)
    return new


def _even_parts(keys: list[str], costs: list[float], most: int) -> list[list[str]]:
    """As few parts as can be with at most `most` keys each, in order, of about equal cost."""
    parts: list[list[str]] = []
    for left in range(-(-len(keys) // most), 0, -1):
        budget, end, total = sum(costs) / left, 0, 0.0
        while end < min(most, len(keys)) and (total + costs[end] / 2 <= budget or len(keys) - end > most * (left - 1)):
            total += costs[end]
            end += 1
        parts.append(keys[:end])
        keys, costs = keys[end:], costs[end:]
    return parts


def resources(plan: Plan, name: str, keys: Sequence[str], attempt: int = 1, parts: int = 1) -> dict[str, Any]:
    """Stage, device, GPUs, `mem_mb` and `runtime` of the job that makes `keys`, or of one of so many parts of it, which
    takes its share of the time, an hour at least: never a reason to rerun. The time is that of the sizes of what it
    makes, or twice that of earlier jobs on such devices where these were slower.

    What ended for want of memory or time, or was preempted, is tried again with `attempt` times as much of both, but
    not with more than `device.most` once that is enough for the first try.
    """
    device, instances = plan.device_of(name), [plan.stages[name][key] for key in keys]
    found: dict[str, Any] = dict(stages()[name].resources(plan, instances)) if instances else {}
    if "runtime" in found:
        found["runtime"] = max(found["runtime"], round(2 * measured_seconds(stages()[name], plan, instances) / 60))
    if parts > 1 and "runtime" in found:
        found["runtime"] = min(found["runtime"], max(60, -(-found["runtime"] // parts)))
    configured = {unit: plan.device.get(unit, {}).get(name) for unit in ("mem_mb", "runtime")}
    found |= {unit: value for unit, value in configured.items() if value is not None}
    for unit in found.keys() & configured.keys():
        most = plan.device.get("most", {}).get(unit) or attempt * found[unit]
        found[unit] = max(found[unit], min(attempt * found[unit], most))
    return found | {"stage": name, "device": device} | _gpu(plan, device)


def _gpu(plan: Plan, device: str) -> dict[str, Any]:
    """As the executor of Slurm reads it: `--gpus=1`, `--gpus=<gpu_model>:1`, or else `--gres=<gres>`; where a model is
    spread over several GPUs, with their number."""
    if not device.startswith("cuda"):
        return {"gpu": 0}
    if gres := plan.device.get("gres"):
        several = n_gpus(device) > 1
        return {"gpu": 0, "gres": re.sub(r"(:\d+)?$", f":{n_gpus(device)}", gres, count=1) if several else gres}
    model = plan.device.get("gpu_model")
    return {"gpu": n_gpus(device)} | ({"gpu_model": model} if model else {})
