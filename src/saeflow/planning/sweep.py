"""Hydra's side of the plan: from `conf/` and overrides to the plain tree of every point of a sweep.

`sweep` in the configuration, or a list in an override where a single value belongs, names the axes: config groups or
dotted paths. A mapping is a product; a list of mappings is the union of their products. An override of something that
the experiment sweeps replaces its values in every product that has it.
"""

import dataclasses
import difflib
import itertools
import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from saeflow.config import ConfigError, PointConfig, takes_list


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
        self.rest: list[str] = []  # everything else goes to Hydra as it is
        self._trees: dict[tuple[str, ...], Any] = {}
        self._parse(overrides)
        base = self._compose([])
        self.experiment = str(base.get("experiment_name") or "default")
        self.device = _plain(base["device"])
        self.figures = _plain(base["figures"])
        self.stacks = _plain(base.get("stacks") or [])
        self.blind = _plain(base.get("blind"))
        self.blocks = self._blocks(_plain(base.get("sweep") or {}))

    def _parse(self, overrides: list[str]) -> None:
        from hydra.core.override_parser.overrides_parser import OverridesParser
        from hydra.errors import OverrideParseException

        try:
            parsed = OverridesParser.create().parse_overrides(overrides)
        except OverrideParseException as error:
            raise ConfigError(f"cannot read the override {error.override!r}: {error}") from error
        for text, override in zip(overrides, parsed, strict=True):
            key = override.key_or_group
            if override.is_sweep_override():
                value: Any = [_plain(v) for v in override.sweep_iterator()]
            else:
                value = _plain(override.value())
            top = key.split(".")[0]
            if key in self.groups and key in self.fields:
                self.chosen[key] = [str(v) for v in _as_list(value)]
            elif top in self.fields and override.is_add() is False and override.is_delete() is False:
                self.values[key] = _axis(key, value)
            elif top in (*self.fields, *self.groups, "sweep", "experiment_name", "figures", "stacks", "blind"):
                self.rest.append(text)
            else:
                legal = sorted({*self.fields, *self.groups})
                raise ConfigError(f"unknown key {key!r}{_near(key, legal)}; legal here: {', '.join(legal)}")

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
            try:
                GlobalHydra.instance().clear()
                with initialize_config_dir(config_dir=str(self.conf), version_base="1.3"):
                    self._trees[name] = compose("config", overrides=[*self.rest, *single, *choices])
            except MissingConfigException as error:
                group = str(error.missing_cfg_file or "").split("/")[0]
                legal = sorted(p.stem for p in (self.conf / group).glob("*.yaml")) if group in self.groups else []
                raise ConfigError(
                    f"no config {error.missing_cfg_file!r}; {group} can be: {', '.join(legal)}"
                ) from error
            except (ConfigCompositionException, OmegaConfBaseException) as error:
                raise ConfigError(f"the configuration does not compose: {_one_line(error)}") from error
        return self._trees[name]

    def _blocks(self, sweep: Any) -> list[dict[str, list[Any]]]:
        """The products whose union the sweep is, with what the command line says put in."""
        blocks = []
        for block in sweep if isinstance(sweep, list) else [sweep]:
            axes = {k: _as_list(v) if k in self.groups else _axis(k, v) for k, v in block.items()}
            for group, wanted in self.chosen.items():
                axes[group] = [c for c in axes[group] if c in wanted] if group in axes else wanted
            if all(axes.values()):
                blocks.append(axes)
        if not blocks:
            asked = " ".join(f"{g}={','.join(c)}" for g, c in self.chosen.items())
            raise ConfigError(
                f"nothing is left of the sweep of experiment={self.experiment} with {asked}; set sweep=null"
            )
        return blocks

    def points(self) -> Iterator[dict[str, Any]]:
        used: set[str] = set()
        for axes in self.blocks:
            groups = {k: v for k, v in axes.items() if k in self.groups}
            values = {k: v for k, v in axes.items() if k not in self.groups}
            for choice in itertools.product(*groups.values()):
                tree = self._compose([f"{g}={c}" for g, c in zip(groups, choice, strict=True)])
                axes_here = dict(values)
                for path, wanted in self.values.items():
                    if path in axes_here or _holds(tree, path):
                        axes_here[path] = wanted
                        used.add(path)
                for path in values:
                    if not _holds(tree, path):
                        raise ConfigError(f"sweep of {path}: no such key{_near(path, _leaves(tree, self.fields))}")
                yield from _product(tree, axes_here, self.fields)
        for path in self.values.keys() - used:
            legal = sorted({leaf for tree in self._trees.values() for leaf in _leaves(tree, self.fields)})
            raise ConfigError(f"unknown key {path!r}{_near(path, legal)}; no config of this experiment has it")


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


def _as_list(value: Any) -> list[Any]:
    return list(value) if isinstance(value, list | tuple) else [value]


def _axis(path: str, value: Any) -> list[Any]:
    """The values of a sweep axis. Where the field itself is a list, one list is one value."""
    if takes_list(path):
        nested = isinstance(value, list) and bool(value) and all(isinstance(v, list) for v in value)
        return value if nested else [value]
    values = _as_list(value)
    if not values:
        raise ConfigError(f"sweep of {path}: the list is empty")
    return values


def _holds(tree: Any, path: str) -> bool:
    node: Any = tree
    for part in path.split("."):
        if not hasattr(node, "keys") or part not in node.keys():  # noqa: SIM118 -- a value "???" is not "in"
            return False
        node = node._get_node(part)
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


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())


def _near(name: str, legal: Iterable[str]) -> str:
    near = difflib.get_close_matches(name, list(legal), n=3)
    return f" (did you mean {' or '.join(near)}?)" if near else ""
