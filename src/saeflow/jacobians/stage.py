"""The stage `jacobian`: of a pair of dictionaries around an MLP, or of a transcoder, on held-out tokens."""

from collections.abc import Sequence

from saeflow.config import ConfigError
from saeflow.jobs.job import Job
from saeflow.models.folder import block_of_hooks
from saeflow.models.resources import operations as running_operations
from saeflow.models.resources import running
from saeflow.planning.expansion import Expansion, PlannedPoint, short_hook
from saeflow.planning.graph import Instance, Plan
from saeflow.planning.stages import Stage
from saeflow.training.stage import dictionaries_mb, dictionaries_operations


def expand(expansion: Expansion) -> None:
    for planned in expansion.points:
        point, config = planned.point, planned.point.dictionary
        if not config.has_jacobian(point):
            continue
        pair = len(planned.dictionaries) == 2
        _check(planned, pair)
        label = f"{short_hook(point.site.hook_name, point.site.hook_name_out)}-{config.amount_label}"
        needs = planned.needed("train") | {"tokens": [planned.keys["tokens"]["held_out"]]}
        planned.add("jacobian", label if pair else f"{config.kind_label}-{label}", needs)


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
    if point.jacobian.norm == "ignored" and not (norm and pair):
        raise ConfigError(
            "jacobian.norm=ignored leaves the norm out of f, but f does not begin before the norm here; use it "
            "with a pair and site=mlp_before_norm, or set jacobian.norm=inside"
        )
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


def resources(plan: Plan, instances: Sequence[Instance]) -> dict[str, int]:
    """Memory for the dictionaries three times, and the Jacobians that are stored whole: of a token 256 by 256 entries
    of 16 bytes, more than is usual."""
    stored = sum(16e-6 * instance.config["jacobian"]["stored_tokens"] * 256**2 for instance in instances)
    return running(plan, instances, operations(plan, instances), 0, 3 * dictionaries_mb(plan, instances) + stored)


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
        needs=("train", "tokens"),
        after=("foreign",),
        operations=operations,
        resources=resources,
        drawn="where_there",
        table=True,
    ),
)
