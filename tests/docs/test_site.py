"""The documentation is built without a warning, and shows itself without a network."""

import json
import os
import re
import shutil
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import notebooks
import pytest

ROOT = Path(__file__).resolve().parents[2]
LOADED = {"script": "src", "img": "src", "iframe": "src", "source": "src", "video": "src"}


PIXEL = "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mNk+M9QDwADhgGAWjR9awAAAABJRU5ErkJggg=="
NOTEBOOK = {
    "cells": [
        {"cell_type": "markdown", "source": ["# An example\n", "\n", "with $x^2$ and `training.lr`"]},
        {
            "cell_type": "code",
            "source": ["frame"],
            "outputs": [
                {"output_type": "display_data", "data": {"text/html": "<table><tr><td>7</td></tr></table>"}},
                {"output_type": "display_data", "data": {"image/png": PIXEL, "text/plain": "<Figure>"}},
                {"output_type": "stream", "name": "stdout", "text": ["\x1b[31mred\x1b[0m <b>&\n"]},
            ],
        },
    ]
}


class Page(HTMLParser):
    """What a page links to and what it loads, its anchors and how many formulas it has."""

    def __init__(self, file: Path) -> None:
        super().__init__()
        self.links, self.loads, self.anchors, self.n_formulas = list[str](), list[str](), {""}, 0
        self.feed(file.read_text())

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        of = {name: value or "" for name, value in attrs}
        self.n_formulas += tag == "math"
        self.anchors |= {of[name] for name in ("id", "name") if name in of}
        if tag == "a" and "href" in of:
            self.links.append(of["href"])
        if tag in LOADED and LOADED[tag] in of:
            self.loads.append(of[LOADED[tag]])
        if tag == "link" and of.get("rel") in ("stylesheet", "icon", "preload", "modulepreload"):
            self.loads.append(of["href"])


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built from a copy, so that nothing is written into the tree."""
    tree = tmp_path_factory.mktemp("documentation")
    shutil.copytree(ROOT / "docs", tree / "docs", ignore=shutil.ignore_patterns("_build", "api"))
    (tree / "docs/notebooks").mkdir(exist_ok=True)
    (tree / "docs/notebooks/example.ipynb").write_text(json.dumps(NOTEBOOK))
    for name in ("src", "conf", "resources", "benchmarks", "CHANGELOG.md", "CONTRIBUTING.md", "pyproject.toml"):
        (tree / name).symlink_to(ROOT / name)
    command = [sys.executable, "-m", "sphinx", "-W", "--keep-going", "-q", "-b", "html", "docs", "html"]
    done = subprocess.run(command, cwd=tree, env=os.environ | {"PYTHONPATH": "src"}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return tree / "html"


@pytest.fixture(scope="module")
def pages(site: Path) -> dict[Path, Page]:
    return {file.resolve(): Page(file) for file in site.rglob("*.html") if "_static" not in file.parts}


@pytest.mark.slow
def test_every_page_and_every_package_is_there(site: Path, pages: dict[Path, Page]) -> None:
    names = {file.relative_to(site.resolve()).with_suffix("").as_posix() for file in pages}
    assert {file.stem for file in ROOT.glob("docs/*.md")} <= names
    packages = {p.name for p in (ROOT / "src/saeflow").iterdir() if (p / "__init__.py").exists()}
    assert {f"api/{name}" for name in packages} <= names
    text = (site / "configuration.html").read_text()
    assert all(f'id="confval-{name}"' in text for name in ("training.lr", "dictionary.k", "model.tracr.method"))
    assert 'id="saeflow.kernels.step.take_step"' in (site / "api/kernels.html").read_text()


@pytest.mark.slow
def test_no_page_loads_anything_from_elsewhere(site: Path, pages: dict[Path, Page]) -> None:
    assert len(pages) > 30
    for file, page in pages.items():
        for address in page.loads:
            if address.startswith("data:"):
                continue
            assert not re.match(r"(\w+:)?//", address), f"{file.name} loads {address}"
            assert (file.parent / address.partition("?")[0].partition("#")[0]).exists(), f"{file.name}: {address}"
    for sheet in site.rglob("*.css"):
        assert not re.search(r"(@import|url\()\s*['\"]?(https?:)?//", sheet.read_text()), sheet


@pytest.mark.slow
def test_every_link_within_the_site_leads_somewhere(pages: dict[Path, Page]) -> None:
    for file, page in pages.items():
        for link in page.links:
            path, _, anchor = link.partition("#")
            if re.match(r"\w+:", link) or path.endswith((".py", ".csv", ".md", ".yaml")):
                continue
            target = (file.parent / path).resolve() if path else file
            assert target.exists(), f"{file.name} links to {link}"
            if target in pages:
                assert anchor in pages[target].anchors, f"{file.name} links to {link}"


@pytest.mark.slow
def test_formulas_are_mathml_and_names_are_links(site: Path, pages: dict[Path, Page]) -> None:
    mathematics = pages[(site / "mathematics.html").resolve()]
    assert mathematics.n_formulas > 80
    assert "api/evaluation.html#saeflow.evaluation.metrics.ratios" in " ".join(
        pages[(site / "architecture.html").resolve()].links
    )
    assert "configuration.html#confval-training.auxk_coefficient" in mathematics.links
    assert "$" not in re.sub(
        r"<(script|style).*?</\1>|<[^>]+>", "", (site / "mathematics.html").read_text(), flags=re.S
    )


@pytest.mark.slow
def test_a_search_finds_settings_and_functions(site: Path) -> None:
    index = (site / "searchindex.js").read_text()
    assert index.startswith("Search.setIndex(")  # a script, which a page opened from the disk may load
    assert "training.lr" in index and "take_step" in index


@pytest.mark.slow
def test_a_notebook_is_a_page_with_its_outputs(site: Path) -> None:
    text = (site / "notebooks/example.html").read_text()
    assert "<h1>An example" in text and "<math" in text and "configuration.html#confval-training.lr" in text
    assert "<td>7</td>" in text and f"data:image/png;base64,{PIXEL}" in text and "red &lt;b&gt;&amp;" in text
    assert "notebooks/example.html" in (site / "index.html").read_text()


def test_a_notebook_that_failed_is_refused() -> None:
    failed = {"output_type": "error", "ename": "KeyError", "evalue": "'l0'"}
    with pytest.raises(ValueError, match="KeyError: 'l0'"):
        notebooks.page(json.dumps({"cells": [{"cell_type": "code", "source": "x", "outputs": [failed]}]}))
