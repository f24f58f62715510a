"""What figures read of evaluations."""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

import pandas as pd

from saeflow.jobs.job import Job


class Evaluations(NamedTuple):
    """The evaluations of an experiment."""

    table: pd.DataFrame
    """One row a dictionary: its `summary.json`."""
    resamples: pd.DataFrame
    """One row a draw of the documents and dictionary: `resamples.parquet` with `dictionary_key`."""
    l0: pd.DataFrame
    """One row a number of active latents and dictionary: `l0.parquet` with `dictionary_key`."""
    confidence: float
    """Of the intervals."""

    @property
    def extra_tables(self) -> dict[str, pd.DataFrame]:
        """All metrics of all dictionaries."""
        return {"evaluations": self.table}


class Stacks(NamedTuple):
    """Sets of layers with their dictionaries in place at once."""

    table: pd.DataFrame
    """One row a set: its `summary.json`."""

    @property
    def extra_tables(self) -> dict[str, pd.DataFrame]:
        return {"stack_evaluations": self.table}


def read_evaluations(job: Job) -> Evaluations:
    folders = job.inputs("evaluate")
    table = read_summaries(folders)
    resamples, l0 = (
        pd.concat(
            pd.read_parquet(f / f"{name}.parquet").assign(dictionary_key=key)
            for f, key in zip(folders, table["dictionary_key"], strict=True)
        )
        for name in ("resamples", "l0")
    )
    return Evaluations(table, resamples, l0, table["confidence"].max())


def read_summaries(folders: Iterable[Path]) -> pd.DataFrame:
    """One row an evaluation; `part` says input or output of what was trained as a pair, else nothing."""
    table = pd.DataFrame([json.loads((f / "summary.json").read_text()) for f in folders])
    return table.fillna({"part": ""}) if len(table) else table


def read_stacks(job: Job) -> Stacks:
    return Stacks(pd.DataFrame([json.loads((f / "summary.json").read_text()) for f in job.inputs("stack")]))
