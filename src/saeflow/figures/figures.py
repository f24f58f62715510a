"""Figures: one function each, tables in, `Figure` out, in one style; the table behind each is saved beside it."""

import itertools
import math
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

from saeflow.evaluation import comparisons as faithfulness
from saeflow.figures.palette import COLOURS, MARKERS
from saeflow.heads import figures as head_figures
from saeflow.heads.folder import HeadStudy
from saeflow.jacobians import figures as jacobian_figures
from saeflow.jacobians.figures import Studies

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
    ("heads", "topk"): "TopK SAEs by head",
    ("heads", "relu"): "ReLU + L1 SAEs by head",
    ("heads", "jumprelu"): "BatchTopK SAEs by head",
}

LEVELS = {"ce_clean": "clean model", "ce_mean": "mean ablation", "ce_zero": "zero ablation"}
NONE = pd.DataFrame()


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
    resamples: pd.DataFrame = NONE
    """One row a draw of the documents and dictionary: `resamples.parquet` with `dictionary_key`."""
    confidence: float = 0.95
    """Of the intervals."""
    stacks: pd.DataFrame = NONE
    """One row a set of layers: `summary.json` of its stack."""
    l0: pd.DataFrame = NONE
    """One row a number of active latents and dictionary: `l0.parquet` with `dictionary_key`."""
    heads: tuple[HeadStudy, ...] = ()
    """Studies of heads, one a layer."""


def sparsity_faithfulness(tables: Tables) -> tuple[Figure, pd.DataFrame]:
    """L0 against CE loss, one panel a hook or head, one line a dictionary kind; clean and ablated levels as lines.

    Bars are the intervals of the increase over the clean model on the same documents.
    A hook at which a single dictionary was evaluated has no front to show: it is in the table only, unless all are so.
    """
    table = _with_series(tables.evaluations)
    table = table.sort_values(["hook_name_out", "head", "series", "l0"])
    counts = table.groupby("place", sort=False).size()
    hooks = list(counts.index[counts > 1]) or list(counts.index)
    columns = min(len(hooks), 4)
    n_rows = math.ceil(len(hooks) / columns)
    figure, grid = plt.subplots(n_rows, columns, figsize=(max(4.2, 3.2 * columns), 3.2 * n_rows), squeeze=False)
    names = [*KINDS.values(), *(f"skip {name}" for name in KINDS.values())]
    names += sorted(set(table["series"]) - set(names))
    if ((table["head"] >= 0) | (table["kind"] == "heads")).any():  # more kinds than colours: only those that there are
        names = list(dict.fromkeys(table["series"]))
    for axis in grid.flat[len(hooks) :]:
        axis.set_axis_off()
    for axis, hook in zip(grid.flat, hooks, strict=False):
        rows = table[table["place"] == hook]
        for series, points in rows.groupby("series", sort=False):
            i = names.index(str(series))
            colour, marker = COLOURS[i % len(COLOURS)], MARKERS[i % len(MARKERS)]
            dashes = "--" if str(series).startswith("skip") else "-"
            axis.plot(points["l0"], points["ce_replaced"], dashes, color=colour, marker=marker, label=series)
            if points["ce_increase_low"].notna().all():
                bounds = [(points[f"ce_increase_{end}"] - points["ce_increase"]).abs() for end in ("low", "high")]
                axis.errorbar(points["l0"], points["ce_replaced"], bounds, fmt="none", color=colour, linewidth=0.8)
        for (column, label), style in zip(LEVELS.items(), ("-", "--", ":"), strict=True):
            axis.axhline(rows[column].iloc[0], color="0.35", linestyle=style, linewidth=1, label=label)
        _log_axis(axis, "x")
        axis.set(xlabel="L0: active latents per token", title=str(hook))
        axis.set_ylabel("CE loss (nats per token)" if axis in grid[:, 0] else "")
    figure.tight_layout()
    _legend_of_all(grid)
    return figure, table


def matched_l0(tables: Tables) -> tuple[Figure, pd.DataFrame]:
    """Difference in CE loss of two kinds of dictionary at equal L0, with its interval, one panel a spliced hook.

    Drawn from all tokens; the table has it without BOS too.
    """
    figure, axes, table = _matched(tables, faithfulness.matched_l0, "l0", "difference", "minus")
    for axis in axes:
        axis.axhline(0, color="0.35", linewidth=1)
        _log_axis(axis, "x")
        axis.set(xlabel="L0: active latents per token")
    if axes:
        axes[0].set_ylabel("difference in CE loss\n(nats per token)")
    figure.tight_layout()
    return figure, table


def matched_ce(tables: Tables) -> tuple[Figure, pd.DataFrame]:
    """L0 of one kind of dictionary over that of another at equal CE loss, with its interval, one panel a spliced hook.

    Drawn from all tokens; the table has it without BOS too.
    """
    figure, axes, table = _matched(tables, faithfulness.matched_ce, "ce_increase", "ratio", "over")
    for axis in axes:
        axis.axhline(1, color="0.35", linewidth=1)
        axis.set(xlabel="increase in CE loss (nats per token)")
    if axes:
        axes[0].set_ylabel("ratio of L0\n(active latents per token)")
    figure.tight_layout()
    return figure, table


def _matched(
    tables: Tables, compare: Callable[..., pd.DataFrame], x: str, y: str, between: str
) -> tuple[Figure, list[Axes], pd.DataFrame]:
    """Every two kinds of dictionary that write at one place, compared along their fronts."""
    evaluations = _with_series(tables.evaluations).sort_values(["hook_name_out", "head"], kind="stable")
    found = []
    for place, rows in evaluations.groupby("place", sort=False):
        groups = [(str(name), group) for name, group in rows.groupby("series", sort=False) if len(group) > 1]
        for (name, one), (other_name, other) in itertools.combinations(groups, 2):
            for positions, suffix in (("all", ""), ("without BOS", "_without_bos")):
                compared = compare(one, other, tables.resamples, tables.confidence, positions=suffix)
                if len(compared):
                    names = {"place": place, "hook": rows["hook_name_out"].iloc[0], "one": name, "other": other_name}
                    found.append(compared.assign(**names, positions=positions))
    columns = ["place", "hook", "one", "other", "positions", x, y, "low", "high", "at_point_of"]
    table = pd.concat(found)[columns] if found else pd.DataFrame(columns=columns)
    shown = table[table["positions"] == "all"]
    places = list(shown["place"].unique())
    n_columns = max(1, min(len(places), 4))
    n_rows = max(1, math.ceil(len(places) / n_columns))
    size = max(4.2, 3.2 * n_columns), 3.0 * n_rows
    figure, grid = plt.subplots(n_rows, n_columns, figsize=size, squeeze=False)
    for axis in grid.flat[len(places) :]:
        axis.set_axis_off()
    if not places:
        grid[0][0].text(0.5, 0.5, "no two kinds of dictionary\ncover the same range", ha="center", va="center")
        return figure, [], table
    pairs = list(dict.fromkeys(zip(shown["one"], shown["other"], strict=True)))
    axes = list(grid.flat[: len(places)])
    for axis, place in zip(axes, places, strict=True):
        for (one, other), line in shown[shown["place"] == place].groupby(["one", "other"], sort=False):
            i = pairs.index((one, other))
            colour, marker = COLOURS[i % len(COLOURS)], MARKERS[i % len(MARKERS)]
            axis.plot(line[x], line[y], color=colour, label=f"{other}\n{between} {one}")
            axis.fill_between(line[x], line["low"], line["high"], color=colour, alpha=0.2)
            points = line[line["at_point_of"].notna()]
            axis.plot(points[x], points[y], marker, color=colour)
        axis.set_title(str(place))
    _legend_of_all(grid)
    return figure, axes, table


MOST_PAIRED = 32


def paired_differences(tables: Tables) -> tuple[Figure, pd.DataFrame]:
    """CE loss of each dictionary (row) minus that of each other (column) on the same documents, in nats / 1000.

    Cells whose interval holds 0 are white. The first 32 dictionaries are shown; the table has all, and more metrics.
    """
    rows = _with_series(tables.evaluations).sort_values(["head", "hook_name_out", "series", "amount"])
    table = faithfulness.paired_differences(rows, tables.resamples, tables.confidence)
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
        f"{_place(h, i)}: {s}" + (f", {n} = {a:g}" if pd.notna(a) else "")
        for h, i, s, n, a in zip(*(shown[c] for c in names), strict=True)
    ]
    axis.set_yticks(range(n), labels, fontsize=6)
    axis.set_xticks(range(n), labels, fontsize=6, rotation=90)
    axis.spines[:].set_visible(False)
    axis.tick_params(length=0)
    figure.colorbar(image, shrink=0.6, label="CE loss of row minus column\n(thousandths of a nat per token)")
    return figure, table


def notebook_004(tables: Tables) -> tuple[Figure, pd.DataFrame]:
    """The two tables of notebook 004, `l0` and `ce_loss` in its terms, beside ours without BOS and with intervals."""
    table = faithfulness.notebook_004(tables.evaluations)
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
        grid = axis.table(cells, colLabels=names, colWidths=widths, loc="upper center", cellLoc="right", edges="")
        grid.auto_set_font_size(False)
        grid.set_fontsize(7)
        for (line, _), cell in grid.get_celld().items():
            cell.visible_edges = "B" if line == 0 else ""
            cell.set_height(cell.get_height() * (1.7 if line == 0 else 1))
        axis.set_title(f"{heads[str(kind)]}, {_readable(str(hook))}", loc="left")
    figure.tight_layout()
    return figure, table


def _with_interval(row: dict[Any, Any], name: str, form: str) -> str:
    if pd.isna(row[name]):
        return "none"
    if pd.isna(row[f"{name}_low"]):
        return f"{row[name]:{form}}"
    return f"{row[name]:{form}} [{row[f'{name}_low']:{form}}, {row[f'{name}_high']:{form}}]"


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
            for _, curve in rows[rows["amount"] == amount].groupby(["train_key", "part"]):
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


def stacks(tables: Tables) -> tuple[Figure, pd.DataFrame]:
    """CE loss with the dictionaries of several layers in place at once, beside the clean model and the same ablated."""
    table = tables.stacks.sort_values(["group", "stack"]).drop(columns=["train_keys"])
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
    return figure, table


def l0_histograms(tables: Tables) -> tuple[Figure, pd.DataFrame]:
    """Share of the tokens, BOS left out, by number of active latents: one panel a kind of dictionary and place."""
    evaluations = _with_series(tables.evaluations)[["dictionary_key", "place", "series", "amount", "amount_name"]]
    table = tables.l0.merge(evaluations, on="dictionary_key", sort=False)
    panels = list(table.groupby(["place", "series"], sort=True))
    columns = min(len(panels), 4)
    n_rows = math.ceil(len(panels) / columns)
    figure, grid = plt.subplots(n_rows, columns, figsize=(max(3.2, 2.4 * columns), 2.5 * n_rows), squeeze=False)
    for axis in grid.flat[len(panels) :]:
        axis.set_axis_off()
    for axis, ((place, series), rows) in zip(grid.flat, panels, strict=False):
        amounts = sorted(rows["amount"].unique())
        colours = plt.get_cmap("viridis")(np.linspace(0.0, 0.85, len(amounts)))
        for amount, colour in zip(amounts, colours, strict=True):
            label: str | None = f"{rows['amount_name'].iloc[0]} = {amount:g}"
            for _, one in rows[rows["amount"] == amount].groupby("dictionary_key"):
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
    return figure, table


FIGURES: dict[str, Callable[[Tables], tuple[Figure, pd.DataFrame]]] = {
    "sparsity_faithfulness": sparsity_faithfulness,
    "matched_l0": matched_l0,
    "matched_ce": matched_ce,
    "paired_differences": paired_differences,
    "notebook_004": notebook_004,
    "stacks": stacks,
    "l0_histograms": l0_histograms,
    "training_curves": training_curves,
    "jacobian_histogram": jacobian_histogram,
}
FIGURES |= {name: partial(lambda f, tables: f(tables.studies), f) for name, f in jacobian_figures.FIGURES.items()}
FIGURES |= {name: partial(lambda f, tables: f(list(tables.heads)), f) for name, f in head_figures.FIGURES.items()}


def draw(name: str, tables: Tables, folder: Path) -> None:
    """Writes `<name>.png`, `.pdf` and `.csv`. Raises `ValueError` for a name that is not in `FIGURES`."""
    if name not in FIGURES:
        raise ValueError(f"no figure {name!r}; there are: {', '.join(FIGURES)}")
    with plt.rc_context(STYLE):
        save_figure(*FIGURES[name](tables), folder, name)


def save_figure(figure: Figure, table: pd.DataFrame, folder: Path, name: str) -> None:
    """Writes `<name>.png`, `.pdf` and, of the table, `.csv`; closes the figure. To be called in the figure's style."""
    figure.savefig(folder / f"{name}.png", bbox_inches="tight")
    figure.savefig(folder / f"{name}.pdf", bbox_inches="tight", metadata={"CreationDate": None})  # equal bytes
    plt.close(figure)
    table.to_csv(folder / f"{name}.csv", index=False, float_format="%.6g")


def _with_series(table: pd.DataFrame) -> pd.DataFrame:
    """Adds the name of the dictionary kind, the head (-1: all) and the place; says L1 for the coefficient's name."""
    table = table.copy()
    head = table["hook_head_index"] if "hook_head_index" in table else pd.Series(np.nan, table.index)
    table["head"] = head.fillna(-1).astype(int)
    table["place"] = [_place(*row) for row in zip(table["hook_name_out"], table["head"], strict=True)]
    columns = (table[c] for c in ("saelens", "skip", "kind", "activation", "source", "head"))
    table["series"] = [_series(*row) for row in zip(*columns, strict=True)]
    if "sparsity" in table:  # said where it is what tells two apart
        for name, rows in table.groupby("series"):
            if rows["sparsity"].nunique() > 1:
                unit_norm = rows.index[rows["sparsity"] == "unit_norm"]
                table.loc[unit_norm, "series"] = f"{name}, unit norm"
    table["amount_name"] = table["amount_name"].replace({"l1_coefficient": "L1", "l0_coefficient": "L0 coefficient"})
    table["amount_name"] = table["amount_name"].str.replace("_", " ")
    return table


def _series(saelens: object, skip: bool, kind: str, activation: str, source: str, head: int) -> str:
    if isinstance(saelens, str):  # pandas says NaN for None beside names
        return f"SAELens {saelens.replace('_', ' ')}"
    name = KINDS.get((kind, activation.replace("batchtopk", "jumprelu")), "SAELens SAE")
    if source:  # made elsewhere, where what is a JumpReLU here may not have been a BatchTopK
        return f"{source} ({name.replace('BatchTopK', 'JumpReLU')})"
    return ("skip " if skip else "") + name + (" of one head" if head >= 0 else "")


def _legend_of_all(grid: np.ndarray) -> None:
    """One legend for all panels, right of the first row."""
    entries: dict[str, Any] = {}
    for axis in grid.flat:
        entries |= dict(zip(*reversed(axis.get_legend_handles_labels()), strict=True))
    entries |= {level: entries.pop(level) for level in LEVELS.values() if level in entries}  # last
    grid[0][-1].legend(entries.values(), entries.keys(), loc="center left", bbox_to_anchor=(1.02, 0.5))


def _place(hook_name: str, head: int) -> str:
    """Where a dictionary writes, as a title."""
    return _readable(hook_name) + (f", head {head}" if head >= 0 else "")


def _readable(hook_name: str) -> str:
    """`blocks.2.hook_mlp_out` as `layer 2, mlp_out`."""
    parts = hook_name.split(".")
    name = ".".join(parts[2:]).replace("hook_", "")
    return f"layer {parts[1]}, {name}" if parts[0] == "blocks" else hook_name


def _log_axis(axis: Axes, which: str) -> None:
    """A log scale that says 0.2 and 50 rather than powers of ten: the ranges are short."""
    axis.set(**{f"{which}scale": "log"})
    ticks = axis.xaxis if which == "x" else axis.yaxis
    ticks.set_major_locator(LogLocator(subs=(1, 2, 3, 5)))
    ticks.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    ticks.set_minor_formatter(NullFormatter())
