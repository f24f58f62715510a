"""Hydra's side of the plan: from `conf/` and overrides to the plain tree of every point of a sweep.

`sweep` in the configuration, or a list in an override where a single value belongs, names the axes: config groups or
dotted paths. A mapping is a product, here a block; a list of mappings is the union of their products. An override of
something that the experiment sweeps replaces its values in every block that has it; overrides of one block are those of
`saeflow.planning.blocks`.
"""

import dataclasses
import difflib
import itertools
import json
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from saeflow.config import ConfigError, PointConfig
from saeflow.config.checks import require
from saeflow.planning.blocks import Block, Edit, as_list, axis, blocks_of
from saeflow.planning.files import check_files, read
from saeflow.planning.overrides import parse

SETTINGS: dict[str, str] = {
    "experiment_name": "What its folders of figures and its ledger are called.",
    "figures": "Names of figures to draw; `make figures` lists all that there are.",
    "stacks": "Sets of layers whose dictionaries are also evaluated all at once: `all`, `all_but_first`, "
    "`all_but_last`, `inner` (all but both) or a list of layers. Dictionaries that differ in nothing but the layer "
    "belong together.",
    "blind": "A blind set of latents of all dictionaries, for people to judge; `{}` for one as it is by default.",
    "sweep": "Axes: config groups or dotted paths, each with its values. A mapping is a product, called a block; a "
    "list of mappings is the union of their products.",
}
"""Keys of an experiment beside those of its points and the config groups, and what each says."""


class Sweep:
    """Reads `conf/` with Hydra, and yields the plain tree of every point.

    `compose()` costs a tenth of a second, so it is called once per combination of config *groups*; plain values are set
    on its result. Interpolations are resolved after that, so that a value derived from a swept one follows it.
    """

    def __init__(self, conf: Path, overrides: list[str]) -> None:
        self.conf = conf
        self.fields = [f.name for f in dataclasses.fields(PointConfig)]
        self.groups = sorted(p.name for p in conf.iterdir() if p.is_dir())
        self.chosen: dict[str, list[str]] = {}  # config groups of the point set on the command line
        self.values: dict[str, list[Any]] = {}  # values of the point set on the command line
        self.edits: list[Edit] = []  # of single blocks of the sweep
        self.swept: Any = None  # the sweep set on the command line, of several the last; {} for none
        self.rest: list[str] = []  # everything else goes to Hydra as it is
        self._trees: dict[tuple[str, ...], Any] = {}
        self._parse(overrides)
        base = self._compose([])
        known = {*self.fields, *self.groups, *SETTINGS}
        for key in [key for key in base if key not in known]:
            raise ConfigError(f"{conf} or the experiment has a key {key!r} that nothing reads{_near(key, known)}")
        self.experiment = str(base.get("experiment_name") or "default")
        legal = re.fullmatch(r"\w[\w.+-]*", self.experiment) is not None
        require(legal, "experiment_name", self.experiment, "letters, digits and . _ + - alone, since it names folders")
        self.device = _plain(base["device"])
        self.figures = _list_of("figures", _plain(base.get("figures")))
        self.figures_asked = any(text.startswith("figures=") for text in self.rest)
        """Whether they are asked for by name, not those of an experiment of which the command line may take a part."""
        self.stacks = _list_of("stacks", _plain(base.get("stacks")))
        self.blind = _plain(base.get("blind"))
        sweep: Any = _plain(base.get("sweep")) or {}
        swept: Any = self.swept
        if swept is not None:  # of two mappings the axes of both; Hydra would refuse a list in place of a mapping
            merged = swept and isinstance(sweep, dict) and isinstance(swept, dict)
            sweep = sweep | swept if merged else swept
        self.blocks = self._blocks(sweep)

    def _parse(self, overrides: list[str]) -> None:
        for text, override in zip(overrides, parse(overrides), strict=True):
            key = override.key_or_group
            swept = override.is_sweep_override()
            value: Any = [_plain(v) for v in override.sweep_iterator()] if swept else _plain(override.value())
            top = key.split(".")[0]
            action = "+" if override.is_add() else "~" if override.is_delete() else ""
            if key in self.groups:
                self._choose(text, key, value)
            elif key.startswith("sweep."):
                self.edits.append(Edit(text, key.removeprefix("sweep."), value, action))
            elif key == "sweep" and not action:
                self.swept = value or {}
            elif top in self.fields and not action:
                self.values[key] = axis(key, value)
            elif top in (*self.fields, *self.groups, *SETTINGS):
                if swept:
                    raise ConfigError(f"{text}: a list needs brackets here: {key}=[{text.partition('=')[2]}]")
                self.rest.append(text)
            else:
                legal = sorted({*self.fields, *self.groups, *SETTINGS})
                raise ConfigError(f"unknown key {key!r}{_near(key, legal)}; legal here: {', '.join(legal)}")

    def _choose(self, text: str, group: str, value: Any) -> None:
        """Takes a choice of a config group. Raises `ConfigError` for several where one is taken."""
        if group in self.chosen or any(before.startswith(f"{group}=") for before in self.rest):
            how = f"list all in one, {group}=a,b" if group in self.fields else "give one, and run the other after it"
            raise ConfigError(f"{text}: {group} is given twice; {how}")
        if group in self.fields:
            self.chosen[group] = [str(v) for v in as_list(value)]
        elif isinstance(value, str | None):
            self.rest.append(text)
        else:
            raise ConfigError(f"{text}: one {group} can be given at a time; run one after the other")

    def _compose(self, choices: list[str]) -> Any:
        """Hydra's tree for some group choices, unresolved."""
        from hydra import compose, initialize_config_dir
        from hydra.core.global_hydra import GlobalHydra
        from hydra.errors import ConfigCompositionException, MissingConfigException
        from omegaconf import OmegaConf
        from omegaconf.errors import OmegaConfBaseException

        name = tuple(choices)
        if name not in self._trees:
            OmegaConf.register_new_resolver("root", lambda: str(self.conf.parent), replace=True)
            single = [f"{g}={c[0]}" for g, c in self.chosen.items() if len(c) == 1]
            check_files(self.conf, self._chosen_of([*self.rest, *single, *choices]))
            try:
                GlobalHydra.instance().clear()
                with initialize_config_dir(config_dir=str(self.conf), version_base="1.3"):
                    self._trees[name] = compose("config", overrides=[*self.rest, *single, *choices])
            except MissingConfigException as error:
                group, _, wanted = str(error.missing_cfg_file or "").partition("/")
                legal = self._choices(group)
                near = [c for c in legal if c.rsplit("/", 1)[-1] == wanted.rsplit("/", 1)[-1]]
                hint = f" (did you mean {' or '.join(near)}?)" if near else _near(wanted, legal)
                raise ConfigError(f"no config {group}={wanted}{hint}; {group} can be: {', '.join(legal)}") from error
            except (ConfigCompositionException, OmegaConfBaseException, ValueError, RecursionError) as error:
                raise ConfigError(f"the configuration does not compose: {_one_line(error)}{_cause(error)}") from error
        return self._trees[name]

    def _chosen_of(self, overrides: list[str]) -> dict[str, str]:
        """Choices of config groups among overrides."""
        found = (text.partition("=") for text in overrides)
        return {name: value for name, _, value in found if name in self.groups}

    def _choices(self, group: str) -> list[str]:
        """What a config group can be, those in folders of it last."""
        root = self.conf / group
        found = [p.relative_to(root).with_suffix("").as_posix() for p in root.rglob("*.yaml")] if group else []
        return sorted(found, key=lambda choice: (choice.count("/"), choice))

    def _blocks(self, sweep: Any) -> list[Block]:
        """The products whose union the sweep is, with what the command line says put in."""
        blocks = blocks_of(sweep, self.groups, self.edits)
        for block in blocks:
            for group, wanted in self.chosen.items():
                here = block.axes.get(group)
                block.axes[group] = wanted if here is None else [choice for choice in here if choice in wanted]
        blocks = [block for block in blocks if all(block.axes.values())]
        if not blocks:
            asked = " ".join(f"{g}={','.join(c)}" for g, c in self.chosen.items()) or self.edits[-1].text
            raise ConfigError(
                f"nothing is left of the sweep of experiment={self.experiment} with {asked}; set sweep=null"
            )
        return blocks

    def points(self) -> Iterator[dict[str, Any]]:
        used: set[str] = set()
        for block in self.blocks:
            groups = {k: v for k, v in block.axes.items() if k in self.groups}
            values = {k: v for k, v in block.axes.items() if k not in self.groups}
            for choice in itertools.product(*groups.values()):
                tree = self._compose([f"{g}={c}" for g, c in zip(groups, choice, strict=True)])
                axes_here = dict(values)
                for path, wanted in self.values.items():
                    if path in axes_here or _holds(tree, path):
                        axes_here[path] = values[path] if path in block.edited else wanted
                        used.add(path)
                for path in values:
                    if not _holds(tree, path):
                        raise ConfigError(f"sweep of {path}: no such key{_near(path, _leaves(tree, self.fields))}")
                for point in _product(tree, axes_here, self.fields):
                    if isinstance(name := point["evaluation"].get("corpus"), str):
                        point["evaluation"]["corpus"] = self._corpus(name)
                    yield point
        for path in sorted(self.values.keys() - used):
            raise self._unknown(path)

    def _corpus(self, name: str) -> dict[str, Any]:
        """The settings of a file in `conf/corpus/`."""
        (point,) = _product(self._compose([f"corpus={name}"]), {}, ["corpus"])
        return dict(point["corpus"])

    def _unknown(self, path: str) -> ConfigError:
        """What to say of a value that no point takes: a misspelt key, or one that other choices of its group have."""
        legal = sorted({leaf for tree in self._trees.values() for leaf in _leaves(tree, self.fields)})
        group, _, key = path.partition(".")
        others = [c for c in self._choices(group) if _has_key(self.conf / group / f"{c}.yaml", key)]
        if not others or path in legal:
            return ConfigError(f"unknown key {path!r}{_near(path, legal)}; no config of this experiment has it")
        chosen = sorted({choice for block in self.blocks for choice in block.axes.get(group, [])})
        here = f"{group}={','.join(chosen)}" if chosen else f"the {group} of this experiment"
        own = ", ".join(leaf for leaf in legal if leaf.startswith(f"{group}."))
        return ConfigError(f"{path} is an option of {group}={','.join(others)}, not of {here}, which has {own}")


def _product(tree: Any, values: dict[str, list[Any]], fields: list[str]) -> Iterator[dict[str, Any]]:
    """Every combination of `values` set on the tree; OmegaConf sets only those that an interpolation may mention."""
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    tree = OmegaConf.masked_copy(tree, [f for f in fields if f in tree])
    raw = json.dumps(OmegaConf.to_container(tree, resolve=False))
    mentioned = [p for p in values if f"{p.split('.')[-1]}}}" in raw]
    plain = [p for p in values if p not in mentioned]
    for combination in itertools.product(*(values[p] for p in mentioned)):
        for path, value in zip(mentioned, combination, strict=True):
            OmegaConf.update(tree, path, value)
        try:
            resolved = json.dumps(OmegaConf.to_container(tree, resolve=True))
        except OmegaConfBaseException as error:
            raise ConfigError(f"the configuration does not resolve: {_one_line(error)}") from error
        for rest in itertools.product(*(values[p] for p in plain)):
            point: Any = json.loads(resolved)  # several times as fast as a deep copy
            for path, value in zip(plain, rest, strict=True):
                *parents, leaf = path.split(".")
                node: Any = point
                for part in parents:
                    node = node[part]
                node[leaf] = value
            for group, options in point.items():
                for key in [k for k, v in options.items() if v == "???"] if isinstance(options, dict) else ():
                    raise ConfigError(f"{group}.{key} has to be given: add {group}.{key}=… to the overrides")
            yield point


def _plain(value: Any) -> Any:
    """A Hydra or OmegaConf value as plain Python, without resolving."""
    from hydra.core.override_parser.types import QuotedString
    from omegaconf import OmegaConf

    if isinstance(value, QuotedString):
        return value.text
    if isinstance(value, list):
        return [_plain(v) for v in value]
    return OmegaConf.to_container(value) if OmegaConf.is_config(value) else value


def _list_of(name: str, value: Any) -> list[Any]:
    """What a list of the configuration holds. Raises `ConfigError` where it is none."""
    if value is not None and not isinstance(value, list):
        raise ConfigError(f"{name}={value}: a list belongs here: {name}=[{value}]")
    return value or []


def _holds(tree: Any, path: str) -> bool:
    node: Any = tree
    for part in path.split("."):
        if not hasattr(node, "keys") or part not in node.keys():  # noqa: SIM118 -- a value "???" is not "in"
            return False
        node = node._get_node(part)
    return True


def _has_key(file: Path, path: str) -> bool:
    """Whether a YAML file has the key at a dotted path."""
    try:
        node: Any = read(file)
    except ConfigError:
        return False  # a file that this run does not read
    for part in path.split("."):
        if not isinstance(node, dict) or part not in node:
            return False
        node = node[part]
    return True


def _leaves(tree: Any, fields: list[str]) -> list[str]:
    found: list[str] = []

    def walk(node: Any, path: str) -> None:
        if isinstance(node, dict):
            for key, value in node.items():
                walk(value, f"{path}.{key}" if path else str(key))
        else:
            found.append(path)

    walk({k: v for k, v in _plain(tree).items() if k in fields}, "")
    return found


def _cause(error: BaseException) -> str:
    """What Hydra's message leaves to the error behind it."""
    return f" ({_one_line(error.__cause__)})" if error.__cause__ is not None else ""


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())


def _near(name: str, legal: Iterable[str]) -> str:
    near = difflib.get_close_matches(name, list(legal), n=3)
    return f" (did you mean {' or '.join(near)}?)" if near else ""
