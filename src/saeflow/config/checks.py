"""From plain trees to dataclasses: every key and type is checked, and what is wrong is named with what is legal."""

import dataclasses
import difflib
import html
import math
import os
import re
import types
import typing
from functools import cache
from pathlib import Path
from typing import Any, Literal, TextIO, TypeVar, Union

T = TypeVar("T")


_CONTROLS = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069]")


def escape_controls(text: str) -> str:
    """The text with characters spelled out that control the terminal or page that shows it: all but line feed and tab
    of ASCII's and Latin-1's, line and paragraph separators, and those that turn the direction of writing."""
    return _CONTROLS.sub(lambda found: found[0].encode("unicode_escape").decode(), text)


def loud(text: str, stream: TextIO) -> str:
    """The text in red where `stream` is a terminal that shows colours (https://no-color.org), else as it is."""
    plain = os.environ.get("NO_COLOR") or os.environ.get("TERM") == "dumb" or not stream.isatty()
    return text if plain or not text else "\n".join(f"\033[31m{line}\033[0m" for line in text.split("\n"))


def html_text(text: object) -> str:
    """For HTML, within tags and attributes; characters that turn or hide text are spelled out."""
    return html.escape(escape_controls(str(text)))


class ConfigError(ValueError):
    """A configuration that cannot be run; the message names the key, what is wrong and the legal values."""

    def __str__(self) -> str:
        return escape_controls(super().__str__())  # names of files and fields may hold anything


LEARNING_RATES = "more than 0 and at most 1, since Adam moves every weight by about as much at every step"


def require(legal: bool, key: str, value: Any, wanted: str) -> None:
    if not legal:
        raise ConfigError(f"{key}={value} is out of range: it must be {wanted}")


def at_least(least: int, config: Any, group: str, names: str) -> None:
    """Raises `ConfigError` for an option of a group, of those named, that is less than `least`."""
    for name in names.split():
        require(getattr(config, name) >= least, f"{group}.{name}", getattr(config, name), f"{least} or more")


def check_seed(config: Any, key: str) -> None:
    """Raises `ConfigError` for a seed that not all generators take: some mix it with a step or a head first."""
    value = getattr(config, key.rsplit(".", 1)[-1])
    require(0 <= value < 2**32, key, value, "0 or more and below 2^32")


def where(path: str | Path) -> str:
    """What to add to a path that is not there: the folder that a relative one was looked for in."""
    return "" if Path(path).is_absolute() else f" in {Path.cwd()}, where the run is (--directory)"


def build(cls: type[T], tree: dict[str, Any], where: str = "") -> T:
    """Builds the dataclass `cls` from a plain tree, checking every key and type.

    A class with a `variant` says which of its subclasses the tree is of. Raises `ConfigError` for unknown keys (with
    the nearest legal one), missing keys and values of the wrong type.
    """
    variant = getattr(cls, "variant", None)
    if variant is not None:
        cls, tree = variant(tree, where)
    fields = {f.name: f for f in dataclasses.fields(cls)}  # type: ignore[arg-type]
    hints = _hints(cls)  # type: ignore[arg-type]
    for key in tree:
        if key not in fields:
            near = difflib.get_close_matches(str(key), fields, n=1)
            hint = f" (did you mean {near[0]!r}?)" if near else ""
            raise ConfigError(f"unknown key {where}{key}{hint}; legal here: {', '.join(fields)}")
    values = {}
    for name, field in fields.items():
        if name in tree:
            values[name] = _coerce(hints[name], tree[name], f"{where}{name}")
        elif field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING:
            raise ConfigError(f"missing key {where}{name}")
    return cls(**values)


_hints = cache(typing.get_type_hints)  # asked for at every point of a sweep


def _coerce(hint: Any, value: Any, where: str) -> Any:
    """The value as the hint's type. Numbers of equal value become equal: 1 and 1.0 hash alike for a float field."""
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if dataclasses.is_dataclass(hint):
        if not isinstance(value, dict):
            raise ConfigError(f"{where}={value!r} must be a group of keys")
        return build(typing.cast(type, hint), value, where + ".")
    if origin in (Union, types.UnionType):
        if value is None and type(None) in args:
            return None
        named = (a for a in args if typing.get_origin(a) is Literal and value in typing.get_args(a))
        return _coerce(next(named, next(a for a in args if a is not type(None))), value, where)
    if origin is Literal:
        if value not in args:
            raise ConfigError(f"{where}={value!r} is not legal: use one of {', '.join(map(str, args))}")
        return value
    if origin is dict:
        if not isinstance(value, dict):
            raise ConfigError(f"{where}={value!r} must be a group of keys")
        return {str(key): value[key] for key in sorted(value)}
    if origin is tuple:
        if not isinstance(value, list | tuple):
            raise ConfigError(f"{where}={value!r} must be a list")
        return tuple(_coerce(args[0], v, f"{where}[{i}]") for i, v in enumerate(value))
    if hint is float and isinstance(value, int | float) and not isinstance(value, bool):
        if not math.isfinite(value):
            raise ConfigError(f"{where}={value} must be a finite number")
        return float(value)
    if hint is int and isinstance(value, float) and value.is_integer():
        value = int(value)
    if hint is int and isinstance(value, int) and abs(value) >= 2**63:
        raise ConfigError(f"{where}={value} is out of range: a whole number here is below 2^63")
    if not isinstance(value, hint) or (hint is int and isinstance(value, bool)):
        raise ConfigError(f"{where}={value!r} must be of type {hint.__name__}")
    return value
