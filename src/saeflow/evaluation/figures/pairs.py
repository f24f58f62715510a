"""Figures of every pair of dictionaries on the same documents, one matrix a place."""

import itertools
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from saeflow.evaluation import comparisons
from saeflow.evaluation.figures.data import Evaluations, read_evaluations
from saeflow.figures.axes import empty_panel, matrix_axis, subplots
from saeflow.figures.registry import figure

MOST_PAIRED = 32
_CELL, _LARGEST = 0.3, 60.0  # inches: of a cell, of a figure


@figure("paired_differences", stage="evaluate", reads=read_evaluations)
def paired_differences(data: Evaluations) -> tuple[Figure, pd.DataFrame]:
    """CE loss of each dictionary (row) minus that of each before it at its place (column) on the same documents, in
    thousandths of a nat.

    Cells whose interval over documents holds 0 are white. The first 32 dictionaries are shown, and the figure says how
    many it leaves out: `paired_differences_all` shows them all, and the table has all either way, with more metrics.
    """
    return _paired(data, MOST_PAIRED)


@figure("paired_differences_all", stage="evaluate", reads=read_evaluations)
def paired_differences_all(data: Evaluations) -> tuple[Figure, pd.DataFrame]:
    """As `paired_differences`, of all dictionaries, however many there are."""
    return _paired(data, len(data.table))


def _paired(data: Evaluations, most: int) -> tuple[Figure, pd.DataFrame]:
    by_place = [(str(place), rows) for place, rows in data.table.groupby("place", sort=False)]
    found = [
        comparisons.paired_differences(rows, data.resamples_of(rows), rows["confidence"].iloc[0]).assign(place=place)
        for place, rows in by_place
    ]
    table = pd.concat(found, ignore_index=True)
    table = table[["place", *(name for name in table if name != "place")]]
    shown, left = [], most
    for place, rows in by_place:
        if len(rows) > 1 and left > 1:
            shown.append((place, rows.head(left)))
            left -= len(shown[-1][1])
    if not shown:
        drawn, axis = subplots(figsize=(4.2, 2.0))
        empty_panel(axis, "no two dictionaries at one place")
        return drawn, table
    sizes = [len(rows) - 1 for _, rows in shown]  # of rows and columns: none is compared with itself
    cell = min(_CELL, _LARGEST / sum(sizes))
    longest = max(len(label) for _, rows in shown for label in rows["label"])
    margin = 0.6 + 0.052 * longest  # for the labels
    heights = [cell * n + margin for n in sizes]
    drawn, grid = subplots(
        len(shown), 1, figsize=(cell * max(sizes) + margin + 1.4, sum(heights)), squeeze=False, height_ratios=heights,
    )  # fmt: skip
    ce = table[table["metric"] == "ce_replaced"]
    largest = 1000 * max((_largest(ce, place, rows) for place, rows in shown), default=0.0) or 1e-9
    for axis, (place, rows) in zip(grid[:, 0], shown, strict=True):
        image = _draw_matrix(axis, rows, ce[ce["place"] == place], largest, cell)
        axis.set_title(place)
        bar = drawn.colorbar(image, ax=axis, fraction=0.05, pad=0.03)
        bar.set_label("CE loss of row minus column\n(thousandths of a nat per token)")
    drawn.tight_layout()
    compared = [rows for _, rows in by_place if len(rows) > 1]
    n_shown = sum(len(rows) for _, rows in shown)
    out = sum(map(len, compared)) - n_shown
    if out:
        among = f" at {len(shown)} of {len(compared)} places" if len(shown) < len(compared) else ""
        note = f"shown: {n_shown} of {n_shown + out} dictionaries{among}; all are in the table beside this figure"
        drawn.text(0.01, 0.0, f"{note}, and in figures=[paired_differences_all]", va="top", fontsize=6.5)
    return drawn, table


def _largest(ce: pd.DataFrame, place: str, rows: pd.DataFrame) -> float:
    mine = ce[
        (ce["place"] == place) & ce["one"].isin(rows["dictionary_key"]) & ce["other"].isin(rows["dictionary_key"])
    ]
    return float(mine["difference"].abs().max()) if len(mine) else 0.0


def _draw_matrix(axis: Axes, rows: pd.DataFrame, pairs: pd.DataFrame, largest: float, cell: float) -> Any:
    """Of the dictionaries `rows`, each pair once; `largest` is the end of the colours, in thousandths of a nat."""
    keys, n = list(rows["dictionary_key"]), len(rows)
    values, clear = np.full((n, n), np.nan), np.zeros((n, n), dtype=bool)
    for pair in pairs[pairs["one"].isin(keys) & pairs["other"].isin(keys)].to_dict("records"):
        i, j = keys.index(pair["one"]), keys.index(pair["other"])
        later, earlier, sign = (j, i, 1) if j > i else (i, j, -1)
        values[later, earlier] = sign * 1000 * pair["difference"]
        clear[later, earlier] = pair["low"] > 0 or pair["high"] < 0
    values, clear = values[1:, :-1], clear[1:, :-1]
    image = axis.imshow(np.where(clear, values, np.nan), cmap="RdBu_r", vmin=-largest, vmax=largest)
    for i, j in itertools.product(range(n - 1), range(n - 1)) if cell == _CELL else ():
        if np.isfinite(values[i, j]):
            dark = clear[i, j] and abs(values[i, j]) > 0.6 * largest
            text = f"{values[i, j]:.0f}" if abs(values[i, j]) >= 9.5 else f"{values[i, j]:.1f}"
            axis.text(j, i, text, ha="center", va="center", fontsize=6, color="white" if dark else "black")
    size = 6 * min(1.0, cell / 0.1)
    axis.set_yticks(range(n - 1), rows["label"][1:], fontsize=size)
    axis.set_xticks(range(n - 1), rows["label"][:-1], fontsize=size, rotation=90)
    matrix_axis(axis)
    return image
