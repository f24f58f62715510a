"""The figure of training: how the metrics fall with the tokens."""

import json

import matplotlib.pyplot as plt
import pandas as pd
from matplotlib.figure import Figure

from saeflow.dictionaries.layouts import part_folders
from saeflow.dictionaries.naming import IDENTITY, hook_title, with_names
from saeflow.figures.axes import labelled, log_axis
from saeflow.figures.registry import figure
from saeflow.figures.style import sequence
from saeflow.jobs.job import Job

_SPEC = ["train_key", "kind", "activation", "skip", "saelens", "source", "amount", "amount_name", "hook_name"]
_SPEC += ["hook_name_out", "hook_head_index", "sparsity", "seed"]


def read_curves(job: Job) -> pd.DataFrame:
    """One row a logged step of each dictionary: `metrics.parquet`, and what the dictionary is.

    The latter stands in the summaries of what judged the dictionaries, evaluations or comparisons with a known
    algorithm, so that no dictionary has to be opened.
    """
    judged = [folder for stage in ("evaluate", "recover") for folder in job.inputs(stage, "summary.json")]
    summaries = [json.loads((folder / "summary.json").read_text()) for folder in judged]
    specs = pd.DataFrame([{name: s.get(name) for name in _SPEC} | {"part": s["part"] or ""} for s in summaries])
    curves = []
    for trained in job.inputs("train", "metrics.parquet"):
        for folder in part_folders(trained):
            part = "" if folder == trained else folder.name
            curves.append(pd.read_parquet(folder / "metrics.parquet", columns=["step", "tokens", "fvu", "l0"]))
            curves[-1] = curves[-1].assign(train_key=trained.name, part=part)
    return pd.concat(curves).merge(specs, on=["train_key", "part"])


@figure("training_curves", stage="train", reads=read_curves)
def training_curves(data: pd.DataFrame) -> tuple[Figure, pd.DataFrame]:
    """Fraction of variance unexplained and mean number of active latents by training tokens, one column a kind of
    dictionary and its site; colours are the swept values of k or of the L1 coefficient."""
    table = with_names(data)
    columns = list(table.groupby(["series", "hook_name"], sort=True))
    figure, axes = plt.subplots(
        2, len(columns), figsize=(max(3.0, 1.9 * len(columns)), 3.8), sharex=True, sharey="row", squeeze=False
    )
    for (top, bottom), ((series, hook), rows) in zip(axes.T, columns, strict=True):
        amounts = sorted(rows["amount"].unique())
        for amount, colour in zip(amounts, sequence(len(amounts)), strict=True):
            for _, curve in rows[rows["amount"] == amount].groupby(["train_key", "part"]):
                label = f"{curve['amount_name'].iloc[0]} = {amount:g}"
                top.plot(curve["tokens"] / 1e3, curve["fvu"], color=colour, label=label)
                bottom.plot(curve["tokens"] / 1e3, curve["l0"], color=colour)
        name = str(series).replace("SAELens ", "SAELens\n")  # side by side, long names would touch
        top.set_title(f"{name}\n{hook_title(str(hook))}")
        bottom.set_xlabel("tokens (thousands)")
        unique = labelled([top])
        shown = list(unique)[:: max(1, len(unique) // 8)]  # of a long sweep every so many, along the colours
        handles = [unique[label] for label in shown]
        bottom.legend(handles, shown, loc="upper center", bbox_to_anchor=(0.5, -0.35), handlelength=1.0)
    axes[0][0].set_ylabel("variance unexplained")
    axes[1][0].set_ylabel("L0 (active latents)")
    for axis in axes.flat:
        log_axis(axis, "y")
    return figure, table[[*IDENTITY, "train_key", "part", "step", "tokens", "fvu", "l0"]]
