"""The stage `foreign`: dictionaries that other libraries made, read instead of trained."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from saeflow.config import ConfigError
from saeflow.config.checks import where
from saeflow.config.labels import file_safe
from saeflow.dictionaries.kinds.foreign import ForeignConfig, ForeignPairConfig
from saeflow.dictionaries.layouts import foreign_bytes, foreign_digest, foreign_format
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
    site = planned.point.site
    identity, sources = _identity(planned, config.path, config.release, config.sae_id, "foreign", config.format)
    label = config.label or (Path(config.path).stem if config.path else f"{config.release} {config.sae_id}")
    made = [_made(identity)]
    if isinstance(config, ForeignPairConfig):
        path = config.path_out or config.path
        identity["output"], more = _identity(
            planned, path, config.release, config.sae_id_out, "foreign_out", config.format
        )
        made.append(_made(identity["output"]))
        sources |= more
    base = f"{'_'.join(dict.fromkeys(made))}-{short_hook(site.hook_name, site.hook_name_out)}"
    extra = identity | {"hook_name": site.hook_name, "hook_name_out": site.hook_name_out, "head": site.head}
    key = planned.add("foreign", base, {}, extra, sources=sources | {"label": label})
    if isinstance(config, ForeignPairConfig):
        for side, hook in zip(("input", "output"), config.hooks(site), strict=True):
            planned.dictionaries.append(PlannedDictionary("foreign", key, hook, base, side))
    else:
        written = site.hook_name_out or site.hook_name
        planned.dictionaries.append(PlannedDictionary("foreign", key, written, base, head=site.head))


def _identity(
    planned: PlannedPoint, path: str | None, release: str | None, sae_id: str | None, source: str, form: str | None
) -> tuple[dict[str, Any], dict[str, str]]:
    """What identifies one dictionary, and where it lies, as the source `source`."""
    if path is None:
        return {"release": release, "sae_id": sae_id, "format": None, "content": None}, {}
    if not Path(path).exists():
        name = "path" if source == "foreign" else "path_out"
        raise ConfigError(f"dictionary.{name}={path}: no such file or folder{where(path)}")
    form = form or foreign_format(Path(path))
    content = foreign_digest(Path(path), form, planned.digests)
    return {"release": None, "sae_id": None, "format": form, "content": content}, {source: path}


def _made(identity: dict[str, Any]) -> str:
    """What stands for a dictionary in names of folders."""
    form, content = identity["format"], identity["content"]
    return file_safe(f"{form}.{content[:4]}" if content else f"{identity['release']}.{identity['sae_id']}")


def version_of(config: dict[str, Any]) -> int | None:
    """2: a transcoder that only SAELens computes lost where it writes."""
    may_be = config["hook_name_out"] is not None and config["format"] in (None, "saelens")
    return 2 if may_be else None


def resources(plan: Plan, instances: Sequence[Instance]) -> dict[str, int]:
    """Its files three times, as read, as ours and as written, beside 3 GB; 1 GB where they are not here yet."""
    size = sum(foreign_bytes(instance.sources) for instance in instances)
    return {"mem_mb": 3000 + max(1000, round(3e-6 * size)), "runtime": 60}


def work(jobs: list[Job]) -> str:
    from saeflow.dictionaries.foreign import foreign_job

    lines = []
    for job in jobs:
        for spec in (dictionary.spec for dictionary in foreign_job(job)):
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
