"""The job that draws the figures of an experiment: each from what its own reader finds in the job's artifacts."""

import pkgutil
from pathlib import Path
from typing import Any

import matplotlib

from saeflow.figures.registry import declared, find
from saeflow.figures.style import STYLE, save_figure, save_table
from saeflow.jobs.job import Job
from saeflow.planning.stages import listed


def draw(jobs: list[Job]) -> str:
    """Draws what each job asks for, and says what it wrote. Raises `ValueError` for a figure that is not known, or of
    a stage that the experiment has not."""
    return "\n".join(_draw(job) for job in jobs)


def _draw(job: Job) -> str:
    wanted = job.config["figures"]
    figures = [find(name) for name in wanted]
    possible = [one.name for one in declared().values() if job.instance.needs.get(one.stage)]
    if impossible := [one.declared for one in figures if one.declared.name not in possible]:
        raise ValueError(
            f"this experiment has no artifacts of {', '.join(dict.fromkeys(one.stage for one in impossible))} for "
            f"{', '.join(one.name for one in impossible)}; from what it has can be drawn: {', '.join(possible)}"
        )
    tables: list[str] = []
    with job.writing() as folder:
        for name in listed(job.instance.needs):
            table, page = pkgutil.resolve_name(name)(job)
            save_table(table, folder, "table")
            (folder / "table.html").write_text(page, encoding="utf-8")
            tables += ["table.csv", "table.html"]
        data: dict[Any, Any] = {}
        for one in figures:
            if one.reads not in data:
                data[one.reads] = one.reads(job)
                for name, table in getattr(data[one.reads], "extra_tables", {}).items():
                    save_table(table, folder, name)
                    tables.append(f"{name}.csv")
            draw_figure(one.declared.name, data[one.reads], folder)
    written = " and ".join([f"{', '.join(wanted)} (.png, .pdf, .csv)", *tables])
    return f"wrote {written} to {job.path}/"


def draw_figure(name: str, data: Any, folder: Path) -> None:
    """Draws one figure of its data in the common style and saves it."""
    with matplotlib.rc_context(STYLE):
        save_figure(*find(name).draw(data), folder, name)
