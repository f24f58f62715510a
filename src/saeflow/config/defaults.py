"""Settings that are at their defaults: these are in no key, so that a release which adds a setting makes nothing stale.

What counts is the dataclass's default, not that of `conf/`, which anyone may edit. So a default is for ever: where one
has to change, the version of every stage that reads it has to be raised (`tests/planning/defaults.txt` lists them all).
"""

import dataclasses
import typing
from collections.abc import Mapping
from functools import cache
from typing import Any

from saeflow.config.dictionary import DictionaryConfig
from saeflow.config.evaluation import BlindConfig
from saeflow.config.model import TracrConfig
from saeflow.config.point import PointConfig


@cache
def groups() -> dict[str, type]:
    """The dataclass of every group of settings that a stage may read."""
    hints = typing.get_type_hints(PointConfig)
    named = {name: hint for name, hint in hints.items() if dataclasses.is_dataclass(hint)}
    return {**named, "tracr": TracrConfig, "blind": BlindConfig}  # type: ignore[dict-item]


@cache
def defaults(cls: type) -> dict[str, Any]:
    """Of the fields of a dataclass that have one, as they are written in JSON."""
    found: dict[str, Any] = {}
    for field in dataclasses.fields(cls):
        if field.default is not dataclasses.MISSING:
            found[field.name] = _plain(field.default)
        elif field.default_factory is not dataclasses.MISSING:
            found[field.name] = _plain(field.default_factory())
    return found


def _plain(value: Any) -> Any:
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {field.name: _plain(getattr(value, field.name)) for field in dataclasses.fields(value)}
    return list(value) if isinstance(value, tuple) else value


def defaults_of(group: str, tree: dict[str, Any]) -> dict[str, Any]:
    """Defaults of the settings of a group; of a dictionary, those of its kind. Empty for what is no group."""
    cls = groups().get(group)
    if cls is None:
        return {}
    return defaults(DictionaryConfig.variant(tree, "")[0] if cls is DictionaryConfig else cls)


def set_apart(config: dict[str, Any]) -> dict[str, Any]:
    """What a stage reads without the settings that are at their defaults: what its key is the hash of."""
    kept: dict[str, Any] = {}
    for group, tree in config.items():
        if isinstance(tree, dict) and group in groups():
            usual = defaults_of(group, tree)
            kept[group] = {k: v for k, v in tree.items() if k not in usual or usual[k] != v}
        else:
            kept[group] = tree
    return kept


def with_defaults(config: dict[str, Any]) -> dict[str, Any]:
    """What was read by a stage, perhaps of an earlier release, with the defaults of settings that it did not know."""
    return {
        group: defaults_of(group, tree) | tree if isinstance(tree, dict) and group in groups() else tree
        for group, tree in config.items()
    }


def flat(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """The values of a tree of settings by their dotted paths."""
    found: dict[str, Any] = {}
    for name, value in tree.items():
        found |= flat(value, f"{prefix}{name}.") if isinstance(value, Mapping) else {f"{prefix}{name}": value}
    return found
