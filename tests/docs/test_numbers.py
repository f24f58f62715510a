"""Every number that README and docs/ state is made by a command that is named beside it."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PAGES = [ROOT / "README.md", *sorted(ROOT.glob("docs/*.md"))]
COMMAND = re.compile(
    r"make (?:bench|demo|run|plan|chaos|test)|snakemake |experiment=\w|\.venv/bin/|python (?:benchmarks|scripts)/"
    r"|tests/\w+/\w+\.py|benchmarks/\w+\.py"
)
MEASURED = re.compile(r"(?<![\w./=-])\d+\.\d+(?![\w.])|\d+ %|\b\d+ s\b|\d nats|\d [GT]B")
DEFINITIONS = {
    ("groundtruth.md", "What is asked of a dictionary"),
    ("heads.md", "Training"),
    ("jacobian.md", "Conventions"),
}
"""Sections whose numbers say what something is: thresholds, schedules of a recipe."""


def measured(page: Path) -> list[tuple[str, str, list[str]]]:
    """The sections of a page that state measured numbers: title, text, numbers."""
    text = re.sub(r"arXiv[^)\]]*|https?:\S+|\d{4}\.\d{5}", "", page.read_text())
    found = []
    for section in re.split(r"^## ", text, flags=re.MULTILINE):
        bare = re.sub(r"```.*?```|`[^`\n]*`|\$\$.*?\$\$|\$[^$\n]*\$", "", section, flags=re.DOTALL)
        if numbers := MEASURED.findall(bare):
            found.append((section.splitlines()[0], section, numbers))
    return found


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_a_section_with_numbers_names_what_makes_them(page: Path) -> None:
    if page.name in ("mathematics.md", "changelog.md"):
        pytest.skip("numbers there are definitions")
    for title, text, numbers in measured(page):
        assert (page.name, title) in DEFINITIONS or COMMAND.search(text), f"{page.name}, {title}: {numbers}"


def test_what_counts_as_a_number_and_as_a_command(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text("# A\n\n`x=0.5` as of 2024\n\n## B\n\nIt is 0.31 nats, 12 % of all.\n")
    ((title, text, numbers),) = measured(page)
    assert title == "B" and numbers == ["0.31", "12 %"] and not COMMAND.search(text)


def test_no_section_is_excused_that_is_not_there() -> None:
    assert {(p.name, t) for p in PAGES for t, *_ in measured(p) if (p.name, t) in DEFINITIONS} == DEFINITIONS
