"""The text of overrides: what stands after `hydra=`, in `HYDRA="..."` or behind a script. All split it here, so that
they read it alike; Hydra's grammar decides what a value is, and what it refuses is said in one sentence.

Overrides are separated by spaces. A space in quotes or brackets separates nothing: `dictionary.k=[4, 8]
corpus.path='/data/my texts/a=b.jsonl'`. Quotes go around a value, and reach Hydra, where everything may stand in them.
"""

import os
import re
from collections.abc import Mapping, Sequence
from typing import Any

from saeflow.config import ConfigError

QUOTES = "'\""
PAIRS = {"[": "]", "{": "}", "(": ")"}
KNOWN = ("hydra", "conf")  # what `--config` of Snakemake may give
_BEFORE_VALUE = "=,:[{( "
_OPENS = re.compile(rf"[{re.escape(_BEFORE_VALUE)}]\w*$")  # a value, or one of Hydra's functions: range(1, 3)
_SIGN = re.compile(r"\\\\(?=\\*['\"])|\\['\"]|.", re.DOTALL)  # before a quote, backslashes count in pairs
_OVERRIDE = re.compile(r"^(~[\w./@+-]+|\+{0,2}[\w./@$-]+=.*)$", re.DOTALL)
_BARE = re.compile(r"[\w/\-+.$%*@?|:\\]*", re.ASCII)  # of which Hydra makes a text without quotes around it


def split(text: str) -> list[str]:
    """The overrides of a text. Raises `ConfigError` for a quote or a bracket that is not closed."""
    found, word, quote, open_ = [], "", "", ""
    for char in _SIGN.findall(text):
        if quote:
            if char == quote:
                char, quote = char[-1], ""
            elif quote == f"\\{char}":
                char = f"\\{char}"
        elif char[-1] in QUOTES and (not word or word[-1] in _BEFORE_VALUE):
            char, quote = char[-1], char  # a quote guarded from a shell, \', ends with one
        elif char in PAIRS and (open_ or not word or _OPENS.search(word)):
            open_ += PAIRS[char]
        elif open_ and char == open_[-1]:
            open_ = open_[:-1]
        elif char.isspace() and not open_:
            found += [word] if word else []
            word = ""
            continue
        word += char
    if quote or open_:
        what = f"a quote {quote[-1]}" if quote else f"a bracket, its {open_[-1]},"
        raise ConfigError(f"cannot read the override {word!r}: {what} is missing at its end{_how_to_quote(word)}")
    return found + ([word] if word else [])


def of_snakemake(config: Mapping[str, Any], arguments: Sequence[str]) -> list[str]:
    """The overrides of a run: from the arguments of `--config` as they were typed, since Snakemake reads YAML in them,
    where ` #` begins a comment and `: ` a mapping; or from a config file.

    Raises `ConfigError` for other keys than `hydra` and `conf`: what was meant for Hydra would be left aside.
    """
    stray = [f"{key}={value}" for key, value in config.items() if key not in KNOWN]
    typed = [argument.partition("=")[2] for argument in arguments if argument.partition("=")[0] == "hydra"]
    text = typed[-1] if typed else config.get("hydra") or ""
    if stray:
        whole = " ".join([str(text), *stray]).strip()
        raise ConfigError(
            f'{" ".join(stray)} is outside of hydra=, where nothing reads it: --config takes hydra="..." and conf=..., '
            f'so put it inside the quotes: --config hydra="{whole}"'
        )
    if len(typed) > 1:
        raise ConfigError(f'hydra= is given {len(typed)} times: put all into one: --config hydra="{" ".join(typed)}"')
    if not isinstance(text, str):
        raise ConfigError(f"hydra={text!r} in the config file must be a text of overrides, such as experiment=demo")
    return split(text)


def parse(overrides: list[str]) -> list[Any]:
    """Hydra's reading of each override. Raises `ConfigError` for what it cannot read, with what to write instead."""
    from hydra.core.override_parser.overrides_parser import OverridesParser
    from hydra.errors import HydraException

    parser = OverridesParser.create()
    parsed = []
    for text in overrides:
        if not _OVERRIDE.match(text):
            raise ConfigError(
                f"{text!r} is no override: write name=value without spaces around =, and quotes around a value that "
                "has spaces, such as corpus.path='/data/my texts'"
            )
        name, _, value = text.partition("=")
        if value.strip("'\"").startswith("~/"):
            raise ConfigError(
                f"{text}: ~ is not replaced here; write {name}={quoted(os.path.expanduser(_bare(value)))}"
            )
        try:
            one = parser.parse_override(text)
        except HydraException as error:
            reason = " ".join(str(error).partition("\n")[0].split())
            raise ConfigError(f"cannot read the override {text}{_how_to_quote(text) or f': {reason}'}") from error
        if one.is_sweep_override() and os.path.exists(value):
            raise ConfigError(
                f"{text}: with its commas this is a list of values, but there is a file of that name: write "
                f"{name}={quoted(value)}"
            )
        parsed.append(one)
    return parsed


def quoted(value: str) -> str:
    """A text as Hydra reads it whatever is in it."""
    quote = '"' if "'" in value and '"' not in value else "'"
    return (
        quote
        + re.sub(rf"(\\*)({quote}|$)", lambda found: 2 * found[1] + ("\\" + quote if found[2] else ""), value)
        + quote
    )


def _bare(value: str) -> str:
    return value[1:-1] if value[:1] in ("'", '"') and value[-1:] == value[:1] else value.strip("'\"")


def _how_to_quote(text: str) -> str:
    """What to write where a value needs quotes; '' where it is a list or a mapping."""
    name, _, value = text.partition("=")
    if not value or value[0] in PAIRS or _BARE.fullmatch(value):
        return ""
    if value[-1] in ",=":
        return f": leave no space after {value[-1]}"
    return (
        ": a value with other signs than letters from a to z, digits and /-+.$%*@?|:_ needs quotes around it: "
        f"{name}={quoted(_bare(value))}"
    )
