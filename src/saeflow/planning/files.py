"""The files of `conf/` as text, read before Hydra reads them: what is wrong in one is said with its file and line.

Hydra leaves out an experiment that is empty, a list or without its first line, and plans something else; what YAML
refuses it gives as a traceback.
"""

import re
from collections.abc import Iterator, Mapping
from functools import cache
from pathlib import Path
from typing import Any

from saeflow.config import ConfigError

EXPERIMENT = "experiment"
MOST_VALUES = 1_000_000
"""Of one file, with what its aliases stand for."""
_PACKAGE = re.compile(r"#\s*@package\s+\S+\s*")
_TAB = "a tab, which YAML does not take for indentation: put spaces"


def check_files(conf: Path, choices: Mapping[str, str]) -> None:
    """Raises `ConfigError` for the first file that is wrong, of those that a composition reads: `config.yaml`, what its
    defaults or `choices` take of each group, and what the defaults of these name."""
    _check(conf, conf / "config.yaml", choices, ())


def _check(conf: Path, file: Path, choices: Mapping[str, str], above: tuple[Path, ...]) -> None:
    if file in above:
        raise ConfigError(f"{file}: its defaults lead back to it ({' → '.join(f.stem for f in (*above, file))})")
    if not file.is_file() or conf not in file.parents:
        return  # Hydra says which there are
    tree = read(file)
    if file.parent != conf and file.relative_to(conf).parts[0] == EXPERIMENT:
        _check_experiment(file, tree)
    for group, choice in _defaults(tree.get("defaults")):
        folder = file.parent if group is None else conf / group
        chosen = choice if group is None else choices.get(group, choice)
        _check(conf, folder / f"{chosen}.yaml", choices, (*above, file))


def _defaults(entries: Any) -> Iterator[tuple[str | None, str]]:
    """Groups and choices of a defaults list; None for a file beside the one that has it."""
    for entry in entries if isinstance(entries, list) else ():
        if isinstance(entry, str) and entry != "_self_":
            yield None, entry
        for group, choice in entry.items() if isinstance(entry, dict) else ():
            name = re.sub(r"^(?:(?:override|optional)\s+)*/?", "", str(group)).partition("@")[0]
            for one in choice if isinstance(choice, list) else [choice]:
                yield name, str(one)


def _check_experiment(file: Path, tree: dict[str, Any]) -> None:
    """Raises `ConfigError` for an experiment of which Hydra would use nothing."""
    if not tree:
        raise ConfigError(f"{file} is empty: an experiment says what it changes, such as `sweep: {{...}}`")
    header = (line for line in file.read_text(encoding="utf-8").splitlines() if line.strip())
    if not _PACKAGE.fullmatch(next(header).strip()):
        raise ConfigError(
            f"{file} is read as a group of its own, so that nothing of it is used: make its first line "
            "`# @package _global_`"
        )


@cache
def _read(file: Path, state: tuple[int, int]) -> dict[str, Any]:
    import yaml

    try:
        text = file.read_bytes().decode("utf-8")
    except UnicodeDecodeError as error:
        line = error.object[: error.start].count(b"\n") + 1
        raise ConfigError(f"{file}, line {line}: {error.reason}, so it is not UTF-8; save it as UTF-8") from error
    loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
    try:
        node = yaml.compose(text, loader)
        if node is not None:
            _check_node(node, file, {}, ())
        tree = yaml.load(text, loader)
    except yaml.YAMLError as error:
        raise ConfigError(f"{file}{_place(error, text)}") from error
    except RecursionError:
        raise ConfigError(f"{file} is nested too deeply to be read") from None
    if tree is not None and not isinstance(tree, dict):
        raise ConfigError(f"{file}, line 1: the file is a {type(tree).__name__}; it must be a mapping, `key: value`")
    return tree or {}


def read(file: Path) -> dict[str, Any]:
    """What a YAML file holds, {} for nothing. Raises `ConfigError`, with file and line, for what is no mapping of texts
    to plain values."""
    state = file.stat()
    return _read(file, (state.st_mtime_ns, state.st_size))


def _check_node(node: Any, file: Path, sizes: dict[int, int], above: tuple[int, ...]) -> int:
    """How many values a node of YAML stands for, aliases followed. Raises `ConfigError` for keys that are given twice
    or are no text, for tags that ask for a Python object, and for a file that its aliases make endless or huge."""
    import yaml

    if id(node) in sizes:
        return sizes[id(node)]
    where = f"{file}, line {node.start_mark.line + 1}"
    if id(node) in above:
        raise ConfigError(f"{where}: an alias within what it stands for")
    if not node.tag.startswith("tag:yaml.org,2002:") or ":python/" in node.tag:
        tag = node.tag.replace("tag:yaml.org,2002:", "!!")
        raise ConfigError(f"{where}: the tag {tag}; a configuration holds plain values, and no code of it is run")
    inside = (*above, id(node))
    size = 1
    if isinstance(node, yaml.MappingNode):
        lines = dict[str, int]()
        for key, value in node.value:
            line = key.start_mark.line + 1
            if key.tag not in ("tag:yaml.org,2002:str", "tag:yaml.org,2002:merge"):
                raise ConfigError(f"{file}, line {line}: a key must be a text; put quotes around it")
            if key.value in lines:
                raise ConfigError(
                    f"{file}, line {line}: the key {key.value} is there twice, first in line "
                    f"{lines[key.value]}; leave one"
                )
            lines[key.value] = line
            size += _check_node(value, file, sizes, inside)
    elif isinstance(node, yaml.SequenceNode):
        size += sum(_check_node(value, file, sizes, inside) for value in node.value)
    if size > MOST_VALUES:
        raise ConfigError(f"{where}: with its aliases this is more than {MOST_VALUES:,} values")
    sizes[id(node)] = size
    return size


def _place(error: Any, text: str) -> str:
    """Line and reason of an error of YAML."""
    mark = getattr(error, "problem_mark", None)
    if mark is None:  # a character that YAML does not allow, at a position
        line = text[: getattr(error, "position", 0)].count("\n") + 1
        return f", line {line}: {getattr(error, 'reason', None) or ' '.join(str(error).split())}"
    lines = text.splitlines()
    shown = lines[mark.line] if mark.line < len(lines) else ""
    indent = shown[: len(shown) - len(shown.lstrip())]
    reason = _TAB if "\t" in indent else str(error.problem)
    begun = getattr(error, "context_mark", None)
    since = f" (of what begins in line {begun.line + 1})" if begun is not None and begun.line != mark.line else ""
    return f", line {mark.line + 1}: {reason}{since}"
