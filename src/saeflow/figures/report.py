"""What Snakemake's report opens on: what a study is, its main figure, what it cost, and what each stage made."""

import base64
import textwrap
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import quote

from saeflow.figures.captions import about, as_rst, text_of
from saeflow.figures.registry import declared
from saeflow.planning.explain import counted
from saeflow.planning.graph import Plan
from saeflow.planning.ledger import as_text, ledger
from saeflow.planning.parts import told_together, without_hash
from saeflow.storage.publish import publish_text

COSTS = (
    "What all artifacts took, by whichever run: wall and GPU time, a share of each job's, and CPU time, of all cores. "
    "``make ledger`` says also what the last run found instead of making it."
)
NAMES = 12
"""Members of a stage that are named."""
FIRST = Path("index.html")
"""Of several pages the one that leads to the others."""
COLUMNS = ("stage", "artifacts", "wall", "CPU", "GPU", "on disk", "memory")
"""Of the ledger, as many as fit beside Snakemake's graph."""


def description(plan: Plan, written: str | Path, folder: str | Path) -> str:
    """Path of the report's description, in `folder`: what is `written` (a folder of captions) in `workflow.rst`, and
    what is of this experiment."""
    (key,) = plan.stages["figures"]
    parts = [(Path(written) / "workflow.rst").read_text(encoding="utf-8"), *_main_figure(plan, key, written)]
    if rows := ledger(plan):
        shown = [name for name in COLUMNS if name != "GPU" or rows[-1].spent.gpu_s]
        parts += [COSTS, as_text(rows, shown)]
    parts.append("What each stage made, by name:")
    parts += [f"* **{stage}**: {as_rst(_members(stage, list(table)))}" for stage, table in plan.stages.items() if table]
    if pages := list(_pages(plan)):
        parts += ["Pages to read, as long as this report lies in the folder of results:", *pages]
    path = Path(folder).resolve() / "report.rst"
    publish_text(path, "\n\n".join(part.strip("\n") for part in parts) + "\n")
    return str(path)


def _main_figure(plan: Plan, key: str, written: str | Path) -> list[str]:
    """The first figure, within the page, and its caption; nothing where it has not been drawn."""
    instance = plan.stages["figures"][key]
    name = next((name for name in instance.config["figures"] if name in declared()), "")
    file = plan.folder("figures", key) / f"{name}.png"
    if not file.is_file():
        return []
    image = "\n   ".join(
        textwrap.wrap(base64.b64encode(file.read_bytes()).decode(), 100)
    )  # docutils takes no long lines
    data = as_rst(about(plan.results, instance.needs, declared()[name].stage))
    alt = as_rst(name.replace("_", " "))
    return [f".. image:: data:image/png;base64,{image}\n   :width: 100%\n   :alt: {alt}", text_of(name, written), data]


def _pages(plan: Plan) -> Iterator[str]:
    """A line a stage that has pages, of studies and of dictionaries, with a link to each, relative to the results."""
    for stage, table in plan.stages.items():
        links = []
        for key in table if stage != "figures" else ():
            folder = plan.folder(stage, key)
            pages = sorted(file.relative_to(folder) for file in folder.rglob("*.html"))
            for page in [FIRST] if FIRST in pages else pages:
                name = as_rst(without_hash(key.rsplit("/", 1)[-1]))
                links.append(f"`{name} <{quote(f'{stage}/{key}/{page}')}>`__")
        if links:
            more = [f"{len(links) - NAMES} more, which ``index.html`` has"] if len(links) > NAMES else []
            yield f"* **{stage}**: {', '.join([*links[:NAMES], *more])}"


def _members(stage: str, keys: list[str]) -> str:
    told = told_together([without_hash(key.rsplit("/", 1)[-1]) for key in keys], NAMES)
    return f"{counted(stage, len(keys))}{'' if told.startswith(':') else ' '}{told}"
