"""The stage `figures`: all figures of an experiment, from all that it measured."""

from saeflow.figures.registry import declared
from saeflow.jobs.job import Job
from saeflow.planning.expansion import Expansion, add_instance
from saeflow.planning.stages import Stage, stages


def expand(expansion: Expansion) -> None:
    plan, known = expansion.plan, declared()
    asked = {known[figure].stage for figure in expansion.figures if figure in known}
    drawn = {name: stage.drawn for name, stage in stages().items() if stage.drawn != "never"}
    there = [s for s in drawn if plan.stages[s] and (s in asked or drawn[s] != "where_asked")]
    needs = {stage: sorted(plan.stages[stage]) for stage in there}

    def wanted(figure: str) -> bool:
        """Figures of a stage that has nothing here are left out; unknown ones are kept, and refused when drawn."""
        stage = known[figure].stage if figure in known else ""
        return stage in needs or drawn.get(stage, "always") == "always"

    figures = [figure for figure in expansion.figures if wanted(figure)]
    add_instance(plan, "figures", plan.experiment, {"figures": figures}, needs, {})


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
        version=2,
        target=True,
    ),
)
