"""Figures of single latents: one output latent with its inputs, and functions of one latent by another."""

from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from saeflow.features.show import visible
from saeflow.figures.axes import empty_panel, log_axis, subplots
from saeflow.figures.registry import figure
from saeflow.jacobians.figures import studies
from saeflow.jacobians.figures.studies import IDENTITY, Studies, read_pairs
from saeflow.jacobians.linearity import ON_LINE

INPUTS_SHOWN = 8
FUNCTIONS_SHOWN = 5
GALLERY = {"jumprelu": "JumpReLU-like", "other": "other", "off": f"|J + Δ| ≥ {ON_LINE:g}"}
"""Rows of `jacobian_functions`, and what they are called."""


def _shown(data: Studies) -> pd.Series:
    """The study of which latents are shown: of the panel with the most coefficients that with the largest."""
    return studies.few_studies(data.summaries).iloc[-1]


@figure("jacobian_graph", stage="jacobian", reads=read_pairs)
def jacobian_graph(data: Studies) -> tuple[Figure, pd.DataFrame]:
    """One output latent and the input latents that it depends on most, each with the token of its largest activation;
    edges are as wide as the mean of J over the tokens on which both are active.

    Drawn is the output of the pair with the largest mean J, of the study with the largest coefficient; the table has
    the top inputs of all.
    """
    table = data.of("top_inputs").merge(_tokens(data, "input"), on=["jacobian_key", "input"], how="left")
    table = table.merge(_tokens(data, "output"), on=["jacobian_key", "output"], how="left")
    study = _shown(data)
    drawn, axis = subplots(figsize=(4.6, 3.2))
    mine = table[table["jacobian_key"] == study["jacobian_key"]]
    first = mine[mine["output_rank"] == mine["output_rank"].min()].sort_values("rank").head(INPUTS_SHOWN)
    if first.empty:
        empty_panel(axis, "no pair of latents is active together\non jacobian.min_count tokens")
    else:
        _draw_graph(axis, first)
    label = studies.label_of(study["jacobian_coefficient"])
    axis.set_title(studies.title(study["panel"], f"layer {study['layer']}, {label}: mean J"))
    columns = ["output_rank", "rank", "output", "input", "output_token", "input_token", "count", "mean", "std"]
    return drawn, table[[*IDENTITY, *columns, "mean_absolute"]]


def _tokens(data: Studies, side: str) -> pd.DataFrame:
    """`<side>_token` of every latent of a side: that of its largest activation."""
    contexts = data.of("contexts")
    rows = contexts[contexts["side"] == side]
    tokens = [
        visible(one[int(np.argmax(a))]).strip() for one, a in zip(rows["tokens"], rows["activations"], strict=True)
    ]
    return pd.DataFrame({"jacobian_key": rows["jacobian_key"], side: rows["latent"], f"{side}_token": tokens})


def _draw_graph(axis: Axes, rows: pd.DataFrame) -> None:
    """Inputs at the left, the largest at the top, and the output they share at the right."""
    heights = np.linspace(1, 0, len(rows)) if len(rows) > 1 else np.array([0.5])
    largest = rows["mean"].abs().max()
    for height, (_, row) in zip(heights, rows.iterrows(), strict=True):
        style: dict[str, Any] = (
            {"color": "#0072B2"} if row["mean"] > 0 else {"color": "#D55E00", "linestyle": (0, (3, 1.5))}
        )
        axis.plot([0, 1], [height, 0.5], linewidth=0.4 + 4 * abs(row["mean"]) / largest, zorder=1, **style)
        axis.plot(0, height, "o", color="0.2", zorder=2)
        axis.annotate(f"{row['input']}  “{row['input_token']}”", (0, height), (-6, 0), textcoords="offset points",
                      ha="right", va="center", fontsize=7)  # fmt: skip
        at = (0.24, height + 0.24 * (0.5 - height))
        box = {"facecolor": "white", "edgecolor": "none", "pad": 0.8}
        axis.annotate(f"{row['mean']:.2f}", at, ha="center", va="center", fontsize=6, bbox=box, zorder=3)
    axis.plot(1, 0.5, "s", color="0.2", markersize=6, zorder=2)
    last = rows.iloc[0]
    axis.annotate(f"{last['output']}  “{last['output_token']}”", (1, 0.5), (7, 0), textcoords="offset points",
                  ha="left", va="center", fontsize=7)  # fmt: skip
    axis.text(0, -0.12, "input latents", ha="right", va="top", fontsize=7, color="0.35")
    axis.text(1, -0.12, "output latent", ha="left", va="top", fontsize=7, color="0.35")
    axis.set(xlim=(-0.75, 1.7), ylim=(-0.2, 1.08))
    axis.set_axis_off()


@figure("jacobian_functions", stage="jacobian", reads=read_pairs)
def jacobian_functions(data: Studies) -> tuple[Figure, pd.DataFrame]:
    """Functions of one output latent by one input latent that are no lines, and those whose ablation J does not tell;
    below, how curved all are: the largest second derivative of each where the output latent is active.

    Points are where the latents are, grey lines have the slope J there. Drawn are the first of the study with the
    largest coefficient; the table has all functions.
    """
    table = data.of("linearity")
    table = table.assign(
        curvature=[_curvature(c, end) for c, end in zip(table["curve"], table["sweep_end"], strict=True)]
    )
    study = _shown(data)
    mine = table[table["jacobian_key"] == study["jacobian_key"]]
    off = (mine["jacobian"] + mine["delta_unit"]).abs() >= ON_LINE
    drawn = Figure(figsize=(7.2, 6.2))
    above, below = drawn.subfigures(2, 1, height_ratios=(3.2, 1.3))  # type: ignore[misc]
    grid = above.subplots(len(GALLERY), FUNCTIONS_SHOWN, squeeze=False)
    for line, (name, text) in zip(grid, GALLERY.items(), strict=True):
        rows = mine[off if name == "off" else mine["class_relative"] == name].head(FUNCTIONS_SHOWN)
        for axis in line:
            axis.set_axis_off()
        line[0].text(-0.35, 0.5, text, transform=line[0].transAxes, rotation=90, ha="right", va="center", fontsize=8)
        if rows.empty:
            line[0].text(0.5, 0.5, "none", transform=line[0].transAxes, ha="center")
        for axis, (_, row) in zip(line, rows.iterrows(), strict=False):
            _draw_function(axis, row)
    label = studies.label_of(study["jacobian_coefficient"])
    above.suptitle(", ".join(part for part in (str(study["panel"]), label, "output latent by input latent") if part))
    _draw_curvatures(below.subplots(), table[table["panel"] == study["panel"]])
    below.subplots_adjust(bottom=0.3, left=0.12, right=0.96, top=0.95)
    above.subplots_adjust(left=0.12, right=0.96, hspace=0.75, wspace=0.5, top=0.88, bottom=0.08)
    entry = ["token", "input", "output", "activation", "jacobian", "delta_unit", "sweep_end", "class_absolute"]
    return drawn, table[[*IDENTITY, *entry, "class_relative", "curvature"]]


def _draw_curvatures(axis: Axes, table: pd.DataFrame) -> None:
    """A histogram of `curvature`, a line a coefficient; of lines and of what is never active there is none."""
    curved = table[table["curvature"] > 0]
    if curved.empty:
        return empty_panel(axis, "no function is curved")
    edges = np.geomspace(curved["curvature"].min() / 1.01, curved["curvature"].max() * 1.01, 30)
    colours = studies.coefficient_colours(table)
    for coefficient, rows in studies.by_coefficient(table):
        counts = np.histogram(rows["curvature"].dropna(), edges)[0] / len(rows)
        axis.stairs(100 * counts, edges, color=colours[coefficient], label=studies.label_of(coefficient))
    log_axis(axis, "x")
    axis.set(xlabel="largest |second derivative| of a function", ylabel="functions (%)")
    axis.legend()


def _draw_function(axis: Axes, row: pd.Series) -> None:
    axis.set_axis_on()
    axis.plot(np.linspace(0, row["sweep_end"], len(row["curve"])), row["curve"], color="0.1", linewidth=1.0)
    low, high = axis.get_ylim()
    ends = np.array([0, row["sweep_end"]])
    axis.plot(ends, row["value"] + row["jacobian"] * (ends - row["activation"]), color="0.6", linewidth=0.8, zorder=1)
    axis.plot(row["activation"], row["value"], "o", color="#D55E00", markersize=3)
    axis.set_ylim(low, max(high, low + 1e-6))
    axis.set_title(f"{row['input']} → {row['output']}", fontsize=6.5, pad=2)
    axis.tick_params(labelsize=6)


def _curvature(curve: Any, end: float) -> float:
    """The largest second derivative of a function on a grid from 0 to `end`, by differences where the output latent is
    active: where it starts or stops there is none. NaN where it is not active on three points in a row."""
    values = np.asarray(curve, dtype=np.float64)
    smooth = (values[:-2] > 0) & (values[1:-1] > 0) & (values[2:] > 0)
    found = np.abs(np.diff(values, 2))[smooth]
    return float(found.max() / (end / (len(values) - 1)) ** 2) if len(found) else np.nan
