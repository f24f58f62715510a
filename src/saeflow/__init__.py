"""From text to the figures of studies of sparse dictionaries in language models.

`saeflow.open_results("results")` opens what the workflow has made. Names are imported on first use.
"""

from importlib import import_module
from typing import Any

__all__ = ["open_results"]  # pyright: ignore


def __getattr__(name: str) -> Any:
    if name in __all__:  # by its name as a string: every package imports this one, and `results` is below all
        return getattr(import_module("saeflow.results"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return [*globals(), *__all__]
