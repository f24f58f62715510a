"""The map of docs/architecture.md is of this country: every package, stage and function that it names is there."""

import pkgutil
import re
import tomllib
from pathlib import Path

import pytest

import saeflow
from saeflow.planning.stages import stages

ROOT = Path(__file__).resolve().parents[1]
PAGES = {page.name: page.read_text() for page in sorted((ROOT / "docs").glob("*.md"))} | {
    "README.md": (ROOT / "README.md").read_text()
}
NAMED = sorted(
    {(page, name) for page, text in PAGES.items() for name in re.findall(r"`(saeflow(?:\.\w+)+)[`(\[]", text)}
)


def test_the_table_of_packages_is_the_order_that_lint_checks() -> None:
    table = re.findall(r"^\| `(\w+)/?` \|", PAGES["architecture.md"], re.MULTILINE)
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    (layers,) = [c["layers"] for c in project["tool"]["importlinter"]["contracts"] if c["type"] == "layers"]
    assert table == layers[::-1]
    assert set(table) == {module.name for module in pkgutil.iter_modules(saeflow.__path__)}


@pytest.mark.parametrize(("page", "name"), NAMED)
def test_what_the_pages_name_is_there(page: str, name: str) -> None:
    if page.startswith("add_a_") and not name.startswith(("saeflow.planning", "saeflow.config", "saeflow.evaluation")):
        pytest.skip("a name of the example")
    if not (ROOT / "src" / name.replace(".", "/")).with_suffix(".py").exists():
        assert pkgutil.resolve_name(name) is not None


def test_files_that_the_pages_name_are_there() -> None:
    for page, text in PAGES.items():
        for link in re.findall(r"\]\((?!https?:|#)([^)#]+)", text):
            folder = ROOT if page == "README.md" else ROOT / "docs"
            assert (folder / link).exists(), f"{page} links to {link}"
    map_ = PAGES["architecture.md"]
    for path in re.findall(r"`((?:\w+/)+\w+\.(?:py|smk|toml|txt))`", map_):
        places = (ROOT / path, ROOT / "src/saeflow" / path, ROOT / "workflow" / path)
        assert any(place.exists() for place in places), path


def test_no_kind_and_no_stage_is_named_by_the_plan() -> None:
    """Planning and rules work from declarations alone."""
    kinds = {"transcoder", "jacobian", "foreign", "saelens"}
    for file in [*(ROOT / "src/saeflow/planning").glob("*.py"), ROOT / "workflow/rules/stages.smk"]:
        strings = re.findall(r'"(\w+)"', file.read_text())
        assert not (kinds | stages().keys()) & {*strings} - {"figures", "blind"}, file  # these two are settings too


def test_branching_on_kind_or_activation_is_where_the_kinds_are() -> None:
    """Elsewhere at most twenty places, each with a reason beside it."""
    branch = re.compile(r"(?:\.kind|\.activation|\[\"kind\"\]|\[\"activation\"\]) *(?:==|!=|in \(|not in \()")
    found = []
    for file in sorted((ROOT / "src/saeflow").rglob("*.py")):
        if not {"dictionaries", "kernels", "circuits"} & {*file.parts}:  # circuits has kinds of nodes
            found += [f"{file.name}: {line.strip()}" for line in file.read_text().splitlines() if branch.search(line)]
    assert len(found) <= 20, "\n".join(found)
