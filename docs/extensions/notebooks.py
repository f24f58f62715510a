"""Executed notebooks as pages: `docs/notebooks/*.ipynb`, with the outputs that they were saved with. None is run."""

import json
import re
from pathlib import Path
from typing import Any

from sphinx.application import Sphinx

FENCE = "`" * 7
CONTROLS = re.compile(r"\x1b\[[0-9;]*m")


def page(text: str) -> str:
    """A notebook as MyST. Raises `ValueError` for one whose code was not run to its end."""
    found: list[str] = []
    for cell in json.loads(text)["cells"]:
        source = "".join(cell["source"])
        if cell["cell_type"] == "markdown":
            found += [source, ""]
        elif cell["cell_type"] == "code" and source.strip():
            found += [f"{FENCE}python", source, FENCE, ""]
            found += [shown for output in cell["outputs"] if (shown := _output(output))]
    return "\n".join(found)


def _output(output: dict[str, Any]) -> str:
    """What is richest of an output: a page's HTML, a picture, or text."""
    if output["output_type"] == "error":
        raise ValueError(f"a cell ended with {output['ename']}: {output['evalue']}")
    data = {name: "".join(of) if isinstance(of, list) else of for name, of in output.get("data", {}).items()}
    if "text/html" in data:
        return _raw(f'<div class="notebook-output">{data["text/html"]}</div>')
    if "image/svg+xml" in data:
        return _raw(data["image/svg+xml"])
    if "image/png" in data:
        return _raw(f'<img alt="output of the cell above" src="data:image/png;base64,{data["image/png"].strip()}">')
    text = CONTROLS.sub("", data.get("text/plain", "".join(output.get("text", []))))
    return f"{FENCE}text\n{text}\n{FENCE}\n" if text.strip() else ""


def _raw(html: str) -> str:
    return f"{FENCE}{{raw}} html\n{html}\n{FENCE}\n"


def convert(app: Sphinx, name: str, source: list[str]) -> None:
    if Path(app.env.doc2path(name)).suffix == ".ipynb":
        source[0] = page(source[0])


def setup(app: Sphinx) -> dict[str, Any]:
    app.add_source_suffix(".ipynb", "markdown")
    app.connect("source-read", convert, priority=400)  # before links are looked at
    return {"parallel_read_safe": True, "parallel_write_safe": True}
