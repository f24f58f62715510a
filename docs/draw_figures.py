"""Draws the figures of docs/figures anew, and writes the table beside each, from the experiments that they are of.

    make docs-figures              # all of them
    make docs-figures NAME=demo    # those of one experiment

`docs/figures/sources.json` is the table of what comes from where. Of a figure it has the overrides of its experiment,
the figure, the key of the experiment's figures when it was drawn, which changes with all that its numbers depend on,
and a hash of the code that drew it; of every other file the command that makes it, and why it is not made here. A test
compares both with those of today, and names the command that draws what is stale. Where code has changed and draws the
same, `python docs/draw_figures.py --same` notes that. `stale` says what is known to be so, until it is drawn anew.
"""

import argparse
import ast
import hashlib
import json
import shutil
import subprocess
import sys
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import demo_numbers

from saeflow.figures.job import draw_figure
from saeflow.figures.registry import declared, find
from saeflow.jobs.job import Job
from saeflow.planning.expansion import compose
from saeflow.planning.graph import Plan
from saeflow.planning.overrides import split

ROOT = Path(__file__).resolve().parents[1]
FOLDER = ROOT / "docs/figures"
SOURCES = FOLDER / "sources.json"
_NOT_LOOKS = ("saeflow.figures.registry",)
"""What modules of figures import from packages of figures, and a picture does not depend on."""


def sources() -> tuple[dict[str, dict[str, str]], dict[str, str]]:
    """The figures by the name of their files (`overrides`, `figure`, `key`, `code`, and why it is `stale`, where it is
    known to be), and how each other file is made."""
    held = json.loads(SOURCES.read_text())
    return held["figures"], held["others"]


def experiment(overrides: str) -> str:
    """The name in `experiment=name sweep=...`."""
    return split(overrides)[0].removeprefix("experiment=")


def planned(overrides: str, results: str | Path) -> tuple[Plan, str]:
    """The plan of today, and the key of its figures."""
    plan = compose(ROOT / "conf", split(overrides), str(results))
    (key,) = plan.stages["figures"]
    return plan, key


# -------------------------------------------------------------------- the code that draws
def code_of(figure: str) -> str:
    """A hash of the modules that draw a figure. Comments, docstrings and layout do not count."""
    told = [digest(_file(module).read_text()) for module in modules_of(figure)]
    return hashlib.sha256("".join(told).encode()).hexdigest()[:12]


def modules_of(figure: str) -> list[str]:
    """A figure's own module, and what these import of packages of figures."""
    found, waiting = list[str](), [declared()[figure].module]
    while waiting:
        module = waiting.pop(0)
        if module not in found:
            found.append(module)
            waiting += sorted(_of_figures(ast.parse(_file(module).read_text())))
    return found


def digest(source: str) -> str:
    """A hash of what a module does."""
    told = [(type(node).__name__, *_said(node)) for node in ast.walk(ast.parse(source))]
    return hashlib.sha256(repr(told).encode()).hexdigest()


def _file(module: str) -> Path:
    return (ROOT / "src").joinpath(*module.split(".")).with_suffix(".py")


def _of_figures(tree: ast.AST) -> set[str]:
    """Modules that are imported of packages of figures."""
    found = set[str]()
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module and "figures" in node.module.split("."):
            found |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return {module for module in found if _file(module).is_file()} - {*_NOT_LOOKS}


def _said(node: ast.AST) -> list[Any]:
    """Names and constants of a node, without docstrings."""
    if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str):
        node.value.value = ""
    values = [value for name, value in ast.iter_fields(node) if name not in ("kind", "type_comment")]
    return [value for value in values if not isinstance(value, ast.AST | list)]


# -------------------------------------------------------------------- drawing
def draw(overrides: str, wanted: dict[str, dict[str, str]], directory: Path, cores: int) -> None:
    """Runs what the experiment lacks, draws those figures of it, and fills in their keys and code."""
    snakemake = [sys.executable, "-m", "snakemake", "--cores", str(cores), "--directory", str(directory)]
    subprocess.run([*snakemake, "--config", f"hydra={overrides}"], cwd=ROOT, check=True)
    plan, key = planned(overrides, directory / "results")
    job, data = Job(plan.instance("figures", key), plan, "cpu"), dict[Any, Any]()
    for name, one in wanted.items():
        reads = find(one["figure"]).reads
        if reads not in data:
            data[reads] = reads(job)
        with TemporaryDirectory() as drawn:
            draw_figure(one["figure"], data[reads], Path(drawn))
            for ending in ("png", "csv"):
                shutil.copyfile(f"{drawn}/{one['figure']}.{ending}", FOLDER / f"{name}.{ending}")
        one |= {"key": key, "code": code_of(one["figure"])}
        one.pop("stale", None)
        sys.stdout.write(f"drew docs/figures/{name}.png\n")
    if overrides == "experiment=demo":
        demo_numbers.write(directory / "results")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--name", help="of one experiment; all of them")
    parser.add_argument("--directory", type=Path, default=ROOT, help="results are below it")
    parser.add_argument("--cores", type=int, default=1)
    parser.add_argument("--same", action="store_true", help="draw none, and note that today's code draws what is there")
    args = parser.parse_args()
    figures, others = sources()
    names = sorted({experiment(one["overrides"]) for one in figures.values()})
    if args.name and args.name not in names:
        parser.error(f"no figure in docs/ is of {args.name!r}; there are figures of {', '.join(names)}")
    asked = {name: one for name, one in figures.items() if args.name in (None, experiment(one["overrides"]))}
    for overrides in dict.fromkeys(one["overrides"] for one in asked.values()):
        mine = {name: one for name, one in asked.items() if one["overrides"] == overrides}
        if args.same:
            for one in mine.values():
                one["code"] = "" if "stale" in one else code_of(one["figure"])
        else:
            draw(overrides, mine, args.directory.resolve(), args.cores)
        SOURCES.write_text(json.dumps({"figures": figures, "others": others}, indent=2, ensure_ascii=False) + "\n")
    if not args.name:
        sys.stdout.write("not drawn here:\n" + "".join(f"  {file}: {how}\n" for file, how in others.items()))


if __name__ == "__main__":
    main()
