"""Figures of how active latents are spread, of several layers at once, and the transcoder paper's tables."""

import textwrap
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import StepPatch

from saeflow.dictionaries.naming import series_name
from saeflow.dictionaries.series import IDENTITY
from saeflow.evaluation import comparisons
from saeflow.evaluation.figures.data import LEVELS, Evaluations, Stacks, read_evaluations, read_stacks
from saeflow.figures.axes import log_axis, plain_table, subplots, wrapped_panels
from saeflow.figures.registry import figure
from saeflow.figures.style import look, sequence

TAIL = 0.999  # of the tokens: histograms end there
_OF_STACKS = (
    ("loss_recovered_zero", 100, "loss recovered of zero ablation (%)"),
    ("kl", 1, "KL from the clean model (nats per token)"),
)
"""What is drawn of sets of layers: metric, factor, name of the axis."""
_FRONT_LINES = 12  # of a table, that the panels above the tables take
_PRINTED_PLACE = "as printed: layer 15, Pythia-410M"


@figure("stacks", stage="stack", reads=read_stacks)
def stacks(data: Stacks) -> tuple[Figure, pd.DataFrame]:
    """The dictionaries of several layers in place at once: the share of the CE loss that they recover of what zero
    ablation of the same hooks costs, and the KL divergence from the clean model.

    A line is the sets of one series and amount over the same layers: the mean of its seeds, thin bars the interval over
    documents where there is one seed, thick bars the range of the seeds where there are several. CE losses, with those
    of the clean and the ablated model, are in the table.
    """
    groups = [group for _, group in data.table.groupby(["place", "series", "point"], sort=False)]
    figure, axes = subplots(1, 2, figsize=(6.4, 0.9 + 0.3 * len(groups)), sharey=True)
    lines = np.arange(len(groups))[::-1]
    for axis, (metric, factor, label) in zip(axes, _OF_STACKS, strict=True):
        for line, group in zip(lines, groups, strict=True):
            first, values = group.iloc[0], factor * group[metric].astype(float)
            axis.plot(values.mean(), line, **look(0).line | {"linestyle": ""})
            if len(group) > 1:
                axis.plot([values.min(), values.max()], [line, line], color=look(0).color, linewidth=3.5, alpha=0.35)
            elif pd.notna(first[f"{metric}_low"]):
                ends = [factor * first[f"{metric}_{end}"] for end in ("low", "high")]
                axis.plot(ends, [line, line], color=look(0).color, linewidth=0.8)
        axis.set(xlabel=label, ylim=(-0.6, len(groups) - 0.4))
        axis.grid(axis="y", color="0.9", linewidth=0.6)
    axes[0].set_yticks(lines, [_line_name(data.table, group.iloc[0], len(group)) for group in groups])
    figure.tight_layout()
    identity = ["place", "series", "amount_name", "amount", "seed", "group", "stack", "layers", "hooks"]
    shown = [f"{metric}{end}" for metric, _, _ in _OF_STACKS for end in ("", "_low", "_high")]
    return figure, data.table[[*identity, "ce_replaced", *LEVELS, *shown]]


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
        _leave_zero_out(axis)
        title = "\n".join(textwrap.wrap(str(series), 34) + textwrap.wrap(str(place), 34))
        axis.set(xlabel="active latents of a token", title=title)
        axis.legend(handlelength=1.0, loc="upper center", bbox_to_anchor=(0.5, -0.22), ncols=2)
    for line in grid:
        line[0].set_ylabel("tokens (%)")
    figure.tight_layout()
    return figure, table[[*identity, "l0", "tokens", "tokens_without_bos"]]


def _leave_zero_out(axis: Axes) -> None:
    """Lets the axis end above the highest share of tokens that have an active latent where the share of those that
    have none is far above, and says what that is."""
    drawn = [
        patch for patch in axis.patches if isinstance(patch, StepPatch) and not patch.get_fill()
    ]  # not their ranges
    shares = [np.asarray(patch.get_data()[0]) for patch in drawn]
    none, rest = max(s[0] for s in shares), max((s[1:].max() for s in shares if len(s) > 1), default=0.0)
    if 0 < 2 * rest < none:
        axis.set_ylim(0, 1.25 * rest)
        values = " to ".join(f"{share:.0f}" for share in sorted({min(s[0] for s in shares), none}))
        axis.text(0.03, 0.99, f"↑ none active: {values} %", transform=axis.transAxes, va="top", fontsize=6)


@figure("notebook_004", stage="evaluate", reads=read_evaluations)
def notebook_004(data: Evaluations) -> tuple[Figure, pd.DataFrame]:
    """The transcoder paper's sweep as its notebook takes it (`l0` and `ce_loss`: means over all positions, BOS too):
    ours beside the nine points that it printed for layer 15 of Pythia-410M, and as tables, with ours without BOS and
    with intervals over documents."""
    table = comparisons.notebook_004(data.table)
    printed, seeds = bool(table["printed_l0"].notna().any()), table["seed"].nunique() > 1
    names = ["l1", *(["seed"] if seeds else []), "l0", "ce_loss"]
    names += [*(["printed\nl0", "printed\nce_loss"] if printed else []), "L0\nwithout BOS", "CE\nwithout BOS"]
    names += ["CE over clean,\nwithout BOS", "recovered of zero\nablation, without BOS", "dead"]
    groups = list(table.groupby(["place", "series"], sort=False))
    heights = [_FRONT_LINES, *([len(rows) + 2.4 for _, rows in groups] or [3])]
    figure = Figure(figsize=(7.6 if printed else 6.6, 0.22 * sum(heights)))
    grid = figure.add_gridspec(len(heights), 2, height_ratios=heights)
    _draw_sweeps(figure, grid[0, 0], grid[0, 1], groups)
    axes = [figure.add_subplot(grid[line, :]) for line in range(1, len(heights))]
    for axis in axes:
        axis.set_axis_off()
    if not groups:
        axes[0].text(0.5, 0.5, "no dictionary with an L1 coefficient at an MLP's output", ha="center")
    for axis, ((place, series), rows) in zip(axes, groups, strict=False):
        cells = []
        for row in rows.to_dict("records"):
            cell = [_digits(row["l1_coefficient"]), *([_number(row["seed"], "g")] if seeds else [])]
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
    return figure, pd.concat([table, _printed()], ignore_index=True)


def _printed() -> pd.DataFrame:
    """What the notebook printed, as rows of a place of its own."""
    rows = [
        {"place": _PRINTED_PLACE, "series": series_name(kind, "relu", False, None), "kind": kind, "l1_coefficient": l1,
         "printed_l0": l0, "printed_ce_loss": ce}
        for (kind, l1), (l0, ce) in comparisons.NOTEBOOK_004.items()
    ]  # fmt: skip
    return pd.DataFrame(rows)


def _draw_sweeps(figure: Figure, left: Any, right: Any, groups: list[Any]) -> None:
    """L0 against CE loss: ours, a line a series, and the notebook's points."""
    ours, theirs = figure.add_subplot(left), figure.add_subplot(right)
    series = list(dict.fromkeys(name for (_, name), _ in groups))
    several = len({place for (place, _), _ in groups}) > 1
    for n, ((place, name), rows) in enumerate(groups):
        alive = rows[rows["l0"] > 0].sort_values("l0")
        style = look(n).line | ({"linestyle": ""} if rows["seed"].nunique() > 1 else {})
        ours.plot(alive["l0"], alive["ce_loss"], label=f"{name}: {place}" if several else name, **style)
    for name, rows in _printed().groupby("series", sort=False):
        mine = look(series.index(name) if name in series and not several else len(groups) + len(theirs.lines))
        rows = rows.sort_values("printed_l0")
        theirs.plot(rows["printed_l0"], rows["printed_ce_loss"], label=str(name), **mine.line)
    for axis, title in ((ours, "here"), (theirs, _PRINTED_PLACE)):
        log_axis(axis, "x")
        axis.set(xlabel="l0, with BOS", title=title)
        if axis.lines:
            axis.legend()
    ours.set_ylabel("ce_loss (nats per token), with BOS")


def _number(value: Any, form: str) -> str:
    """What isn't known, of a dictionary that was made elsewhere or of another model than the paper's, is left out."""
    return "" if pd.isna(value) else f"{value:{form}}"


def _digits(value: float) -> str:
    """0.000085 beside 0.0001, not 8.5e-05."""
    return "" if pd.isna(value) else np.format_float_positional(value, trim="-")


def _with_interval(row: dict[Any, Any], name: str, form: str) -> str:
    if pd.isna(row[name]):
        return "none"
    if pd.isna(row[f"{name}_low"]):
        return f"{row[name]:{form}}"
    return f"{row[name]:{form}} [{row[f'{name}_low']:{form}}, {row[f'{name}_high']:{form}}]"
