"""Everything that an artifact's making read, from the plan; and in a few words what tells several apart.

Settings are a flat dict by dotted path, as in `conf/`: of the artifact and of all that it is made from, so that two
dictionaries with equal settings are equal. Figures and tables name dictionaries by what differs between theirs: see
`saeflow.dictionaries.series`.
"""

import dataclasses
import json
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from saeflow.config import PointConfig
from saeflow.config.defaults import flat
from saeflow.jobs.job import Job
from saeflow.planning.digests import canonical, short_hash
from saeflow.planning.graph import Instance, Plan

if TYPE_CHECKING:
    import pandas as pd

Settings = Mapping[str, Any]
MOST_SAID = 3
_POINT = {field.name for field in dataclasses.fields(PointConfig)} | {"tokenizer"}
_SAYS = {
    "d_sae": "{:,} latents",
    "dictionary.expansion": "expansion {}",
    "dictionary.jacobian_coefficient": "λ = {:g}",
    "dictionary.jacobian_penalty": "penalty {}",
    "dictionary.jacobian_norm": "norm {} in training",
    "dictionary.label": "{}",
    "dictionary.k": "k = {}",
    "evaluation.replace_first": "first tokens kept",
    "jacobian.at": "at the {}",
    "jacobian.norm": "norm {}",
    "training.corpus": "trained on {}",
    "training.exclude.norm_above": "trained without norms above {:g}",
    "training.exclude.positions": "trained without positions {}",
    "training.exclude.token_ids": "trained without tokens {}",
    "tokens.context_size": "context of {}",
    "tokens.train_tokens": "{:,} training tokens",
    "tokens.held_out_tokens": "{:,} held-out tokens",
    "tokenizer": "tokenizer {:.8}",
    "layer": "layer {}",
    "head": "head {}",
    "reads": "reads {}",
    **dict.fromkeys(("model", "control", "corpus", "tokens", "method", "hook"), "{}"),
    "control_seed": "seed {} of it",
}
_ABSENT = object()


def settings(plan: Plan, stage: str, key: str) -> dict[str, Any]:
    """Of an artifact and all that it is made from. Raises `ConfigError` for one that the plan has not."""
    found: dict[str, Any] = {}
    for made_by, instance in lineage(plan, stage, key).values():
        config = instance.config
        held = {name: value for name, value in config.items() if name in _POINT or isinstance(value, dict)}
        found |= {path: value for path, value in flat(held).items() if path not in found}
        for source in ("model", "corpus"):  # what people call them now; it tells nothing apart
            if f"{source}_name" in instance.sources and source in config:
                found.setdefault(f"{source}.name", instance.sources[f"{source}_name"])
        if made_by == "tokens":
            if any(found[path] != value for path, value in flat({"corpus": config["corpus"]}).items()):
                found.setdefault("training.corpus", instance.sources["corpus_name"])
            found[f"tokens.{config['split']}_tokens"] = config["n_rows"] * config["tokens"]["context_size"]
        if "replace_first" in config:  # where it is not as usual
            found["evaluation.replace_first"] = config["replace_first"]
        if made_by == "foreign":
            found |= {f"dictionary.{name}": config[name] for name in ("content", "release", "sae_id")}
            found["dictionary.label"] = instance.sources["label"]  # as it is now
    return found


def read_summaries(job: Job, stage: str) -> "pd.DataFrame":
    """One row an artifact of a stage that a job needs: its `summary.json`, its `settings` and its `folder`."""
    import pandas as pd

    folders = job.inputs(stage)
    rows = [json.loads((folder / "summary.json").read_text()) for folder in folders]
    held = [{"settings": settings(job.plan, stage, folder.name), "folder": str(folder)} for folder in folders]
    for row, more in zip(rows, held, strict=True):
        row |= more
        if "dictionary.label" in row["settings"]:  # as it is now, whatever it was when it was evaluated
            row["source"] = row["settings"]["dictionary.label"]
    return pd.DataFrame(rows)


def with_keys(table: "pd.DataFrame") -> "pd.DataFrame":
    """Summaries with the `dictionary_key` of each, which comparisons with the truth do not state."""
    if "dictionary_key" in table:
        return table
    return table.assign(dictionary_key=table["train_key"].str.cat(table["part"].fillna(""), sep="/").str.rstrip("/"))


def lineage(plan: Plan, stage: str, key: str) -> dict[str, tuple[str, Instance]]:
    """Stage and instance by key: the artifact's first, then of what it needs, the nearest first."""
    found: dict[str, tuple[str, Instance]] = {}
    nearest = [(stage, key)]
    while nearest:
        at, name = nearest.pop(0)
        if f"{at} {name}" not in found:
            instance = plan.instance(at, name)
            found[f"{at} {name}"] = (at, instance)
            nearest += [(needed, k) for needed, keys in instance.needs.items() for k in keys]
    return found


def by_one_width(rows: Sequence[Settings]) -> list[dict[str, Any]]:
    """The rows with their width said in one way: by `dictionary.expansion`, what was asked for, or where some ask by
    `d_sae`, or are not of here, by what came of it."""
    by_expansion = all(row.get("dictionary.expansion") is not None for row in rows)
    left_out = ("dictionary.d_sae", "d_sae") if by_expansion else ("dictionary.expansion", "dictionary.d_sae")
    return [{path: value for path, value in row.items() if path not in left_out} for row in rows]


def same(one: Any) -> str:
    """A text that is equal for equal settings."""
    return canonical(one)


def differing(rows: Sequence[Settings]) -> list[str]:
    """Paths whose values are not the same in all of `rows`, a path that one has not among them."""
    paths = dict.fromkeys(path for row in rows for path in row)
    return [path for path in paths if len({_value(row, path) for row in rows}) > 1]


def tell_apart(rows: Sequence[Settings]) -> list[list[str]]:
    """Of each row what differs between them, such as `expansion 8`, nothing where they are alike.

    All that differs is said while that is three settings or fewer. Else as few as tell the rows apart, with `…` for
    the others.
    """
    paths = differing(rows)
    said = paths if len(paths) <= MOST_SAID else _fewest(rows, paths)
    rest = ["…"] if len(said) < len(paths) else []
    return [[*(phrase(path, row[path]) for path in said if path in row), *rest] for row in rows]


def _fewest(rows: Sequence[Settings], paths: list[str]) -> list[str]:
    """Paths that divide the rows as all of `paths` do, in their order; chosen one by one, the most telling first."""

    def parts(some: Iterable[str]) -> int:
        chosen = list(some)
        return len({tuple(_value(row, path) for path in chosen) for row in rows})

    said: list[str] = []
    while parts(said) < parts(paths):
        said.append(max((path for path in paths if path not in said), key=lambda path: parts([*said, path])))
    return [path for path in paths if path in said]


def _value(row: Settings, path: str) -> Any:
    return same(row[path]) if path in row else _ABSENT


def phrase(path: str, value: Any) -> str:
    """A setting in words: its name in `conf/` and its value, unless it has words of its own."""
    if path in _SAYS and value is not None:
        return _SAYS[path].format(value)
    return f"{path.split('.')[-1]} = {_text(value)}"


def _text(value: Any) -> str:
    if value is None or isinstance(value, bool | list | dict):
        return "none" if value is None else json.dumps(value)
    if isinstance(value, str) and len(value) > 24:  # a hash of content
        return short_hash(value)
    return value if isinstance(value, str) else f"{value:g}"
