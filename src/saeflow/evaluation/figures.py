"""Figures of how sparse dictionaries are and how faithful to the model: the fronts of kinds of dictionary and their
differences, several layers at once, how active latents are spread over tokens, every pair of dictionaries on the same
documents, and the tables of notebook 004.
"""

import itertools
import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from saeflow.dictionaries.naming import IDENTITY, SERIES, hook_title, place_name, with_names
from saeflow.evaluation import comparisons
from saeflow.figures.axes import labelled, log_axis, matrix_axis, plain_table, wrapped_panels
from saeflow.figures.registry import figure
from saeflow.figures.style import COLOURS, look, sequence
from saeflow.jobs.job import Job

LEVELS = {"ce_clean": "clean model", "ce_mean": "mean ablation", "ce_zero": "zero ablation"}
_INCREASE = ["ce_increase", "ce_increase_low", "ce_increase_high"]
MOST_PAIRED = 32


class Evaluations(NamedTuple):
    """The evaluations of an experiment."""

    table: pd.DataFrame
    """One row a dictionary: its `summary.json`."""
    resamples: pd.DataFrame
    """One row a resample of the documents and dictionary: `resamples.parquet` with `dictionary_key`."""
    l0: pd.DataFrame
    """One row a number of active latents and dictionary: `l0.parquet` with `dictionary_key`."""
    confidence: float
    """Of the intervals."""

    @property
    def extra_tables(self) -> dict[str, pd.DataFrame]:
        """All metrics of all dictionaries."""
        return {"evaluations": self.table}


class Stacks(NamedTuple):
    """Sets of layers with their dictionaries in place at once."""

    table: pd.DataFrame
    """One row a set: its `summary.json`."""

    @property
    def extra_tables(self) -> dict[str, pd.DataFrame]:
        return {"stack_evaluations": self.table}


def read_evaluations(job: Job) -> Evaluations:
    folders = job.inputs("evaluate")
    table = read_summaries(folders).fillna({"part": ""})
    resamples, l0 = (
        pd.concat(
            pd.read_parquet(f / f"{name}.parquet").assign(dictionary_key=key)
            for f, key in zip(folders, table["dictionary_key"], strict=True)
        )
        for name in ("resamples", "l0")
    )
    return Evaluations(table, resamples, l0, table["confidence"].max())


def read_summaries(folders: Iterable[Path]) -> pd.DataFrame:
    """One row a folder; `part` says input or output of what was trained as a pair."""
    return pd.DataFrame([json.loads((f / "summary.json").read_text()) for f in folders])


def read_stacks(job: Job) -> Stacks:
    return Stacks(read_summaries(job.inputs("stack")))


# -------------------------------------------------------------------- fronts
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
    labels = ("L0: active latents per token", "difference in CE loss\n(nats per token)")
    return _matched(data, comparisons.matched_l0, "l0", "difference", "minus", 0, *labels)


@figure("matched_ce", stage="evaluate", reads=read_evaluations)
def matched_ce(data: Evaluations) -> tuple[Figure, pd.DataFrame]:
    """L0 of one kind of dictionary over that of another at equal CE loss, with its interval, one panel a spliced hook.

    Drawn from all tokens; the table has it without BOS too.
    """
    labels = ("increase in CE loss (nats per token)", "ratio of L0\n(active latents per token)")
    return _matched(data, comparisons.matched_ce, "ce_increase", "ratio", "over", 1, *labels)


def _matched(
    data: Evaluations, compare: Callable[..., pd.DataFrame], x: str, y: str, between: str, equal: int, *labels: str
) -> tuple[Figure, pd.DataFrame]:
    """Every two kinds of dictionary that write at one place, compared along their fronts.

    `equal`: the value of y where they are as good; `labels`: of x and y.
    """
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
        figure.tight_layout()
        return figure, table
    pairs = list(dict.fromkeys(zip(shown["one"], shown["other"], strict=True)))
    for axis, place in zip(grid.flat, places, strict=False):
        for (one, other), line in shown[shown["place"] == place].groupby(["one", "other"], sort=False):
            colour, marker = look(pairs.index((one, other)))
            axis.plot(line[x], line[y], color=colour, label=f"{other}\n{between} {one}")
            axis.fill_between(line[x], line["low"], line["high"], color=colour, alpha=0.2)
            points = line[line["at_point_of"].notna()]
            axis.plot(points[x], points[y], marker, color=colour)
        axis.axhline(equal, color="0.35", linewidth=1)
        axis.set(xlabel=labels[0], title=str(place))
        if x == "l0":
            log_axis(axis, "x")
    grid[0][0].set_ylabel(labels[1])
    _legend_of_all(grid)
    figure.tight_layout()
    return figure, table


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


@figure("l0_histograms", stage="evaluate", reads=read_evaluations)
def l0_histograms(data: Evaluations) -> tuple[Figure, pd.DataFrame]:
    """Share of the tokens, BOS left out, by number of active latents: one panel a kind of dictionary, hook and head.

    The table has the tokens with BOS too.
    """
    identity = [*IDENTITY, "dictionary_key"]
    table = data.l0.merge(with_names(data.table)[identity], on="dictionary_key", sort=False)
    groups = list(table.groupby(["place", "series"], sort=True))
    figure, grid = wrapped_panels(len(groups), 2.4, 2.5, least_width=3.2)
    for axis, ((place, series), rows) in zip(grid.flat, groups, strict=False):
        amounts = list(rows.groupby(rows["amount"].astype(float), dropna=False))  # none: of dictionaries made elsewhere
        for (amount, of_amount), colour in zip(amounts, sequence(len(amounts)), strict=True):
            label: str | None = f"{rows['amount_name'].iloc[0]} = {amount:g}" if pd.notna(amount) else str(series)
            for _, one in of_amount.groupby("dictionary_key"):
                tokens = one.sort_values("l0")["tokens_without_bos"].to_numpy()
                shown = int(np.searchsorted(tokens.cumsum(), 0.999 * tokens.sum())) + 1
                share = 100 * tokens[:shown] / tokens.sum()
                axis.stairs(share, np.arange(shown + 1) - 0.5, color=colour, label=label)
                label = None
        axis.set(xlabel="active latents of a token", title=f"{series}\n{place}")
        axis.legend(handlelength=1.0)
    for line in grid:
        line[0].set_ylabel("tokens (%)")
    figure.tight_layout()
    return figure, table[[*identity, "l0", "tokens", "tokens_without_bos"]]


# -------------------------------------------------------------------- pairs and tables
@figure("paired_differences", stage="evaluate", reads=read_evaluations)
def paired_differences(data: Evaluations) -> tuple[Figure, pd.DataFrame]:
    """CE loss of each dictionary (row) minus that of each other (column) on the same documents, in nats / 1000.

    Cells whose interval holds 0 are white. The first 32 dictionaries are shown; the table has all, and more metrics.
    """
    rows = with_names(data.table).sort_values(["head", "hook_name_out", "series", "amount"])
    table = comparisons.paired_differences(rows, data.resamples, data.confidence)
    shown = rows.head(MOST_PAIRED)
    keys, n = list(shown["dictionary_key"]), len(shown)
    values, clear = np.full((n, n), np.nan), np.zeros((n, n), dtype=bool)
    for pair in table[table["metric"] == "ce_replaced"].to_dict("records"):
        if pair["one"] in keys and pair["other"] in keys:
            i, j = keys.index(pair["one"]), keys.index(pair["other"])
            values[j, i], values[i, j] = 1000 * pair["difference"], -1000 * pair["difference"]
            clear[i, j] = clear[j, i] = pair["low"] > 0 or pair["high"] < 0
    largest = np.nanmax(np.abs(values), initial=1e-9)
    side = 2.2 + 0.34 * n
    figure, axis = plt.subplots(figsize=(side + 1, side))
    image = axis.imshow(np.where(clear, values, np.nan), cmap="RdBu_r", vmin=-largest, vmax=largest)
    for i, j in itertools.product(range(n), range(n)):
        if np.isfinite(values[i, j]):
            dark = clear[i, j] and abs(values[i, j]) > 0.6 * largest
            text = f"{values[i, j]:.0f}" if abs(values[i, j]) >= 9.5 else f"{values[i, j]:.1f}"
            axis.text(j, i, text, ha="center", va="center", fontsize=5, color="white" if dark else "black")
    names = ("hook_name", "head", "series", "amount_name", "amount")
    labels = [
        f"{place_name(h, i)}: {s}" + (f", {n} = {a:g}" if pd.notna(a) else "")
        for h, i, s, n, a in zip(*(shown[c] for c in names), strict=True)
    ]
    axis.set_yticks(range(n), labels, fontsize=6)
    axis.set_xticks(range(n), labels, fontsize=6, rotation=90)
    matrix_axis(axis)
    figure.colorbar(image, shrink=0.6, label="CE loss of row minus column\n(thousandths of a nat per token)")
    return figure, table


@figure("notebook_004", stage="evaluate", reads=read_evaluations)
def notebook_004(data: Evaluations) -> tuple[Figure, pd.DataFrame]:
    """The two tables of notebook 004, `l0` and `ce_loss` in its terms, beside ours without BOS and with intervals."""
    table = comparisons.notebook_004(data.table)
    printed = bool(table["printed_l0"].notna().any())
    names = ["l1", "l0", "ce_loss", *(["printed\nl0", "printed\nce_loss"] if printed else [])]
    names += ["L0\nwithout BOS", "CE\nwithout BOS", "CE over clean", "recovered\nof zero ablation", "dead"]
    heads = {"sae": "SAEs of the MLP's output", "transcoder": "Transcoders of the MLP"}
    groups = list(table.groupby(["hook", "kind"], sort=True))
    lines = len(table) + 3 * max(1, len(groups))
    size, heights = (7.6 if printed else 6.6, 0.22 * lines), [len(rows) + 3 for _, rows in groups] or None
    figure, axes = plt.subplots(max(1, len(groups)), 1, figsize=size, squeeze=False, height_ratios=heights)
    for axis in axes[:, 0]:
        axis.set_axis_off()
    if not groups:
        axes[0][0].text(0.5, 0.5, "no dictionary with an L1 coefficient at an MLP's output", ha="center")
    for axis, ((hook, kind), rows) in zip(axes[:, 0], groups, strict=False):
        cells = []
        for row in rows.to_dict("records"):
            l1 = "–" if pd.isna(row["l1_coefficient"]) else f"{row['l1_coefficient']:g}"
            cell = [l1, f"{row['l0']:.2f}", f"{row['ce_loss']:.4f}"]
            cell += [f"{row['printed_l0']:.2f}", f"{row['printed_ce_loss']:.4f}"] if printed else []
            cell += [f"{row['l0_without_bos']:.2f}", f"{row['ce_replaced_without_bos']:.4f}"]
            cell += [_with_interval(row, "ce_increase_without_bos", ".4f")]
            cell += [_with_interval(row, "loss_recovered_zero_without_bos", ".3f"), f"{row['dead_fraction']:.3f}"]
            cells.append(cell)
        widths = [0.07, 0.08, 0.08, *([0.08, 0.08] if printed else []), 0.11, 0.11, 0.23, 0.23, 0.07]
        plain_table(axis, cells, names, widths, 7, head=1.7, loc="upper center")
        axis.set_title(f"{heads[str(kind)]}, {hook_title(str(hook))}", loc="left")
    figure.tight_layout()
    return figure, table


def _with_interval(row: dict[Any, Any], name: str, form: str) -> str:
    if pd.isna(row[name]):
        return "none"
    if pd.isna(row[f"{name}_low"]):
        return f"{row[name]:{form}}"
    return f"{row[name]:{form}} [{row[f'{name}_low']:{form}}, {row[f'{name}_high']:{form}}]"
