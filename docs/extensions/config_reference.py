"""The reference of the configuration, from its dataclasses, the stages that read it, and the files of `conf/`.

A field is described by the string below it: `[unit] meaning. Source: where it is from.` `documented` finds all of them;
the directives `config-fields` and `config-files` show those of a group.
"""

import ast
import dataclasses
import inspect
import re
import textwrap
import types
import typing
from collections.abc import Iterable, Iterator
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

import yaml
from docutils import nodes
from sphinx.application import Sphinx
from sphinx.util.docutils import SphinxDirective

from saeflow.config import BlindConfig, CorpusConfig, DictionaryConfig, PointConfig
from saeflow.config.device import SETTINGS as DEVICE
from saeflow.config.dictionary import kinds
from saeflow.planning.expansion import compose
from saeflow.planning.sweep import SETTINGS as EXPERIMENT
from saeflow.training.stage import HOW_IT_RUNS

CONF = Path(__file__).resolve().parents[2] / "conf"
LIBRARY = CONF.parent / "src/saeflow"
UNITS = {
    "tokens", "rows", "steps", "batches", "latents", "documents", "dictionaries", "examples", "intervals", "bins",
    "pairs", "atoms", "samples", "resamples", "checkpoints", "seconds", "index", "seed", "fraction", "factor", "rate",
    "norm", "|J|", "heads", "paths", "nodes",
}  # fmt: skip
"""What a number can be a number of; `factor`, `rate` and `fraction` have no dimension."""

EXPERIMENTS = (
    ["experiment=demo", "features=all", "dashboards=all"],
    ["experiment=jsae"],
    ["experiment=attention_heads"],
    ["experiment=stack"],
    ["experiment=circuits"],
    ["experiment=blind"],
    ["experiment=tracr_case3"],
    ["experiment=demo", "evaluation.replace_first=false", "tokens.eos_token='Ġthe'", "model.dtype=bfloat16"],
)
"""Which together have every stage; their plans say what each reads."""

ELSEWHERE = {
    "hook_name": "site.hook_name",
    "hook_name_out": "site.hook_name_out",
    "head": "site.head",
    "layers": "site.layer",
    "layer": "circuits.layer",
    "replace_first": "evaluation.replace_first",
}
"""What instances read that is called otherwise than the setting that it is."""

BESIDE_KEYS = {
    "model.name": "nobody: people see it",
    "corpus.name": "nobody: people see it",
    "dictionary.label": "`figures`, and no key",
    "model.tracr.path": "`groundtruth`; in keys are the contents of its files",
    "features.make": "the plan: whether the stage `features` is there",
    "dashboards.make": "the plan: whether the stages `dashboards`, `comparisons` and `features` are there",
    "jacobian.transcoders": "the plan: whether transcoders have a stage `jacobian`",
} | {f"training.{name}": "`train`, as to how it runs: in no key" for name in HOW_IT_RUNS}
BESIDE_KEYS |= {
    f"model.{name}": "every stage that opens the model; in keys are the contents of its files"
    for name in ("path", "hub", "revision")
}
BESIDE_KEYS |= {
    f"corpus.{name}": "`tokens`; in keys are the contents of local files, and of datasets their names"
    for name in ("path", "dataset", "subset", "split", "revision", "case")
}
BESIDE_KEYS |= {
    f"dictionary.{name}": "`foreign`; in keys are the contents of its files"
    for name in ("path", "heads", "format", "release", "sae_id", "path_out", "sae_id_out")
}
BESIDE_KEYS |= {
    f"evaluation.corpus.{field.name}": BESIDE_KEYS.get(f"corpus.{field.name}", "`tokens`")
    for field in dataclasses.fields(CorpusConfig)
}


REQUIRED = "has to be given"


class Setting(NamedTuple):
    """One field of the configuration."""

    path: str
    """Dotted, as in an override."""
    kinds: tuple[str, ...]
    """Kinds of dictionary that have it; empty for what is no option of a kind."""
    type: str
    choices: tuple[str, ...]
    default: str
    usual: str
    """What the group's default file in `conf/` sets, where that is another."""
    unit: str
    meaning: str
    source: str


class Described(NamedTuple):
    unit: str
    meaning: str
    source: str


def describe(text: str) -> Described:
    """The parts of a field's string. A source is a sentence of its own, at the end."""
    unit, meaning = re.fullmatch(r"(?:\[([^\]]+)\] )?(.*)", " ".join(text.split()), re.DOTALL).groups()  # type: ignore[union-attr]
    meaning, _, source = meaning.partition(" Source: ")
    return Described(unit or "", meaning, source.removesuffix("."))


@cache
def strings(cls: type) -> dict[str, str]:
    """Of the fields of a class and its bases, the strings below them."""
    found: dict[str, str] = {}
    for base in reversed([c for c in cls.__mro__ if dataclasses.is_dataclass(c)]):
        (tree,) = ast.parse(textwrap.dedent(inspect.getsource(base))).body
        assert isinstance(tree, ast.ClassDef)
        for field, after in zip(tree.body, tree.body[1:], strict=False):
            if isinstance(field, ast.AnnAssign) and isinstance(after, ast.Expr) and isinstance(field.target, ast.Name):
                found[field.target.id] = ast.literal_eval(after.value)
    return found


def documented() -> Iterator[Setting]:
    """Every field of the configuration, in the order of its classes."""
    for name, hint in typing.get_type_hints(PointConfig).items():
        if hint is DictionaryConfig:
            yield from _of_kinds()
        elif dataclasses.is_dataclass(hint):
            yield from _of_class(hint, f"{name}.")
        else:
            (field,) = (f for f in dataclasses.fields(PointConfig) if f.name == name)
            yield _setting(PointConfig, field, "")
    yield from _of_class(BlindConfig, "blind.")


def _of_class(cls: type, prefix: str) -> Iterator[Setting]:
    hints = typing.get_type_hints(cls)
    for field in dataclasses.fields(cls):
        hint = _without_none(hints[field.name])
        if dataclasses.is_dataclass(hint):
            yield from _of_class(hint, f"{prefix}{field.name}.")  # type: ignore[arg-type]
        else:
            yield _setting(cls, field, prefix)


def _of_kinds() -> Iterator[Setting]:
    """Options of dictionaries, each once, with the kinds that have it."""
    found: dict[tuple[str, str], Setting] = {}
    for kind, cls in kinds().items():
        for one in _of_class(cls, "dictionary."):
            same = one.path, one.meaning
            found[same] = one._replace(kinds=(*(found[same].kinds if same in found else ()), kind))
    yield from found.values()


def _setting(cls: type, field: dataclasses.Field, prefix: str) -> Setting:
    path, hint = prefix + field.name, typing.get_type_hints(cls)[field.name]
    unit, meaning, source = describe(strings(cls).get(field.name, ""))
    default = REQUIRED
    if field.default is not dataclasses.MISSING:
        default = said(field.default)
    elif field.default_factory is not dataclasses.MISSING:
        default = said(field.default_factory())
    usual = said(_usual().get(path, field.default)) if prefix != "dictionary." else default
    return Setting(path, (), *_type(hint), default, usual if usual != default else "", unit, meaning, source)


def said(value: Any) -> str:
    """A value as it is written in YAML."""
    if value is dataclasses.MISSING:
        return REQUIRED
    if isinstance(value, tuple | list):
        return "[" + ", ".join(map(said, value)) + "]"
    if isinstance(value, float):
        return f"{value:g}"
    return {None: "null", True: "true", False: "false"}.get(value, str(value)) if not isinstance(value, dict) else "{}"


def _without_none(hint: Any) -> Any:
    args = [a for a in typing.get_args(hint) if a is not type(None)]
    return args[0] if type(None) in typing.get_args(hint) else hint


def _type(hint: Any) -> tuple[str, tuple[str, ...]]:
    """What may stand there, in words, and the values that it is one of."""
    names = {int: "whole number", float: "number", str: "text", bool: "true or false", dict: "settings"}
    inner = _without_none(hint)
    null = " or null" if inner is not hint else ""
    origin, args = typing.get_origin(inner), typing.get_args(inner)
    if origin is typing.Literal:
        return "one of these" + null, tuple(map(str, args))
    if origin in (typing.Union, types.UnionType):  # a list, or a word in its place
        (of, choices), (_, words) = map(_type, args)
        return f"{of} or one of these{null}", (*choices, *words)
    if origin is tuple:
        of, choices = _type(args[0])
        return (f"list of {of}s" if not choices else "list of these") + null, choices
    return names[dict if origin is dict else inner] + null, ()


@cache
def _usual() -> dict[str, Any]:
    """What the defaults of `conf/` set, by dotted path."""
    root = yaml.load((CONF / "config.yaml").read_text(), Loader=_Yaml)
    found = {name: value for name, value in root.items() if name not in ("defaults", *EXPERIMENT)}
    for entry in root["defaults"]:
        for group, choice in entry.items() if isinstance(entry, dict) else ():
            if choice and group not in ("device", "dictionary", "site"):
                tree = yaml.load((CONF / group / f"{choice}.yaml").read_text(), Loader=_Yaml)
                found[group] = {**tree, **(found.get(group) or {})}
    return dict(_leaves(found))


class _Yaml(yaml.SafeLoader):
    """Reads 6e-3 as the number that Hydra takes it for."""


_Yaml.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"[-+]?[0-9][0-9_]*(?:\.[0-9_]*)?[eE][-+]?[0-9]+"), list("-+0123456789")
)


def _leaves(tree: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    if isinstance(tree, dict) and tree:
        for name, value in tree.items():
            yield from _leaves(value, f"{path}.{name}" if path else name)
    else:
        yield path, tree


@cache
def readers() -> dict[str, tuple[str, ...]]:
    """By setting the stages that read it, as the plans of `EXPERIMENTS` have it."""
    found: dict[str, dict[str, None]] = {}
    with TemporaryDirectory() as results:
        for overrides in EXPERIMENTS:
            plan = compose(CONF, overrides, results)
            for stage, instances in plan.stages.items():
                for instance in instances.values():
                    paths = [_as_set(path) for path, _ in _leaves(instance.config)]
                    for path in [*paths, *(setting for setting, _ in instance.says.values())]:
                        found.setdefault(path, {})[stage] = None
    return {path: tuple(stages) for path, stages in found.items()}


def _as_set(path: str) -> str:
    """The setting that an instance reads at a path of its own."""
    return f"model.{path}" if path.startswith("tracr.") else ELSEWHERE.get(path, path)


def read_by(path: str) -> str:
    """Who reads a setting, for people; '' where nobody is known."""
    stages = readers().get(path, ())
    if path.startswith("dictionary.") and path not in BESIDE_KEYS:
        stages = ("train",)
    if path.startswith("training.exclude.") or path == "training.buffer_tokens":
        stages = ("train",)
    return ", ".join(f"`{stage}`" for stage in stages) or BESIDE_KEYS.get(path, "")


# -------------------------------------------------------------------- as a page
def fields_page(groups: Iterable[str]) -> str:
    """Of kinds that say different things of one option, the first is what links lead to."""
    lines: list[str] = []
    before: set[str] = set()
    for one in documented():
        if (one.path.partition(".")[0] if "." in one.path else "point") in groups:
            lines += _entry(one, [":no-index:"] if one.path in before else [])
            before.add(one.path)
    return "\n".join(lines)


def _entry(one: Setting, options: list[str]) -> list[str]:
    meaning = re.sub(r"\(docs/(\w+)\.md\)", r"([more](\1.md))", one.meaning)
    choices = ", ".join(f"`{choice}`" for choice in one.choices)
    facts = {
        "Type": one.type.replace("one of these", f"one of {choices}").replace("list of these", f"list of {choices}"),
        "Unit": one.unit,
        "Default": f"`{one.default}`" if one.default != REQUIRED else one.default,
        "Preset": f"`{one.usual}`" if one.usual else "",
        "Kinds": ", ".join(f"`{kind}`" for kind in one.kinds if one.kinds != tuple(kinds())),
        "Source": one.source,
        "Read by": read_by(one.path),
    }
    shown = [f":{name}: {fact}" for name, fact in facts.items() if fact]
    return [f"::::{{confval}} {one.path}", *options, "", meaning, "", *shown, "::::", ""]


def other_page(which: str) -> str:
    """Settings that are no field of a dataclass: of jobs, or of the experiment."""
    prefix, settings = ("device.", DEVICE) if which == "device" else ("", EXPERIMENT)
    lines: list[str] = []
    for name, text in settings.items():
        unit, meaning, _ = describe(text)
        lines += [f"::::{{confval}} {prefix}{name}", "", meaning, "", *([f":Unit: {unit}"] if unit else []), "::::", ""]
    return "\n".join(lines)


def files_page(group: str) -> str:
    """The files of a group of `conf/`, each with what its comment says and what it sets."""
    lines: list[str] = []
    for file in sorted((CONF / group).rglob("*.yaml"), key=lambda f: (len(f.parts), f)):
        name, text = file.relative_to(CONF / group).with_suffix("").as_posix(), file.read_text()
        comment, rest = _comment(text)
        override = f"{group}={name}"
        lines += [f"### `{override}`", "", comment, "", f"::::{{code-block}} yaml\n\n{rest.strip()}\n::::", ""]
    return "\n".join(lines)


def _comment(text: str) -> tuple[str, str]:
    """The lines of comment that a file begins with, as prose, and the rest. Indented ones stay as they are."""
    lines = [line for line in text.splitlines() if line != "# @package _global_"]
    n = next((i for i, line in enumerate(lines) if not line.startswith("#")), len(lines))
    said = "\n".join(line.removeprefix("#").removeprefix(" ") for line in lines[:n])
    said = re.sub(r"(?m)^( {2,}\S.*(?:\n {2,}\S.*)*)", lambda code: f"\n```\n{code[1]}\n```\n", said)
    return said.replace("<", "&lt;"), "\n".join(lines[n:])


class FromCode(SphinxDirective):
    """Shows what a function makes of the directive's argument, as MyST."""

    required_arguments = 1
    final_argument_whitespace = True

    def run(self) -> list[nodes.Node]:
        for file in [*CONF.rglob("*.yaml"), *LIBRARY.glob("config/*.py"), *LIBRARY.glob("dictionaries/kinds/*.py")]:
            self.env.note_dependency(str(file))  # a change of it makes the page anew
        make = {"config-fields": lambda names: fields_page(names.split()), "config-files": files_page}
        make["config-settings"] = other_page
        return self.parse_text_to_nodes(make[self.name](self.arguments[0]), allow_section_headings=True)


def know_settings(app: Sphinx) -> None:
    app.env.config_paths = {one.path for one in documented()}  # type: ignore[attr-defined]


def setup(app: Sphinx) -> dict[str, Any]:
    for name in ("config-fields", "config-settings", "config-files"):
        app.add_directive(name, FromCode)
    app.connect("builder-inited", know_settings)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
