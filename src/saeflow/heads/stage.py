"""The stage `heads`: how the heads of a layer, and the dictionaries of them, share and mix what they write."""

import re
from collections.abc import Sequence

from saeflow.config import ConfigError
from saeflow.figures.registry import declared
from saeflow.jobs.job import Job
from saeflow.models.resources import operations as running_operations
from saeflow.models.resources import running
from saeflow.planning.digests import canonical
from saeflow.planning.expansion import Expansion, PlannedPoint, short_hook
from saeflow.planning.graph import Instance, Plan
from saeflow.planning.stages import Stage
from saeflow.training.stage import dictionaries_mb, dictionaries_operations


def expand(expansion: Expansion) -> None:
    """One study of all dictionaries of a layer's heads, if some are of single heads or a figure asks for it."""
    figures = declared()
    asked = any(name in figures and figures[name].stage == "heads" for name in expansion.figures)
    groups: dict[str, list[PlannedPoint]] = {}
    for planned in expansion.points:
        point, hook = planned.point, planned.point.site.hook_name
        every_head = re.fullmatch(r"blocks\.\d+\.attn\.hook_z", hook) and point.site.head is None
        if every_head and point.model.tracr is None and "heads" in point.dictionary.studies:
            tokens = planned.keys["tokens"]["held_out"]
            groups.setdefault(canonical([planned.tree["heads"], planned.tree["model"], hook, tokens]), []).append(
                planned
            )
    for points in groups.values():
        if not asked and not any(planned.point.dictionary.by_head for planned in points):
            continue
        needs: dict[str, list[str]] = {}
        for stage in ("train", "foreign"):
            if keys := {p.dictionaries[0].key for p in points if p.dictionaries[0].stage == stage}:
                needs[stage] = sorted(keys)
        hook, geometry = points[0].point.site.hook_name, points[0].geometry
        if geometry.norms != "before":
            raise ConfigError(
                f"the study of the heads at {hook} needs a layer to write the sum of what its heads write, and "
                f"{geometry.architecture} normalises that sum; use a model without norms after attention, or "
                "dictionaries of all heads together, such as dictionary=topk"
            )
        needs["tokens"] = [points[0].keys["tokens"]["held_out"]]
        points[0].add("heads", short_hook(hook), needs, {"hook_name": hook}, name=hook)


def operations(plan: Plan, instances: Sequence[Instance]) -> float:
    """The model twice over the held-out tokens, and the dictionaries."""
    passes = sum(running_operations(plan, instance, passes=2) for instance in instances)
    return passes + dictionaries_operations(plan, instances)


def resources(plan: Plan, instances: Sequence[Instance]) -> dict[str, int]:
    """4 GB for the moments and pairs of heads, and the dictionaries three times: as they are, and what pairs of their
    latents share; two hours at least."""
    held = 4000 + 3 * dictionaries_mb(plan, instances)
    found = running(plan, instances, operations(plan, instances), instances[0].config["heads"]["batch_rows"], held)
    return found | {"runtime": max(120, found["runtime"])}


def work(jobs: list[Job]) -> str:
    from saeflow.heads.job import heads_job

    lines = []
    for job in jobs:
        s = heads_job(job)
        lines.append(
            f"{job.path}/: {s['n_heads']} heads of layer {s['layer']}, {len(s['dictionaries'])} dictionaries, "
            f"{s['n_tokens']} tokens; median cosine of two heads' outputs {s['median_cosine']:.3f} (rotated "
            f"{s['median_cosine_rotated']:.3f})"
        )
    return "\n".join(lines)


STAGES = (
    Stage(
        "heads",
        ("study of heads", "studies of heads"),
        work,
        expand,
        reads=("heads", "model"),
        version=2,
        needs=("train", "foreign", "tokens"),
        after=("stack",),
        operations=operations,
        resources=resources,
        drawn="where_there",
        table=True,
    ),
)
