"""From configuration to plan: every stage adds its instances for the points of a sweep, in the order of the data flow.

Nothing here knows which stages, sources or kinds of dictionary there are: they are declared by their packages.
"""

import dataclasses
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from saeflow.config import PointConfig, build
from saeflow.config.defaults import set_apart
from saeflow.config.device import check_device
from saeflow.config.labels import check_names, joined, merged, told, unusual
from saeflow.planning.batches import look
from saeflow.planning.digests import DigestCache, canonical, short_hash
from saeflow.planning.graph import Instance, Plan
from saeflow.planning.stages import sources, stages
from saeflow.planning.sweep import Sweep


class PlannedDictionary(NamedTuple):
    """A dictionary of a point that is evaluated: an artifact, or a part of one."""

    stage: str
    """Which has it: `train`, or `foreign`."""
    key: str
    hook_name: str
    """Where it writes."""
    base: str
    """Its name, without what is not as usual and the hash: kind, place and amount."""
    part: str = ""
    head: int | None = None

    @property
    def label(self) -> str:
        """Kind, place, amount and part."""
        return "-".join([self.base, *([self.part] if self.part else [])])


@dataclass
class PlannedPoint:
    """A point on its way through the stages: what identifies its parts, and the keys of its artifacts so far."""

    point: PointConfig
    tree: dict[str, Any]
    """The point as plain data, in which sources put what identifies them by content. Stages project it."""
    plan: Plan
    digests: DigestCache
    tells: dict[str, dict[str, str]] = field(default_factory=dict)
    """Of every key of the plan, what its name tells that is not as usual (`saeflow.config.labels`)."""
    sources: dict[str, str] = field(default_factory=dict)
    """Where outside files lie now, and how jobs are to be run: never hashed."""
    geometry: Any = None
    """`saeflow.models.folder.Geometry` of its model."""
    labels: dict[str, str] = field(default_factory=dict)
    """What stands for its model and its corpora in names of folders: made of content, never what the user calls
    them."""
    keys: dict[str, dict[str, str]] = field(default_factory=dict)
    """Of each stage, the keys of this point's artifacts by what tells them apart: a split, a hook, ..."""
    dictionaries: list[PlannedDictionary] = field(default_factory=list)
    """What is evaluated."""

    def add(
        self,
        stage: str,
        label: str,
        needs: dict[str, list[str]],
        extra: Mapping[str, Any] | None = None,
        *,
        name: str = "",
        sources: dict[str, str] | None = None,
        says: Mapping[str, str] | None = None,
        tells: bool = True,
    ) -> str:
        """Adds an instance of a stage and returns its key. It reads what the stage declares, and `extra`; `name` tells
        it from others of the stage in `keys`. `says`: the settings that entries of `extra` follow from. Unless `tells`,
        its folder is named by `label` alone, without what is not as usual."""
        config = project(self.tree, stages()[stage].reads) | dict(extra or {})
        needed = [self.tells.get(key, {}) for keys in needs.values() for key in keys]
        parts = merged([*needed, unusual(config, self.labels)])
        if parts.get("corpus") == "":  # what it is made from is of both corpora of the point
            parts |= {path: token for path, token in self.labels.items() if path == "evaluation.corpus"}
        full = joined(label, parts) if tells else label
        settings = {name: [path, self.setting(path)] for name, path in (says or {}).items()}
        key = add_instance(self.plan, stage, full, config, needs, self.sources | (sources or {}), settings)
        for path in (says or {}).values():
            parts |= told(path, self.setting(path))
        self.tells[key] = parts
        self.keys.setdefault(stage, {})[name] = key
        return key

    def setting(self, path: str) -> Any:
        """A value of the point by its dotted path."""
        value: Any = self.point
        for part in path.split("."):
            value = getattr(value, part)
        return value

    def needed(self, stage: str) -> dict[str, list[str]]:
        """All keys of a stage that this point has, as an instance's needs; nothing where it has none."""
        keys = list(dict.fromkeys(self.keys.get(stage, {}).values()))
        return {stage: keys} if keys else {}


@dataclass
class Expansion:
    """All points of an experiment, and what it asks for that is of several points."""

    plan: Plan
    points: list[PlannedPoint]
    figures: list[str]
    stacks: list[Any]
    blind: dict[str, Any] | None
    figures_asked: bool = False
    """Whether `figures` were named for this run: all of them have to be possible."""


def compose(
    conf: str | Path, overrides: list[str], results: str = "results", digests: str | Path | None = None
) -> Plan:
    """Composes `conf/` with Hydra overrides into a plan, and looks at what of it is there; `digests` is a file that
    remembers content hashes.

    Raises `ConfigError` for anything that cannot run: an unknown key or group, an impossible combination, a model
    without weights, a hook that the model does not have.
    """
    cache = DigestCache(digests)
    sweep = Sweep(Path(conf).resolve(), overrides)
    in_parts, spread = (
        [name for name, s in stages().items() if can(s)] for can in (lambda s: s.parts, lambda s: s.spreads)
    )
    check_device(sweep.device, stages(), in_parts, spread)
    table: dict[str, dict[str, Instance]] = {name: {} for name in stages()}
    plan = Plan(sweep.experiment, table, sweep.device, results=results, overrides=list(overrides))
    tells: dict[str, dict[str, str]] = {}
    points = [_planned(build(PointConfig, tree), plan, cache, tells) for tree in sweep.points()]
    expansion = Expansion(plan, points, sweep.figures, sweep.stacks, sweep.blind, sweep.figures_asked)
    for stage in stages().values():
        stage.expand(expansion)
    look(plan)
    cache.save()
    return plan


def _planned(point: PointConfig, plan: Plan, digests: DigestCache, tells: dict[str, dict[str, str]]) -> PlannedPoint:
    tree = json.loads(canonical(dataclasses.asdict(point)))  # tuples become lists, as they will be when read back
    tree["dictionary"] = json.loads(canonical(point.dictionary.identity()))
    planned = PlannedPoint(point, tree, plan, digests, tells)
    for source in sources():
        if source.applies(point):
            source.identify(planned)
    return planned


def add_instance(
    plan: Plan,
    stage: str,
    label: str,
    config: dict[str, Any],
    needs: dict[str, list[str]],
    sources: dict[str, str],
    says: Mapping[str, list[Any]] | None = None,
) -> str:
    """Adds an instance, unless an equal one is there; returns its key. Settings at their defaults are not in its hash,
    nor are the labels of what it needs."""
    declared = stages()[stage]
    version = declared.version_of(config) or declared.version
    needed = {other: [plan.stages[other][key].identity for key in keys] for other, keys in needs.items()}
    identity = short_hash([stage, version, set_apart(config), needed], 32)
    key = f"{label}-{identity[:8]}"
    check_names(key)
    made = Instance(stage, key, config, needs, sources, version, dict(says or {}), identity)
    plan.stages[stage].setdefault(key, made)
    return key


def project(tree: dict[str, Any], paths: Iterable[str]) -> dict[str, Any]:
    """The part of a tree at some dotted paths; one that ends in `?` is left out where it is null."""
    out: dict[str, Any] = {}
    for path in paths:
        *parents, leaf = path.removesuffix("?").split(".")
        source, node = tree, out
        for part in parents:
            source, node = source[part], node.setdefault(part, {})
        if source[leaf] is not None or not path.endswith("?"):
            node[leaf] = source[leaf]
    return out


def short_hook(hook_name: str, hook_name_out: str | None = None) -> str:
    """`blocks.2.ln2.hook_normalized` as `L2.ln2.normalized`, for labels; from one to another of the same block as
    `L2.ln2.normalized_to_mlp_out`."""
    name = hook_name.replace("blocks.", "L").replace("hook_", "")
    if hook_name_out is None or hook_name_out == hook_name:
        return name
    out, block = short_hook(hook_name_out), name.split(".")[0] + "."
    return f"{name}_to_{out.removeprefix(block)}"
