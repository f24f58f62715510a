"""From text to the figures of studies of sparse dictionaries in language models.

`saeflow.open_results("results")` opens what the workflow has made; `saeflow.jacobian(sae_in, sae_out, mlp, x)` is the
Jacobian of a pair of dictionaries around an MLP. Names are imported on first use.
"""

from importlib import import_module
from typing import Any

_HOMES = {"open_results": "saeflow.results", "jacobian": "saeflow.jacobians.function"}
__all__ = list(_HOMES)  # pyright: ignore


def __getattr__(name: str) -> Any:
    if name in _HOMES:  # by its name as a string: every package imports this one, and these are below all
        return getattr(import_module(_HOMES[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return [*globals(), *__all__]
