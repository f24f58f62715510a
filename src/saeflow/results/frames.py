"""Tables of what was measured, one tidy frame each: first what a row is of, then what was measured."""

from pathlib import Path
from typing import Any

import pandas as pd

from saeflow.dictionaries.layouts import part_folders
from saeflow.dictionaries.naming import dictionary_key
from saeflow.dictionaries.series import with_names
from saeflow.dictionaries.settings import read_summaries
from saeflow.evaluation.overview import told_apart
from saeflow.jobs.job import Job

IDENTITY = ("place", "series", "amount_name", "amount")
_WITHOUT = "_without_bos"
_ENDS = ("", "_low", "_high", "_reason")
"""Of a metric: its value, its interval over documents, and why it has no value."""
_PLAIN = ("dead_fraction", "dense_fraction")
_COUNTS = ("n_tokens", "n_predictions", "n_documents")
_NOT_SHOWN = ("folder", "settings", "point", "repeat", "settings_of", "label", "where", "head")


def evaluations(job: Job, *, without_bos: bool = False) -> pd.DataFrame:
    """A row a dictionary whose evaluation the job needs, in the order of the figures.

    First what it is: `place`, `series`, `amount_name`, `amount`, every other setting that differs between the rows by
    its path in `conf/`, `seed`, `d_sae`, `dictionary_key`. Then every metric, with the ends of its interval over
    documents (`_low`, `_high`), on how much text, and the rest of the summary. `without_bos`: the metrics of all
    tokens but those at the head of rows, under the same names.
    """
    table = read_summaries(job, "evaluate")
    if not len(table):
        return pd.DataFrame(columns=[*IDENTITY, "seed", "d_sae", "dictionary_key"])
    settings = told_apart(list(table["settings"]))
    table["evaluate_key"] = [Path(folder).name for folder in table["folder"]]
    named = with_names(table.fillna({"part": ""}).assign(settings_of=pd.Series(settings, dtype=object)))
    extra = pd.DataFrame(list(named["settings_of"]), index=named.index)
    named = named.drop(columns=[name for name in _NOT_SHOWN if name in named])
    named = named.join(extra[[name for name in extra if name not in named]])
    scopes = {scope: _metrics(named.columns.tolist(), scope) for scope in ("", _WITHOUT)}
    chosen = scopes[_WITHOUT if without_bos else ""]
    first = [*IDENTITY, *(name for name in extra if name not in IDENTITY), "seed", "d_sae", "dictionary_key"]
    taken = {*first, *chosen, *(name for columns in scopes.values() for name in columns)}
    columns = [*first, *chosen, *(name for name in named if name not in taken)]
    return named[[name for name in dict.fromkeys(columns) if name in named]].rename(columns=chosen)


def _metrics(columns: list[str], scope: str) -> dict[str, str]:
    """Columns of metrics in one scope, all tokens or those without BOS, by what they are called: each with the ends of
    its interval, and on how much text."""
    ended = {name.removesuffix(end) for name in columns for end in _ENDS if end and name.endswith(end)}
    mine = [name for name in columns if name in ended and name.endswith(_WITHOUT) == bool(scope)]
    metrics = [name.removesuffix(scope) for name in mine]
    found = {f"{name}{scope}{end}": f"{name}{end}" for name in metrics for end in _ENDS}
    found |= {name: name for name in _PLAIN}
    found |= {f"{name}{scope}": name for name in _COUNTS} | {"confidence": "confidence"}
    return {name: called for name, called in found.items() if name in columns}


def curves(job: Job, judged: pd.DataFrame) -> pd.DataFrame:
    """A row a logged step of each dictionary whose training the job needs: what it is (`judged`, rows of `evaluations`;
    missing for what was not evaluated), `dictionary_key`, `train_key`, `part`, and `metrics.parquet`."""
    found = []
    for folder_of_all in job.inputs("train", "metrics.parquet"):
        for folder in part_folders(folder_of_all):
            part = "" if folder == folder_of_all else folder.name
            key = dictionary_key(folder_of_all.name, part)
            of = {"dictionary_key": key, "train_key": folder_of_all.name, "part": part}
            found.append(pd.read_parquet(folder / "metrics.parquet").assign(**of))
    if not found:
        return pd.DataFrame(columns=[*IDENTITY, "seed", "dictionary_key", "train_key", "part", "step"])
    curves = pd.concat(found, ignore_index=True)
    first = [*IDENTITY, "seed", "dictionary_key"]
    names = judged[first].drop_duplicates("dictionary_key")
    merged = curves.merge(names, on="dictionary_key", how="left", sort=False)
    return merged[[*first, *(name for name in curves if name not in first)]]


def summaries(job: Job, stage: str) -> pd.DataFrame:
    """A row an artifact of a stage: its key, and its `summary.json`."""
    table = read_summaries(job, stage)
    if not len(table):
        return pd.DataFrame(columns=["key"])
    table.insert(0, "key", [Path(folder).name for folder in table["folder"]])
    return table.drop(columns=["folder", "settings"])


def rows_where(table: pd.DataFrame, where: dict[str, Any]) -> pd.DataFrame:
    """The rows whose columns have these values. Raises `KeyError` for a column that there is not."""
    for name, value in where.items():
        if name not in table:
            raise KeyError(f"no column {name!r} to choose by; there are: {', '.join(map(str, table))}")
        table = table[table[name].isin(value if isinstance(value, list | tuple | set) else [value])]
    return table.reset_index(drop=True)
