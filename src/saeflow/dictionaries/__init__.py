"""Sparse dictionaries: `load_dictionary(folder)` opens one. Names are imported on first use, as torch takes seconds."""

from importlib import import_module
from typing import Any

_HOMES = {
    "BlockDiagonal": "heads",
    "Dictionary": "sae",
    "SAE": "sae",
    "Transcoder": "sae",
    "DictionaryError": "spec",
    "Origin": "spec",
    "Spec": "spec",
    "load_dictionary": "saelens_format",
    "save_dictionary": "saelens_format",
}
__all__ = list(_HOMES)  # pyright: ignore


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(import_module(f"saeflow.dictionaries.{_HOMES[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
