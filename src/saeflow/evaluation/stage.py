"""The stages `baseline`, `evaluate`, `stack` and `blind`: dictionaries in the model, on held-out tokens."""

import dataclasses
import re
from collections.abc import Collection, Iterable, Sequence
from typing import Any, NamedTuple

from saeflow.config import BlindConfig, ConfigError, build
from saeflow.config.labels import file_safe
from saeflow.jobs.job import Job
from saeflow.models.resources import block_of, operations, running
from saeflow.planning.digests import canonical
from saeflow.planning.expansion import Expansion, PlannedPoint, add_instance, short_hook
from saeflow.planning.graph import Instance, Plan
from saeflow.planning.stages import Stage
from saeflow.training.stage import dictionaries_mb, dictionaries_operations


def expand_baseline(expansion: Expansion) -> None:
    """What evaluations at a hook, or at one head of it, are compared with."""
    for planned in _on_text(expansion):
        for found in planned.dictionaries:
            label = short_hook(found.hook_name) + (f".{found.head}" if found.head is not None else "")
            needs = _held_out(planned) | {"activations": [planned.keys["activations"][found.hook_name]]}
            extra, label = {"head": found.head} | _scope(planned), label + _told(planned)
            planned.add("baseline", label, needs, extra, name=f"{found.hook_name} {found.head}")


def expand_evaluate(expansion: Expansion) -> None:
    for planned in _on_text(expansion):
        for found in planned.dictionaries:
            baseline = planned.keys["baseline"][f"{found.hook_name} {found.head}"]
            needs = {found.stage: [found.key], "baseline": [baseline]} | _held_out(planned)
            part = {"part": found.part} if found.part else {}
            extra, label = part | _scope(planned), found.label + _told(planned)
            planned.add("evaluate", label, needs, extra, name=f"{found.key} {found.part}")


class Layers(NamedTuple):
    """Points whose dictionaries differ in the layer alone."""

    points: dict[int, PlannedPoint | None]
    """By layer; None where it has several dictionaries, such as foreign ones: which belongs to the group?"""

    def of(self, layers: Iterable[int]) -> list[PlannedPoint]:
        """The points of some layers, fewer where a layer has several dictionaries."""
        return [point for layer in layers if (point := self.points[layer]) is not None]


def named(key: str) -> str:
    """What dictionaries that differ in the layer alone are called together: a key without layer and hash."""
    return re.sub(r"-L\d+\.", "-", key.rsplit("-", 1)[0])


def by_layer(points: Iterable[PlannedPoint], apart: Collection[str] = ()) -> list[Layers]:
    """Groups of points that differ in the layer alone, or in settings that have no part in it (`apart`)."""
    groups: dict[str, Layers] = {}
    for planned in points:
        site = planned.point.site
        if site.layer is None or "stack" not in planned.point.dictionary.studies:
            continue
        rest = {name: value for name, value in planned.tree.items() if name not in ("site", *apart)}
        hooks = [hook and hook.replace(f"blocks.{site.layer}.", "") for hook in (site.hook_name, site.hook_name_out)]
        found = groups.setdefault(canonical([rest, hooks, site.head, *_scope(planned)]), Layers({})).points
        other = found.setdefault(site.layer, planned)
        if other is None or other.dictionaries[0].key != planned.dictionaries[0].key:
            found[site.layer] = None
    return list(groups.values())


def expand_stack(expansion: Expansion) -> None:
    """For every group of dictionaries that differ in the layer alone, the sets of layers that are asked for."""
    for group in by_layer(_on_text(expansion), ("jacobian", "circuits")) if expansion.stacks else ():
        for wanted in expansion.stacks:
            _add_stack(wanted, group)
    if expansion.stacks and not expansion.plan.stages["stack"]:
        raise ConfigError("stacks: no dictionary of this experiment is of a layer; sweep site.layer")


def _add_stack(wanted: Any, group: Layers) -> None:
    layers = _layers(wanted, sorted(group.points))
    points = group.of(layers)
    if len(points) < len(layers):
        raise ConfigError(f"stacks: {wanted} has several dictionaries of a layer that differ in nothing else")
    dictionaries = [point.dictionaries[0] for point in points]
    label = re.sub(r"-L\d+\.", "-", dictionaries[0].label)
    name = "_".join(map(str, layers)) if isinstance(wanted, list) else wanted
    needs = {
        dictionaries[0].stage: [found.key for found in dictionaries],
        "activations": [p.keys["activations"][d.hook_name] for p, d in zip(points, dictionaries, strict=True)],
    }
    extra = {"group": named(dictionaries[0].key), "stack": name, "layers": layers} | _scope(points[0])
    points[0].add("stack", f"{label}-{name}{_told(points[0])}", needs | _held_out(points[0]), extra, name=name)


def _layers(wanted: Any, there: list[int]) -> list[int]:
    """The layers of a set, by its name or as a list."""
    named = {"all": there, "all_but_first": there[1:], "all_but_last": there[:-1], "inner": there[1:-1]}
    layers = sorted(wanted) if isinstance(wanted, list) else named.get(wanted)
    if layers is None:
        raise ConfigError(f"stacks: {wanted!r} is none of {', '.join(named)}, and no list of layers")
    missing = [layer for layer in layers if layer not in there]
    if missing or not layers:
        raise ConfigError(f"stacks: {wanted} needs layers {missing or '1 or more'}; dictionaries are of layers {there}")
    return layers


def expand_blind(expansion: Expansion) -> None:
    """One set of all dictionaries of one model and one set of held-out tokens, each with its evaluation.

    Those of heads are shown as the one that they are together: its latents are theirs.
    """
    if expansion.blind is None:
        return
    blind, plan = build(BlindConfig, expansion.blind, "blind."), expansion.plan
    evaluations = [e for e in plan.stages["evaluate"].values() if "head_" not in e.config.get("part", "")]
    shared = {canonical([e.config["model"], e.needs["tokens"]]) for e in evaluations}
    if len(shared) != 1 or len(evaluations) < 2:
        raise ConfigError("blind: it takes two dictionaries or more of one model, on the same held-out tokens")
    first = evaluations[0]
    evaluations.sort(key=lambda e: e.key)
    needs = {
        stage: list(dict.fromkeys(key for e in evaluations for key in e.needs.get(stage, [])))
        for stage in ("train", "foreign")
    }
    needs = {stage: keys for stage, keys in needs.items() if keys}
    needs |= {"evaluate": [e.key for e in evaluations], "tokens": first.needs["tokens"]}
    config = {"model": first.config["model"], "blind": dataclasses.asdict(blind)}
    add_instance(plan, "blind", file_safe(plan.experiment), config, needs, first.sources)


def _on_text(expansion: Expansion) -> list[PlannedPoint]:
    """Points whose held-out tokens are text; a model whose algorithm is known is asked about that instead."""
    return [planned for planned in expansion.points if planned.point.model.tracr is None]


def _scope(planned: PlannedPoint) -> dict[str, Any]:
    """What of the evaluation's scope enters keys: nothing where first tokens are replaced too, as they were always
    before there was a choice."""
    planned.tree["evaluation"].pop("replace_first", None)
    return {} if planned.point.evaluation.replace_first else {"replace_first": False}


def _told(planned: PlannedPoint) -> str:
    return "" if planned.point.evaluation.replace_first else "-no_replace_first"


def _held_out(planned: PlannedPoint) -> dict[str, list[str]]:
    return {"tokens": [planned.keys["tokens"]["held_out"]]}


def together(plan: Plan, instance: Instance) -> list[Any]:
    """Those of one model that are evaluated on the same tokens share the clean pass."""
    config = instance.config
    scope = [config["replace_first"]] if "replace_first" in config else []
    return [config["model"], config.get("evaluation"), instance.needs["tokens"], *scope]


def operations_baseline(plan: Plan, instances: Sequence[Instance]) -> float:
    """The model as it is, and from each hook on with it ablated in two ways."""
    again = sum(operations(plan, i, first=_block(plan, i), passes=2) for i in instances)
    return operations(plan, instances[0]) + again


def resources_baseline(plan: Plan, instances: Sequence[Instance]) -> dict[str, int]:
    batch_rows = instances[0].config["evaluation"]["batch_rows"]
    return running(plan, instances, operations_baseline(plan, instances), batch_rows)


def operations_evaluate(plan: Plan, instances: Sequence[Instance]) -> float:
    """The model as it is, and from each dictionary on with that in it."""
    baselines = (plan.instance("baseline", i.needs["baseline"][0]) for i in instances)
    again = sum(operations(plan, baseline, first=_block(plan, baseline)) for baseline in baselines)
    return operations(plan, instances[0]) + again + dictionaries_operations(plan, instances)


def resources_evaluate(plan: Plan, instances: Sequence[Instance]) -> dict[str, int]:
    held, batch_rows = dictionaries_mb(plan, instances), instances[0].config["evaluation"]["batch_rows"]
    return running(plan, instances, operations_evaluate(plan, instances), batch_rows, held)


def operations_stack(plan: Plan, instances: Sequence[Instance]) -> float:
    """The model as it is, and with the layers ablated in two ways and replaced, in two scopes at most."""
    return sum(operations(plan, i, passes=5) for i in instances) + dictionaries_operations(plan, instances)


def resources_stack(plan: Plan, instances: Sequence[Instance]) -> dict[str, int]:
    held, batch_rows = dictionaries_mb(plan, instances), instances[0].config["evaluation"]["batch_rows"]
    return running(plan, instances, operations_stack(plan, instances), batch_rows, held)


def operations_blind(plan: Plan, instances: Sequence[Instance]) -> float:
    """One pass for each dictionary, without logits."""
    passes = sum(operations(plan, i, logits=False, passes=len(i.needs["evaluate"])) for i in instances)
    return passes + dictionaries_operations(plan, instances)


def resources_blind(plan: Plan, instances: Sequence[Instance]) -> dict[str, int]:
    return running(plan, instances, operations_blind(plan, instances), 0, dictionaries_mb(plan, instances))


def _block(plan: Plan, baseline: Instance) -> int:
    """That the hook of a baseline is of."""
    return block_of(plan.instance("activations", baseline.needs["activations"][0]).config["hook_name"])


def work_baseline(jobs: list[Job]) -> str:
    from saeflow.evaluation.baseline import baseline_jobs
    from saeflow.evaluation.sums import columns

    lines = []
    for job, found in zip(jobs, baseline_jobs(jobs), strict=True):
        total = {name: values.sum() for name, values in columns(found.sums.batches).items()}
        clean, zero, mean = (total[f"ce_{name}"] / total["n_predictions"] for name in ("clean", "zero", "mean"))
        lines.append(f"{job.path}/: CE {clean:.4f} clean, {zero:.4f} zero-ablated, {mean:.4f} mean-ablated")
    return "\n".join(lines)


def work_evaluate(jobs: list[Job]) -> str:
    from saeflow.evaluation.evaluate import evaluate_jobs

    found = zip(jobs, evaluate_jobs(jobs), strict=True)
    return "\n".join(f"{job.path}/: L0 {s['l0']:.1f}, CE {_levels(s)}" for job, s in found)


def work_stack(jobs: list[Job]) -> str:
    from saeflow.evaluation.stack import stack_job

    lines = []
    for job in jobs:
        s = stack_job(job)
        layers = ", ".join(map(str, s["layers"]))
        lines.append(f"{job.path}/: layers {layers} at once, CE {_levels(s)}, KL {s['kl']:.4f}")
    return "\n".join(lines)


def _levels(s: dict[str, Any]) -> str:
    clean, zero, mean = (f"{s[f'ce_{name}']:.4f}" for name in ("clean", "zero", "mean"))
    return f"{s['ce_replaced']:.4f} (clean {clean}, zero-ablated {zero}, mean-ablated {mean})"


def work_blind(jobs: list[Job]) -> str:
    from saeflow.evaluation.blind import blind_job

    lines = []
    for job in jobs:
        n = blind_job(job)
        lines.append(f"{job.path}/: dashboards.html with {n} features; fill in sheet.csv, do not look into secret/")
    return "\n".join(lines)


STAGES = (
    Stage(
        "baseline",
        ("baseline", "baselines"),
        work_baseline,
        expand_baseline,
        reads=("evaluation.batch_rows", "model"),
        needs=("tokens", "activations"),
        after=("jacobian",),
        together=together,
        spreads=True,
        operations=operations_baseline,
        resources=resources_baseline,
    ),
    Stage(
        "evaluate",
        ("evaluation", "evaluations"),
        work_evaluate,
        expand_evaluate,
        reads=("evaluation", "model"),
        version=5,
        needs=("train", "foreign", "baseline", "tokens"),
        together=together,
        spreads=True,
        operations=operations_evaluate,
        resources=resources_evaluate,
        drawn="always",
        listed="saeflow.evaluation.overview:overview",
    ),
    Stage(
        "stack",
        ("stack of dictionaries", "stacks of dictionaries"),
        work_stack,
        expand_stack,
        reads=("evaluation", "model"),
        version=2,
        needs=("train", "foreign", "activations", "tokens"),
        after=("evaluate",),
        spreads=True,
        operations=operations_stack,
        resources=resources_stack,
        drawn="where_there",
    ),
    Stage(
        "blind",
        ("blind set of features", "blind sets of features"),
        work_blind,
        expand_blind,
        reads=("model",),
        version=2,
        needs=("train", "foreign", "evaluate", "tokens"),
        after=("heads",),
        operations=operations_blind,
        resources=resources_blind,
        target=True,
    ),
)
