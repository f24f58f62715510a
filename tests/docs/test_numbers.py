"""Every number that README and docs/ state is made by a command that is named beside it."""

import re
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from demo_numbers import METRICS, TABLE, keys, rows

ROOT = Path(__file__).resolve().parents[2]
PAGES = [ROOT / "README.md", *sorted(ROOT.glob("docs/*.md"))]
COMMAND = re.compile(
    r"make (?:bench|demo|run|plan|chaos|test|reproduction)|snakemake |experiment=\w|\.venv/bin/"
    r"|python (?:benchmarks|scripts)/|tests/\w+/\w+\.py|benchmarks/\w+\.py"
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


# -------------------------------------------------------------------- the demo's
def dictionaries() -> pd.DataFrame:
    """The demo's twelve dictionaries of what the last MLP writes."""
    table = pd.read_csv(TABLE)
    return table[table["hook_name_out"] == "blocks.3.hook_mlp_out"]


def facts() -> dict[str, str]:
    """What README and docs/findings.md state of the demo, as its table has it, and in their words."""
    table = dictionaries()
    worth = float((table["ce_zero"] - table["ce_clean"]).iloc[0])
    recovered = 100 * table["loss_recovered_zero"]
    (topk,) = recovered[(table["activation"] == "topk") & (table["l0"] == 8)]
    l1 = table[(table["activation"] == "relu") & (table["kind"] == "sae")]
    assert (l1["l0"][100 * l1["loss_recovered_zero"] < topk]).max() > 22  # which is not enough
    words = {12: "twelve"}
    return {
        "worth": rf"worth {worth:.2f} nats",
        "ablated": rf"from {table['ce_clean'].iloc[0]:.2f} to {table['ce_zero'].iloc[0]:.2f}",
        "how many": rf"{words[len(table)]} dictionaries|all {words[len(table)]} recover",
        "width": rf"{table['d_sae'].iloc[0]:,} latents",
        "recovered": rf"{recovered.min():.0f} % (?:to|and) {recovered.max():.0f} %",
        "TopK": rf"TopK SAE recovers {topk:.0f} %, for which an SAE with an L1 penalty needs more than 22",
    }


def in_prose(text: str) -> str:
    """A page on one line, without code, addresses and tables."""
    text = re.sub(r"```.*?```|`[^`\n]*`|\]\([^)]*\)|^\|[^\n]*$", "", text, flags=re.DOTALL | re.MULTILINE)
    return " ".join(text.split())


def test_the_numbers_of_the_readme_are_those_of_the_demo() -> None:
    prose = in_prose((ROOT / "README.md").read_text())
    for name in ("worth", "how many", "width", "recovered"):
        assert re.search(facts()[name], prose), f"README does not say {facts()[name]!r}"
    made = " ".join(re.search(pattern, prose)[0] for pattern in facts().values() if re.search(pattern, prose))
    stated = re.findall(r"(?<![\w.])\d[\d,.]*\d|(?<![\w.])\d", prose)
    assert set(stated) - set(re.findall(r"\d[\d,.]*\d|\d", made)) == {"3.11"}  # the version of Python
    assert "`make demo` makes this figure" in (ROOT / "README.md").read_text()


def test_the_numbers_of_the_findings_are_those_of_the_demo() -> None:
    prose = in_prose((ROOT / "docs/findings.md").read_text())
    for pattern in facts().values():
        assert re.search(pattern, prose), f"docs/findings.md does not say {pattern!r}"


def test_transcoders_lie_below_the_l1_saes_at_every_l0() -> None:
    table = dictionaries()
    fronts = {kind: rows.sort_values("l0") for kind, rows in table[table["activation"] == "relu"].groupby("kind")}
    sae, transcoder = fronts["sae"], fronts["transcoder"]
    at = np.geomspace(max(f["l0"].min() for f in fronts.values()), min(f["l0"].max() for f in fronts.values()), 50)
    loss = [np.interp(np.log(at), np.log(f["l0"]), f["ce_replaced"]) for f in (sae, transcoder)]
    assert (loss[1] < loss[0]).all()


def test_the_table_is_of_what_the_plan_would_make_today() -> None:
    assert list(pd.read_csv(TABLE)["evaluation"]) == keys(), "make demo, then .venv/bin/python docs/demo_numbers.py"


def test_the_table_is_what_a_demo_that_is_here_found() -> None:
    """Elsewhere sums may be rounded otherwise, and after a thousand steps a little shows."""
    if not all((ROOT / "results/evaluate" / key / "summary.json").exists() for key in keys()):
        pytest.skip("the demo has not been run here: make demo")
    here, stated = pd.DataFrame(rows(ROOT / "results")), pd.read_csv(TABLE)
    for name in METRICS:
        assert here[name].astype(float).to_numpy() == pytest.approx(stated[name].to_numpy(), rel=0.02)
