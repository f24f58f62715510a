"""The stage `figures`: all figures of an experiment, from all that it measured."""

import difflib
from collections.abc import Collection
from typing import Any

from saeflow.config import ConfigError
from saeflow.config.labels import file_safe
from saeflow.figures.registry import declared
from saeflow.jobs.job import Job
from saeflow.planning.expansion import Expansion, add_instance
from saeflow.planning.stages import Stage, stages


def expand(expansion: Expansion) -> None:
    plan, known = expansion.plan, declared()
    check_names(expansion.figures, known)
    asked = {known[figure].stage for figure in expansion.figures}
    drawn = {name: stage.drawn for name, stage in stages().items() if stage.drawn != "never"}
    there = [s for s in drawn if plan.stages[s] and (s in asked or drawn[s] != "where_asked")]
    needs = {stage: sorted(plan.stages[stage]) for stage in there}
    # An experiment of which a part is run has figures of the rest too: those are left out. What is asked for is not.
    left_out = [f for f in expansion.figures if known[f].stage not in needs]
    if impossible := [f for f in left_out if expansion.figures_asked or drawn.get(known[f].stage) == "always"]:
        possible = ", ".join(one.name for one in known.values() if one.stage in needs)
        wanted = " and ".join(dict.fromkeys(known[figure].stage for figure in impossible))
        raise ConfigError(
            f"figures=[{','.join(impossible)}] shows what the stage {wanted} makes, of which this experiment has "
            f"nothing; from what it has can be drawn: {possible or 'none'}"
        )
    figures = [figure for figure in expansion.figures if figure not in left_out]
    labels = {k: i.sources["label"] for table in plan.stages.values() for k, i in table.items() if "label" in i.sources}
    config = {"figures": figures} | ({"labels": labels} if labels else {})
    add_instance(plan, "figures", file_safe(plan.experiment), config, needs, {})


def check_names(figures: list[Any], known: Collection[str]) -> None:
    """Raises `ConfigError` for a name that no figure has, and for one that is given twice."""
    for number, figure in enumerate(figures):
        if figure not in known:
            named = [name for name in known if str(figure) and str(figure) in name]
            near = difflib.get_close_matches(str(figure), known, n=2) or named
            hint = f"did you mean {' or '.join(near)}? " if near else ""
            raise ConfigError(f"figures: no figure is called {figure}; {hint}there are: {', '.join(known)}")
        if figure in figures[:number]:
            raise ConfigError(f"figures: {figure} is given twice; name it once")


def version_of(config: dict[str, Any]) -> int | None:
    """Intervals came to `jacobian_reproduction` alone."""
    return 5 if "jacobian_reproduction" in config["figures"] else None


def work(jobs: list[Job]) -> str:
    from saeflow.figures.job import draw

    return draw(jobs)


STAGES = (
    Stage(
        "figures",
        ("set of figures", "sets of figures"),
        work,
        expand,
        says_all=True,
        version=4,
        version_of=version_of,
        target=True,
    ),
)
