"""What the figures of heads share."""

from collections.abc import Iterator
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import xarray as xr
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from saeflow.figures.palette import COLOURS
from saeflow.heads.folder import HeadStudy

NULL = "0.6"


def colours(n: int) -> list[Any]:
    """One a head: those that are safe for colour-blind readers while they last."""
    return list(COLOURS[:n]) if n <= len(COLOURS) else list(plt.get_cmap("viridis")(np.linspace(0, 0.9, n)))


def grid_of(rows: int, columns: int, width: float = 2.9, height: float = 2.6, **more: Any) -> tuple[Figure, np.ndarray]:
    return plt.subplots(rows, columns, figsize=(width * columns, height * rows), squeeze=False, **more)


def legend(figure: Figure, handles: list[Any], columns: int = 6) -> None:
    if handles:
        figure.legend(handles=handles, loc="upper center", bbox_to_anchor=(0.5, 0.01), ncols=min(columns, len(handles)))


def head_handles(n: int) -> list[Line2D]:
    return [Line2D([], [], color=colour, label=f"head {h}") for h, colour in enumerate(colours(n))]


def head_legend(figure: Figure, studies: list[HeadStudy], *more: Line2D) -> None:
    """A colour for each head of the studies, and `more`."""
    legend(figure, [*head_handles(max((study.summary["n_heads"] for study in studies), default=0)), *more])


def pair_names(dataset: xr.Dataset) -> list[str]:
    return [f"{g}, {h}" for g, h in zip(dataset["head"].values, dataset["other_head"].values, strict=True)]


def nothing(axis: Axes, text: str) -> None:
    axis.text(0.5, 0.5, text, ha="center", va="center", transform=axis.transAxes)
    axis.set_axis_off()


def concat(tables: list[pd.DataFrame]) -> pd.DataFrame:
    return pd.concat(tables, ignore_index=True) if tables else pd.DataFrame()


def with_chosen(studies: list[HeadStudy], kind: str) -> Iterator[tuple[int, HeadStudy, str | None]]:
    for row, study in enumerate(studies):
        yield row, study, study.chosen(kind)
