"""The stage `features`: tables of what every latent of a dictionary is about."""

from collections.abc import Sequence
from typing import Any

from saeflow.config import ConfigError
from saeflow.jobs.job import Job
from saeflow.models.resources import running
from saeflow.planning.expansion import Expansion, PlannedPoint
from saeflow.planning.graph import Instance, Plan
from saeflow.planning.stages import Stage
from saeflow.training.stage import dictionaries_mb


def expand(expansion: Expansion) -> None:
    """A table for every dictionary, where they are asked for; what is part of another that has one is in that."""
    for planned in expansion.points:
        config = planned.point.features
        planned.tree["features"].pop("make", None)
        if not config.make:
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


def resources(plan: Plan, instances: Sequence[Instance]) -> dict[str, int]:
    """The model once over the tokens, and with each dictionary's latents ablated about once; the dictionaries twice,
    and 2 GB for where they fire and what is made of that."""
    held = 2 * dictionaries_mb(plan, instances) + 2000
    return running(plan, instances, 2 + len(instances), instances[0].config["features"]["batch_rows"], held)


def work(jobs: list[Job]) -> str:
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
        resources=resources,
        target=True,
    ),
)
