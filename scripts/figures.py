"""Draws the figures of an experiment; `python -m saeflow.figures` lists all that there are."""

from saeflow.jobs.command import run
from saeflow.jobs.job import Job


def figures(jobs: list[Job]) -> str:
    from saeflow.figures.job import draw

    return draw(jobs)


if __name__ == "__main__":
    run("figures", figures)
