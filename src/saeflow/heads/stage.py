"""The stage `heads`: how the heads of a layer, and the dictionaries of them, share and mix what they write."""

import re
from collections.abc import Sequence

from saeflow.config import ConfigError
from saeflow.dictionaries.kinds.trained import TrainedConfig
from saeflow.figures.registry import declared
from saeflow.jobs.job import Job
from saeflow.models.resources import operations as running_operations
from saeflow.models.resources import running
from saeflow.planning.digests import canonical
from saeflow.planning.expansion import Expansion, PlannedPoint, short_hook
from saeflow.planning.graph import Instance, Plan
from saeflow.planning.stages import Stage
from saeflow.training.stage import dictionaries_mb, dictionaries_operations

SHOWN = {
    "heads": ("norms", "spectra", "interference", "top_pairs", "lifted", "decomposition", "coefficients", "agreement"),
    "concat": ("shares", "measures", "decomposition", "coefficients", "agreement", "attribution"),
}
"""Kinds of dictionary, and the figures `heads_...` that have nothing to show without one."""
NOUNS = {"heads": "dictionary of single heads (dictionary=heads)", "concat": "dictionary of all heads at once"}


def expand(expansion: Expansion) -> None:
    """One study of all dictionaries of a layer's heads, if some are of single heads or a figure asks for it."""
    figures = declared()
    asked = [name for name in expansion.figures if name in figures and figures[name].stage == "heads"]
    groups: dict[str, list[PlannedPoint]] = {}
    apart: list[PlannedPoint] = []
    for planned in expansion.points:
        point, hook = planned.point, planned.point.site.hook_name
        at_heads = re.fullmatch(r"blocks\.\d+\.attn\.hook_z", hook) and point.model.tracr is None
        if at_heads and point.site.head is not None:
            apart.append(planned)
        elif at_heads and "heads" in point.dictionary.studies:
            tokens = planned.keys["tokens"]["held_out"]
            groups.setdefault(canonical([planned.tree["heads"], planned.tree["model"], hook, tokens]), []).append(
                planned
            )
    _check_figures(asked, groups, apart, expansion.figures_asked)
    for points in groups.values():
        if not asked and not any(map(_is_by_head, points)):
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
        _check_latents(points)
        needs["tokens"] = [points[0].keys["tokens"]["held_out"]]
        points[0].add("heads", short_hook(hook), needs, {"hook_name": hook}, name=hook)


def _check_latents(points: list[PlannedPoint]) -> None:
    """Raises `ConfigError` where a latent is named that a dictionary which is trained here will not have."""
    for planned in points:
        config = planned.point.dictionary
        if isinstance(config, TrainedConfig):
            n_heads, d_head = planned.geometry.hook_size(planned.point.site.hook_name)
            d_sae = n_heads * config.width(d_head) if config.by_head else config.width(n_heads * d_head)
            planned.point.heads.check_latents(d_sae, planned.dictionaries[0].label)


def _is_by_head(planned: PlannedPoint) -> bool:
    return any(found.part for found in planned.dictionaries)


def _check_figures(
    asked: list[str], groups: dict[str, list[PlannedPoint]], apart: list[PlannedPoint], named: bool
) -> None:
    """Raises `ConfigError` for figures that can show nothing: where all dictionaries are of one head each, and of those
    that were `named` for this run, where no dictionary is of the kind that they show."""
    if asked and apart and not groups:
        raise ConfigError(
            f"figures=[{','.join(asked)}] show all heads of a layer, and these dictionaries are of one head each "
            "(site.head); train dictionary=heads, or read those of all heads as one with dictionary.heads=[...]"
        )
    there = {"heads" if _is_by_head(planned) else "concat" for points in groups.values() for planned in points}
    for kind in SHOWN.keys() - there if there and named else ():
        empty = [name for name in asked if name.removeprefix("heads_") in SHOWN[kind]]
        if empty:
            raise ConfigError(
                f"figures=[{','.join(empty)}] show nothing without a {NOUNS[kind]}; add one, or leave these figures out"
            )


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
        version=3,
        needs=("train", "foreign", "tokens"),
        after=("stack",),
        operations=operations,
        resources=resources,
        drawn="where_asked",
        table=lambda instance: True,
    ),
)
