"""Series of the Jacobian figures: their colours, panels, bars and legends."""

import re
from collections.abc import Iterable
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from saeflow.figures.axes import PANELS_BESIDE, labelled, legend_below
from saeflow.figures.style import sequence

DASHES = ("-", "--", ":", "-.")
NORMS = {"none": "|J|", "l1": "|J| / L1 norm", "l2": "|J| / L2 norm", "rms": "|J| / RMS of its token"}


def coefficient_colours(table: pd.DataFrame) -> dict[float, Any]:
    """Colour by coefficient."""
    values = sorted(table["jacobian_coefficient"].unique())
    return dict(zip(values, sequence(len(values), 0.82, 0.02), strict=True))


def by_coefficient(rows: pd.DataFrame) -> list[tuple[float, pd.DataFrame]]:
    """From the baseline up."""
    found = sorted(map(float, rows["jacobian_coefficient"].unique()))
    return [(c, rows[rows["jacobian_coefficient"] == c]) for c in found]


def label_of(coefficient: float) -> str:
    return "λ = 0 (baseline)" if coefficient == 0 else f"λ = {coefficient:g}"


def by_panel(table: pd.DataFrame) -> list[tuple[str, pd.DataFrame]]:
    """Panels in the order of the studies."""
    return [(str(name), rows) for name, rows in table.groupby("panel", sort=False)]


def first_panel(summaries: pd.DataFrame) -> pd.DataFrame:
    """Of the first panel one study a coefficient, at most four of them, the baseline and the largest included."""
    _, rows = by_panel(summaries)[0]
    by_coefficient = rows.drop_duplicates("jacobian_coefficient").sort_values("jacobian_coefficient")
    return by_coefficient.iloc[np.unique(np.linspace(0, len(by_coefficient) - 1, 4).round().astype(int))]


def over_seeds(rows: pd.DataFrame, by: str, value: str) -> pd.DataFrame:
    """Mean over seeds of `value`, the lowest of its lower ends, the highest of its upper ends; one row a `by`."""
    names = {"value": (value, "mean"), "low": (f"{value}_low", "min"), "high": (f"{value}_high", "max")}
    return rows.groupby(by, sort=True).agg(**names).reset_index()


def bars(axis: Axes, groups: list[str], series: dict[float, pd.DataFrame], colours: dict[float, Any]) -> None:
    """Grouped bars in percent, with intervals; a frame of `series` has a row a group."""
    width = 0.8 / max(len(series), 1)
    for n, (coefficient, rows) in enumerate(series.items()):
        at = np.arange(len(groups)) + (n - (len(series) - 1) / 2) * width
        value, low, high = (100 * rows[c].to_numpy() for c in ("value", "low", "high"))
        axis.bar(at, value, 0.9 * width, color=colours[coefficient], label=label_of(coefficient))
        errors = np.nan_to_num(np.maximum([value - low, high - value], 0))
        axis.errorbar(at, value, errors, fmt="none", ecolor="0.2", elinewidth=0.8, capsize=1.5)
    axis.set_xticks(range(len(groups)), groups)


def legend(figure: Figure, axes: Iterable[Axes], columns: int = 6) -> None:
    """Below everything: each label once, in the order of the first that has it, the baseline first."""
    unique = sorted(labelled(axes).items(), key=lambda item: _label_order(item[0]))
    legend_below(figure, dict(unique), columns)


def _label_order(label: str) -> float:
    found = re.match(r"λ = ([\d.e+-]+)", label)
    return float(found[1]) if found else 0.0


def paired_panels(places: int) -> tuple[Figure, list[np.ndarray]]:
    """Columns of two axes each, at most four beside one another."""
    beside, bands = min(places, PANELS_BESIDE), -(-places // PANELS_BESIDE)
    figure, grid = plt.subplots(2 * bands, beside, figsize=(max(4.4, 2.5 * beside), 4.4 * bands), squeeze=False)
    columns = [grid[2 * (n // beside) : 2 * (n // beside) + 2, n % beside] for n in range(bands * beside)]
    for column in columns[places:]:
        for axis in column:
            axis.set_axis_off()
    return figure, columns[:places]


def legend_of_lines(figure: Figure, colours: dict[float, Any], panels: list[str], more: Iterable[Line2D] = ()) -> None:
    """A legend of colours (coefficients) and dashes (panels)."""
    handles = [Line2D([], [], color=colour, label=label_of(c)) for c, colour in colours.items()]
    if len(panels) > 1:
        dashes = {panel: DASHES[n % len(DASHES)] for n, panel in enumerate(panels)}
        handles += [Line2D([], [], color="0.3", linestyle=dash, label=panel) for panel, dash in dashes.items()]
    legend_below(figure, [*handles, *more], columns=5)


def title(panel: str, text: str = "") -> str:
    return "\n".join(part for part in (panel, text) if part)
