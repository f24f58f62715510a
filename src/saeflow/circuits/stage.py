"""The stages `circuits`, what makes latents of a transcoder active, by way of those of the layers below, and
`greater_than`, how few of its latents, or of its MLP's neurons, do a task."""

from collections.abc import Sequence

from saeflow.config import ConfigError
from saeflow.config.circuits import check_prompt
from saeflow.dictionaries.kinds.trained import TrainedConfig
from saeflow.evaluation.stage import by_layer, named
from saeflow.figures.registry import declared
from saeflow.jobs.job import Job
from saeflow.models.resources import operations as running_operations
from saeflow.models.resources import running
from saeflow.planning.expansion import Expansion, PlannedPoint
from saeflow.planning.graph import Instance, Plan
from saeflow.planning.stages import Stage
from saeflow.text.tokenizer import row_of
from saeflow.training.stage import dictionaries_mb, dictionaries_operations


def expand(expansion: Expansion) -> None:
    """Of transcoders that differ in the layer alone, where a figure of circuits is asked for."""
    if not _asked(expansion, "circuits"):
        return
    for group in by_layer(filter(_is_transcoder, expansion.points), ("jacobian",)):
        layers = sorted(group.points)
        points = group.of(layers)
        if len(points) < len(layers):
            raise ConfigError("circuits: a layer has several transcoders that differ in nothing else; keep one of each")
        _add(points, layers)


def _asked(expansion: Expansion, stage: str) -> bool:
    """Whether a figure of the stage is."""
    figures = declared()
    return any(name in figures and figures[name].stage == stage for name in expansion.figures)


def expand_greater_than(expansion: Expansion) -> None:
    """Of every transcoder of an MLP, where its figure is asked for."""
    for planned in filter(_is_transcoder, expansion.points if _asked(expansion, "greater_than") else ()):
        (found,) = planned.dictionaries
        needs = {found.stage: [found.key], "tokens": [planned.keys["tokens"]["held_out"]]}
        planned.add("greater_than", found.label, needs, name=found.key)


def _is_transcoder(planned: PlannedPoint) -> bool:
    """Whether a point's dictionary predicts what an MLP writes, on text, from what the norm before it gives."""
    site = planned.point.site
    hooks = (f"blocks.{site.layer}.ln2.hook_normalized", f"blocks.{site.layer}.hook_mlp_out")
    alone = len(planned.dictionaries) == 1 and planned.point.model.tracr is None
    return alone and (site.hook_name, site.hook_name_out) == hooks


def _add(points: list[PlannedPoint], layers: list[int]) -> None:
    first, config = points[0], points[0].point.circuits
    if first.geometry.bridged:
        raise ConfigError(
            "circuits follow weights with the norms' gain and bias folded into them, and those of "
            f"{first.geometry.architecture} are left as they are, as transformers' own modules run it; use a model "
            "that TransformerLens converts (docs/models.md)"
        )
    if not first.point.model.fold_ln:
        raise ConfigError(
            "circuits need the norms' gain and bias folded into the weights, so that latents read the residual stream: "
            "set model.fold_ln=true, with which transcoders are trained anew"
        )
    layer = layers[-1] if config.layer is None else config.layer
    if layer not in layers:
        raise ConfigError(f"circuits.layer={layer} has no transcoder here; layers {', '.join(map(str, layers))} have")
    width = _width(points[layers.index(layer)])
    if width and (beyond := [latent for latent in config.latents if latent >= width]):
        raise ConfigError(f"circuits.latents={beyond}: the transcoder of layer {layer} has {width} latents, from 0 on")
    if config.prompt is not None:
        tokens = first.point.tokens
        ids = row_of(config.prompt, first.sources["model"], tokens)
        check_prompt(len(ids) - tokens.prepend_bos, tokens.prepend_bos, first.geometry.n_ctx)
    dictionaries = [point.dictionaries[0] for point in points]
    needs = {dictionaries[0].stage: [found.key for found in dictionaries], "tokens": [first.keys["tokens"]["held_out"]]}
    group = named(dictionaries[0].key)
    extra = {"group": group, "layers": layers, "layer": layer}
    first.add("circuits", f"L{layer}-{group}", needs, extra, name=group, tells=False)


def _width(planned: PlannedPoint) -> int | None:
    """Latents of a dictionary that is trained here; None where only its files say."""
    config, size = planned.point.dictionary, planned.geometry.hook_size(planned.point.site.hook_name)
    return config.width(size[-1]) if isinstance(config, TrainedConfig) else None


def resources_greater_than(plan: Plan, instances: Sequence[Instance]) -> dict[str, int]:
    """A hundred prompts, some two hundred times: less than an hour."""
    return running(plan, instances, 0.0, 8, dictionaries_mb(plan, instances))


def work_greater_than(jobs: list[Job]) -> str:
    from saeflow.circuits.greater_than import greater_than_job

    lines = []
    for job in jobs:
        s = greater_than_job(job)
        lines.append(f"{job.path}/: score {s['score_model']:.3f}, with the transcoder {s['score_transcoder']:.3f}")
    return "\n".join(lines)


def operations(plan: Plan, instances: Sequence[Instance]) -> float:
    """Three passes of the model over all held-out tokens at most, and the dictionaries."""
    passes = 3 * running_operations(plan, instances[0], logits=False)
    return passes + dictionaries_operations(plan, instances)


def resources(plan: Plan, instances: Sequence[Instance]) -> dict[str, int]:
    held, batch_rows = dictionaries_mb(plan, instances), instances[0].config["circuits"]["batch_rows"]
    return running(plan, instances, operations(plan, instances), batch_rows, held)


def work(jobs: list[Job]) -> str:
    from saeflow.circuits.study import circuits_job

    lines = []
    for job in jobs:
        s = circuits_job(job)
        lines.append(
            f"{job.path}/: circuits.html of {s['n_latents']} latents of layer {s['layer']}; errors of the transcoders "
            f"are {100 * s['error_share']:.0f} % of what makes them active"
        )
    return "\n".join(lines)


STAGES = (
    Stage(
        "circuits",
        ("study of circuits", "studies of circuits"),
        work,
        expand,
        reads=("circuits", "model"),
        version=2,
        needs=("train", "foreign", "tokens"),
        after=("recover",),
        operations=operations,
        resources=resources,
        drawn="where_asked",
    ),
    Stage(
        "greater_than",
        ("greater-than study", "greater-than studies"),
        work_greater_than,
        expand_greater_than,
        reads=("model",),
        needs=("train", "foreign", "tokens"),
        after=("circuits",),
        together=lambda plan, instance: [instance.config["model"], instance.needs["tokens"]],
        resources=resources_greater_than,
        drawn="where_asked",
    ),
)
