"""The reference of the library, from its source. Nothing is imported, so it is made in seconds and without a GPU.

A page a package, below `docs/api/`, which git does not keep. Docstrings are Markdown, as they are written. Names that
begin with an underscore are left out.
"""

import ast
import inspect
import re
import tomllib
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

from docutils import nodes
from sphinx.application import Sphinx
from sphinx.util.docutils import SphinxDirective

LIBRARY = Path(__file__).resolve().parents[2] / "src/saeflow"
Function = ast.FunctionDef | ast.AsyncFunctionDef


def write_pages(app: Sphinx) -> None:
    """Writes what has changed, so that a second build reads only that."""
    folder = Path(app.srcdir) / "api"
    folder.mkdir(exist_ok=True)
    wanted = pages()
    for stale in {page.stem for page in folder.glob("*.md")} - wanted.keys():
        (folder / f"{stale}.md").unlink()
    for name, text in wanted.items():
        page = folder / f"{name}.md"
        if not page.exists() or page.read_text() != text:
            page.write_text(text)


def pages() -> dict[str, str]:
    """The page of every package, by its name."""
    packages = {p.name: sorted(p.rglob("*.py")) for p in LIBRARY.iterdir() if (p / "__init__.py").exists()}
    packages |= {file.stem: [file] for file in LIBRARY.glob("*.py") if file.stem != "__init__"}
    return {name: _page(name, files) for name, files in packages.items()}


def _page(package: str, files: list[Path]) -> str:
    lines = [f"# saeflow.{package}", ""]
    for file in sorted(files, key=lambda f: (f.name != "__init__.py", f)):
        module = _module(file)
        tree = ast.parse(file.read_text())
        _resolve(tree, module)
        body = "\n".join(_members(tree.body, ":::::"))
        if module != f"saeflow.{package}" or package == file.stem:
            if not ast.get_docstring(tree):
                continue
            lines += [f"## {_escaped(module)}", ""] if module != f"saeflow.{package}" else []
        lines += [f":::{{py:module}} {module}\n:::", "", prose(ast.get_docstring(tree)), "", body, ""]
    return "\n".join(lines)


def _members(body: list[ast.stmt], fence: str, in_class: bool = False) -> Iterator[str]:
    """What is public of a module or class, in its order."""
    for node, after in zip(body, [*body[1:], None], strict=True):
        text = _string(after)
        if isinstance(node, Function | ast.ClassDef) and not node.name.startswith("_"):
            yield from _class(node, fence) if isinstance(node, ast.ClassDef) else _function(node, fence, in_class)
        elif isinstance(node, ast.AnnAssign | ast.Assign) and (in_class or text):
            yield from _value(node, text, fence, in_class)


def _function(node: Function, fence: str, in_class: bool) -> Iterator[str]:
    marks = {ast.unparse(d) for d in node.decorator_list}
    if "property" in marks or any(mark.endswith("cached_property") for mark in marks):
        returns = f"\n:type: {_flat(node.returns)}" if node.returns else ""
        yield f"{fence}{{py:property}} {node.name}{returns}\n\n{prose(ast.get_docstring(node))}\n{fence}\n"
        return
    options = [f":{mark}:" for mark in ("classmethod", "staticmethod") if in_class and mark in marks]
    kind, arguments = ("method", _without_self(node, marks)) if in_class else ("function", node.args)
    returns = f" -> {_flat(node.returns)}" if node.returns else ""
    lines = [f"{fence}{{py:{kind}}} {node.name}({_flat(arguments)}){returns}", *options]
    yield "\n".join([*lines, "", prose(ast.get_docstring(node)), fence, ""])


def _without_self(node: Function, marks: set[str]) -> ast.arguments:
    if "staticmethod" not in marks and node.args.args:
        del node.args.args[0]
    return node.args


def _class(node: ast.ClassDef, fence: str) -> Iterator[str]:
    made = next((n for n in node.body if isinstance(n, Function) and n.name == "__init__"), None)
    arguments = f"({_flat(_without_self(made, set()))})" if made else ""
    bases = ", ".join(_flat(base) for base in node.bases)
    texts = [f"*Is a* `{bases}`." if bases else "", prose(ast.get_docstring(node))]
    texts += [prose(ast.get_docstring(made))] if made else []
    inner = _members(node.body, fence[:-1], in_class=True)
    head = [f"{fence}{{py:class}} {node.name}{arguments}", "", "\n\n".join(filter(None, texts)), ""]
    yield "\n".join([*head, *inner, fence, ""])


def _value(node: ast.AnnAssign | ast.Assign, text: str | None, fence: str, in_class: bool) -> Iterator[str]:
    target = node.target if isinstance(node, ast.AnnAssign) else node.targets[0]
    if not isinstance(target, ast.Name) or target.id.startswith("_"):
        return
    options = [f":type: {_flat(node.annotation)}"] if isinstance(node, ast.AnnAssign) else []
    if node.value is not None and len(value := _flat(node.value)) < 60:
        options.append(f":value: {value}")
    kind = "attribute" if in_class else "data"
    yield "\n".join([f"{fence}{{py:{kind}}} {target.id}", *options, "", prose(text), fence, ""])


def _string(node: ast.stmt | None) -> str | None:
    """What a string says that stands as a statement of its own."""
    if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str):
        return node.value.value
    return None


class _Resolved(ast.NodeTransformer):
    """Annotations that are strings, as what they stand for, and names of the library with their module."""

    def __init__(self, names: dict[str, str]) -> None:
        self.names = names

    def visit_Name(self, node: ast.Name) -> ast.expr:
        return ast.parse(self.names.get(node.id, node.id), mode="eval").body

    def visit_Constant(self, node: ast.Constant) -> ast.expr:
        return self.visit(ast.parse(node.value, mode="eval").body) if isinstance(node.value, str) else node

    def visit_Subscript(self, node: ast.Subscript) -> ast.Subscript:
        if not ast.unparse(node.value).endswith("Literal"):
            self.generic_visit(node)
        return node


def _resolve(tree: ast.Module, module: str) -> None:
    """Puts into every annotation the full names of what the module defines or imports of the library; of others only
    where the library has a class of the same name."""
    names = {name: f"{module}.{name}" for name in _types(tree)}
    for node in ast.walk(tree):
        for one in node.names if isinstance(node, ast.ImportFrom) and node.module else ():
            if one.name in _classes():
                names[one.asname or one.name] = _defined(node.module, one.name)
    resolved = _Resolved(names)
    for node in ast.walk(tree):
        if isinstance(node, ast.arg | ast.AnnAssign) and node.annotation is not None:
            node.annotation = resolved.visit(node.annotation)
        elif isinstance(node, Function) and node.returns is not None:
            node.returns = resolved.visit(node.returns)


@cache
def _classes() -> dict[str, list[str]]:
    """The modules that define a class, or another name for a type, by its name."""
    found: dict[str, list[str]] = {}
    for file in sorted(LIBRARY.rglob("*.py")):
        for name in _types(ast.parse(file.read_text())):
            found.setdefault(name, []).append(_module(file))
    return found


def _types(tree: ast.Module) -> list[str]:
    named = [node.name for node in tree.body if isinstance(node, ast.ClassDef)]
    targets = [target for node in tree.body if isinstance(node, ast.Assign) for target in node.targets]
    return [*named, *(t.id for t in targets if isinstance(t, ast.Name) and re.match("[A-Z]+[a-z]", t.id))]


def _defined(module: str, name: str) -> str:
    """The full name of a class that is imported from `module`, which may have it from one of its own modules."""
    there = _classes()[name]
    inner = [one for one in there if one.startswith(f"{module}.")]
    return f"{inner[0] if module not in there and len(inner) == 1 else module}.{name}"


def _module(file: Path) -> str:
    return ".".join(("saeflow", *file.relative_to(LIBRARY).with_suffix("").parts)).removesuffix(".__init__")


def _flat(node: ast.AST) -> str:
    return " ".join(ast.unparse(node).split())


def prose(text: str | None) -> str:
    """A docstring as MyST: signs that would be markup there are none here, but in `code` and in indented blocks."""
    found: list[str] = []
    for block in re.split(r"((?:^    .*(?:\n|\Z))+)", inspect.cleandoc(text or ""), flags=re.MULTILINE):
        shown = [block] if block.startswith("    ") else re.split(r"(`[^`]*`)", block)
        found += [s if s.startswith(("`", "    ")) else _escaped(s) for s in shown]
    return "".join(found)


def _escaped(text: str) -> str:
    return re.sub(r"([<$_])", r"\\\1", text)


class Packages(SphinxDirective):
    """A table of contents of all packages, in the order of the data flow, which is that of the layers of imports."""

    def run(self) -> list[nodes.Node]:
        project = tomllib.loads((LIBRARY.parents[1] / "pyproject.toml").read_text())
        (layers,) = (c["layers"] for c in project["tool"]["importlinter"]["contracts"] if "layers" in c)
        order = {name: place for place, name in enumerate(reversed(layers))}
        names = sorted(pages(), key=lambda name: (order.get(name, len(order)), name))
        return self.parse_text_to_nodes(
            "\n".join(["```{toctree}", ":maxdepth: 1", "", *(f"api/{n}" for n in names), "```"])
        )


def setup(app: Sphinx) -> dict[str, Any]:
    app.add_directive("packages", Packages)
    app.connect("builder-inited", write_pages)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
