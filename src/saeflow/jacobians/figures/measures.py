"""Figures of what J comes to over a study: its measures by coefficient and layer, their price, the paper's numbers."""

import re
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from saeflow.figures.axes import legend_below, log_axis, plain_table, subplots
from saeflow.figures.registry import figure
from saeflow.figures.style import Look, look, track
from saeflow.jacobians.figures import studies
from saeflow.jacobians.figures.studies import COSTS, FAITHFULNESS, IDENTITY, Studies, read_pairs


@figure("jacobian_sweep", stage="jacobian", reads=read_pairs)
def jacobian_sweep(data: Studies) -> tuple[Figure, pd.DataFrame]:
    """Sizes and scale-free measures of J by the Jacobian coefficient, with intervals over documents."""
    table = data.summaries
    series = [(panel, rows, look(n)) for n, (panel, rows) in enumerate(studies.by_panel(table))]
    return _measures(table, "jacobian_coefficient", "Jacobian coefficient λ", series)


@figure("jacobian_layers", stage="jacobian", reads=read_pairs)
def jacobian_layers(data: Studies) -> tuple[Figure, pd.DataFrame]:
    """Sizes and scale-free measures of J by layer, one line a Jacobian coefficient."""
    table = data.summaries
    series: list[tuple[str, pd.DataFrame, Look]] = []
    for beside, mine in table.groupby("beside_layer", sort=False):
        for coefficient, rows in studies.by_coefficient(mine):
            if rows["layer"].nunique() == 1 < table["layer"].nunique():
                continue  # no line by layer
            label = ", ".join(part for part in (studies.label_of(coefficient), str(beside)) if part)
            series.append((label, rows, look(len(series))))
    return _measures(table, "layer", "layer", series)


def _between_layers(table: pd.DataFrame, name: str) -> str:
    """The measure `name`, where there are several layers in units that do not move with the gains of their norms."""
    return _in_units(table, name) if table["layer"].nunique() > 1 else name


def _in_units(table: pd.DataFrame, name: str) -> str:
    """The measure `name` for a unit step of what the MLP reads, where all studies have that."""
    own = f"{name}_unit"
    return own if own in table and table[own].notna().all() else name


_MEASURES = {
    "mean_absolute": "mean |J|",
    "fraction_above_0.01": "share of |J| > 0.01",
    "kurtosis": "kurtosis",
    "hoyer": "Hoyer sparsity",
    "gini": "Gini coefficient",
    "effective_inputs": "effective inputs per output",
}


def _measures(
    table: pd.DataFrame, by: str, label: str, series: list[tuple[str, pd.DataFrame, Look]]
) -> tuple[Figure, pd.DataFrame]:
    """A panel a measure, its values at equal steps along `by`; `series`: label, rows and look."""
    # thresholds are configured
    measures = {_between_layers(table, name): text for name, text in _MEASURES.items() if name in table}
    values = sorted(table[by].unique())
    figure, grid = subplots(2, 3, figsize=(7.6, 4.2), sharex=True)
    for axis, (name, text) in zip(grid.flat, measures.items(), strict=False):
        for title, rows, style in series:
            curve = studies.over_seeds(rows, by, name)
            errors = np.nan_to_num(np.maximum([curve["value"] - curve["low"], curve["high"] - curve["value"]], 0))
            at = [values.index(v) for v in curve[by]]
            axis.errorbar(at, curve["value"], errors, label=title or "pair", capsize=2, **style.line)
        axis.set(ylabel=text)
        if name == "kurtosis":
            log_axis(axis, "y")
        axis.set_xticks(range(len(values)), [f"{v:g}" for v in values])
    for axis in grid[1]:
        axis.set_xlabel(label)
    figure.tight_layout()
    studies.legend(figure, grid[0][:1], columns=3, note=studies.covers(table))
    ends = [f"{name}{end}" for name in measures for end in ("", "_low", "_high")]
    return figure, table[["layer", *IDENTITY, *ends]]


@figure("jacobian_pareto", stage="jacobian", reads=read_pairs)
def jacobian_pareto(data: Studies) -> tuple[Figure, pd.DataFrame]:
    """What sparsity costs: explained variance and recovered loss of both SAEs of a pair against the sparsity of J;
    points are Jacobian coefficients, means over seeds."""
    table = data.summaries
    colours = studies.coefficient_colours(table)
    measures = {"fraction_above_0.01": "share of |J| > 0.01", "effective_inputs": "effective inputs per output"}
    measures |= {"hoyer": "Hoyer sparsity"}
    measures = {_between_layers(table, name): label for name, label in measures.items() if name in table}
    figure, grid = subplots(2, len(measures), figsize=(2.7 * len(measures), 4.4), sharex="col", squeeze=False)
    for axis, label in zip(grid[-1], measures.values(), strict=True):
        axis.set_xlabel(label)
    for (score, name), line in zip(FAITHFULNESS.items(), grid, strict=True):
        for axis, measure in zip(line, measures, strict=True):
            for n, (_, rows) in enumerate(studies.by_panel(table)):
                for side, hollow in (("input", False), ("output", True)):
                    points = rows.groupby("jacobian_coefficient")[[measure, f"{score}_{side}"]].mean()
                    x, y, style = points[measure], points[f"{score}_{side}"], track(n)
                    axis.plot(x, y, linestyle=style["linestyle"], color="0.6", linewidth=0.8, zorder=1)
                    for at, coefficient in enumerate(points.index):
                        face = "white" if hollow else colours[coefficient]
                        dot = {"color": colours[coefficient], "markerfacecolor": face, "linestyle": ""}
                        axis.plot(x.iloc[at], y.iloc[at], marker=style["marker"], zorder=2, **dot)
        line[0].set_ylabel(name)
    figure.tight_layout()
    sides = [
        Line2D([], [], color="0.3", marker="o", markerfacecolor=face, linestyle="", label=f"{side} SAE")
        for side, face in (("input", "0.3"), ("output", "white"))
    ]
    note = "recovered: of what ablation costs in the same model, which is little in one that was never trained"
    note = note if table["control"].nunique() > 1 else ""
    studies.legend_of_lines(figure, colours, [name for name, _ in studies.by_panel(table)], sides, note)
    scores = [f"{score}_{side}" for score in FAITHFULNESS for side in ("input", "output")]
    return figure, table[[*IDENTITY, *measures, *scores]]


@figure("jacobian_price", stage="jacobian", reads=read_pairs)
def jacobian_price(data: Studies) -> tuple[Figure, pd.DataFrame]:
    """What a Jacobian coefficient costs: explained variance, cosine, CE and dead latents of both SAEs of a pair by the
    coefficient, with intervals over documents."""
    table = pd.concat(
        data.summaries[IDENTITY].assign(
            side=side, measure=name, value=data.summaries[f"{name}_{side}"],
            value_low=data.summaries[f"{name}_low_{side}"], value_high=data.summaries[f"{name}_high_{side}"],
        )
        for name in COSTS for side in ("input", "output")
    )  # fmt: skip
    of_one_pair = ["train_key_in", "train_key_out", "tokens_key", "jacobian_coefficient"]  # studied in several ways
    shown = table[table["jacobian_key"].isin(data.summaries.drop_duplicates(of_one_pair)["jacobian_key"])]
    panels = [name for name, _ in studies.by_panel(shown)]
    values = sorted(table["jacobian_coefficient"].unique())
    figure, axes = subplots(1, len(COSTS), figsize=(2.1 * len(COSTS), 2.4))
    for axis, (name, text) in zip(axes, COSTS.items(), strict=True):
        for n, panel in enumerate(panels):
            for side, face in (("input", look(n).color), ("output", "white")):
                mine = shown[(shown["panel"] == panel) & (shown["measure"] == name) & (shown["side"] == side)]
                curve = studies.over_seeds(mine, "jacobian_coefficient", "value")
                errors = np.nan_to_num(np.maximum([curve["value"] - curve["low"], curve["high"] - curve["value"]], 0))
                at = [values.index(v) for v in curve["jacobian_coefficient"]]
                style = look(n).line | {"markerfacecolor": face, "linestyle": "-" if side == "input" else "--"}
                axis.errorbar(at, curve["value"], errors, capsize=2, **style)
        axis.set(ylabel=text, xlabel="Jacobian coefficient λ")
        axis.set_xticks(range(len(values)), [f"{v:g}" for v in values])
    figure.tight_layout()
    handles = [
        Line2D([], [], color="0.3", marker="o", markerfacecolor=face, linestyle=line, label=f"{side} SAE")
        for side, face, line in (("input", "0.3", "-"), ("output", "white", "--"))
    ]
    if len(panels) > 1:
        handles += [Line2D([], [], label=panel, **look(n).line) for n, panel in enumerate(panels)]
    legend_below(figure, handles, columns=3, note=studies.covers(data.summaries))
    return figure, table


_COMPARED = {
    "fraction_above_0.005": "|J| > 0.005 (%)",
    "fraction_above_0.01": "|J| > 0.01 (%)",
    "fraction_above_0.015": "|J| > 0.015 (%)",
    "fraction_above_0.02": "|J| > 0.02 (%)",
    "absolute_linear_or_flat": "linear functions (%)",
    "absolute_jumprelu": "JumpReLU-like (%)",
    "absolute_other": "other (%)",
    "on_line": "|J + Δ| < 0.1 (%)",
}
_HOW_COMPARED = (
    "in brackets: 95 % intervals over documents, or of several studies the range; |J| for a unit step of what the MLP "
    "reads, flat functions among the linear\n"
    "paper: arXiv 2502.18147, figures 2, 6 and 7: 300 million tokens of training, without position 0, at the true "
    "input; the weights of its trained models were folded, those of its random ones were not"
)
_PAPER = {  # model or control, study: the same measures in percent; of its figures 2, 6 and 7 and its notebooks
    ("trained model", "Pythia-410m layer 15, λ = 0"): (77.1, 58.3, 44.0, 33.4, 74.6, 17.6, 7.7, None),
    ("trained model", "Pythia-410m layer 15, λ = 0.5"): (16.5, 6.2, 3.2, 1.9, 88.3, 9.5, 2.2, 97.7),
    ("trained model", "Pythia-70m layer 3, λ = 0"): (83.5, 68.8, 56.8, 47.1, 71.9, 14.5, 13.6, None),
    ("trained model", "Pythia-70m layer 3, λ = 1"): (22.8, 11.3, 7.1, 4.9, 86.8, 10.4, 2.8, 97.5),
    ("re-initialised model", "Pythia-410m layer 15, λ = 0"): (92.1, 84.4, 77.0, 69.9, None, None, None, None),
    ("re-initialised model", "Pythia-410m layer 15, λ = 0.5"): (42.1, 22.5, 14.1, 9.7, None, None, None, None),
    ("re-initialised model", "Pythia-70m layer 3, λ = 0"): (93.4, 86.9, 80.5, 74.3, None, None, None, None),
    ("re-initialised model", "Pythia-70m layer 3, λ = 1"): (55.7, 33.6, 21.9, 15.1, None, None, None, None),
}


@figure("jacobian_reproduction", stage="jacobian", reads=read_pairs)
def jacobian_reproduction(data: Studies) -> tuple[Figure, pd.DataFrame]:
    """The paper's numbers beside ours: every study with the L1 penalty, with intervals over documents; of several that
    differ in a seed the mean and the range.

    Ours are for a unit step of what the MLP reads (the paper's units) where f begins after the norm's division.
    Functions that are flat count as linear, as there. arXiv 2502.18147, figures 2, 6 and 7: 300 million tokens of
    training, position 0 left out, taken at the true input; its trained models' weights were folded for the analysis and
    not for the training, its random models' were not.
    """
    rows: list[dict[str, Any]] = [
        {"source": "paper", "control": control, "study": study} | dict(zip(_COMPARED, values, strict=True))
        for (control, study), values in _PAPER.items()
    ]
    ours = data.summaries[data.summaries["jacobian_penalty"] == "l1"]
    held = [name for name in _COMPARED if name in ours]  # thresholds are configured
    by = ["control", "layer", "panel", "jacobian_coefficient"]
    for (kind, layer, panel, coefficient), mine in ours.groupby(by, sort=False):
        rest = [part for part in str(panel).split(", ") if part not in ("", f"layer {layer}", kind)]
        study = ", ".join(["ours", f"layer {layer}", *rest, f"λ = {coefficient:g}"])
        values = {end: 100 * value for name in held for end, value in _mean_and_ends(mine, name).items()}
        sizes = {name: "/".join(map(str, mine[name].unique())) for name in _SIZES if name in mine}
        rows.append({"source": "ours", "control": kind, "study": study} | sizes | values)
    order = list(dict.fromkeys(row["control"] for row in rows))
    table = pd.DataFrame(rows).sort_values("control", key=lambda column: column.map(order.index), kind="stable")
    cells = [
        [row["control"], row["study"], *(_with_ends(row, name) for name in _COMPARED)]
        for row in table.to_dict("records")
    ]
    figure, axis = subplots(figsize=(9.0, 0.28 * len(cells) + 0.6))
    axis.set_axis_off()
    names = [re.sub(r"( functions|-like)? \(%\)", "\n(%)", text) for text in _COMPARED.values()]
    widths = [0.17, 0.29, *[0.08] * len(_COMPARED)]
    grid = plain_table(axis, cells, ["language model", "study", *names], widths, 6.5, head=1.5, loc="center")
    for (line, column), cell in grid.get_celld().items():
        if column < 2:
            cell.set_text_props(ha="left")
        if line:  # room for a mean above its interval
            cell.set_height(1.4 * cell.get_height())
    how = "\n".join([_what_is_ours(ours), _HOW_COMPARED])
    figure.text(0.5, 0.02, how, ha="center", va="top", fontsize=6.5)
    return figure, table


_SIZES = ("k", "d_sae", "n_tokens", "n_documents")


def _mean_and_ends(mine: pd.DataFrame, name: str) -> dict[str, float]:
    """A measure of studies that differ in a seed: its mean, and the ends of one study's interval or of their range."""
    own = _in_units(mine, name)
    if len(mine) > 1:
        low, high = mine[own].min(), mine[own].max()
    else:
        low, high = (mine[end].iloc[0] if (end := f"{own}_{side}") in mine else np.nan for side in ("low", "high"))
    return {name: mine[own].mean(), f"{name}_low": low, f"{name}_high": high}


def _with_ends(row: dict[Any, Any], name: str) -> str:
    if pd.isna(row.get(name)):
        return ""
    low, high = (row.get(f"{name}_{side}", np.nan) for side in ("low", "high"))
    return f"{row[name]:.1f}" + ("" if pd.isna(low) else f"\n[{_end(low)}, {_end(high)}]")


def _end(value: float) -> str:
    """Of an interval in percent: 100 has no room for a decimal."""
    return format(round(value, 1), ".3g")


def _what_is_ours(ours: pd.DataFrame) -> str:
    """Sizes, tokens and conventions of the studies, in words."""
    several = {
        name: " or ".join(f"{value:,}" for value in sorted(ours[name].unique())) for name in _SIZES if name in ours
    }
    sizes = [f"k {several['k']}"] if "k" in several else []
    sizes += [f"{several['d_sae']} latents"] if "d_sae" in several else []
    if "n_tokens" in several:
        sizes += [f"{several['n_tokens']} held-out tokens of {several.get('n_documents', '?')} documents"]
    return "ours: " + "; ".join([", ".join(sizes), *map(str, ours.get("convention", pd.Series(dtype=str)).unique())])
