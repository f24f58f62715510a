"""The stage `train`: one dictionary, or several that are trained as one, from columns of activations."""

import json
import logging
import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from saeflow.activations.elsewhere import array_url
from saeflow.activations.shards import ITEMSIZE
from saeflow.config import DictionaryConfig, build
from saeflow.config.dictionary import Columns, kinds
from saeflow.dictionaries.kinds.trained import TrainedConfig
from saeflow.dictionaries.layouts import foreign_bytes
from saeflow.dictionaries.spec import Origin, Spec
from saeflow.jobs.job import Job
from saeflow.models.folder import ModelError, read_geometry
from saeflow.models.resources import rows_of
from saeflow.planning.digests import canonical
from saeflow.planning.expansion import Expansion, PlannedDictionary, PlannedPoint, short_hook
from saeflow.planning.explain import readable
from saeflow.planning.graph import Instance, Plan
from saeflow.planning.stages import Stage, stages
from saeflow.storage.memory import machine_memory
from saeflow.training.loggers import check_loggers

log = logging.getLogger(__name__)
HOW_IT_RUNS = ("loggers", "together", "checkpoint_seconds", "keep_checkpoints")  # makes no dictionary another


MANY_PASSES = 10


def _warn_of_passes(planned: PlannedPoint) -> None:
    """Says where a training sees the same text again and again, which a preset for a long training on few tokens does
    without a word; rows of a case are all that there are."""
    point = planned.point
    passes = point.training.n_tokens / point.tokens.train_tokens
    if passes <= MANY_PASSES or point.corpus.case is not None or not point.dictionary.trainings(point.site):
        return
    said = (
        f"training.n_tokens={point.training.n_tokens} passes {passes:.0f} times over tokens.train_tokens="
        f"{point.tokens.train_tokens}: raise the latter, unless so few tokens are meant"
    )
    planned.digests.once(said, lambda: log.warning(said))


def expand(expansion: Expansion) -> None:
    loggers = set[str]()
    for planned in expansion.points:
        site, config = planned.point.site, planned.point.dictionary
        _warn_of_passes(planned)
        training = planned.tree["training"]
        how = {name: training.pop(name) for name in HOW_IT_RUNS}
        exclude = planned.point.training.exclude
        exclude.check(planned.point.tokens.context_size, planned.geometry.d_vocab)
        training["exclude"] = json.loads(canonical(exclude.identity()))
        if not training["exclude"]:
            del training["exclude"]
        if planned.point.training.buffered is None:
            del training["buffer_tokens"]
        for name in {name for kind in kinds().values() for name in kind.training_options} - {*config.training_options}:
            del training[name]  # what does not concern a dictionary is not in its key
        head = {} if site.head is None else {"head": site.head}
        keys, bases = [], []
        for number, (dictionary, hook, hook_out) in enumerate(config.trainings(site)):
            place, heads = short_hook(hook, hook_out), [f"head{h}" for h in head.values()]
            label = "-".join([config.kind_label, place, config.amount_label, *heads])
            columns = [planned.keys["activations"][h] for h in (hook, hook_out) if h]
            key = planned.add(
                "train",
                label,
                {"activations": columns},
                {"dictionary": json.loads(canonical(dictionary)), "hook_name": hook, "hook_name_out": hook_out} | head,
                name=str(number),
                sources={"training": canonical(how)},
            )
            keys.append(key)
            bases.append(label)
            if not expansion.plan.done("train", key):
                loggers.update(how["loggers"])
        n_heads = planned.geometry.hook_size(site.hook_name)[0]
        for part in config.parts(site, n_heads) if keys else ():
            key, base = keys[part.training], bases[part.training]
            found = PlannedDictionary("train", key, part.hook_name, base, part.name, part.head)
            planned.dictionaries.append(found)
    check_loggers(loggers)


def config_of(instance: Instance) -> DictionaryConfig:
    return build(DictionaryConfig, instance.config["dictionary"], "dictionary.")


def together(plan: Plan, instance: Instance) -> list[Any]:
    """Those that read the same tokens in the same batches. Where norms decide about tokens, they are those of the
    columns that are read."""
    column, training = plan.instance("activations", instance.needs["activations"][0]), instance.config["training"]
    store = column.key.split("/")[0]
    shared = [store, column.config["n_rows"], training["batch_size"], training["shuffle_seed"]]
    shared += [_buffer_tokens(instance)]
    if exclude := training.get("exclude"):
        shared += [exclude, sorted(instance.needs["activations"]) if "norm_above" in exclude else []]
    return shared


def _buffer_tokens(instance: Instance) -> int | None:
    """Of the buffered order."""
    training = instance.config["training"]
    return int(training["buffer_tokens"]) if training.get("order") == "buffered" else None


def _bytes_read(plan: Plan, instances: Sequence[Instance]) -> int:
    """Of the activations that a job reads."""
    return sum(stages()["activations"].n_bytes(plan, column) for column in _columns_read(plan, instances))


def _columns_read(plan: Plan, instances: Sequence[Instance]) -> list[Instance]:
    """Each once."""
    keys = dict.fromkeys(key for instance in instances for key in instance.needs["activations"])
    return [plan.instance("activations", key) for key in keys]


def note(plan: Plan, instances: Sequence[Instance]) -> str:
    """Where activations are larger than the memory of this machine."""
    n_bytes, memory = _bytes_read(plan, instances), machine_memory()
    if n_bytes <= memory:
        return ""
    larger = f"{instances[0].key} reads {readable(n_bytes)} of activations, and there are {readable(memory)} of memory"
    if tokens := _buffer_tokens(instances[0]):
        return f"{larger}: it reads them in order, mixed in buffers of {tokens:,} tokens (training.order=buffered)"
    return f"{larger}: each row is read at random from the disk; training.order=buffered reads them in order"


def order(instance: Instance) -> tuple[list[str], float]:
    """Those that read the same columns side by side, the longest first."""
    return instance.needs["activations"], -config_of(instance).cost


def version_of(config: dict[str, Any]) -> int | None:
    """4: dictionaries that ranked latents in units of their own were saved with another order of them."""
    dictionary = build(DictionaryConfig, config["dictionary"], "dictionary.")
    return 4 if dictionary.ranks_in_scaled_units and "head" not in config else None


def _columns(plan: Plan, instance: Instance) -> Columns:
    read = [plan.instance("activations", key).config for key in instance.needs["activations"]]
    return Columns([c["hook_name"] for c in read], [tuple(c["size"]) for c in read], instance.config.get("head"))


def operations(plan: Plan, instances: Sequence[Instance]) -> float:
    """Floating-point operations, additions and multiplications."""
    return sum(_operations(plan, instance) for instance in instances)


def _operations(plan: Plan, instance: Instance) -> float:

    def d_mlp() -> int | None:
        try:
            return read_geometry(Path(instance.sources["model"])).d_mlp
        except (ModelError, OSError):  # of a model that the workflow makes, where it has not made it yet
            return None

    return config_of(instance).operations(_columns(plan, instance), instance.config["training"], d_mlp)


def specs_of(plan: Plan, instance: Instance) -> list[Spec]:
    """What a training makes, as far as the plan knows it."""
    config = config_of(instance)
    assert isinstance(config, TrainedConfig)
    return config.specs(_columns(plan, instance), instance.config["seed"], Origin())


def n_weights(plan: Plan, instance: Instance) -> int:
    """Weights and biases of all that a training makes."""
    specs = specs_of(plan, instance)
    return sum(s.d_sae * (s.d_in + s.d_out + 1) + s.d_out + s.skip * s.d_in * s.d_out for s in specs)


def n_bytes(plan: Plan, instance: Instance) -> int:
    """Of the dictionary, in float32."""
    return 4 * n_weights(plan, instance)


def sized_by(instance: Instance) -> str:
    name = "expansion" if instance.config["dictionary"]["d_sae"] is None else "d_sae"
    return f"dictionary.{name}={instance.config['dictionary'][name]}"


def beside(plan: Plan, instances: Sequence[Instance]) -> int:
    """Checkpoints, of weights and Adam's two moments: those that are kept, and the next."""
    kept = (json.loads(instance.sources["training"])["keep_checkpoints"] + 1 for instance in instances)
    return sum(3 * n * n_bytes(plan, instance) for n, instance in zip(kept, instances, strict=True))


def holds(plan: Plan, instances: Sequence[Instance]) -> int:
    """Weights, gradients and Adam's two moments."""
    return sum(4 * n_bytes(plan, instance) for instance in instances)


def dictionaries_mb(plan: Plan, instances: Sequence[Instance]) -> float:
    """Of the weights of all dictionaries that some instances read, each once, trained or of other libraries."""
    keys = {(stage, key) for i in instances for stage in ("train", "foreign") for key in i.needs.get(stage, ())}
    trained = sum(n_bytes(plan, plan.instance("train", key)) for stage, key in keys if stage == "train")
    foreign = sum(foreign_bytes(plan.instance("foreign", key).sources) for stage, key in keys if stage == "foreign")
    return 1e-6 * (trained + foreign)


def dictionaries_operations(plan: Plan, instances: Sequence[Instance]) -> float:
    """Of all dictionaries that some instances read, each once over the tokens that they share: two for each weight."""
    tokens = rows_of(plan, instances[0])
    return 2 * dictionaries_mb(plan, instances) * 1e6 / 4 * tokens["n_rows"] * tokens["tokens"]["context_size"]


def resources(plan: Plan, instances: Sequence[Instance]) -> dict[str, int]:
    """Weights, gradients and Adam's two moments of every dictionary beside 3 GB, and what it takes to find the tokens
    to leave out, to read a bucket and to hold two buffers of the buffered order; twice the time of its operations."""
    n_operations, memory = operations(plan, instances), 3000
    if instances and (exclude := instances[0].config["training"].get("exclude")):
        column = plan.instance("activations", instances[0].needs["activations"][0]).config
        bytes_a_token = 20 if "norm_above" in exclude else 8
        memory += round(1e-6 * bytes_a_token * column["n_rows"] * column["tokens"]["context_size"])
    read = _columns_read(plan, instances)
    if any(array_url(plan.folder("activations", column.key)) for column in read):
        memory += plan.read_ahead_mb
    if instances and (tokens := _buffer_tokens(instances[0])):
        row_bytes = sum(math.prod(c.config["size"]) * ITEMSIZE[c.config["activations"]["dtype"]] for c in read)
        memory += round(2e-6 * tokens * row_bytes)
    for instance in instances:
        memory += max(250, round(1e-6 * holds(plan, [instance])))
    return {"mem_mb": memory, "runtime": max(240, round(2 * n_operations / float(plan.device["flops"]) / 60))}


def outside(folder: Path) -> list[Path]:
    """Checkpoints of a training that was killed."""
    return [folder.parents[1] / "checkpoints" / folder.name]


def all_outside(results: Path) -> list[Path]:
    return sorted((results / "checkpoints").glob("*"))


def work(jobs: list[Job]) -> str:
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # torch's idle threads would spin beside those of our loops
    from saeflow.kernels.memory import keep_freed_memory
    from saeflow.training.loop import train

    keep_freed_memory()
    return train(jobs)


STAGES = (
    Stage(
        "train",
        ("training", "trainings"),
        work,
        expand,
        reads=("dictionary", "training", "seed"),
        version=3,
        version_of=version_of,
        needs=("activations",),
        together=together,
        most=lambda instance: int(json.loads(instance.sources["training"])["together"]),
        order=order,
        cost=lambda instance: config_of(instance).cost,
        operations=operations,
        n_bytes=n_bytes,
        sized_by=sized_by,
        beside=beside,
        holds=holds,
        note=note,
        outside=outside,
        all_outside=all_outside,
        resources=resources,
        drawn="where_there",
        table=lambda instance: instance.config["dictionary"]["kind"] == "jacobian",
    ),
)
