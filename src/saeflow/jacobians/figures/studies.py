"""What figures read of the Jacobian stage."""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd

from saeflow.evaluation.figures.reading import read_summaries
from saeflow.jobs.job import Job

EXAMPLE_TOKENS = 3
IDENTITY = ["panel", "jacobian_coefficient", "seed", "jacobian_key"]
FAITHFULNESS = {"explained_variance": "explained variance", "loss_recovered_zero": "CE loss recovered (zero ablation)"}
CONTROLS = {"none": "trained model", "reinit": "re-initialised model", "permuted": "permuted model"}
_DISTINGUISHED_BY = ["layer", "k", "d_sae", "control", "jacobian_penalty", "at", "norm", "hook_name", "hook_name_out"]


class Studies(NamedTuple):
    """What the Jacobian stage measured, of pairs. Every table has the column `jacobian_key`."""

    summaries: pd.DataFrame
    """One row a study, with its `panel`: what distinguishes it besides coefficient and seed. What evaluations of its
    dictionaries say has `_input` or `_output` added to its name."""
    tables: dict[str, pd.DataFrame]
    """By name: the stage's tables, and `examples`, the Jacobians of a few tokens, one row an entry."""

    def of(self, name: str) -> pd.DataFrame:
        """A table that begins with what identifies each row's study."""
        table = self.tables[name].merge(self.summaries[IDENTITY], on="jacobian_key", sort=False)
        return table[[*IDENTITY, *(column for column in table if column not in IDENTITY)]]


def read_pairs(job: Job) -> Studies:
    """Raises `ValueError` where no study is of a pair."""
    studies = read_studies(job.inputs("jacobian"), read_summaries(job.inputs("evaluate")))
    if studies.summaries.empty:
        raise ValueError("figures of Jacobians but jacobian_histogram need pairs: use dictionary=pair or jacobian")
    return studies


def read_labelled_histograms(job: Job) -> pd.DataFrame:
    return read_histograms(job.inputs("jacobian"))


def read_studies(folders: Iterable[Path], evaluations: pd.DataFrame) -> Studies:
    """Reads the artifacts of the Jacobian stage; those of transcoders, which have no coefficient, are left out.

    `evaluations`: one row a dictionary, those of the pairs among them.
    """
    summaries: list[dict[str, Any]] = []
    tables: dict[str, list[pd.DataFrame]] = {}
    names = ("histogram", "log_histogram", "thresholds", "global_exceedance", "outputs", "linearity")
    for folder in folders:
        summary = json.loads((folder / "summary.json").read_text())
        if summary["kind"] != "pair":
            continue
        summaries.append(summary | {"jacobian_key": folder.name, "control": control(summary)})
        for name in names:
            tables.setdefault(name, []).append(
                pd.read_parquet(folder / f"{name}.parquet").assign(jacobian_key=folder.name)
            )
        tables.setdefault("examples", []).append(_read_examples(folder).assign(jacobian_key=folder.name))
    joined = {name: pd.concat(parts, ignore_index=True) for name, parts in tables.items()}
    return Studies(_with_evaluations(_with_panels(pd.DataFrame(summaries)), evaluations), joined)


def read_histograms(folders: Iterable[Path]) -> pd.DataFrame:
    """`histogram.parquet` of every study, those of transcoders too, with `jacobian_key` and `label`."""
    tables = []
    for folder in folders:
        summary = json.loads((folder / "summary.json").read_text())
        of = "transcoder"
        if summary["kind"] == "pair":
            of = f"k = {summary['k']}, λ = {summary['jacobian_coefficient']:g}, {control(summary)}"
        sites = " → ".join(summary[c].split(".", 2)[-1].replace("hook_", "") for c in ("hook_name", "hook_name_out"))
        label = f"layer {summary['layer']}, {sites}, {of}"
        tables.append(pd.read_parquet(folder / "histogram.parquet").assign(label=label, jacobian_key=folder.name))
    return pd.concat(tables) if tables else pd.DataFrame()


def _with_evaluations(summaries: pd.DataFrame, evaluations: pd.DataFrame) -> pd.DataFrame:
    """Adds `FAITHFULNESS` of both dictionaries of each study; NaN where one was not evaluated."""
    if summaries.empty:
        return summaries
    wanted = ["train_key", "part", *FAITHFULNESS]
    held = evaluations.reindex(columns=wanted)
    for side, key in (("input", "train_key_in"), ("output", "train_key_out")):
        mine = held[held["part"].fillna("").isin(["", side])].drop(columns="part").drop_duplicates("train_key")
        named = mine.rename(columns={name: f"{name}_{side}" for name in FAITHFULNESS} | {"train_key": key})
        summaries = summaries.merge(named, on=key, how="left")
    return summaries


def control(summary: dict[str, Any]) -> str:
    """Name of the language model: trained, or which control."""
    return CONTROLS[summary.get("randomise") or "none"]


def _with_panels(summaries: pd.DataFrame) -> pd.DataFrame:
    """Names each study by what differs between studies besides coefficient and seed; '' where nothing does."""
    if summaries.empty:
        return summaries
    differing = [c for c in _DISTINGUISHED_BY if summaries[c].nunique(dropna=False) > 1]
    if "layer" in differing:
        differing = [c for c in differing if not c.startswith("hook_name")]
    says = {
        "layer": "layer {}",
        "k": "k = {}",
        "d_sae": "{} latents",
        "control": "{}",
        "jacobian_penalty": "penalty {}",
        "at": "at the {}",
        "norm": "norm {}",
    }
    usual = {"control": "trained model", "jacobian_penalty": "l1"}  # goes without saying where something else is said
    names = []
    for _, row in summaries.iterrows():
        said = [c for c in differing if row[c] != usual.get(c)] or differing
        names.append(", ".join(says.get(c, "{}").format(row[c]) for c in said))
    return summaries.assign(panel=names)


def _read_examples(folder: Path) -> pd.DataFrame:
    """The entries of the first tokens: `token`, `output`, `input`, `jacobian`."""
    import zarr

    group = zarr.open_group(folder / "tokens.zarr", mode="r")
    n = int(np.searchsorted(group["token"][:], EXAMPLE_TOKENS))  # type: ignore[index,arg-type]
    return pd.DataFrame({name: group[name][:n] for name in ("token", "output", "input", "jacobian")})  # type: ignore[index]
