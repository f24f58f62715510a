"""The stage `activations`: a column a hook, of one store a (model, processing, packing, dtype)."""

import math
from collections.abc import Sequence
from pathlib import Path

from saeflow.activations.ahead import FOLDER, missing
from saeflow.activations.elsewhere import array_url, rows_are_somewhere
from saeflow.activations.shards import COORDINATES, ITEMSIZE, Layout, hook_of, predicted_bytes
from saeflow.config import ConfigError
from saeflow.config.defaults import set_apart
from saeflow.config.labels import joined, unusual
from saeflow.jobs.job import Job
from saeflow.models.resources import block_of, running
from saeflow.models.resources import operations as running_operations
from saeflow.planning.digests import short_hash
from saeflow.planning.expansion import Expansion, PlannedPoint, project, short_hook
from saeflow.planning.graph import Instance, Plan
from saeflow.planning.parts import Part, Parts
from saeflow.planning.stages import Stage, stages


def expand(expansion: Expansion) -> None:
    """Neither hooks nor the number of rows are in a store's name, so that both can grow in place."""
    declared, tokens = stages()["activations"], stages()["tokens"]
    for planned in expansion.points:
        _check(planned)
        point = planned.point
        packing = short_hash([tokens.version, set_apart(project(planned.tree, tokens.reads))])
        read = project(planned.tree, declared.reads)
        told = {path: token for path, token in unusual(read, {"model": ""}).items() if path != "activations.dtype"}
        store = (
            joined(f"{planned.labels['model']}-{point.activations.dtype}", told)
            + "-"
            + short_hash([declared.version, set_apart(read), packing])
        )
        n_rows = point.tokens.train_tokens // point.tokens.context_size
        needs = {"tokens": [planned.keys["tokens"]["train"]]} | planned.needed("groundtruth")
        for hook in point.dictionary.hooks(point.site):
            size, label = list(planned.geometry.hook_size(hook)), f"{store}/{short_hook(hook)}-{n_rows}rows"
            extra = {"hook_name": hook, "n_rows": n_rows, "size": size}
            planned.add(
                "activations", label, needs, extra, name=hook, says={"n_rows": "tokens.train_tokens"}, tells=False
            )


def _check(planned: PlannedPoint) -> None:
    """Raises `ConfigError` for hooks that the model does not have, and dictionaries that they do not fit."""
    site, config = planned.point.site, planned.point.dictionary
    needs_heads = config.needs_heads() if site.head is None else f"site.head={site.head}"
    by_head = config.by_head or site.head is not None
    for hook in (site.hook_name, site.hook_name_out):
        if hook is None:
            continue
        size = planned.geometry.hook_size(hook)
        if hook.endswith("mlp.hook_in") and planned.point.model.fold_ln:
            raise ConfigError(
                f"{hook} is behind the norm's gain and bias, which model.fold_ln=true folds into the MLP's weights; "
                "set model.fold_ln=false, or use site=mlp, which then reads the same"
            )
        if len(size) == 1 and needs_heads:
            legal = ", ".join(name for name, held in planned.geometry.block_hooks().items() if len(held) == 2)
            raise ConfigError(f"{needs_heads} needs a hook with heads, and {hook} has none; these have: {legal}")
        if site.head is not None and not 0 <= site.head < size[0]:
            raise ConfigError(f"site.head={site.head} is out of range: {hook} has heads 0 to {size[0] - 1}")
        config.check_size(hook, size[-1] if by_head else math.prod(size), by_head)


def operations(plan: Plan, instances: Sequence[Instance]) -> float:
    """One pass over the rows of the longest column, up to the last block that is asked for, without logits, and each
    hook's covariance."""
    longest = max(instances, key=lambda instance: int(instance.config["n_rows"]))
    last = max(block_of(instance.config["hook_name"]) for instance in instances)
    tokens = {i.config["hook_name"]: _n_tokens(i) for i in sorted(instances, key=_n_tokens)}  # of the longest column
    widths = {i.config["hook_name"]: math.prod(i.config["size"]) for i in instances}
    covariances = sum(2.0 * n * widths[hook] ** 2 for hook, n in tokens.items())
    return running_operations(plan, longest, last=last, logits=False) + covariances


def _n_tokens(instance: Instance) -> int:
    return int(instance.config["n_rows"]) * int(instance.config["tokens"]["context_size"])


def resources(plan: Plan, instances: Sequence[Instance]) -> dict[str, int]:
    longest = max(instances, key=lambda instance: int(instance.config["n_rows"]))
    found = running(plan, [longest], operations(plan, instances), batch_rows=0)
    return found | {"runtime": max(240, found["runtime"])}


def n_bytes(plan: Plan, instance: Instance) -> int:
    """Exact."""
    size, store = instance.config["size"], instance.config["activations"]
    return predicted_bytes(_n_tokens(instance), size, store["dtype"], store["chunk_tokens"], store["shard_tokens"])


def most_parts(plan: Plan, instances: Sequence[Instance]) -> int:
    """A part has a shard or more."""
    return max(layout.n_shards(n) for _, _, layout, n in _longest(instances))


def parts_missing(plan: Plan, instances: Sequence[Instance], parts: list[Part]) -> list[Part]:
    store = plan.folder("activations", instances[0].key).parent
    numbers = {
        number
        for hook, n_dims, layout, n_tokens in _longest(instances)
        for number in missing(store, hook, n_dims, layout, n_tokens)
    }
    return [part for part in parts if any(map(part.has, numbers))]


def _longest(instances: Sequence[Instance]) -> list[tuple[str, int, Layout, int]]:
    """Of each hook, the dimensions and layout of its array, and how many tokens its longest column has."""
    found: dict[str, tuple[str, int, Layout, int]] = {}
    for instance in sorted(instances, key=_n_tokens):
        config = instance.config
        held, size = config["activations"], config["size"]
        layout = Layout(math.prod(size) * ITEMSIZE[held["dtype"]], held["chunk_tokens"], held["shard_tokens"])
        found[config["hook_name"]] = (config["hook_name"], 1 + len(size), layout, _n_tokens(instance))
    return list(found.values())


def outside(folder: Path) -> list[Path]:
    """The array of a column's hook, how far it is, and what lies ready of it, which the hook's other columns share. The
    hook of a column that is not there yet, its name tells."""
    store, short = folder.parent, folder.name.rsplit("-", 2)[0]
    known = (path.name for path in (*_arrays(store), *_ready(store)))
    hook = hook_of(folder) or next((name for name in known if short_hook(name) == short), None)
    if hook is None:
        return []
    return [store / "activations.zarr" / hook, store / "progress" / f"{hook}.safetensors", store / FOLDER / hook]


def all_outside(results: Path) -> list[Path]:
    stores = sorted((results / "activations").glob("*"))
    return [
        path
        for store in stores
        for path in [*_arrays(store), *sorted((store / "progress").glob("*.safetensors")), *_ready(store)]
    ]


def _ready(store: Path) -> list[Path]:
    """Folders of shards that were computed ahead, one a hook."""
    return sorted((store / FOLDER).glob("*/"))


def _arrays(store: Path) -> list[Path]:
    """Those of hooks."""
    found = sorted((store / "activations.zarr").glob("*/"))
    return [array for array in found if array.name not in COORDINATES and not array.name.endswith(".partial")]


def work(jobs: list[Job]) -> str:
    from saeflow.activations.caching import cache_jobs

    return cache_jobs(jobs)


def part_work(jobs: list[Job], part: Part) -> str:
    from saeflow.activations.parts import cache_part

    return cache_part(jobs, part)


STAGES = (
    Stage(
        "activations",
        ("activation column", "activation columns"),
        work,
        expand,
        reads=("model", "activations", "tokens.context_size"),
        needs=("tokens", "groundtruth"),
        together=lambda plan, instance: instance.key.split("/")[0],  # one forward pass fills all columns of a store
        n_bytes=n_bytes,
        sized_by=lambda instance: "{}={}".format(*instance.says["n_rows"]),
        whole=rows_are_somewhere,
        elsewhere=array_url,
        carrier="saeflow.activations.carrier",
        outside=outside,
        all_outside=all_outside,
        operations=operations,
        resources=resources,
        parts=Parts(most_parts, parts_missing, part_work),
        cached=True,
        spreads=True,
    ),
)
