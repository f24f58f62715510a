"""Figures: one function each, tables in, `Figure` out, in one style; the table behind each is saved beside it."""

import math
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import NamedTuple

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

from saeflow import jacobian_figures
from saeflow.jacobian_figures import Studies

# Okabe and Ito's colours, safe for colour-blind readers; every series has a marker of its own too, for print.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
MARKERS = ("o", "s", "^", "D", "v", "P")
STYLE = {
    "font.size": 8,
    "axes.titlesize": 8,
    "legend.fontsize": 7,
    "legend.frameon": False,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "lines.linewidth": 1.2,
    "lines.markersize": 4,
    "figure.dpi": 200,
    "savefig.dpi": 200,
    "pdf.fonttype": 42,
}
KINDS = {
    ("sae", "topk"): "TopK SAE",
    ("sae", "relu"): "ReLU + L1 SAE",
    ("transcoder", "topk"): "TopK transcoder",
    ("transcoder", "relu"): "ReLU + L1 transcoder",
    ("sae", "jumprelu"): "BatchTopK SAE",  # what it is once trained
    ("transcoder", "jumprelu"): "BatchTopK transcoder",
}


class Tables(NamedTuple):
    """Everything that an experiment measured."""

    evaluations: pd.DataFrame
    """One row a dictionary: `summary.json` of its evaluation."""
    training: pd.DataFrame
    """One row a logged step of each dictionary: `metrics.parquet` with the columns of `identity`."""
    jacobians: pd.DataFrame
    """One row a histogram bin of each study, named by its `label`; empty where there is none."""
    studies: Studies | None = None
    """Those of pairs, with all their tables."""


def sparsity_faithfulness(tables: Tables) -> tuple[Figure, pd.DataFrame]:
    """L0 against CE loss, one panel a spliced hook, one line a dictionary kind; clean and ablated levels as lines.

    A hook at which a single dictionary was evaluated has no front to show: it is in the table only, unless all are so.
    """
    table = _with_series(tables.evaluations)
    table["spliced_hook"] = table["hook_name_out"].fillna(table["hook_name"])
    table = table.sort_values(["spliced_hook", "series", "l0"])
    counts = table.groupby("spliced_hook").size()
    hooks = list(counts.index[counts > 1]) or list(counts.index)
    columns = min(len(hooks), 4)
    n_rows = math.ceil(len(hooks) / columns)
    figure, grid = plt.subplots(n_rows, columns, figsize=(max(4.2, 3.2 * columns), 3.2 * n_rows), squeeze=False)
    names = [*KINDS.values(), *(f"skip {name}" for name in KINDS.values())]
    names += sorted(set(table["series"]) - set(names))
    for axis in grid.flat[len(hooks) :]:
        axis.set_axis_off()
    for axis, hook in zip(grid.flat, hooks, strict=False):
        rows = table[table["spliced_hook"] == hook]
        for series, points in rows.groupby("series", sort=False):
            i = names.index(str(series))
            colour, marker = COLOURS[i % len(COLOURS)], MARKERS[i % len(MARKERS)]
            dashes = "--" if str(series).startswith("skip") else "-"
            axis.plot(points["l0"], points["ce_replaced"], dashes, color=colour, marker=marker, label=series)
        for column, style, label in (
            ("ce_clean", "-", "clean model"),
            ("ce_mean", "--", "mean ablation"),
            ("ce_zero", ":", "zero ablation"),
        ):
            axis.axhline(rows[column].iloc[0], color="0.35", linestyle=style, linewidth=1, label=label)
        _log_axis(axis, "x")
        axis.set(xlabel="L0: active latents per token", title=_readable(hook))
        axis.set_ylabel("CE loss (nats per token)" if axis in grid[:, 0] else "")
    figure.tight_layout()
    grid[0][-1].legend(loc="center left", bbox_to_anchor=(1.02, 0.5))
    return figure, table


def training_curves(tables: Tables) -> tuple[Figure, pd.DataFrame]:
    """Fraction of variance unexplained and L0 by training tokens, one column a dictionary kind and site."""
    table = _with_series(tables.training)
    panels = list(table.groupby(["series", "hook_name"], sort=True))
    figure, axes = plt.subplots(
        2, len(panels), figsize=(max(3.0, 1.9 * len(panels)), 3.8), sharex=True, sharey="row", squeeze=False
    )
    for column, ((series, hook), rows) in enumerate(panels):
        amounts = sorted(rows["amount"].unique())
        colours = plt.get_cmap("viridis")(np.linspace(0.0, 0.85, len(amounts)))
        for amount, colour in zip(amounts, colours, strict=True):
            for _, curve in rows[rows["amount"] == amount].groupby("train_key"):
                label = f"{curve['amount_name'].iloc[0]} = {amount:g}"
                axes[0][column].plot(curve["tokens"] / 1e3, curve["fvu"], color=colour, label=label)
                axes[1][column].plot(curve["tokens"] / 1e3, curve["l0"], color=colour)
        name = str(series).replace("SAELens ", "SAELens\n")  # side by side, long names would touch
        axes[0][column].set_title(f"{name}\n{_readable(str(hook))}")
        axes[1][column].set_xlabel("tokens (thousands)")
        handles, labels = axes[0][column].get_legend_handles_labels()
        unique = dict(zip(labels, handles, strict=True))
        shown = list(unique)[:: max(1, len(unique) // 8)]  # of a long sweep every so many, along the colours
        axes[1][column].legend(
            [unique[label] for label in shown], shown, loc="upper center", bbox_to_anchor=(0.5, -0.35), handlelength=1.0
        )
    axes[0][0].set_ylabel("variance unexplained")
    axes[1][0].set_ylabel("L0 (active latents)")
    for axis in axes.flat:
        _log_axis(axis, "y")
    return figure, table


def jacobian_histogram(tables: Tables) -> tuple[Figure, pd.DataFrame]:
    """|J| over the active k×k entries of a token (notebook 000): histogram, and how many entries exceed a threshold."""
    table = tables.jacobians
    figure, (left, right) = plt.subplots(1, 2, figsize=(6.2, 2.8))
    for i, (_, rows) in enumerate(table.groupby("jacobian_key", sort=True)):
        label = rows["label"].iloc[0]
        edges = np.append(rows["bin_left"], rows["bin_right"].iloc[-1])
        colour = COLOURS[i % len(COLOURS)]
        left.stairs(rows["count_per_token"], edges, color=colour, label=label)
        right.plot(rows["bin_left"], rows["above_per_token"], color=colour)
    left.set(xlabel="|J|", ylabel="entries per token and bin")
    right.set(xlabel="threshold", ylabel="entries per token\nwith |J| above it")
    for axis in (left, right):
        _log_axis(axis, "y")
    figure.tight_layout()
    figure.legend(*left.get_legend_handles_labels(), loc="upper center", bbox_to_anchor=(0.5, 0.02))
    return figure, table


FIGURES: dict[str, Callable[[Tables], tuple[Figure, pd.DataFrame]]] = {
    "sparsity_faithfulness": sparsity_faithfulness,
    "training_curves": training_curves,
    "jacobian_histogram": jacobian_histogram,
}
FIGURES |= {name: partial(lambda f, tables: f(tables.studies), f) for name, f in jacobian_figures.FIGURES.items()}


def draw(name: str, tables: Tables, folder: Path) -> None:
    """Writes `<name>.png`, `.pdf` and `.csv`. Raises `ValueError` for a name that is not in `FIGURES`."""
    if name not in FIGURES:
        raise ValueError(f"no figure {name!r}; there are: {', '.join(FIGURES)}")
    with plt.rc_context(STYLE):
        figure, table = FIGURES[name](tables)
        figure.savefig(folder / f"{name}.png", bbox_inches="tight")
        figure.savefig(folder / f"{name}.pdf", bbox_inches="tight", metadata={"CreationDate": None})  # equal bytes
        plt.close(figure)
    table.to_csv(folder / f"{name}.csv", index=False, float_format="%.6g")


def _with_series(table: pd.DataFrame) -> pd.DataFrame:
    """Adds the name of the dictionary kind; says L1 for the coefficient's name."""
    table = table.copy()
    columns = (table[c] for c in ("saelens", "skip", "kind", "activation"))
    table["series"] = [_series(*row) for row in zip(*columns, strict=True)]
    table["amount_name"] = table["amount_name"].replace({"l1_coefficient": "L1", "l0_coefficient": "L0 coefficient"})
    table["amount_name"] = table["amount_name"].str.replace("_", " ")
    return table


def _series(saelens: object, skip: bool, kind: str, activation: str) -> str:
    if isinstance(saelens, str):  # pandas says NaN for None beside names
        return f"SAELens {saelens.replace('_', ' ')}"
    return ("skip " if skip else "") + KINDS[kind, activation.replace("batchtopk", "jumprelu")]


def _readable(hook_name: str) -> str:
    """`blocks.2.hook_mlp_out` as `layer 2, mlp_out`."""
    parts = hook_name.split(".")
    name = ".".join(parts[2:]).replace("hook_", "")
    return f"layer {parts[1]}, {name}" if parts[0] == "blocks" else hook_name


def _log_axis(axis: Axes, which: str) -> None:
    """A log scale that says 0.2 and 50 rather than powers of ten: the ranges are short."""
    axis.set(**{f"{which}scale": "log"})
    ticks = axis.xaxis if which == "x" else axis.yaxis
    ticks.set_major_locator(LogLocator(subs=(1, 2, 5)))
    ticks.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    ticks.set_minor_formatter(NullFormatter())
