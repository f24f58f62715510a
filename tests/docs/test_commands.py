"""Every experiment that README and docs/ name can be planned, as far as its model and text are here."""

import re
from pathlib import Path

import pytest

from saeflow.planning.expansion import compose
from saeflow.planning.overrides import split

ROOT = Path(__file__).resolve().parents[2]
OWN = {"random_subset", "relative_norm", "norm_by_position", "site=block", "experiment=middle"}
"""What pages make themselves, and other tests follow."""
ELSEWHERE = re.compile(r"no such (?:file or )?folder|is not in the local Hugging Face cache")


def named() -> dict[str, str]:
    """By the overrides, the page that has them first; without those that say that something is left out."""
    found: dict[str, str] = {}
    for page in [ROOT / "README.md", *sorted(ROOT.glob("docs/*.md"))]:
        for quoted, bare in re.findall(r'(?:HYDRA|hydra)="([^"]+)"|hydra=(experiment=\w+)', page.read_text()):
            if not re.search(r"…|\.\.\.", quoted) and not any(name in quoted for name in OWN):
                found.setdefault(quoted or bare, page.name)
    return found


@pytest.mark.parametrize(("overrides", "page"), named().items())
def test_what_the_pages_name_can_be_planned(overrides: str, page: str, tmp_path: Path) -> None:
    try:
        plan = compose(ROOT / "conf", split(overrides), str(tmp_path))
    except ValueError as error:
        assert ELSEWHERE.search(str(error)), f"{page}: {error}"
    else:
        assert plan.stages["train"]


def test_pages_name_experiments() -> None:
    assert {"experiment=demo features=all", "experiment=jsae", "experiment=blind"} <= named().keys()
