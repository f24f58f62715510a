"""The stage `jacobian`: of a pair of dictionaries around an MLP, or of a transcoder, on held-out tokens."""

from collections.abc import Sequence
from typing import Any

from saeflow.config import ConfigError
from saeflow.jacobians.prompt import read_prompt
from saeflow.jobs.job import Job
from saeflow.models.folder import block_of_hooks
from saeflow.models.resources import operations as running_operations
from saeflow.models.resources import running
from saeflow.planning.expansion import Expansion, PlannedPoint, short_hook
from saeflow.planning.explain import readable
from saeflow.planning.graph import Instance, Plan
from saeflow.planning.stages import Stage
from saeflow.training.stage import dictionaries_mb, dictionaries_operations, specs_of

SUMS_MB = 1000
"""Memory for the sums of all pairs, which lie in files where they are more (`saeflow.jacobians.sums`)."""
BYTES_IN_MEMORY = 200
"""Of a pair, with what sorting takes;"""
BYTES_ON_DISK = 120
"""and of one in files: runs, and what they are merged to."""


def expand(expansion: Expansion) -> None:
    for planned in expansion.points:
        point, config = planned.point, planned.point.dictionary
        if not config.has_jacobian(point):
            continue
        pair = len(planned.dictionaries) == 2
        _check(planned, pair)
        label = f"{short_hook(point.site.hook_name, point.site.hook_name_out)}-{config.amount_label}"
        if planned.dictionaries[0].stage == "foreign":
            label = planned.dictionaries[0].base
        needs, extra = planned.needed("train") | planned.needed("foreign"), dict[str, Any]()
        if point.jacobian.of_text:
            extra = {"row": read_prompt(planned), "tokenizer": planned.tree["tokenizer"]}
        else:
            needs |= {"tokens": [planned.keys["tokens"]["held_out"]]}
        planned.add("jacobian", label if pair else f"{config.kind_label}-{label}", needs, extra)


def _check(planned: PlannedPoint, pair: bool) -> None:
    point = planned.point
    assert point.site.hook_name_out is not None
    geometry = planned.geometry
    norm = block_of_hooks(point.site.hook_name, point.site.hook_name_out, geometry.parallel, geometry.norms).norm
    if point.model.dtype != "float32" and (geometry.norms != "before" or geometry.experts):
        raise ConfigError(
            f"model.dtype={point.model.dtype}: Jacobians of {geometry.architecture} are derivatives of the model's own "
            "modules, which have too few bits for them there; set model.dtype=float32"
        )
    trained = getattr(point.dictionary, "jacobian_norm", "inside")
    for name, value in (("jacobian.norm", point.jacobian.norm), ("dictionary.jacobian_norm", trained)):
        if value == "ignored" and not (norm and pair):
            raise ConfigError(
                f"{name}=ignored leaves the norm out of f, but f does not begin before the norm here; use it with a "
                f"pair and site=mlp_before_norm, or set {name}=inside"
            )
    if point.jacobian.of_text:
        return
    usable = point.tokens.held_out_tokens // point.tokens.context_size * (point.tokens.context_size - 1)
    if point.jacobian.n_tokens > usable:
        raise ConfigError(
            f"jacobian.n_tokens={point.jacobian.n_tokens} is more than the {usable} held-out tokens that are not "
            "at position 0; lower it, or raise tokens.held_out_tokens"
        )


def operations(plan: Plan, instances: Sequence[Instance]) -> float:
    """The model once over the held-out tokens, and the dictionaries."""
    passes = sum(running_operations(plan, instance, logits=False) for instance in instances)
    return passes + dictionaries_operations(plan, instances)


def most_pairs(plan: Plan, instance: Instance) -> int:
    """Pairs of latents that a study may find active together, at most; 0 for a transcoder, whose entries are of the
    model's dimensions, and where a dictionary was not trained here."""
    trained = [spec for key in instance.needs.get("train", ()) for spec in specs_of(plan, plan.instance("train", key))]
    if len(trained) != 2:
        return 0
    input, output = trained
    config = instance.config
    n_tokens = len(config["row"]) if "row" in config else config["jacobian"]["n_tokens"]
    met = n_tokens * (input.k or input.d_sae) * (output.k or output.d_sae)
    return int(min(met, input.d_sae * output.d_sae))


def resources(plan: Plan, instances: Sequence[Instance]) -> dict[str, int]:
    """Memory for the dictionaries three times, for the sums of pairs, and for the Jacobians that are stored whole: of a
    token 256 by 256 entries of 16 bytes, more than is usual."""
    stored = sum(16e-6 * instance.config["jacobian"]["stored_tokens"] * 256**2 for instance in instances)
    sums = max(min(SUMS_MB, 1e-6 * BYTES_IN_MEMORY * most_pairs(plan, instance)) for instance in instances)
    held = 3 * dictionaries_mb(plan, instances) + stored + sums
    return running(plan, instances, operations(plan, instances), 0, held)


def note(plan: Plan, instances: Sequence[Instance]) -> str:
    """Where the sums of pairs do not fit into the memory that is asked for them."""
    pairs = max(most_pairs(plan, instance) for instance in instances)
    if BYTES_IN_MEMORY * pairs <= 1e6 * SUMS_MB:
        return ""
    disk = readable(BYTES_ON_DISK * pairs)
    return (
        f"{instances[0].key} sums up to {pairs:,} pairs of latents, in files: {SUMS_MB} MB of memory and up to {disk} "
        "of disk while it runs; fewer jacobian.n_tokens are fewer pairs"
    )


def work(jobs: list[Job]) -> str:
    from saeflow.jacobians.study import jacobian_job

    lines = []
    for job in jobs:
        summary = jacobian_job(job)
        lines.append(f"{summary['n_tokens']} tokens, RMS of J {summary['rms']:.4g}, in {job.path}/")
    return "\n".join(lines)


STAGES = (
    Stage(
        "jacobian",
        ("Jacobian study", "Jacobian studies"),
        work,
        expand,
        reads=("jacobian", "model"),
        version=4,
        needs=("train", "foreign", "tokens"),
        operations=operations,
        resources=resources,
        note=note,
        drawn="where_there",
        table=lambda instance: True,
    ),
)
