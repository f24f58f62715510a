"""Links that nobody writes: names of the library and of settings in `code` lead to their entry in the reference, links
to the library's files to the entry of their module, and the table of contents to the pages that are there."""

import re
from pathlib import Path
from typing import Any

from docutils import nodes
from sphinx import addnodes
from sphinx.application import Sphinx
from sphinx.transforms import SphinxTransform
from sphinx.util.docutils import SphinxDirective

ROOT = Path(__file__).resolve().parents[2]
SHOWN = {
    "changelog": "CHANGELOG.md",
    "contributing": "CONTRIBUTING.md",
    "embedded_model": "resources/model/README.md",
}
"""Pages that show a file which stands elsewhere in the tree."""
_NAME = re.compile(r"saeflow(\.\w+)+")
_FILE = re.compile(r"\[([^\]]+)\]\(\.\./src/(saeflow(?:/\w+)+)\.py\)")


def prepare(app: Sphinx, page: str, source: list[str]) -> None:
    """Links to files become links to what the site has of them: pages, and entries of modules."""
    text = source[0]
    if page in SHOWN:
        app.env.note_dependency(str(ROOT / SHOWN[page]))
        text = (ROOT / SHOWN[page]).read_text().replace("](docs/", "](")
    for name, file in SHOWN.items():
        text = text.replace(f"](../{file})", f"]({name}.md)")
    text = _FILE.sub(lambda found: f"{{py:mod}}`{found[1].strip('`')} <{found[2].replace('/', '.')}>`", text)
    source[0] = text


class LinkNames(SphinxTransform):
    default_priority = 500

    def apply(self, **named: Any) -> None:
        settings = self.env.config_paths  # type: ignore[attr-defined]
        for literal in list(self.document.findall(nodes.literal)):
            text = literal.astext()
            if isinstance(literal.parent, nodes.reference | nodes.title | addnodes.pending_xref):
                continue
            if _NAME.fullmatch(text):
                self._link(literal, "py", "obj", text)
            elif "." in text and text.partition("=")[0] in settings:
                self._link(literal, "std", "confval", text.partition("=")[0])

    def _link(self, literal: nodes.literal, domain: str, role: str, target: str) -> None:
        where = {"refdoc": self.env.docname, "refdomain": domain, "reftype": role, "reftarget": target}
        reference = addnodes.pending_xref("", literal.deepcopy(), refwarn=False, refexplicit=True, **where)
        literal.replace_self(reference)


class Pages(SphinxDirective):
    """A part of the table of contents, of pages that are there: `{pages} Caption`, then names, titles or globs."""

    required_arguments = 1
    final_argument_whitespace = True
    has_content = True

    def run(self) -> list[nodes.Node]:
        folder, entries = Path(self.env.srcdir), []
        for entry in self.content:
            name = entry.partition("<")[2].removesuffix(">") or entry
            there = sorted(file for end in ("md", "ipynb") for file in folder.glob(f"{name}.{end}"))
            named = [file.relative_to(folder).with_suffix("").as_posix() for file in there]
            entries += [entry] if named == [name] else named
        options = ["```{toctree}", ":hidden:", f":caption: {self.arguments[0]}", "", *entries, "```"]
        return self.parse_text_to_nodes("\n".join(options)) if entries else []


def setup(app: Sphinx) -> dict[str, Any]:
    app.add_directive("pages", Pages)
    app.connect("source-read", prepare)
    app.add_transform(LinkNames)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
