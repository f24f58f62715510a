"""The stage `foreign`: dictionaries that other libraries made, read instead of trained."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from saeflow.config import ConfigError
from saeflow.config.checks import where
from saeflow.config.labels import file_safe
from saeflow.dictionaries.kinds.foreign import ForeignConfig, ForeignPairConfig
from saeflow.dictionaries.layouts import foreign_bytes, foreign_digest, foreign_format, head_folders, kissane_config
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
    site, heads = planned.point.site, _heads(config)
    if heads:
        identity, sources = _identity_of_heads(planned, heads, config.format)
        _check_heads(planned, len(heads))
        label = (heads[0].parent if config.heads else Path(str(config.path))).stem
    else:
        identity, sources = _identity(planned, config.path, config.release, config.sae_id, "foreign", config.format)
        label = Path(config.path).stem if config.path else f"{config.release} {config.sae_id}"
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
    needs = planned.needed("groundtruth")  # a model that it has to fit, and that the workflow makes first
    key = planned.add("foreign", base, needs, extra, sources=sources | {"label": config.label or label})
    if isinstance(config, ForeignPairConfig):
        sides = zip(("input", "output"), config.hooks(site), strict=True)
        planned.dictionaries += [PlannedDictionary("foreign", key, hook, base, side) for side, hook in sides]
    else:
        written = site.hook_name_out or site.hook_name
        parts = [PlannedDictionary("foreign", key, written, base, f"head_{h}", h) for h in range(len(heads))]
        planned.dictionaries += [PlannedDictionary("foreign", key, written, base, head=site.head), *parts]


def _heads(config: ForeignConfig) -> list[Path]:
    """Where the dictionaries of all heads lie, if that is what is meant."""
    whole = isinstance(config, ForeignPairConfig) or config.path is None
    return [Path(path) for path in config.heads] if whole or config.heads else head_folders(Path(str(config.path)))


def _identity(
    planned: PlannedPoint, path: str | None, release: str | None, sae_id: str | None, source: str, form: str | None
) -> tuple[dict[str, Any], dict[str, str]]:
    """What identifies one dictionary, and where it lies, as the source `source`."""
    if path is None:
        return {"release": release, "sae_id": sae_id, "format": None, "content": None}, {}
    there = _there(Path(path), "path" if source == "foreign" else "path_out")
    form = form or foreign_format(there)
    content = _checked(there, form, planned)
    return {"release": None, "sae_id": None, "format": form, "content": content}, {source: path}


def _identity_of_heads(
    planned: PlannedPoint, heads: list[Path], form: str | None
) -> tuple[dict[str, Any], dict[str, str]]:
    """What identifies the dictionaries of all heads, which are read as one, and where they lie."""
    forms = {form or foreign_format(_there(path, "heads")): path for path in heads}
    if len(forms) > 1:
        raise ConfigError(f"dictionaries of heads are of one format, but {_several(forms)}; name them by themselves")
    (found,) = forms
    contents = [_checked(_there(path, "heads"), found, planned) for path in heads]
    identity = {"release": None, "sae_id": None, "format": found, "content": short_hash(contents, 32)}
    return identity | {"heads": contents}, {f"foreign_{h}": str(path) for h, path in enumerate(heads)}


def _there(path: Path, name: str) -> Path:
    if not path.exists():
        raise ConfigError(f"dictionary.{name}={path}: no such file or folder{where(path)}")
    return path


def _made(identity: dict[str, Any]) -> str:
    """What stands for a dictionary in names of folders."""
    form, content = identity["format"], identity["content"]
    heads = "heads_" if "heads" in identity else ""
    return file_safe(f"{heads}{form}.{content[:4]}" if content else f"{identity['release']}.{identity['sae_id']}")


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
        needs=("groundtruth",),
        after=("train",),
        resources=resources,
        drawn="where_there",
    ),
)
