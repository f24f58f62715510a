"""The stage `foreign`: dictionaries that other libraries made, read instead of trained."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from saeflow.config import ConfigError
from saeflow.config.checks import where
from saeflow.config.labels import file_safe
from saeflow.dictionaries.kinds.foreign import ForeignConfig
from saeflow.dictionaries.layouts import foreign_digest, foreign_format, foreign_paths, head_folders, kissane_config
from saeflow.jobs.job import Job
from saeflow.planning.digests import short_hash
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
    label, made, heads = f"{config.release} {config.sae_id}", f"{config.release}.{config.sae_id}", list[Path]()
    if config.release is None:
        paths = [Path(path) for path in config.heads or (config.path,) if path]
        for path in paths:
            if not path.exists():
                name = "heads" if config.heads else "path"
                raise ConfigError(f"dictionary.{name}={path}: no such file or folder{where(path)}")
        heads = paths if config.heads else head_folders(paths[0])
        forms = {config.format or foreign_format(path): path for path in heads or paths}
        if len(forms) > 1:
            raise ConfigError(
                f"dictionaries of heads are of one format, but {_several(forms)}; name them by themselves"
            )
        ((form, _),) = forms.items()
        contents = [_checked(path, form, planned) for path in heads or paths]
        identity |= {"format": form, "content": short_hash(contents, 32) if heads else contents[0]}
        identity |= {"heads": contents} if heads else {}
        label = (paths[0].parent if config.heads else paths[0]).stem
        made = f"{'heads_' if heads else ''}{form}.{identity['content'][:4]}"
        sources = {f"foreign_{h}": str(path) for h, path in enumerate(heads)} or {"foreign": str(paths[0])}
    base = f"{file_safe(made)}-{short_hook(site.hook_name, site.hook_name_out)}"
    extra = identity | {"hook_name": site.hook_name, "hook_name_out": site.hook_name_out, "head": site.head}
    if heads:
        _check_heads(planned, len(heads))
    needs = planned.needed("groundtruth")  # a model that it has to fit, and that the workflow makes first
    key = planned.add("foreign", base, needs, extra, sources=sources | {"label": config.label or label})
    written = site.hook_name_out or site.hook_name
    parts = [PlannedDictionary("foreign", key, written, base, f"head_{h}", h) for h in range(len(heads))]
    planned.dictionaries += [PlannedDictionary("foreign", key, written, base, head=site.head), *parts]


def _several(forms: dict[str, Path]) -> str:
    return " and ".join(f"{path} is of {form}" for form, path in forms.items())


def _checked(path: Path, form: str, planned: PlannedPoint) -> str:
    """The digest of a dictionary's files, of which those of format `kissane` say where they belong."""
    content, hook = foreign_digest(path, form, planned.digests), planned.point.site.hook_name
    if form == "kissane" and (said := kissane_config(path)["act_name"]) != hook:
        raise ConfigError(
            f"dictionary.path={path} is of {said}, but the site is {hook}; choose the site it was made for"
        )
    return content


def _check_heads(planned: PlannedPoint, n: int) -> None:
    """Raises `ConfigError` unless the site has `n` heads, and all are meant."""
    site, size = planned.point.site, planned.geometry.hook_size(planned.point.site.hook_name)
    if site.head is not None or site.hook_name_out is not None:
        raise ConfigError(
            "dictionary.heads are SAEs of all heads of one hook: leave site.head and site.hook_name_out at null, or "
            "set dictionary.path to that of one head"
        )
    if len(size) != 2 or size[0] != n:
        there = f"{size[0]} heads" if len(size) == 2 else "no heads"
        raise ConfigError(f"dictionary.heads: these are SAEs of {n} heads, but {site.hook_name} has {there}")


def version_of(config: dict[str, Any]) -> int | None:
    """2: a transcoder that only SAELens computes lost where it writes."""
    may_be = config["hook_name_out"] is not None and config["format"] in (None, "saelens")
    return 2 if may_be else None


def resources(plan: Plan, instances: Sequence[Instance]) -> dict[str, int]:
    """Its files three times, as read, as ours and as written, beside 3 GB; 1 GB where they are not here yet."""
    size = 0
    for path in (path for instance in instances for path in foreign_paths(instance.sources)):
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
        needs=("groundtruth",),
        after=("train",),
        resources=resources,
        drawn="where_there",
    ),
)
