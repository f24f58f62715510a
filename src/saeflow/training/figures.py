"""The figure of training: how the metrics fall with the tokens."""

import textwrap

import pandas as pd
from matplotlib.figure import Figure

from saeflow.dictionaries.layouts import part_folders
from saeflow.dictionaries.series import IDENTITY, with_names
from saeflow.dictionaries.settings import read_summaries
from saeflow.figures.axes import labelled, log_axis
from saeflow.figures.registry import figure
from saeflow.figures.style import sequence
from saeflow.jobs.job import Job

MOST_BESIDE = 6
_HEIGHTS = (1.5, 1.5, 0.85)  # inches: of both panels and of their legend


def read_curves(job: Job) -> pd.DataFrame:
    """One row a logged step of each dictionary: `metrics.parquet`, and what the dictionary is.

    The latter stands in the summaries of what judged the dictionaries, evaluations or comparisons with a known
    algorithm, so that no dictionary has to be opened.
    """
    judged = pd.concat([read_summaries(job, stage) for stage in ("evaluate", "recover")], ignore_index=True)
    judged = judged.assign(part=judged["part"].fillna("")).drop_duplicates(["train_key", "part"])
    trained = judged[judged["train_key"].isin([folder.name for folder in job.inputs("train", "metrics.parquet")])]
    curves = []
    for folder_of_all in job.inputs("train", "metrics.parquet"):
        for folder in part_folders(folder_of_all):
            part = "" if folder == folder_of_all else folder.name
            curves.append(pd.read_parquet(folder / "metrics.parquet", columns=["step", "tokens", "fvu", "l0"]))
            curves[-1] = curves[-1].assign(train_key=folder_of_all.name, part=part)
    names = with_names(trained)[[*IDENTITY, "point", "label", "train_key", "part"]]
    return names.merge(pd.concat(curves), on=["train_key", "part"], sort=False)


@figure("training_curves", stage="train", reads=read_curves)
def training_curves(data: pd.DataFrame) -> tuple[Figure, pd.DataFrame]:
    """Fraction of variance unexplained and mean number of active latents by training tokens, one column a series of
    dictionaries and its place; colours are the swept values of k or of the L1 coefficient. Of several seeds the mean,
    within their range."""
    columns = list(data.groupby(["place", "series"], sort=False))
    beside, bands = min(len(columns), MOST_BESIDE), -(-len(columns) // MOST_BESIDE)
    figure = Figure(figsize=(max(3.0, 2.0 * beside), sum(_HEIGHTS) * bands + 0.6))
    grid = figure.subplots(3 * bands, beside, sharey=False, squeeze=False, height_ratios=_HEIGHTS * bands)
    for axis in grid.flat:
        axis.set_axis_off()
    highest = {name: (data[name][data[name] > 0].min(), data[name].max()) for name in ("fvu", "l0")}
    for n, ((place, series), rows) in enumerate(columns):
        band, column = divmod(n, MOST_BESIDE)
        top, bottom, below = grid[3 * band : 3 * band + 3, column]
        points = list(rows.groupby("point", sort=False))
        for (_, curve), colour in zip(points, sequence(len(points)), strict=True):
            seeds = curve.groupby(["train_key", "part"]).ngroups
            label = f"{curve['amount_name'].iloc[0]} = {curve['amount'].iloc[0]:g}" + (
                f", {seeds} seeds" if seeds > 1 else ""
            )
            by_tokens = curve.groupby("tokens")
            for axis, name in ((top, "fvu"), (bottom, "l0")):
                mean, low, high = (getattr(by_tokens[name], of)() for of in ("mean", "min", "max"))
                axis.plot(mean.index / 1e3, mean, color=colour, label=label)
                if seeds > 1:
                    axis.fill_between(mean.index / 1e3, low, high, color=colour, alpha=0.3, linewidth=0)
        top.set_title("\n".join(textwrap.wrap(str(series), 30) + textwrap.wrap(str(place), 30)))
        bottom.set_xlabel("tokens (thousands)")
        for axis, name, what in ((top, "fvu", "variance unexplained"), (bottom, "l0", "L0 (active latents)")):
            axis.set_axis_on()
            log_axis(axis, "y")
            low, high = highest[name]
            axis.set_ylim(low / 1.1, high * 1.1)
            axis.set_ylabel(what if column == 0 else "")
            axis.tick_params(labelleft=column == 0)
        top.tick_params(labelbottom=False)
        unique = labelled([top])
        shown = list(unique)[:: max(1, len(unique) // 6)]  # of a long sweep every so many, along the colours
        below.legend([unique[label] for label in shown], shown, loc="upper center", handlelength=1.0)
    figure.tight_layout(h_pad=0.6)
    return figure, data[[*IDENTITY, "train_key", "part", "step", "tokens", "fvu", "l0"]]
