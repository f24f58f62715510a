"""The stages `groundtruth` and `recover`: models whose algorithm is known, and dictionaries compared with it."""

from collections.abc import Sequence
from typing import Any

from saeflow.jobs.job import Job
from saeflow.models.resources import operations, running
from saeflow.planning.expansion import Expansion
from saeflow.planning.graph import Instance, Plan
from saeflow.planning.stages import Stage
from saeflow.training.stage import dictionaries_mb


def expand_recover(expansion: Expansion) -> None:
    for planned in expansion.points:
        if planned.point.model.tracr is None:
            continue
        for found in planned.dictionaries:
            needs = {found.stage: [found.key], "tokens": [planned.keys["tokens"]["held_out"]]} | planned.needed(
                "groundtruth"
            )
            part = {"part": found.part} if found.part else {}
            planned.add("recover", found.label, needs, part, name=f"{found.key} {found.part}")


def together(plan: Plan, instance: Instance) -> list[Any]:
    """Those of one model on the same rows."""
    return [instance.config["model"], None, instance.needs["tokens"]]


def resources_recover(plan: Plan, instances: Sequence[Instance]) -> dict[str, int]:
    """The model as it is, and with each dictionary in it, on all rows at once."""
    rows = plan.instance("tokens", instances[0].needs["tokens"][0]).config["n_rows"]
    n_operations = operations(plan, instances[0], passes=1 + len(instances))
    return running(plan, instances, n_operations, rows, dictionaries_mb(plan, instances))


def work_groundtruth(jobs: list[Job]) -> str:
    from saeflow.groundtruth.job import make_model

    return "\n".join(map(make_model, jobs))


def work_recover(jobs: list[Job]) -> str:
    from saeflow.groundtruth.job import recover_jobs

    lines = [
        f"{job.path}/: {s['n_live']} live latents, {s['n_distinct']} of them distinct, recovery "
        f"{'none' if s['recovery'] is None else format(s['recovery'], '.3f')}, accuracy {s['accuracy_replaced']:.3f} "
        f"(clean {s['accuracy_clean']:.3f})"
        for job, s in zip(jobs, recover_jobs(jobs), strict=True)
    ]
    return "\n".join(lines)


STAGES = (
    Stage(
        "groundtruth",
        ("model of a case", "models of a case"),
        work_groundtruth,
        lambda expansion: None,  # its models are what points begin with: see `source`
        reads=("model.tracr",),
    ),
    Stage(
        "recover",
        ("comparison with the truth", "comparisons with the truth"),
        work_recover,
        expand_recover,
        reads=("model",),
        version=4,
        needs=("train", "foreign", "tokens", "groundtruth"),
        after=("blind",),
        resources=resources_recover,
        together=together,
        drawn="always",
        listed="saeflow.evaluation.overview:overview",
    ),
)
