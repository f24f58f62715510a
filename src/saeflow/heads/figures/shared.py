"""What the figures of heads share."""

from collections.abc import Callable, Iterator

import numpy as np
import pandas as pd
import xarray as xr
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from saeflow.dictionaries.series import with_names
from saeflow.dictionaries.settings import read_summaries, settings, tell_apart
from saeflow.figures.axes import empty_panel, legend_below
from saeflow.figures.style import colours
from saeflow.heads.folder import HeadStudy, read_head_studies
from saeflow.jobs.job import Job

NULL = "0.6"
Rows = pd.DataFrame | xr.Dataset


def read_heads(job: Job) -> list[HeadStudy]:
    """The studies of an experiment in the order of the layers, and what tells them and their dictionaries apart."""
    studies = read_head_studies(job.inputs("heads"))
    evaluated = with_names(read_summaries(job, "evaluate"))
    whole = evaluated[evaluated["part"].isna()]
    labels = dict(zip(whole["train_key"], whole["label"], strict=True))
    held = [settings(job.plan, "heads", study.key) for study in studies]
    own = tell_apart([{path: value for path, value in one.items() if path.startswith("heads.")} for one in held])
    named = []
    for study, said in zip(studies, own, strict=True):
        (tokens,) = job.plan.instance("heads", study.key).needs["tokens"]
        mine = whole[whole["train_key"].isin(study.summary["dictionaries"]) & (whole["tokens_key"] == tokens)].iloc[0]
        beside = mine["place"].removeprefix(mine["where"]).removeprefix(", ")
        title = ", ".join(part for part in (study.name, beside, *said) if part)
        named.append(study._replace(title=title, labels=labels))
    return named


def head_legend(figure: Figure, studies: list[HeadStudy], *more: Line2D) -> None:
    """A colour for each head of the studies, and `more`."""
    by_head = enumerate(colours(max((study.summary["n_heads"] for study in studies), default=0)))
    legend_below(figure, [*(Line2D([], [], color=colour, label=f"head {h}") for h, colour in by_head), *more])


def pair_names(dataset: xr.Dataset) -> list[str]:
    return [f"{g}, {h}" for g, h in zip(dataset["head"].values, dataset["other_head"].values, strict=True)]


def identified(table: Rows, study: HeadStudy, dictionary: str | None = None) -> pd.DataFrame:
    """The rows with the keys of what they are of in front."""
    table = table.to_dataframe().reset_index() if isinstance(table, xr.Dataset) else table
    keys = {"study": study.key} | ({"dictionary_key": dictionary} if dictionary else {})
    return pd.DataFrame(keys, index=table.index).join(table)


def of_studies(studies: list[HeadStudy], rows: Callable[[HeadStudy], Rows]) -> pd.DataFrame:
    return concat([identified(rows(study), study) for study in studies])


def of_dictionaries(
    studies: list[HeadStudy], kind: str, rows: Callable[[HeadStudy, str], Rows], file: str | None = None
) -> pd.DataFrame:
    """The rows of all dictionaries of a kind (that have a `file`), those that are not drawn too."""
    keys = [(study, key) for study in studies for key in study.of_kind(kind)]
    shown = [(study, key) for study, key in keys if file is None or study.file(file, key).exists()]
    return concat([identified(rows(study, key), study, key) for study, key in shown])


def concat(tables: list[pd.DataFrame]) -> pd.DataFrame:
    return pd.concat(tables, ignore_index=True) if tables else pd.DataFrame()


def shown_rows(
    studies: list[HeadStudy], grid: np.ndarray, kind: str, *, without: str, file: str | None = None, once: bool = False
) -> Iterator[tuple[np.ndarray, HeadStudy, str]]:
    """Each study's row of panels, and the dictionary of a kind that they show.

    Where there is none, or it has no `file`, all panels say what they are `without`, or `once` the first alone.
    """
    for line, study in zip(grid, studies, strict=True):
        key = study.shown_dictionary(kind)
        if key is not None and (file is None or study.file(file, key).exists()):
            yield line, study, key
            continue
        for axis in line[1:] if once else ():
            axis.set_axis_off()
        for axis in line[:1] if once else line:
            empty_panel(axis, without)
