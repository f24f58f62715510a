"""The stage `foreign`: dictionaries that other libraries made, read instead of trained."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from saeflow.config import ConfigError
from saeflow.config.checks import where
from saeflow.config.labels import file_safe
from saeflow.dictionaries.kinds.foreign import ForeignConfig
from saeflow.dictionaries.layouts import foreign_digest, foreign_format
from saeflow.jobs.job import Job
from saeflow.planning.expansion import Expansion, PlannedDictionary, PlannedPoint, short_hook
from saeflow.planning.graph import Instance, Plan
from saeflow.planning.stages import Stage


def expand(expansion: Expansion) -> None:
    for planned in expansion.points:
        if isinstance(planned.point.dictionary, ForeignConfig):
            _add(planned, planned.point.dictionary)


def _add(planned: PlannedPoint, config: ForeignConfig) -> None:
    """It enters by content, or by the names of its release; what figures call it enters nothing but theirs."""
    site, sources = planned.point.site, dict[str, str]()
    identity: dict[str, Any] = {"release": config.release, "sae_id": config.sae_id, "format": None, "content": None}
    label = config.label or f"{config.release} {config.sae_id}"
    if config.path is not None:
        path = Path(config.path)
        if not path.exists():
            raise ConfigError(f"dictionary.path={path}: no such file or folder{where(path)}")
        form = config.format or foreign_format(path)
        content = foreign_digest(path, form, planned.digests)
        identity |= {"format": form, "content": content}
        label = config.label or path.stem
        sources = {"foreign": str(path)}
    made = file_safe(f"{form}.{content[:4]}" if config.path is not None else f"{config.release}.{config.sae_id}")
    base = f"{made}-{short_hook(site.hook_name, site.hook_name_out)}"
    extra = identity | {"hook_name": site.hook_name, "hook_name_out": site.hook_name_out, "head": site.head}
    key = planned.add("foreign", base, {}, extra, sources=sources | {"label": label})
    written = site.hook_name_out or site.hook_name
    planned.dictionaries.append(PlannedDictionary("foreign", key, written, base, head=site.head))


def version_of(config: dict[str, Any]) -> int | None:
    """2: a transcoder that only SAELens computes lost where it writes."""
    may_be = config["hook_name_out"] is not None and config["format"] in (None, "saelens")
    return 2 if may_be else None


def resources(plan: Plan, instances: Sequence[Instance]) -> dict[str, int]:
    """Its files three times, as read, as ours and as written, beside 3 GB; 1 GB where they are not here yet."""
    size = 0
    for path in (Path(instance.sources.get("foreign", "")) for instance in instances):
        size += sum(file.stat().st_size for file in [path, *path.glob("*")] if file.is_file())
    return {"mem_mb": 3000 + max(1000, round(3e-6 * size)), "runtime": 60}


def work(jobs: list[Job]) -> str:
    from saeflow.dictionaries.foreign import foreign_job

    lines = []
    for job in jobs:
        spec = foreign_job(job).spec
        lines.append(f"{job.path}/: {spec.kind} of {spec.d_sae} latents at {spec.hook_name}, {spec.activation}")
    return "\n".join(lines)


STAGES = (
    Stage(
        "foreign",
        ("foreign dictionary", "foreign dictionaries"),
        work,
        expand,
        reads=("model",),
        version_of=version_of,
        after=("train",),
        resources=resources,
        drawn="where_there",
    ),
)
