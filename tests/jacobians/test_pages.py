"""The page and the table for print: whole, escaped, and with what is in the tables."""

import re
from html.parser import HTMLParser
from typing import Any

import numpy as np
import pandas as pd
import pytest

from saeflow.jacobians.pages import escape_latex, latex, page, visible

NASTY = [
    "<script>alert('1')</script>",
    "a & b",
    "100%",
    "\\end{document}",
    "x_1^2~{}",
    "\n",
    "\t",
    "é海",
    "\x07",
    '"#$|',
]
SUMMARY: dict[str, Any] = {
    "layer": 3, "hook_name": "blocks.3.ln2.hook_normalized", "hook_name_out": "blocks.3.hook_mlp_out", "k": 16,
    "k_out": 16, "d_sae": 1024, "jacobian_coefficient": 0.0, "n_tokens": 1000, "n_documents": 7,
    "randomise": "none", "norm": "inside", "convention": "at the true input",
}  # fmt: skip


@pytest.fixture
def tables() -> tuple[pd.DataFrame, ...]:
    described = {"output": 5, "input": 7, "count": 40, "mean": 0.25, "std": 0.125, "mean_absolute": 0.5}
    described |= {"std_absolute": 0.0625, "active_output": 50, "active_input": 60}
    pairs = pd.DataFrame([{"statistic": s, "rank": 1} | described for s in ("mean", "mean_absolute", "count")])
    values = np.linspace(-1, 1, len(NASTY))
    where = {"sequence": 0, "position": 0, "token_ids": list(range(len(NASTY))), "tokens": NASTY}
    contexts = pd.DataFrame(
        {"side": side, "latent": latent, "rank": 1, "max_activation": 1.0, **where, "activations": [np.abs(values)]}
        for side, latent in (("output", 5), ("input", 7))
    ).assign(tokens=[NASTY] * 2, activations=[np.abs(values)] * 2)
    shown = pd.DataFrame([{"output": 5, "input": 7, "rank": 1, "largest_jacobian": -1.0} | where | {
        "jacobian": values, "output_activations": np.abs(values), "input_activations": values * 0 + 2}])  # fmt: skip
    return pairs, pd.DataFrame([{"output_rank": 1, "rank": 1} | described]), contexts, shown


class Outline(HTMLParser):
    """Tags that are open, those that were seen, and the text."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.seen: list[str] = []
        self.ids: list[str] = []
        self.links: list[str] = []
        self.text = ""

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.seen.append(tag)
        named = dict(attrs)
        self.ids += [named["id"] or ""] if "id" in named else []
        self.links += [named["href"] or ""] if "href" in named else []
        if tag != "meta":
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data


def test_page_is_well_formed_and_escaped(tables: tuple[pd.DataFrame, ...]) -> None:
    outline = Outline()
    outline.feed(page(SUMMARY, *tables))
    assert outline.open == [] and "script" not in outline.seen
    assert {link.removeprefix("#") for link in outline.links} <= set(outline.ids)
    for token in NASTY:
        assert visible(token) in outline.text
    assert outline.seen.count("table") == 3
    assert "0.2500" in outline.text and "Jacobian coefficient 0, of the trained model;" in outline.text
    assert "http" not in page(SUMMARY, *tables)  # nothing is fetched


def test_latex_is_balanced_and_escaped(tables: tuple[pd.DataFrame, ...]) -> None:
    text = latex(SUMMARY, tables[0], tables[3])
    body = text[text.index(r"\endfoot") :]
    assert body.count(r"\end{") == 1 and r"\end{longtable}" in body
    plain = re.sub(r"\\[{}]", "", text)
    assert plain.count("{") == plain.count("}")
    (row,) = [line for line in body.splitlines() if line.startswith("1 & 5 & 7 & 40 & 0.250 & 0.125")]
    assert len(re.findall(r"(?<!\\)&", row)) == 6  # as many as the columns take
    assert not re.search(r"(?<!\\)[%#]", row.replace("!", "")) and row.endswith(r"\\")
    assert r"\jacobiantoken{jacobiannegative}{100}" in row


def test_every_special_character_is_escaped() -> None:
    assert escape_latex("a\\b{c}_d") == r"a\textbackslash{}b\{c\}\_d"
    for character in "$&#_%{}":
        assert escape_latex(character) == "\\" + character
    assert escape_latex("\x07\x1b") == "??"


def test_page_and_table_say_the_model_the_coefficient_and_the_norm(tables: tuple[pd.DataFrame, ...]) -> None:
    """So that the page of a re-initialised model does not read as one of the trained model."""
    arm = {"randomise": "reinit", "randomise_seed": 1, "jacobian_coefficient": 0.5, "norm": "ignored"}
    said = {"trained model, λ = 0": SUMMARY, "re-initialised model (seed 1), λ = 0.5, norm ignored": SUMMARY | arm}
    for text, summary in said.items():
        for made in (page(summary, *tables), latex(summary, tables[0], tables[3])):
            assert f"layer 3: {text}" in made or f"layer 3, {text}" in made
            assert "1000 held-out tokens of 7 documents. J is taken at the true input." in made
            assert sum(other in made for other in said) == 1
    assert "1000 tokens of a text. J is" in page(SUMMARY | {"text": "so"}, *tables)
