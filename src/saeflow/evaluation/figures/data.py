"""What figures read of evaluations: one row a dictionary, named by what tells the experiment's dictionaries apart."""

from typing import NamedTuple

import pandas as pd

from saeflow.dictionaries.series import with_names
from saeflow.dictionaries.settings import read_summaries
from saeflow.jobs.job import Job

LEVELS = {"ce_clean": "clean model", "ce_mean": "mean ablation", "ce_zero": "zero ablation"}
INCREASE = ["ce_increase", "ce_increase_low", "ce_increase_high"]


class Evaluations(NamedTuple):
    """The evaluations of an experiment."""

    table: pd.DataFrame
    """One row a dictionary: its `summary.json`, with its names (`saeflow.dictionaries.series.with_names`)."""
    resamples: pd.DataFrame
    """One row a resample of the documents and dictionary: `resamples.parquet` with `dictionary_key`."""
    l0: pd.DataFrame
    """One row a number of active latents and dictionary: `l0.parquet` with `dictionary_key`."""

    @property
    def extra_tables(self) -> dict[str, pd.DataFrame]:
        """All metrics of all dictionaries."""
        return {"evaluations": self.table.drop(columns=["point", "repeat"])}

    def resamples_of(self, rows: pd.DataFrame) -> pd.DataFrame:
        """The resamples of some rows of the table, which must be of one place: resample r then left the same documents
        out for all. Dictionaries that were evaluated twice, on other tokens say, have those of that place."""
        (place,) = rows["place"].unique()
        mine = self.resamples[self.resamples["dictionary_key"].isin(rows["dictionary_key"])]
        return mine[mine["place"] == place] if "place" in mine else mine


class Stacks(NamedTuple):
    """Sets of layers with their dictionaries in place at once."""

    table: pd.DataFrame
    """One row a set: its `summary.json`, and `place`, `series`, `point`, `label` of what they are sets of."""

    @property
    def extra_tables(self) -> dict[str, pd.DataFrame]:
        return {"stack_evaluations": self.table.drop(columns=["point", "repeat"], errors="ignore")}


def read_evaluations(job: Job) -> Evaluations:
    named = with_names(read_summaries(job, "evaluate").fillna({"part": ""}))
    resamples, l0 = (
        pd.concat(
            pd.read_parquet(f"{folder}/{name}.parquet").assign(dictionary_key=key, place=place)
            for folder, key, place in zip(named["folder"], named["dictionary_key"], named["place"], strict=True)
        )
        for name in ("resamples", "l0")
    )
    return Evaluations(named.drop(columns="folder"), resamples, l0)


def read_stacks(job: Job) -> Stacks:
    """A set is called what its dictionaries are, which are alike in all but the layer; its layers are its place."""
    table = read_summaries(job, "stack").drop(columns="folder")
    kinds = read_summaries(job, "evaluate").drop_duplicates("train_key").set_index("train_key")
    first = kinds.reindex([keys[0] for keys in table["train_keys"]])
    names = ["kind", "activation", "skip", "saelens", "source", "d_sae", "sparsity", "seed", "amount_name", "amount"]
    table = table.assign(**{name: first[name].to_numpy() for name in [*names, "model_name"]})
    sites = [
        f"layers {', '.join(map(str, layers))}, {hooks[0].split('.', 2)[-1].replace('hook_', '')}"
        for layers, hooks in zip(table["layers"], table["hooks"], strict=True)
    ]
    return Stacks(with_names(table.assign(hook_name=sites, hook_name_out=sites)))
