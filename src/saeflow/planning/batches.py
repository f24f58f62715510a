"""Which instances share a job, and what a job needs of the machine."""

from collections.abc import Sequence
from typing import Any

from saeflow.planning.digests import canonical
from saeflow.planning.graph import Plan
from saeflow.planning.stages import Stage, stages


def assign_batches(plan: Plan, previous: Plan | None) -> None:
    """Groups the instances of stages that share jobs and are not on disk.

    A batch of an earlier run whose artifacts are all there, and all wanted, is kept as it was: its rule stays the one
    that made them. What was made by a batch that is no longer whole is simply there, with no rule.
    """
    for name, stage in stages().items():
        if stage.together is None:
            continue
        table = plan.stages[name]
        kept: list[list[str]] = []
        plan.past[name] = []
        batched: set[str] = set()
        for batch in previous.batches.get(name, []) + previous.past.get(name, []) if previous else []:
            if batched.isdisjoint(batch) and all(plan.done(name, k) for k in batch):
                wanted = all(k in table for k in batch)
                (kept if wanted else plan.past[name]).append(batch)
                batched.update(batch if wanted else ())
        plan.batches[name] = kept + _new_batches(plan, stage, [k for k in table if k not in batched])


def _new_batches(plan: Plan, stage: Stage, keys: list[str]) -> list[list[str]]:
    """Of those that are not on disk."""
    assert stage.together is not None
    table = plan.stages[stage.name]
    size = int(plan.device.get("batch", {}).get(stage.name, 1 << 30))
    groups: dict[tuple[str, int], list[str]] = {}
    for key in keys:
        if not plan.done(stage.name, key):
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


def resources(plan: Plan, name: str, keys: Sequence[str]) -> dict[str, Any]:
    """Stage, device, `gpu`, `mem_mb` and `runtime` of the job that makes `keys`: never a reason to rerun."""
    device, instances = plan.device_of(name), [plan.stages[name][key] for key in keys]
    found: dict[str, Any] = dict(stages()[name].resources(plan, instances)) if instances else {}
    configured = {unit: plan.device.get(unit, {}).get(name) for unit in ("mem_mb", "runtime")}
    found |= {unit: value for unit, value in configured.items() if value is not None}
    return found | {"stage": name, "device": device, "gpu": int(device.startswith("cuda"))}
