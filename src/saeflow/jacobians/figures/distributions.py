"""Figures of how large the entries of J are: blocks of single tokens, thresholds, distributions, the mean |J|; and of
one output latent as a function of one input latent: its class, and what J predicts of it.
"""

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from saeflow.figures.axes import log_axis, subplots
from saeflow.figures.registry import figure
from saeflow.figures.style import DASHES, look, track
from saeflow.jacobians.figures import studies
from saeflow.jacobians.figures.studies import (
    EXAMPLE_TOKENS,
    IDENTITY,
    NORMS,
    Studies,
    read_labelled_histograms,
    read_pairs,
)
from saeflow.jacobians.linearity import ABSOLUTE, RELATIVE

CLASSES = {"linear": "linear", "jumprelu": "JumpReLU", "other": "other", "flat": "flat"}


@figure("jacobian_examples", stage="jacobian", reads=read_pairs)
def jacobian_examples(data: Studies) -> tuple[Figure, pd.DataFrame]:
    """|J| of a few held-out tokens, raw and divided by its own L1 and L2 norm; rows and columns of a block shuffled
    (seeded).

    One panel's studies, at most four coefficients of them, from the baseline up. A token is named by its row of the
    held-out tokens and its position there, from 0.
    """
    chosen = studies.few_studies(data.summaries)
    table = data.of("examples")
    table = table[table["jacobian_key"].isin(chosen["jacobian_key"])]
    blocks: dict[tuple[str, int], np.ndarray] = {}
    for _, study in chosen.iterrows():
        shape = (int(study["k_out"]), int(study["k"]))
        for token in range(EXAMPLE_TOKENS):
            entries = table[(table["jacobian_key"] == study["jacobian_key"]) & (table["token"] == token)]
            blocks[str(study["jacobian_key"]), token] = _shuffled(entries, shape, token)
    norms = {"none": lambda b: 1.0, "l1": lambda b: b.sum() or 1.0, "l2": lambda b: float(np.linalg.norm(b)) or 1.0}
    columns = [(norm, token) for norm in norms for token in range(EXAMPLE_TOKENS)]
    figure, grid = subplots(
        len(chosen), len(columns), figsize=(0.95 * len(columns), 0.95 * len(chosen) + 0.9), squeeze=False
    )
    for norm, scale in norms.items():
        mine = {at: block / scale(block) for at, block in blocks.items()}
        top = max(float(np.quantile(block, 0.995)) for block in mine.values())
        places = [n for n, (name, _) in enumerate(columns) if name == norm]
        for line, key in zip(grid, chosen["jacobian_key"], strict=True):
            for place in places:
                block = mine[str(key), columns[place][1]]
                image = line[place].imshow(block, cmap="magma_r", vmin=0, vmax=top, interpolation="nearest")
        axes = [line[place] for line in grid for place in places]
        bar = figure.colorbar(image, ax=axes, location="bottom", shrink=0.9, pad=0.04, aspect=30, extend="max")
        bar.set_label(NORMS[norm])
    for axis in grid.flat:
        axis.set(xticks=[], yticks=[])
        for side in axis.spines.values():
            side.set(visible=True, linewidth=0.4)
    for line, coefficient in zip(grid, chosen["jacobian_coefficient"], strict=True):
        line[0].set_ylabel(studies.label_of(coefficient).replace(" (", "\n("), fontsize=7)
    named = table.drop_duplicates("token").set_index("token")
    for axis, (_, token) in zip(grid[0], columns, strict=True):
        if token in named.index:  # else nothing depends on anything there
            axis.set_title("row {sequence},\ntoken {position}".format(**named.loc[token]), fontsize=7)
    figure.suptitle(chosen["panel"].iloc[0], y=1.0)
    return figure, table


def _shuffled(entries: pd.DataFrame, shape: tuple[int, int], seed: int) -> np.ndarray:
    """|J| of a token (k_out, k_in) with rows and columns in random order; latents at 0 have no entries."""
    block = np.zeros(shape)
    outputs, inputs = (np.unique(entries[c], return_inverse=True)[1] for c in ("output", "input"))
    block[outputs, inputs] = entries["jacobian"].abs()
    rng = np.random.default_rng(seed)
    return block[rng.permutation(shape[0])][:, rng.permutation(shape[1])]


@figure("jacobian_thresholds", stage="jacobian", reads=read_pairs)
def jacobian_thresholds(data: Studies) -> tuple[Figure, pd.DataFrame]:
    """Share of a token's active entries above thresholds, with intervals over documents: of |J|, as in the paper, and
    in units of the RMS of the token's own block, which does not change when J is scaled."""
    table = data.of("thresholds")
    colours = studies.coefficient_colours(table)
    panels = studies.by_panel(table)
    figure, columns = studies.paired_panels(len(panels))
    for (panel, mine), column in zip(panels, columns, strict=True):
        for axis, norm in zip(column, ("none", "rms"), strict=True):
            here = mine[mine["normalisation"] == norm]
            series = {c: studies.over_seeds(one, "threshold", "fraction") for c, one in studies.by_coefficient(here)}
            studies.bars(axis, [f"{t:g}" for t in sorted(here["threshold"].unique())], series, colours)
            axis.set_xlabel("threshold of " + NORMS[norm])
            axis.set(ylim=(0, 105), ylabel=studies.at_the_left(axis, "entries above it (%)"))
        column[0].set_title(panel)
    figure.tight_layout()
    studies.legend(figure, figure.axes, note=studies.covers(data.summaries))
    return figure, table


@figure("jacobian_distribution", stage="jacobian", reads=read_pairs)
def jacobian_distribution(data: Studies) -> tuple[Figure, pd.DataFrame]:
    """Histogram and CDF of |J|: as it is on a linear and a logarithmic axis, and divided by its token's RMS.

    Drawn is the panel with the most coefficients, as curves of several hide each other; the table has all.
    """
    linear, logarithmic = data.of("histogram"), data.of("log_histogram")
    entries = data.summaries.set_index("jacobian_key")["entries_per_token"]
    scale = 100 / linear["jacobian_key"].map(entries)
    for name in ("count_per_token", "above_per_token"):
        linear[name] *= scale
    table = logarithmic[logarithmic["fraction"] > 0]
    panel = studies.shown_panel(logarithmic)
    logarithmic = logarithmic[logarithmic["panel"] == panel]
    linear = linear[linear["panel"] == panel]
    ends = [(name, end) for name in ("count", "above") for end in ("low", "high")]
    linear = linear.rename(columns={f"{name}_{end}": f"{name}_per_token_{end}" for name, end in ends})
    colours = studies.coefficient_colours(logarithmic)
    figure, grid = subplots(2, 3, figsize=(8.2, 4.6), sharex="col")
    for coefficient, colour in colours.items():
        here = linear[linear["jacobian_coefficient"] == coefficient]
        counts, above = (studies.over_seeds(here, "bin_left", f"{name}_per_token") for name in ("count", "above"))
        grid[0][0].plot(counts["bin_left"], counts["value"], color=colour)
        grid[1][0].plot(above["bin_left"], 100 - above["value"], color=colour)
        for place, norm in ((1, "none"), (2, "rms")):
            mine = logarithmic["jacobian_coefficient"] == coefficient
            here = logarithmic[mine & (logarithmic["normalisation"] == norm)]
            for axis, name in zip(grid[:, place], ("fraction", "cdf"), strict=True):
                curve = studies.over_seeds(here, "bin_right", name)
                axis.plot(curve["bin_right"], 100 * curve["value"], color=colour)
                low, high = 100 * curve["low"], 100 * curve["high"]
                axis.fill_between(curve["bin_right"], low, high, color=colour, alpha=0.2, lw=0)
    used = logarithmic[logarithmic["fraction"] > 1e-4]
    for place, norm in ((1, "none"), (2, "rms")):
        mine_used = used[used["normalisation"] == norm]
        for axis in grid[:, place]:
            log_axis(axis, "x")
            axis.set_xlim(mine_used["bin_left"].min(), mine_used["bin_right"].max())
    log_axis(grid[0][0], "y")
    grid[0][0].set(ylabel=f"entries (% per {_of_bin(linear)})", xlim=(0, linear["bin_right"].max()))
    grid[0][1].set_ylabel("entries (% per 1/32 decade)")
    grid[1][0].set_ylabel("entries at most that large (%)")
    for axis, norm in zip(grid[1], ("none", "none", "rms"), strict=True):
        axis.set_xlabel(NORMS[norm])
    figure.suptitle(panel)
    figure.tight_layout(w_pad=1.5)
    studies.legend_of_lines(figure, colours, [panel], note=studies.covers(data.summaries))
    return figure, table


def _of_bin(table: pd.DataFrame) -> str:
    """How wide the bins of histograms are, where they are equal."""
    widths = (table["bin_right"] - table["bin_left"]).round(9).unique()
    return f"{widths[0]:g} of |J|" if len(widths) == 1 else "bin"


@figure("jacobian_signed", stage="jacobian", reads=read_pairs)
def jacobian_signed(data: Studies) -> tuple[Figure, pd.DataFrame]:
    """J with its sign, over the entries of the stored tokens that are not 0, on a linear and a logarithmic axis.

    Drawn is the panel with the most coefficients, of several seeds the mean; the table has all.
    """
    table = data.of("signed")
    shown = table[table["panel"] == studies.shown_panel(table)]
    colours = studies.coefficient_colours(shown)
    figure, (left, right) = subplots(1, 2, figsize=(6.2, 2.6))
    for n, (coefficient, rows) in enumerate(studies.by_coefficient(shown)):
        counts = rows.groupby(["bin_left", "bin_right"])["count_per_token"].mean().reset_index()
        edges = np.append(counts["bin_left"], counts["bin_right"].iloc[-1])
        style = {"color": colours[coefficient], "linestyle": DASHES[n % len(DASHES)]}
        for axis in (left, right):
            axis.stairs(counts["count_per_token"], edges, label=studies.label_of(coefficient), **style)
    largest = shown.loc[shown["count_per_token"] > 0, "bin_right"].abs().max()
    width = shown["bin_right"].iloc[0] - shown["bin_left"].iloc[0]
    for axis in (left, right):
        axis.set(xlabel="J", xlim=(-largest, largest))
    left.set_ylabel(f"entries per token and {width:.2g} of J")
    right.set_yscale("log")
    figure.suptitle(shown["panel"].iloc[0])
    figure.tight_layout()
    note = f"of {shown['stored_tokens'].iloc[0]:,} stored tokens, without intervals"
    studies.legend(figure, [left], note=note)
    return figure, table


@figure("jacobian_global", stage="jacobian", reads=read_pairs)
def jacobian_global(data: Studies) -> tuple[Figure, pd.DataFrame]:
    """The n x n mean |J|: how many entries exceed a threshold, and how many inputs an output latent needs for 90 %;
    means over seeds."""
    table, outputs = data.of("global_exceedance"), data.of("outputs")
    colours = studies.coefficient_colours(table)
    panels = [name for name, _ in studies.by_panel(table)]
    figure, (left, middle, right) = subplots(1, 3, figsize=(8.2, 2.7))
    series = [(panel, c, rows) for panel, mine in studies.by_panel(table) for c, rows in studies.by_coefficient(mine)]
    for panel, coefficient, rows in series:
        colour = colours[coefficient]
        style = track(panels.index(panel)) | {"color": colour, "markevery": 0.15, "markersize": 3}
        style |= {"marker": ""} if len(panels) == 1 else {}
        for axis, convention in ((left, "active"), (middle, "all")):
            fraction = rows[rows["convention"] == convention].groupby("threshold")["fraction"].mean()
            shown = fraction[fraction > 0]
            axis.plot(shown.index, 100 * shown, **style)
        mine = outputs[(outputs["panel"] == panel) & (outputs["jacobian_coefficient"] == coefficient)]
        needed = np.sort(mine["inputs_for_90_percent"])
        right.plot(needed, 100 * np.arange(1, len(needed) + 1) / len(needed), **style)
    for axis, over in ((left, "tokens with the output active"), (middle, "all tokens")):
        for which in ("x", "y"):
            log_axis(axis, which)
        axis.set(xlabel="threshold of mean |J|", title=f"mean over {over}")
        axis.set_ylabel("entries of n × n above it (%)" if axis is left else "")
    log_axis(right, "x")
    right.set(xlabel="inputs for 90 % of Σ|J|", ylabel="output latents (%)", title="per output latent")
    figure.tight_layout()
    studies.legend_of_lines(figure, colours, panels)
    return figure, table


@figure("jacobian_histogram", stage="jacobian", reads=read_labelled_histograms)
def jacobian_histogram(table: pd.DataFrame) -> tuple[Figure, pd.DataFrame]:
    """|J| over the active k×k entries of a token, on linear bins: histogram, and how many entries exceed a threshold.
    Of several seeds the mean."""
    figure, (left, right) = subplots(1, 2, figsize=(6.2, 2.8))
    for i, (label, studies_of_one) in enumerate(table.groupby("label", sort=False)):
        rows = studies_of_one.groupby("bin_left")[["bin_right", "count_per_token", "above_per_token"]].mean()
        seeds, style = studies_of_one["jacobian_key"].nunique(), look(i)
        line = {"color": style.color, "linestyle": style.linestyle}
        edges = np.append(rows.index, rows["bin_right"].iloc[-1])
        name = f"{label}, {seeds} seeds" if seeds > 1 else str(label)
        left.stairs(rows["count_per_token"], edges, **line)
        marks = style.line if table["label"].nunique() > 1 else line
        right.plot(rows.index, rows["above_per_token"], markevery=0.1, label=name, **marks)
    left.set(xlabel="|J|", ylabel=f"entries per token\nand {_of_bin(table)}")
    right.set(xlabel="threshold", ylabel="entries per token\nwith |J| above it")
    for axis in (left, right):
        log_axis(axis, "y")
    figure.tight_layout()
    figure.legend(*right.get_legend_handles_labels(), loc="upper center", bbox_to_anchor=(0.5, 0.02))
    counts = ["count_per_token", "count_low", "count_high", "above_per_token", "above_low", "above_high"]
    return figure, table[["label", "jacobian_key", "bin_left", "bin_right", *counts]]


# -------------------------------------------------------------------- functions of one input latent
@figure("jacobian_linearity", stage="jacobian", reads=read_pairs)
def jacobian_linearity(data: Studies) -> tuple[Figure, pd.DataFrame]:
    """Classes of the functions of one output latent by one input latent, under both tolerances, and examples of each
    class: those of the panel with the most coefficients, at its largest."""
    summaries, table = data.summaries, data.of("linearity")
    colours = studies.coefficient_colours(summaries)
    panels = studies.by_panel(summaries)
    figure, places = studies.paired_panels(len(panels) + 2)
    columns = [f"{kind}_{name}" for kind in ("absolute", "relative") for name in CLASSES]
    long = pd.concat(
        summaries[IDENTITY].assign(
            tolerance=column.split("_")[0], function=column.split("_")[1], share=summaries[column],
            share_low=summaries[f"{column}_low"], share_high=summaries[f"{column}_high"],
        )
        for column in columns
    )  # fmt: skip
    says = {"absolute": f"residual < {ABSOLUTE:g} (paper)", "relative": f"residual < {100 * RELATIVE:g} % of the range"}
    for (panel, _), pair in zip(panels, places, strict=False):
        for axis, kind in zip(pair, ("absolute", "relative"), strict=True):
            here = long[(long["panel"] == panel) & (long["tolerance"] == kind)]
            series: dict[float, pd.DataFrame] = {}
            for coefficient, rows in studies.by_coefficient(here):
                order = studies.over_seeds(rows, "function", "share").set_index("function").reindex(list(CLASSES))
                series[coefficient] = order.reset_index()
            studies.bars(axis, list(CLASSES.values()), series, colours)
            axis.tick_params(axis="x", labelrotation=25)
            axis.set(ylim=(0, 105), ylabel=studies.at_the_left(axis, "functions (%)"))
            axis.set_title(studies.title(panel, says[kind]))
    shown = studies.few_studies(summaries).iloc[-1]
    of_study = studies.title(str(shown["panel"]), studies.label_of(shown["jacobian_coefficient"]))
    mine = table[table["jacobian_key"] == shown["jacobian_key"]]
    _draw_curves(np.concatenate(places[len(panels) :]), mine, of_study.replace("\n", ", "))
    figure.tight_layout()
    studies.legend(figure, figure.axes, note=studies.covers(data.summaries))
    return figure, long


def _draw_curves(axes: np.ndarray, table: pd.DataFrame, of_study: str) -> None:
    """Three functions of each class (relative tolerance) of one study, one of four axes a class."""
    found = [name for name in CLASSES if (table["class_relative"] == name).any()]
    for axis in axes:
        axis.set_axis_off()
    for axis, name in zip(axes, found, strict=False):
        axis.set_axis_on()
        some = table[table["class_relative"] == name].head(3)
        for n, (end, curve) in enumerate(zip(some["sweep_end"], some["curve"], strict=True)):
            axis.plot(np.linspace(0, end, len(curve)), curve, color=f"{0.15 + 0.25 * n}")
        axis.set(title=f"examples: {CLASSES[name]}\n{of_study}", xlabel="input latent", ylabel="output latent")


@figure("jacobian_ablation", stage="jacobian", reads=read_pairs)
def jacobian_ablation(data: Studies) -> tuple[Figure, pd.DataFrame]:
    """What J predicts against what happens: one unit of the decoder row subtracted (paper), and the latent ablated.

    Drawn of one panel's studies, at most four coefficients of them; the table has all.
    """
    table = data.of("linearity")
    summaries = data.summaries
    colours = studies.coefficient_colours(summaries)
    chosen = studies.few_studies(summaries)
    figure, grid = subplots(2, len(chosen), figsize=(max(4.4, 2.1 * len(chosen)), 4.5), squeeze=False)
    for column, (_, study) in zip(grid.T, chosen.iterrows(), strict=True):
        rows = table[table["jacobian_key"] == study["jacobian_key"]]
        unit = (-rows["jacobian"], rows["delta_unit"])
        ablated = (-rows["jacobian"] * rows["activation"], rows["delta_ablation"])
        for axis, (predicted, found) in zip(column, (unit, ablated), strict=True):
            axis.scatter(predicted, found, s=3, color=colours[study["jacobian_coefficient"]], alpha=0.5, lw=0)
            ends = [min(predicted.min(), found.min()), max(predicted.max(), found.max())]
            axis.plot(ends, ends, color="0.4", linewidth=0.7)
        column[0].set_title(studies.label_of(study["jacobian_coefficient"]))
        on_line = f"{100 * study['on_line']:.1f} % within 0.1"
        fit = f"R² {study['ablation_r2']:.2f}, slope {study['ablation_slope']:.2f}"
        for axis, text in zip(column, (on_line, fit), strict=True):
            axis.text(0.04, 0.96, text, transform=axis.transAxes, va="top", fontsize=6.5)
        column[0].set_xlabel("−J")
        column[1].set_xlabel("−J × activation")
    grid[0][0].set_ylabel("change of the output latent,\none unit subtracted")
    grid[1][0].set_ylabel("change of the output latent,\ninput latent ablated")
    figure.suptitle(chosen["panel"].iloc[0])
    figure.tight_layout()
    entry = ["token", "input", "output", "activation", "jacobian", "delta_unit", "delta_ablation"]
    return figure, table[[*IDENTITY, *entry, "class_absolute", "class_relative"]]
