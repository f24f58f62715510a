"""Figures of how active latents are spread, of several layers at once, and the transcoder paper's tables."""

import textwrap
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from saeflow.dictionaries.series import IDENTITY
from saeflow.evaluation import comparisons
from saeflow.evaluation.figures.data import INCREASE, LEVELS, Evaluations, Stacks, read_evaluations, read_stacks
from saeflow.figures.axes import plain_table, subplots, wrapped_panels
from saeflow.figures.registry import figure
from saeflow.figures.style import look, sequence

TAIL = 0.999  # of the tokens: histograms end there


@figure("stacks", stage="stack", reads=read_stacks)
def stacks(data: Stacks) -> tuple[Figure, pd.DataFrame]:
    """CE loss with the dictionaries of several layers in place at once, beside the clean model and the same ablated.

    A line is the sets of one series and amount over the same layers: the mean of its seeds, thin bars the interval over
    documents where there is one seed, thick bars the range of the seeds where there are several.
    """
    groups = [group for _, group in data.table.groupby(["place", "series", "point"], sort=False)]
    figure, axis = subplots(figsize=(4.6, 0.9 + 0.3 * len(groups)))
    lines = np.arange(len(groups))[::-1]
    names = []
    for line, group in zip(lines, groups, strict=True):
        first, ce = group.iloc[0], group["ce_replaced"]
        dot = look(0).line | {"linestyle": ""}
        axis.plot(ce.mean(), line, label="dictionaries" if line == lines[0] else None, **dot)
        if len(group) > 1:
            axis.plot([ce.min(), ce.max()], [line, line], color=look(0).color, linewidth=3.5, alpha=0.35)
        elif pd.notna(first["ce_increase_low"]):
            ends = [first["ce_clean"] + first[f"ce_increase_{end}"] for end in ("low", "high")]
            axis.plot(ends, [line, line], color=look(0).color, linewidth=0.8)
        for (column, label), marker in zip(LEVELS.items(), "|sx", strict=True):
            style = {"color": "0.35", "marker": marker, "markerfacecolor": "none", "linestyle": ""}
            axis.plot(first[column], line, label=label if line == lines[0] else None, **style)
        names.append(_line_name(data.table, first, len(group)))
    axis.set_yticks(lines, names)
    axis.set(xlabel="CE loss (nats per token)", ylim=(-0.6, len(groups) - 0.4))
    axis.legend(loc="center left", bbox_to_anchor=(1.02, 0.5))
    identity = ["place", "series", "amount_name", "amount", "seed", "group", "stack", "layers", "hooks"]
    return figure, data.table[[*identity, "ce_replaced", *INCREASE, *LEVELS]]


def _line_name(table: pd.DataFrame, row: pd.Series, n: int) -> str:
    """The layers of a set, and of what it is where the table has several."""
    said = [row["series"]] if table["series"].nunique() > 1 else []
    if len(table[["series", "point"]].drop_duplicates()) > table["series"].nunique():
        said.append(f"{row['amount_name']} = {row['amount']:g}")
    said += [f"{n} seeds"] if n > 1 else []
    return ": ".join([row["place"], *([", ".join(said)] if said else [])])


@figure("l0_histograms", stage="evaluate", reads=read_evaluations)
def l0_histograms(data: Evaluations) -> tuple[Figure, pd.DataFrame]:
    """Share of the tokens, BOS left out, by number of active latents: one panel a series of dictionaries and its place.

    Of several seeds the mean, within their range. The table has the tokens with BOS too.
    """
    identity = [*IDENTITY, "dictionary_key"]
    names = data.table[[*identity, "where", "point", "label"]]
    both = [c for c in ("dictionary_key", "place") if c in data.l0]  # one dictionary may be at several places
    table = names.merge(data.l0, on=both, sort=False)
    groups = list(table.groupby(["place", "series"], sort=False))
    figure, grid = wrapped_panels(len(groups), 2.4, 2.5, least_width=3.2)
    for axis, ((place, series), rows) in zip(grid.flat, groups, strict=False):
        points = list(rows.groupby("point", sort=False))
        for (_, mine), colour in zip(points, sequence(len(points)), strict=True):
            each = [one.sort_values("l0")["tokens_without_bos"] for _, one in mine.groupby("dictionary_key")]
            shares = np.zeros((len(each), max(map(len, each))))
            for line, tokens in zip(shares, each, strict=True):
                line[: len(tokens)] = 100 * tokens / tokens.sum()
            mean = shares.mean(0)
            mean = mean[: int(np.searchsorted(mean.cumsum(), 100 * TAIL)) + 1]
            edges = np.arange(len(mean) + 1) - 0.5
            amount = mine["amount"].iloc[0]
            name = mine["label"].iloc[0] if pd.isna(amount) else f"{mine['amount_name'].iloc[0]} = {amount:g}"
            several = f" ({len(each)} seeds)" if len(each) > 1 else ""
            axis.stairs(mean, edges, color=colour, label=name + several)
            if len(each) > 1:
                low, high = (ends[: len(mean)] for ends in (shares.min(0), shares.max(0)))
                axis.stairs(high, edges, baseline=low, color=colour, fill=True, alpha=0.3, linewidth=0)
        title = "\n".join(textwrap.wrap(str(series), 34) + textwrap.wrap(str(place), 34))
        axis.set(xlabel="active latents of a token", title=title)
        axis.legend(handlelength=1.0, loc="upper center", bbox_to_anchor=(0.5, -0.22), ncols=2)
    for line in grid:
        line[0].set_ylabel("tokens (%)")
    figure.tight_layout()
    return figure, table[[*identity, "l0", "tokens", "tokens_without_bos"]]


@figure("notebook_004", stage="evaluate", reads=read_evaluations)
def notebook_004(data: Evaluations) -> tuple[Figure, pd.DataFrame]:
    """The transcoder paper's two tables, `l0` and `ce_loss` as its notebook takes them (means over all positions,
    BOS too), beside ours without BOS and with intervals over documents."""
    table = comparisons.notebook_004(data.table)
    printed, seeds = bool(table["printed_l0"].notna().any()), table["seed"].nunique() > 1
    names = ["l1", *(["seed"] if seeds else []), "l0", "ce_loss"]
    names += [*(["printed\nl0", "printed\nce_loss"] if printed else []), "L0\nwithout BOS", "CE\nwithout BOS"]
    names += ["CE over clean", "recovered\nof zero ablation", "dead"]
    groups = list(table.groupby(["place", "series"], sort=False))
    lines = len(table) + 3 * max(1, len(groups))
    size, heights = (7.6 if printed else 6.6, 0.22 * lines), [len(rows) + 3 for _, rows in groups] or None
    figure, axes = subplots(max(1, len(groups)), 1, figsize=size, squeeze=False, height_ratios=heights)
    for axis in axes[:, 0]:
        axis.set_axis_off()
    if not groups:
        axes[0][0].text(0.5, 0.5, "no dictionary with an L1 coefficient at an MLP's output", ha="center")
    for axis, ((place, series), rows) in zip(axes[:, 0], groups, strict=False):
        cells = []
        for row in rows.to_dict("records"):
            cell = [_number(row["l1_coefficient"], "g"), *([_number(row["seed"], "g")] if seeds else [])]
            cell += [f"{row['l0']:.2f}", f"{row['ce_loss']:.4f}"]
            cell += [_number(row["printed_l0"], ".2f"), _number(row["printed_ce_loss"], ".4f")] if printed else []
            cell += [f"{row['l0_without_bos']:.2f}", f"{row['ce_replaced_without_bos']:.4f}"]
            cell += [_with_interval(row, "ce_increase_without_bos", ".4f")]
            cell += [_with_interval(row, "loss_recovered_zero_without_bos", ".3f"), f"{row['dead_fraction']:.3f}"]
            cells.append(cell)
        widths = [0.07, *([0.05] if seeds else []), 0.08, 0.08, *([0.08, 0.08] if printed else [])]
        plain_table(axis, cells, names, [*widths, 0.11, 0.11, 0.23, 0.23, 0.07], 7, head=1.7, loc="upper center")
        axis.set_title(f"{series}: {place}", loc="left")
    figure.tight_layout()
    return figure, table


def _number(value: Any, form: str) -> str:
    """What isn't known, of a dictionary that was made elsewhere or of another model than the paper's, is left out."""
    return "" if pd.isna(value) else f"{value:{form}}"


def _with_interval(row: dict[Any, Any], name: str, form: str) -> str:
    if pd.isna(row[name]):
        return "none"
    if pd.isna(row[f"{name}_low"]):
        return f"{row[name]:{form}}"
    return f"{row[name]:{form}} [{row[f'{name}_low']:{form}}, {row[f'{name}_high']:{form}}]"
