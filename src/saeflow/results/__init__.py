"""A results folder as people open it: five lines in a notebook (`open_results`), and the front page (`front`).

Names are imported on first use, so that `import saeflow` costs nothing.
"""

from importlib import import_module
from typing import Any

_HOMES = {"open_results": "run", "Results": "run", "ResultsError": "disk"}
__all__ = list(_HOMES)  # pyright: ignore


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(import_module(f"saeflow.results.{_HOMES[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
