"""The stage `features`: tables of what every latent of a dictionary is about."""

import os
from collections.abc import Sequence
from typing import Any

from saeflow.config import ConfigError
from saeflow.jobs.job import Job
from saeflow.models.resources import operations as running_operations
from saeflow.models.resources import running
from saeflow.planning.expansion import Expansion, PlannedPoint
from saeflow.planning.graph import Instance, Plan
from saeflow.planning.stages import Stage
from saeflow.training.stage import dictionaries_mb, dictionaries_operations


def expand(expansion: Expansion) -> None:
    """A table for every dictionary, where these or dashboards are asked for; what is part of another that has one is in
    that."""
    for planned in expansion.points:
        config = planned.point.features
        planned.tree["features"].pop("make", None)
        if not (config.make or planned.point.dashboards.make):
            continue
        whole = {found.key for found in planned.dictionaries if not found.part}
        pair = len(planned.dictionaries) == 2
        for found in planned.dictionaries:
            if found.part and found.key in whole:
                continue
            needs = {found.stage: [found.key]} | _text(planned) | planned.needed("groundtruth")
            needs |= planned.needed("jacobian") if pair else {}
            name = f"{found.key} {found.part}"
            if recovered := planned.keys.get("recover", {}).get(name):
                needs["recover"] = [recovered]
            planned.add("features", found.label, needs, {"part": found.part} if found.part else {}, name=name)


def _text(planned: PlannedPoint) -> dict[str, list[str]]:
    """The tokens on which latents are looked up, and where their activations are cached, these."""
    if planned.point.features.split == "held_out":
        return {"tokens": [planned.keys["tokens"]["held_out"]]}
    hooks = {planned.point.site.hook_name, *(found.hook_name for found in planned.dictionaries)}
    if missing := hooks - planned.keys["activations"].keys():
        raise ConfigError(
            f"features.split=train reads cached activations, and those at {missing.pop()} are not cached for a "
            "dictionary of another library; set features.split=held_out"
        )
    return planned.needed("activations") | {"tokens": [planned.keys["tokens"]["train"]]}


def together(plan: Plan, instance: Instance) -> list[Any]:
    """Those of one model on the same tokens share the pass."""
    return [instance.config["model"], instance.config["features"], instance.needs["tokens"]]


def operations(plan: Plan, instances: Sequence[Instance]) -> float:
    """Of the tokens that are looked at: the model once, and, where latents are ablated, once more clean and about once
    for each dictionary; and the dictionaries."""
    first, config = instances[0], instances[0].config["features"]
    tokens = plan.instance("tokens", first.needs["tokens"][0]).config
    share = min(1.0, config["n_tokens"] / (tokens["n_rows"] * tokens["tokens"]["context_size"]))
    passes = 1 + (1 + len(instances) if config["effect_samples"] else 0)
    all_tokens = running_operations(plan, first, logits=False, passes=passes)
    return share * (all_tokens + dictionaries_operations(plan, instances))


def resources(plan: Plan, instances: Sequence[Instance]) -> dict[str, int]:
    """The dictionaries twice, and 2 GB for where they fire and what is made of that."""
    held, batch_rows = 2 * dictionaries_mb(plan, instances) + 2000, instances[0].config["features"]["batch_rows"]
    return running(plan, instances, operations(plan, instances), batch_rows, held)


def work(jobs: list[Job]) -> str:
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # threads that wait would take the cores from those that work
    from saeflow.features.job import features_jobs

    lines = []
    for job, index in zip(jobs, features_jobs(jobs), strict=True):
        live = f"{index['n_live']} of them fire on {index['n_tokens']} tokens"
        lines.append(f"{job.path}/: {index['n_latents']} latents, {live}")
    return "\n".join(lines)


STAGES = (
    Stage(
        "features",
        ("table of latents", "tables of latents"),
        work,
        expand,
        reads=("features", "model"),
        needs=("train", "foreign", "activations", "tokens", "groundtruth", "jacobian", "recover"),
        together=together,
        operations=operations,
        resources=resources,
        target=True,
    ),
)
