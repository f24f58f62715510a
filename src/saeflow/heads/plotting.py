"""What the figures of heads share: the studies as figures read them, and small helpers.

Where a figure is of one dictionary, it is the one of all heads whose L0 is nearest to 20 (what Kissane et al. aim for)
and the one of single heads that it is decomposed in; the table beside the figure has all dictionaries.
"""

import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import xarray as xr
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from saeflow.heads.store import read_dataset
from saeflow.palette import COLOURS

WANTED_L0 = 20
NULL = "0.6"


class HeadStudy(NamedTuple):
    """One artifact of the stage."""

    folder: Path
    summary: dict[str, Any]

    @property
    def key(self) -> str:
        return self.folder.name

    @property
    def name(self) -> str:
        return f"layer {self.summary['layer']}"

    def dataset(self, name: str, dictionary: str | None = None) -> xr.Dataset:
        return read_dataset(self.file(f"{name}.zarr", dictionary))

    def table(self, name: str, dictionary: str | None = None) -> pd.DataFrame:
        return pd.read_parquet(self.file(f"{name}.parquet", dictionary))

    def of_kind(self, kind: str) -> list[str]:
        """Keys of the dictionaries of a kind, the sparsest last."""
        held = self.summary["dictionaries"]
        return sorted((key for key in held if held[key]["kind"] == kind), key=lambda key: -held[key]["l0"])

    def chosen(self, kind: str) -> str | None:
        """The dictionary of a kind that figures of one dictionary show."""
        keys, held = self.of_kind(kind), self.summary["dictionaries"]
        if kind == "heads":
            concat = self.chosen("concat")
            if concat is not None and "decomposed_in" in held[concat]:
                return str(held[concat]["decomposed_in"])
        return min(keys, key=lambda key: abs(np.log(max(held[key]["l0"], 1e-9) / WANTED_L0))) if keys else None

    def says(self, key: str) -> str:
        held = self.summary["dictionaries"][key]
        of = "SAEs of heads" if held["kind"] == "heads" else "SAE of all heads"
        name = {"l1_coefficient": "L1"}.get(held["amount_name"], held["amount_name"])
        amount = f", {name} = {held['amount']:g}" if held["amount"] is not None else ""
        return f"{of}{amount}, L0 {held['l0']:.0f}"

    def file(self, name: str, dictionary: str | None) -> Path:
        return self.folder / "dictionaries" / dictionary / name if dictionary else self.folder / name


def read_head_studies(folders: Iterable[Path]) -> list[HeadStudy]:
    """Their summaries; datasets are read when a figure wants them."""
    found = [HeadStudy(folder, json.loads((folder / "summary.json").read_text())) for folder in folders]
    return sorted(found, key=lambda study: (study.summary["layer"], study.key))


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
