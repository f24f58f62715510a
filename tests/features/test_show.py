"""How a latent shows itself in a notebook: all that is known of it, and nothing that its tokens could do."""

from typing import Any

import numpy as np
import pandas as pd
import pytest
from tests.results.pages import Page

from saeflow.features.reader import Example, Feature
from saeflow.features.show import feature_html

HOSTILE = [
    "<script>alert(1)</script>", '" onmouseover="alert(2)', "'><img src=x onerror=alert(3)>", "</span></div>",
    "&lt;b&gt;", "\u202eabc", "\x00", "\x1b[31m", "\n\t\r", "<!--", "]]>", "\ufeff", "😀", "", " ",
]  # fmt: skip


def feature(tokens: list[str], **row: Any) -> Feature:
    values = [float(n) for n in range(len(tokens))]
    example = Example(3.0, 0.5, None, 7, 1, 2, 2, tokens, values)
    known = {"fired": 10, "frequency": 0.001, "n_documents": 3, "max": np.float32(3), "q50": np.float32(1.0)}
    known |= {"effect": np.float32(0.25), "effect_error": np.float32(0.5), "label": None, "label_f1": None} | row
    named = [(token, 0.5) for token in tokens]
    near = {"decoder": [(4, 0.5)], "firing": [], "jacobian": []}
    intervals = [[example._replace(interval=0)], [], [example._replace(interval=2, value=9.0)]]
    return Feature(12, pd.Series(known), [example], intervals, np.zeros(3), np.zeros(3), named, named, named, near)


@pytest.mark.parametrize("token", HOSTILE)
def test_tokens_are_text_whatever_they_hold(token: str) -> None:
    shown = feature_html(feature([token, "a", "b"], label=token))
    page = Page(shown)
    assert page.tags <= {"h4", "p", "b", "div", "span", "small", "code"} and page.unclosed == []
    assert page.attributes <= {"style", "title"} and not page.links
    for sign in "\x00\x1b\u202e":
        assert sign not in shown
    if token.isprintable() and token:
        assert page.text.count(token) >= 6


def test_it_says_what_is_known() -> None:
    page = Page(feature(["x", "y"], label="equals a", label_f1=0.93)._repr_html_())
    assert "latent 12" in page.text and "fires on 10 tokens (0.100%) of 3 documents" in page.text
    assert "rises by 0.25 ± 0.5 nats" in page.text and "equals a (F1 0.93)" in page.text
    assert "nearest by decoder 4 (0.50)" in page.text
    assert page.text.index("9 xy") > page.text.index("over its range") and "nearest by firing" not in page.text


def test_what_is_not_known_is_left_out() -> None:
    page = Page(feature(["x"], effect=None, effect_error=None)._repr_html_())
    assert "loss" not in page.text and "label" not in page.text
    silent = feature([], fired=0, effect=float("nan"))._replace(top=[], intervals=[[]])
    assert "It fires on no token" in Page(silent._repr_html_()).text and "fires on 0 tokens" in repr(silent)
