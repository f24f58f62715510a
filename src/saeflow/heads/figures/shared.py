"""What the figures of heads share."""

from collections.abc import Callable, Iterator

import pandas as pd
import xarray as xr
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from saeflow.figures.axes import legend_below
from saeflow.figures.style import colours
from saeflow.heads.folder import HeadStudy, read_head_studies
from saeflow.jobs.job import Job

NULL = "0.6"


def read_heads(job: Job) -> list[HeadStudy]:
    return read_head_studies(job.inputs("heads"))


def head_handles(n: int) -> list[Line2D]:
    return [Line2D([], [], color=colour, label=f"head {h}") for h, colour in enumerate(colours(n))]


def head_legend(figure: Figure, studies: list[HeadStudy], *more: Line2D) -> None:
    """A colour for each head of the studies, and `more`."""
    legend_below(figure, [*head_handles(max((study.summary["n_heads"] for study in studies), default=0)), *more])


def pair_names(dataset: xr.Dataset) -> list[str]:
    return [f"{g}, {h}" for g, h in zip(dataset["head"].values, dataset["other_head"].values, strict=True)]


def identified(table: pd.DataFrame, study: HeadStudy, dictionary: str | None = None) -> pd.DataFrame:
    """The rows with the keys of what they are of in front."""
    keys = {"study": study.key} | ({"dictionary_key": dictionary} if dictionary else {})
    return pd.DataFrame(keys, index=table.index).join(table)


def long(dataset: xr.Dataset) -> pd.DataFrame:
    return dataset.to_dataframe().reset_index()


def of_dictionaries(
    studies: list[HeadStudy], kind: str, rows: Callable[[HeadStudy, str], pd.DataFrame]
) -> pd.DataFrame:
    """The rows of all dictionaries of a kind, those that are not drawn too."""
    return concat([identified(rows(study, key), study, key) for study in studies for key in study.of_kind(kind)])


def concat(tables: list[pd.DataFrame]) -> pd.DataFrame:
    return pd.concat(tables, ignore_index=True) if tables else pd.DataFrame()


def with_chosen(studies: list[HeadStudy], kind: str) -> Iterator[tuple[int, HeadStudy, str | None]]:
    for row, study in enumerate(studies):
        yield row, study, study.shown_dictionary(kind)
