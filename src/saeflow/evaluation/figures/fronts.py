"""Figures of how sparse dictionaries are and how faithful to the model: the fronts of their series at each place, and
what two fronts differ by at equal L0 or equal CE loss. Seeds are one point, their mean, with their range.
"""

import itertools
from collections.abc import Callable
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from saeflow.dictionaries.series import IDENTITY, ordered_series
from saeflow.evaluation import comparisons
from saeflow.evaluation.figures.data import INCREASE, LEVELS, Evaluations, read_evaluations
from saeflow.evaluation.intervals import interval
from saeflow.figures.axes import empty_panel, labelled, legend_beside, log_axis, wrapped_panels
from saeflow.figures.registry import figure
from saeflow.figures.style import Look, look

_RANGE = {"linewidth": 3.5, "alpha": 0.35, "fmt": "none"}
NEAR = 0.5  # of the span of the points: levels that lie further off are named, not drawn


# -------------------------------------------------------------------- fronts
@figure("sparsity_faithfulness", stage="evaluate", reads=read_evaluations)
def sparsity_faithfulness(data: Evaluations) -> tuple[Figure, pd.DataFrame]:
    """L0 against CE loss, one panel a place (model, held-out tokens, hook or head), one line a series of dictionaries;
    the axis at the right is the loss recovered of zero ablation.

    Thin bars are the intervals of the increase over the clean model on the same documents; where a series has several
    seeds, points are their means and thick bars their range. Ablations that lie beyond the panel are named at its top.
    A dictionary that is never active has no place on a logarithmic axis: it is marked at the left edge. A place at
    which a single dictionary was evaluated has no front to show: it is in the table only, unless all are so.
    """
    return _fronts(data)


@figure("fronts_with_coefficients", stage="evaluate", reads=read_evaluations)
def fronts_with_coefficients(data: Evaluations) -> tuple[Figure, pd.DataFrame]:
    """`sparsity_faithfulness` with the amount of each point beside it: its L1 coefficient or k, in the colour of its
    series; every second series has them below its points.
    """
    return _fronts(data, amounts=True)


def _fronts(data: Evaluations, amounts: bool = False) -> tuple[Figure, pd.DataFrame]:
    table = points(data)
    counts = table.groupby("place", sort=False).size()
    places = list(counts.index[counts > 1]) or list(counts.index)
    table_shown = table[table["place"].isin(places)]
    looks = {name: look(n) for n, name in enumerate(ordered_series(table_shown))}
    figure, grid = wrapped_panels(len(places), 3.5, 3.2, least_width=4.2)
    for axis, place in zip(grid.flat, places, strict=False):
        rows = table_shown[table_shown["place"] == place]
        _draw_place(axis, rows, looks)
        if amounts:
            _name_amounts(axis, rows, looks)
        axis.set(xlabel="L0: active latents per token", title=_title(rows))
        axis.set_ylabel("CE loss (nats per token)" if axis in grid[:, 0] else "")
    figure.tight_layout()
    entries = labelled(grid.flat)
    entries = {name: entries[name] for name in [*looks, *LEVELS.values()] if name in entries}
    legend_beside(grid, entries | _what_bars_cover(table_shown, data.table["confidence"].max()))
    return figure, table.drop(columns="where")


def points(data: Evaluations) -> pd.DataFrame:
    """A row a point: dictionaries that differ in their seeds alone are one, and those that are never active apart.

    Means over seeds, `seeds` how many, `<metric>_least` and `<metric>_most` their range; `ce_increase_low` and `_high`
    cover the documents.
    """
    found = []
    by = ["place", "series", "point", "never_active"]
    for _, rows in data.table.assign(never_active=data.table["l0"] == 0).groupby(by, sort=False):
        first = rows.iloc[0]
        row = {name: first[name] for name in (*IDENTITY, "where") if name != "seed"}
        row |= {"seeds": len(rows), "dictionary_keys": " ".join(rows["dictionary_key"])}
        for name in ("l0", "ce_replaced"):
            row |= {name: rows[name].mean(), f"{name}_least": rows[name].min(), f"{name}_most": rows[name].max()}
        row |= {name: first[name] for name in INCREASE}
        if len(rows) > 1:
            resampled = data.resamples_of(rows).pivot(columns="dictionary_key", values="ce_increase").mean(axis=1)
            mean = rows["ce_increase"].mean()
            low, high = interval(mean, resampled.to_numpy(), first["confidence"])
            row |= dict(zip(INCREASE, (mean, float(low), float(high)), strict=True))
        found.append(row | {name: first[name] for name in LEVELS})
    return pd.DataFrame(found).astype(dict.fromkeys(INCREASE, float))  # none where documents are too few: NaN


def _draw_place(axis: Axes, rows: pd.DataFrame, looks: dict[str, Look]) -> None:
    log_axis(axis, "x")
    for name, mine in rows.groupby("series", sort=False):
        style, alive = looks[str(name)], mine[mine["l0"] > 0].sort_values("l0")
        axis.plot(alive["l0"], alive["ce_replaced"], label=str(name), **style.line)
        bounds = [(alive[f"ce_increase_{end}"] - alive["ce_increase"]).abs() for end in ("low", "high")]
        if not np.isnan(bounds).any():
            at = alive["l0"], alive["ce_replaced"]
            axis.errorbar(*at, bounds, fmt="none", color=style.color, linewidth=0.8, capsize=1.5)
        seeds = alive[alive["seeds"] > 1]
        for value, which in (("ce_replaced", "yerr"), ("l0", "xerr")):
            ends = [seeds[value] - seeds[f"{value}_least"], seeds[f"{value}_most"] - seeds[value]]
            ends = [end.clip(lower=0) for end in ends]  # the mean of equal seeds may round beyond them
            errors: dict[str, Any] = {which: ends, "color": style.color, **_RANGE}
            axis.errorbar(seeds["l0"], seeds["ce_replaced"], **errors)
    _levels(axis, rows)
    _mark_never_active(axis, rows[rows["l0"] == 0], looks)


def _name_amounts(axis: Axes, rows: pd.DataFrame, looks: dict[str, Look]) -> None:
    axis.margins(x=0.1)  # room for them at both ends
    shown = rows[(rows["l0"] > 0) & rows["amount"].notna()]  # what was made elsewhere may not say it
    for name, mine in shown.groupby("series", sort=False):
        below = list(looks).index(str(name)) % 2
        where: dict[str, Any] = {"textcoords": "offset points", "fontsize": 5.5, "color": looks[str(name)].color}
        where |= {"ha": "right", "va": "top"} if below else {"ha": "left", "va": "bottom"}  # beside the interval
        for _, point in mine.iterrows():
            at = point["l0"], point["ce_replaced"]
            axis.annotate(f"{point['amount']:g}", at, (-2.5, -1.5) if below else (2.5, 1.5), **where)


def _mark_never_active(axis: Axes, rows: pd.DataFrame, looks: dict[str, Look]) -> None:
    """At the left edge, as high as their loss is, or at the top where that is beyond the panel."""
    top = axis.get_ylim()[1]
    placed = rows.assign(y=rows["ce_replaced"].clip(upper=top))
    where: dict[str, Any] = {
        "xycoords": axis.get_yaxis_transform(),
        "textcoords": "offset points",
        "va": "center",
        "fontsize": 6,
    }
    for _, mine in placed.groupby("y"):
        y = float(mine["y"].iloc[0])
        for name in mine["series"]:
            mark = looks[str(name)].line | {"linestyle": "", "clip_on": False, "zorder": 4}
            axis.plot([0], [y], **mark, transform=axis.get_yaxis_transform())
        beyond = ", ".join(f"{ce:.3f}" for ce in sorted(set(mine["ce_replaced"].round(3))) if ce > top)
        axis.annotate(f"↑ L0 = 0, at {beyond}" if beyond else "L0 = 0", (0, y), (5, -4 if beyond else -7), **where)


def _levels(axis: Axes, rows: pd.DataFrame) -> None:
    """The clean model's level and the ablations', those far above the points as text; recovered loss at the right."""
    first, alive = rows.iloc[0], rows[rows["l0"] > 0]
    shown = rows if alive.empty else alive
    clean, top = first["ce_clean"], shown["ce_replaced_most"].max()
    bottom = min(clean, shown["ce_replaced_least"].min())
    reach = top + NEAR * (top - bottom)
    beyond = []
    for (column, label), dashes in zip(LEVELS.items(), ("-", "--", ":"), strict=True):
        if first[column] <= reach:
            axis.axhline(first[column], color="0.35", linestyle=dashes, linewidth=1, label=label)
        else:
            beyond.append(f"{label} at {first[column]:.3f}")
    if beyond:  # room for them
        text = "↑ " + "\n↑ ".join(beyond)
        axis.text(0.98, 0.99, text, transform=axis.transAxes, ha="right", va="top", fontsize=6, color="0.25")
        bottom, top = axis.get_ylim()
        axis.set_ylim(bottom, top + 0.06 * (1 + len(beyond)) * (top - bottom))
    worth = first["ce_zero"] - clean
    if worth > 0:
        scale = (lambda ce: 100 * (1 - (ce - clean) / worth), lambda share: clean + worth * (1 - share / 100))
        right = axis.secondary_yaxis("right", functions=scale)
        right.set_ylabel("recovered of zero ablation (%)")
        right.spines["right"].set_visible(True)


def _what_bars_cover(table: pd.DataFrame, confidence: float) -> dict[str, Any]:
    """Legend of the bars that there are."""
    entries: dict[str, Any] = {}
    if table["ce_increase_low"].notna().any():
        entries[f"{100 * confidence:g} % interval over documents"] = Line2D(
            [], [], color="0.35", marker="|", markersize=8, linestyle=""
        )
    if table["seeds"].max() > 1:
        n = sorted(table.loc[table["seeds"] > 1, "seeds"].unique())
        several = f"{n[0]}" if len(n) == 1 else f"{n[0]} to {n[-1]}"
        entries[f"range over {several} seeds"] = Line2D([], [], color="0.35", linewidth=3.5, alpha=0.35)
    return entries


def _title(rows: pd.DataFrame) -> str:
    """Hook and head, and below them what else tells the place of `rows` from others."""
    place, where = rows["place"].iloc[0], rows["where"].iloc[0]
    return str(place).replace(f"{where}, ", f"{where}\n")


# -------------------------------------------------------------------- two fronts
@figure("matched_l0", stage="evaluate", reads=read_evaluations)
def matched_l0(data: Evaluations) -> tuple[Figure, pd.DataFrame]:
    """Difference in CE loss of two series of dictionaries at equal L0, one panel a place. The dark band is its interval
    over documents, the light one its range over pairs of seeds.

    Drawn from all tokens; the table has it without BOS too: of `other` less that of `one`.
    """
    labels = ("L0: active latents per token", "difference in CE loss\n(nats per token)")
    return _matched(data, comparisons.matched_l0, "l0", "difference", "minus", 0, *labels)


@figure("matched_ce", stage="evaluate", reads=read_evaluations)
def matched_ce(data: Evaluations) -> tuple[Figure, pd.DataFrame]:
    """L0 of one series of dictionaries over that of another at equal CE loss, one panel a place. The dark band is its
    interval over documents, the light one its range over pairs of seeds.

    Drawn from all tokens; the table has it without BOS too: of `other` over that of `one`.
    """
    labels = ("increase in CE loss (nats per token)", "ratio of L0\n(active latents per token)")
    return _matched(data, comparisons.matched_ce, "ce_increase", "ratio", "over", 1, *labels)


def _matched(
    data: Evaluations, compare: Callable[..., pd.DataFrame], x: str, y: str, between: str, equal: int, *labels: str
) -> tuple[Figure, pd.DataFrame]:
    """Every two series at one place, compared along their fronts.

    `equal`: the value of y where they are as good; `labels`: of x and y.
    """
    found = []
    for place, rows in data.table.groupby("place", sort=False):
        draws, confidence = data.resamples_of(rows), rows["confidence"].iloc[0]
        groups = [(str(name), group) for name, group in rows.groupby("series", sort=False)]
        for (name, one), (other_name, other) in itertools.combinations(groups, 2):
            for positions, suffix in (("all", ""), ("without BOS", "_without_bos")):
                compared = compare(one, other, draws, confidence, positions=suffix)
                if len(compared):
                    names = {"place": place, "hook": rows["hook_name_out"].iloc[0], "one": name, "other": other_name}
                    found.append(compared.assign(**names, positions=positions))
    columns = ["place", "hook", "one", "other", "positions", x, y, "low", "high", "seeds_low", "seeds_high"]
    columns.append("at_point_of")
    table = pd.concat(found)[columns] if found else pd.DataFrame(columns=columns)
    shown = table[table["positions"] == "all"]
    places = list(shown["place"].unique())
    figure, grid = wrapped_panels(len(places), 3.2, 3.0, least_width=4.2)
    if not places:
        empty_panel(grid[0][0], "no two series of dictionaries\ncover the same range at one place")
        figure.tight_layout()
        return figure, table
    pairs = list(dict.fromkeys(zip(shown["one"], shown["other"], strict=True)))
    for axis, place in zip(grid.flat, places, strict=False):
        for (one, other), line in shown[shown["place"] == place].groupby(["one", "other"], sort=False):
            style = look(pairs.index((one, other)))
            axis.fill_between(line[x], line["seeds_low"], line["seeds_high"], color=style.color, alpha=0.12, lw=0)
            axis.fill_between(line[x], line["low"], line["high"], color=style.color, alpha=0.3, lw=0)
            marked = np.flatnonzero(line["at_point_of"].notna()).tolist()
            axis.plot(line[x], line[y], markevery=marked, label=f"{other}\n{between} {one}", **style.line)
        axis.axhline(equal, color="0.35", linewidth=1)
        axis.set(xlabel=labels[0], title=_title(data.table[data.table["place"] == place]))
        if x == "l0":
            log_axis(axis, "x")
    grid[0][0].set_ylabel(labels[1])
    bands = {f"{100 * data.table['confidence'].max():g} % interval over documents": _band(0.3)}
    if shown["seeds_low"].notna().any():
        bands["range over pairs of seeds"] = _band(0.12)
    figure.tight_layout()
    legend_beside(grid, labelled(grid.flat) | bands)
    return figure, table


def _band(alpha: float) -> Line2D:
    return Line2D([], [], color="0.35", linewidth=6, alpha=alpha)
