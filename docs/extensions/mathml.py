"""Formulas as MathML, made while the site is built: browsers show it without scripts, fonts or a network."""

from typing import Any

from docutils import nodes
from latex2mathml.converter import convert
from sphinx.application import Sphinx
from sphinx.util import logging

log = logging.getLogger(__name__)


def inline(translator: Any, node: nodes.math) -> None:
    _write(translator, node, "inline")


def display(translator: Any, node: nodes.math_block) -> None:
    _write(translator, node, "block")


def _write(translator: Any, node: nodes.Element, display: str) -> None:
    found = convert(node.astext(), display=display)
    if "\\" in found:  # a command that it does not know is left as it is
        log.warning("no formula that can be shown: %s", node.astext(), location=node)
    translator.body.append(found)
    raise nodes.SkipNode


def setup(app: Sphinx) -> dict[str, Any]:
    app.add_html_math_renderer("mathml", (inline, None), (display, None))
    return {"parallel_read_safe": True, "parallel_write_safe": True}
