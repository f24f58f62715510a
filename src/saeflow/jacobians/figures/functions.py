"""Figures of one output latent as a function of one input latent: its class, and what J predicts of it."""

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from saeflow.figures.axes import PANELS_BESIDE
from saeflow.figures.registry import figure
from saeflow.jacobians.figures.series import (
    bars,
    by_coefficient,
    by_panel,
    coefficient_colours,
    first_panel,
    label_of,
    legend,
    over_seeds,
    paired_panels,
    title,
)
from saeflow.jacobians.figures.studies import IDENTITY, Studies, read_pairs
from saeflow.jacobians.linearity import ABSOLUTE, RELATIVE

CLASSES = {"linear": "linear", "jumprelu": "JumpReLU", "other": "other", "flat": "flat"}


@figure("jacobian_linearity", stage="jacobian", reads=read_pairs)
def jacobian_linearity(studies: Studies) -> tuple[Figure, pd.DataFrame]:
    """Classes of the functions of one output latent by one input latent, under both tolerances, and examples."""
    summaries, table = studies.summaries, studies.of("linearity")
    colours = coefficient_colours(summaries)
    panels = by_panel(summaries)
    figure, places = paired_panels(len(panels) + 2)
    columns = [f"{kind}_{name}" for kind in ("absolute", "relative") for name in CLASSES]
    long = pd.concat(
        summaries[IDENTITY].assign(
            tolerance=column.split("_")[0], function=column.split("_")[1], share=summaries[column],
            share_low=summaries[f"{column}_low"], share_high=summaries[f"{column}_high"],
        )
        for column in columns
    )  # fmt: skip
    says = {"absolute": f"residual < {ABSOLUTE:g} (paper)", "relative": f"residual < {100 * RELATIVE:g} % of the range"}
    for place, ((panel, _), pair) in enumerate(zip(panels, places, strict=False)):
        for axis, kind in zip(pair, ("absolute", "relative"), strict=True):
            here = long[(long["panel"] == panel) & (long["tolerance"] == kind)]
            series: dict[float, pd.DataFrame] = {}
            for coefficient, rows in by_coefficient(here):
                order = over_seeds(rows, "function", "share").set_index("function").reindex(list(CLASSES))
                series[coefficient] = order.reset_index()
            bars(axis, list(CLASSES.values()), series, colours)
            axis.set(ylim=(0, 105), ylabel="functions (%)" if place % PANELS_BESIDE == 0 else "")
            axis.set_title(title(panel, says[kind]))
    _draw_curves(np.concatenate(places[len(panels) :]), table)
    figure.tight_layout()
    legend(figure, figure.axes)
    return figure, long


def _draw_curves(axes: np.ndarray, table: pd.DataFrame) -> None:
    """Three functions of each class (relative tolerance), one of four axes a class."""
    found = [name for name in CLASSES if (table["class_relative"] == name).any()]
    for axis in axes:
        axis.set_axis_off()
    for axis, name in zip(axes, found, strict=False):
        axis.set_axis_on()
        some = table[table["class_relative"] == name].head(3)
        for n, (end, curve) in enumerate(zip(some["sweep_end"], some["curve"], strict=True)):
            axis.plot(np.linspace(0, end, len(curve)), curve, color=f"{0.15 + 0.25 * n}")
        axis.set(title=f"examples: {CLASSES[name]}", xlabel="input latent", ylabel="output latent")


@figure("jacobian_ablation", stage="jacobian", reads=read_pairs)
def jacobian_ablation(studies: Studies) -> tuple[Figure, pd.DataFrame]:
    """What J predicts against what happens: one unit of the decoder row subtracted (paper), and the latent ablated.

    Drawn of one panel's studies, at most four coefficients of them; the table has all.
    """
    table = studies.of("linearity")
    summaries = studies.summaries
    colours = coefficient_colours(summaries)
    chosen = first_panel(summaries)
    figure, grid = plt.subplots(2, len(chosen), figsize=(max(4.4, 2.1 * len(chosen)), 4.5), squeeze=False)
    for column, (_, study) in zip(grid.T, chosen.iterrows(), strict=True):
        rows = table[table["jacobian_key"] == study["jacobian_key"]]
        unit = (-rows["jacobian"], rows["delta_unit"])
        ablated = (-rows["jacobian"] * rows["activation"], rows["delta_ablation"])
        for axis, (predicted, found) in zip(column, (unit, ablated), strict=True):
            axis.scatter(predicted, found, s=3, color=colours[study["jacobian_coefficient"]], alpha=0.5, lw=0)
            ends = [min(predicted.min(), found.min()), max(predicted.max(), found.max())]
            axis.plot(ends, ends, color="0.4", linewidth=0.7)
        column[0].set_title(title(study["panel"], label_of(study["jacobian_coefficient"])))
        on_line = f"{100 * study['on_line']:.1f} % within 0.1"
        fit = f"R² {study['ablation_r2']:.2f}, slope {study['ablation_slope']:.2f}"
        for axis, text in zip(column, (on_line, fit), strict=True):
            axis.text(0.04, 0.96, text, transform=axis.transAxes, va="top", fontsize=6.5)
        column[0].set_xlabel("−J")
        column[1].set_xlabel("−J × activation")
    grid[0][0].set_ylabel("change of the output latent,\none unit subtracted")
    grid[1][0].set_ylabel("change of the output latent,\ninput latent ablated")
    figure.tight_layout()
    entry = ["token", "input", "output", "activation", "jacobian", "delta_unit", "delta_ablation"]
    return figure, table[[*IDENTITY, *entry, "class_absolute", "class_relative"]]
