"""Sparsity against faithfulness: the fronts of kinds of dictionary, their differences, and several layers at once."""

import itertools
from collections.abc import Callable

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from saeflow.dictionaries.naming import IDENTITY, SERIES, with_names
from saeflow.evaluation import comparisons
from saeflow.evaluation.figures.reading import Evaluations, Stacks, read_evaluations, read_stacks
from saeflow.figures.axes import labelled, log_axis, wrapped_panels
from saeflow.figures.registry import figure
from saeflow.figures.style import COLOURS, look

LEVELS = {"ce_clean": "clean model", "ce_mean": "mean ablation", "ce_zero": "zero ablation"}
_INCREASE = ["ce_increase", "ce_increase_low", "ce_increase_high"]


@figure("sparsity_faithfulness", stage="evaluate", reads=read_evaluations)
def sparsity_faithfulness(data: Evaluations) -> tuple[Figure, pd.DataFrame]:
    """L0 against CE loss, one panel a hook or head, one line a dictionary kind; clean and ablated levels as lines.

    Bars are the intervals of the increase over the clean model on the same documents.
    A hook at which a single dictionary was evaluated has no front to show: it is in the table only, unless all are so.
    """
    table = with_names(data.table)
    table = table.sort_values(["hook_name_out", "head", "series", "l0"])
    counts = table.groupby("place", sort=False).size()
    hooks = list(counts.index[counts > 1]) or list(counts.index)
    figure, grid = wrapped_panels(len(hooks), 3.2, 3.2, least_width=4.2)
    names = [*SERIES, *sorted(set(table["series"]) - set(SERIES))]
    if ((table["head"] >= 0) | (table["kind"] == "heads")).any():  # more kinds than colours: only those that there are
        names = list(dict.fromkeys(table["series"]))
    for axis, hook in zip(grid.flat, hooks, strict=False):
        rows = table[table["place"] == hook]
        for series, points in rows.groupby("series", sort=False):
            colour, marker = look(names.index(str(series)))
            dashes = "--" if str(series).startswith("skip") else "-"
            axis.plot(points["l0"], points["ce_replaced"], dashes, color=colour, marker=marker, label=series)
            if points["ce_increase_low"].notna().all():
                bounds = [(points[f"ce_increase_{end}"] - points["ce_increase"]).abs() for end in ("low", "high")]
                axis.errorbar(points["l0"], points["ce_replaced"], bounds, fmt="none", color=colour, linewidth=0.8)
        for (column, label), style in zip(LEVELS.items(), ("-", "--", ":"), strict=True):
            axis.axhline(rows[column].iloc[0], color="0.35", linestyle=style, linewidth=1, label=label)
        log_axis(axis, "x")
        axis.set(xlabel="L0: active latents per token", title=str(hook))
        axis.set_ylabel("CE loss (nats per token)" if axis in grid[:, 0] else "")
    figure.tight_layout()
    _legend_of_all(grid)
    return figure, table[[*IDENTITY, "dictionary_key", "l0", "ce_replaced", *_INCREASE, *LEVELS]]


@figure("matched_l0", stage="evaluate", reads=read_evaluations)
def matched_l0(data: Evaluations) -> tuple[Figure, pd.DataFrame]:
    """Difference in CE loss of two kinds of dictionary at equal L0, with its interval, one panel a spliced hook.

    Drawn from all tokens; the table has it without BOS too.
    """
    figure, axes, table = _matched(data, comparisons.matched_l0, "l0", "difference", "minus")
    for axis in axes:
        axis.axhline(0, color="0.35", linewidth=1)
        log_axis(axis, "x")
        axis.set(xlabel="L0: active latents per token")
    if axes:
        axes[0].set_ylabel("difference in CE loss\n(nats per token)")
    figure.tight_layout()
    return figure, table


@figure("matched_ce", stage="evaluate", reads=read_evaluations)
def matched_ce(data: Evaluations) -> tuple[Figure, pd.DataFrame]:
    """L0 of one kind of dictionary over that of another at equal CE loss, with its interval, one panel a spliced hook.

    Drawn from all tokens; the table has it without BOS too.
    """
    figure, axes, table = _matched(data, comparisons.matched_ce, "ce_increase", "ratio", "over")
    for axis in axes:
        axis.axhline(1, color="0.35", linewidth=1)
        axis.set(xlabel="increase in CE loss (nats per token)")
    if axes:
        axes[0].set_ylabel("ratio of L0\n(active latents per token)")
    figure.tight_layout()
    return figure, table


def _matched(
    data: Evaluations, compare: Callable[..., pd.DataFrame], x: str, y: str, between: str
) -> tuple[Figure, list[Axes], pd.DataFrame]:
    """Every two kinds of dictionary that write at one place, compared along their fronts."""
    evaluations = with_names(data.table).sort_values(["hook_name_out", "head"], kind="stable")
    found = []
    for place, rows in evaluations.groupby("place", sort=False):
        groups = [(str(name), group) for name, group in rows.groupby("series", sort=False) if len(group) > 1]
        for (name, one), (other_name, other) in itertools.combinations(groups, 2):
            for positions, suffix in (("all", ""), ("without BOS", "_without_bos")):
                compared = compare(one, other, data.resamples, data.confidence, positions=suffix)
                if len(compared):
                    names = {"place": place, "hook": rows["hook_name_out"].iloc[0], "one": name, "other": other_name}
                    found.append(compared.assign(**names, positions=positions))
    columns = ["place", "hook", "one", "other", "positions", x, y, "low", "high", "at_point_of"]
    table = pd.concat(found)[columns] if found else pd.DataFrame(columns=columns)
    shown = table[table["positions"] == "all"]
    places = list(shown["place"].unique())
    figure, grid = wrapped_panels(len(places), 3.2, 3.0, least_width=4.2)
    if not places:
        grid[0][0].text(0.5, 0.5, "no two kinds of dictionary\ncover the same range", ha="center", va="center")
        return figure, [], table
    pairs = list(dict.fromkeys(zip(shown["one"], shown["other"], strict=True)))
    axes = list(grid.flat[: len(places)])
    for axis, place in zip(axes, places, strict=True):
        for (one, other), line in shown[shown["place"] == place].groupby(["one", "other"], sort=False):
            colour, marker = look(pairs.index((one, other)))
            axis.plot(line[x], line[y], color=colour, label=f"{other}\n{between} {one}")
            axis.fill_between(line[x], line["low"], line["high"], color=colour, alpha=0.2)
            points = line[line["at_point_of"].notna()]
            axis.plot(points[x], points[y], marker, color=colour)
        axis.set_title(str(place))
    _legend_of_all(grid)
    return figure, axes, table


def _legend_of_all(grid: np.ndarray) -> None:
    """One legend for all panels, right of the first row."""
    entries = labelled(grid.flat)
    entries |= {level: entries.pop(level) for level in LEVELS.values() if level in entries}  # last
    grid[0][-1].legend(entries.values(), entries.keys(), loc="center left", bbox_to_anchor=(1.02, 0.5))


@figure("stacks", stage="stack", reads=read_stacks)
def stacks(data: Stacks) -> tuple[Figure, pd.DataFrame]:
    """CE loss with the dictionaries of several layers in place at once, beside the clean model and the same ablated."""
    table = data.table.sort_values(["group", "stack"])
    figure, axis = plt.subplots(figsize=(4.6, 0.9 + 0.3 * len(table)))
    lines = np.arange(len(table))[::-1]
    bounds = [(table[f"ce_increase_{end}"] - table["ce_increase"]).abs().fillna(0) for end in ("low", "high")]
    axis.errorbar(table["ce_replaced"], lines, xerr=bounds, fmt="o", color=COLOURS[0], label="dictionaries")
    for (column, label), marker in zip(LEVELS.items(), "|sx", strict=True):
        axis.plot(table[column], lines, marker, color="0.35", markerfacecolor="none", label=label)
    several = table["group"].nunique() > 1
    names = [f"layers {', '.join(map(str, layers))}" for layers in table["layers"]]
    axis.set_yticks(lines, [f"{g}: {n}" if several else n for g, n in zip(table["group"], names, strict=True)])
    axis.set(xlabel="CE loss (nats per token)", ylim=(-0.6, len(table) - 0.4))
    axis.legend(loc="center left", bbox_to_anchor=(1.02, 0.5))
    return figure, table[["group", "stack", "layers", "hooks", "ce_replaced", *_INCREASE, *LEVELS]]
