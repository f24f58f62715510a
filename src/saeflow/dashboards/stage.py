"""The stages `dashboards` and `comparisons`: pages of each dictionary, and of those at one place beside each other."""

from collections.abc import Sequence
from typing import Any

from saeflow.jobs.job import Job
from saeflow.planning.digests import canonical
from saeflow.planning.expansion import Expansion, PlannedPoint, short_hook
from saeflow.planning.graph import Instance, Plan
from saeflow.planning.stages import Stage
from saeflow.training.stage import dictionaries_mb

Looked = tuple[PlannedPoint, str]
"""A point, and the key of the dashboard of one of its dictionaries."""


def expand(expansion: Expansion) -> None:
    """A dashboard for every table of latents, where dashboards are asked for."""
    for planned in expansion.points:
        if not planned.point.dashboards.make:
            continue
        made = []
        for found in planned.dictionaries:
            name = f"{found.key} {found.part}"
            if name in planned.keys.get("features", {}):
                needs = {"features": [planned.keys["features"][name]], found.stage: [found.key]}
                needs |= _of_dictionary(planned, name)
                part = {"part": found.part} if found.part else {}
                made.append(planned.add("dashboards", found.label, needs, part, name=name))
        if len(made) == 2 and "jacobian" in planned.keys:
            # Sides of a pair name each other. Their tables have the same study, so the one's key decides the other's.
            for side, key, partner in zip(("input", "output"), made, reversed(made), strict=True):
                planned.plan.stages["dashboards"][key].sources.update(side=side, partner=partner)


def _of_dictionary(planned: PlannedPoint, name: str) -> dict[str, list[str]]:
    """What was measured of a dictionary."""
    stages = ("evaluate", "recover")
    return {stage: [planned.keys[stage][name]] for stage in stages if name in planned.keys.get(stage, {})}


def expand_comparisons(expansion: Expansion) -> None:
    """One of all dictionaries with a dashboard that write at one place of one model, looked up on the same tokens."""
    places: dict[str, dict[str, Looked]] = {}
    for planned in expansion.points:
        for found in planned.dictionaries:
            name = f"{found.key} {found.part}"
            if key := planned.keys.get("dashboards", {}).get(name):
                table = expansion.plan.instance("features", planned.keys["features"][name])
                same = [table.config["model"], table.config["features"], table.needs["tokens"], found.hook_name]
                group = places.setdefault(canonical([*same, found.head]), {})
                if name not in group or "jacobian" in table.needs:  # of one with and without partners, that with
                    group[name] = planned, key
    for group in places.values():
        if len(group) > 1:
            _add_comparison(group)


def _add_comparison(group: dict[str, Looked]) -> None:
    needs: dict[str, list[str]] = {"dashboards": sorted(key for _, key in group.values())}
    for name, (planned, _) in sorted(group.items(), key=lambda one: one[1][1]):
        found = next(d for d in planned.dictionaries if f"{d.key} {d.part}" == name)
        own = {"features": [planned.keys["features"][name]], found.stage: [found.key]} | _of_dictionary(planned, name)
        for stage, keys in own.items():
            needs[stage] = list(dict.fromkeys([*needs.get(stage, []), *keys]))
    of = planned.plan.stages["foreign"]
    labels = {key: of[key].sources["label"] for key in needs.get("foreign", ())}  # what its pages call them
    extra = {"labels": labels} if labels else {}
    planned.add("comparisons", short_hook(found.hook_name), needs, extra, name=f"{found.hook_name} {found.head}")


def together(plan: Plan, instance: Instance) -> list[Any]:
    """All: each takes a second, as long as a process takes to start."""
    return []


def resources(plan: Plan, instances: Sequence[Instance]) -> dict[str, int]:
    """The rows of 256 latents, and of all what the table shows."""
    return {"mem_mb": 4000, "runtime": 60}


def resources_comparisons(plan: Plan, instances: Sequence[Instance]) -> dict[str, int]:
    return {"mem_mb": 4000 + round(3 * dictionaries_mb(plan, instances)), "runtime": 120}


def work(jobs: list[Job]) -> str:
    from saeflow.dashboards.job import dashboard

    return "\n".join(f"{job.path}/index.html: {dashboard(job)['name']['title']}" for job in jobs)


def work_comparisons(jobs: list[Job]) -> str:
    from saeflow.dashboards.comparisons import compare

    return "\n".join(f"{job.path}/index.html: {compare(job)} dictionaries beside each other" for job in jobs)


STAGES = (
    Stage(
        "dashboards",
        ("dashboard", "dashboards"),
        work,
        expand,
        needs=("features", "train", "foreign", "evaluate", "recover"),
        after=("heads",),
        together=together,
        most=lambda instance: 16,
        resources=resources,
        target=True,
    ),
    Stage(
        "comparisons",
        ("comparison of dictionaries", "comparisons of dictionaries"),
        work_comparisons,
        expand_comparisons,
        reads=("dashboards.matches",),
        needs=("dashboards", "features", "train", "foreign", "evaluate", "recover"),
        resources=resources_comparisons,
        target=True,
    ),
)
