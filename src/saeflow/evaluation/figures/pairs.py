"""Every pair of dictionaries on the same documents, and the tables of notebook 004."""

import itertools
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from saeflow.dictionaries.naming import hook_title, place_name, with_names
from saeflow.evaluation import comparisons
from saeflow.evaluation.figures.reading import Evaluations, read_evaluations
from saeflow.figures.axes import matrix_axis, plain_table
from saeflow.figures.registry import figure

MOST_PAIRED = 32


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
    figure, axes = plt.subplots(
        max(1, len(groups)),
        1,
        figsize=(7.6 if printed else 6.6, 0.22 * lines),
        squeeze=False,
        height_ratios=[len(rows) + 3 for _, rows in groups] or None,
    )
    for axis in axes[:, 0]:
        axis.set_axis_off()
    if not groups:
        axes[0][0].text(0.5, 0.5, "no dictionary with an L1 coefficient at an MLP's output", ha="center")
    for axis, ((hook, kind), rows) in zip(axes[:, 0], groups, strict=False):
        cells = []
        for row in rows.to_dict("records"):
            cell = [f"{row['l1_coefficient']:g}", f"{row['l0']:.2f}", f"{row['ce_loss']:.4f}"]
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
