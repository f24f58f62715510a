"""Figures by name: `@figure` registers a function where its data is made, `declared` lists all, `find` opens one.

    @figure("matched_l0", stage="evaluate", reads=read_evaluations)
    def matched_l0(data: Evaluations) -> tuple[Figure, pd.DataFrame]:
        \"\"\"Difference in CE loss of two kinds of dictionary at equal L0, with its interval.\"\"\"

The docstring's first paragraph is the sentence that lists and captions show. `reads` makes the data of a job; a job
calls it once for all figures that share it. Data that have `extra_tables` (name: table) get them saved beside the
figures.

The plan lists figures at every start, so that listing imports none of them: declarations are read from the source of
modules `figures.py` and of packages `figures/` in the packages of saeflow. Their names and stages are literals.
"""

import ast
import functools
import importlib
import re
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.figure import Figure

    from saeflow.jobs.job import Job

Draw = TypeVar("Draw", bound="Callable[[Any], tuple[Figure, pd.DataFrame]]")
PACKAGES = Path(__file__).resolve().parents[1]
_DECORATED = re.compile(r'^@figure\(.*?(?:"""|\Z).*?(?:"""|\Z)', re.MULTILINE | re.DOTALL)


class Declared(NamedTuple):
    """What is known of a figure without importing it."""

    name: str
    stage: str
    """Whose artifacts it shows."""
    sentence: str
    module: str


class Registered(NamedTuple):
    declared: Declared
    draw: "Callable[[Any], tuple[Figure, pd.DataFrame]]"
    reads: "Callable[[Job], Any]"


_registered: dict[str, Registered] = {}


def figure(name: str, *, stage: str, reads: "Callable[[Job], Any]") -> Callable[[Draw], Draw]:
    """Registers a function `data -> (figure, the table behind it)`. Raises `ValueError` for a name that is taken."""

    def register(draw: Draw) -> Draw:
        one = Declared(name, stage, _sentence(draw.__doc__, name), draw.__module__)
        if name in _registered and _registered[name].draw.__qualname__ != draw.__qualname__:
            raise _taken(one, _registered[name].declared)
        if (other := declared().get(name, one)).module != one.module:
            raise _taken(one, other)
        _registered[name] = Registered(one, draw, reads)
        return draw

    return register


def declared() -> dict[str, Declared]:
    """All figures by name: those of the packages, and what this process registered besides."""
    return _in_source() | {name: one.declared for name, one in _registered.items()}


def find(name: str) -> Registered:
    """Imports a figure's module. Raises `ValueError` for a name that no figure has."""
    known = declared()
    if name not in known:
        raise ValueError(f"no figure {name!r}; there are: {', '.join(known)}")
    if name not in _registered:
        importlib.import_module(known[name].module)
    return _registered[name]


@functools.cache
def _in_source() -> dict[str, Declared]:
    found: dict[str, Declared] = {}
    for file in sorted([*PACKAGES.glob("*/figures.py"), *PACKAGES.glob("*/figures/*.py")]):
        module = ".".join((PACKAGES.name, *file.relative_to(PACKAGES).with_suffix("").parts))
        for source in _DECORATED.findall(file.read_text()):
            one = _declaration(source, module)
            if one.name in found:
                raise _taken(one, found[one.name])
            found[one.name] = one
    return found


def _declaration(source: str, module: str) -> Declared:
    """Of the source of a decorated function up to the end of its docstring."""
    try:
        function: Any = ast.parse(source).body[0]
        call = function.decorator_list[0]
        name = ast.literal_eval(call.args[0])
        (stage,) = (ast.literal_eval(keyword.value) for keyword in call.keywords if keyword.arg == "stage")
    except (SyntaxError, ValueError, IndexError) as error:
        line = source.partition("\n")[0]
        raise ValueError(
            f'{module}: {line} must be @figure("name", stage="stage", reads=...) of a function with a docstring'
        ) from error
    return Declared(name, stage, _sentence(ast.get_docstring(function), name), module)


def _sentence(docstring: str | None, name: str) -> str:
    """The first paragraph."""
    sentence = " ".join((docstring or "").split("\n\n")[0].split())
    if not sentence:
        raise ValueError(f"figure {name!r} has no docstring: its first line is what lists and captions show")
    return sentence


def _taken(one: Declared, other: Declared) -> ValueError:
    return ValueError(f"two figures are called {one.name!r}: of {other.module} and of {one.module}")
