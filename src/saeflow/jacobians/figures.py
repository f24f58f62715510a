"""Figures of the Jacobian stage: series are the points of a sweep over the Jacobian coefficient, 0 the baseline.

Whatever else differs between studies (layer, k, the language model's arm, where the Jacobian is taken) makes panels or
line styles; studies that differ in seeds alone, the dictionaries' or the randomised model's, are drawn as one, their
mean within the span of their intervals.
"""

import json
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from saeflow.jacobians.linearity import ABSOLUTE, RELATIVE

LOW, HIGH = 0.02, 0.82  # of viridis: what prints well on white
DASHES = ("-", "--", ":", "-.")
EXAMPLE_TOKENS = 3
PANELS_BESIDE = 4
NORMS = {"none": "|J|", "l1": "|J| / L1 norm", "l2": "|J| / L2 norm", "rms": "|J| / RMS of its token"}
CLASSES = {"linear": "linear", "jumprelu": "JumpReLU", "other": "other", "flat": "flat"}
_IDENTITY = ["layer", "k", "d_sae", "arm", "jacobian_penalty", "at", "norm", "hook_name", "hook_name_out"]


class Studies(NamedTuple):
    """What the Jacobian stage measured, of pairs. Every table has the column `jacobian_key`."""

    summaries: pd.DataFrame
    """One row a study, with its `panel`: what distinguishes it besides coefficient and seed. What evaluations of its
    dictionaries say has `_input` or `_output` added to its name."""
    tables: dict[str, pd.DataFrame]
    """By name: the stage's tables, and `examples`, the Jacobians of a few tokens, one row an entry."""

    def of(self, name: str) -> pd.DataFrame:
        """A table with `panel`, `jacobian_coefficient` and `seed` of each row's study."""
        identity = self.summaries[["jacobian_key", "panel", "jacobian_coefficient", "seed"]]
        return self.tables[name].merge(identity, on="jacobian_key", sort=False)


def read_studies(folders: Iterable[Path], evaluations: pd.DataFrame) -> Studies:
    """Reads the artifacts of the Jacobian stage; those of transcoders, which have no coefficient, are left out.

    `evaluations`: one row a dictionary, those of the pairs among them.
    """
    summaries: list[dict[str, Any]] = []
    tables: dict[str, list[pd.DataFrame]] = {}
    names = ("histogram", "log_histogram", "thresholds", "global_exceedance", "outputs", "linearity")
    for folder in folders:
        summary = json.loads((folder / "summary.json").read_text())
        if summary["kind"] != "pair":
            continue
        summaries.append(summary | {"jacobian_key": folder.name, "arm": arm(summary)})
        for name in names:
            tables.setdefault(name, []).append(
                pd.read_parquet(folder / f"{name}.parquet").assign(jacobian_key=folder.name)
            )
        tables.setdefault("examples", []).append(_read_examples(folder).assign(jacobian_key=folder.name))
    joined = {name: pd.concat(parts, ignore_index=True) for name, parts in tables.items()}
    return Studies(_with_evaluations(_with_panels(pd.DataFrame(summaries)), evaluations), joined)


def read_histograms(folders: Iterable[Path]) -> pd.DataFrame:
    """`histogram.parquet` of every study, those of transcoders too, with `jacobian_key` and `label`."""
    tables = []
    for folder in folders:
        summary = json.loads((folder / "summary.json").read_text())
        of = "transcoder"
        if summary["kind"] == "pair":
            of = f"k = {summary['k']}, λ = {summary['jacobian_coefficient']:g}, {arm(summary)}"
        sites = " → ".join(summary[c].split(".", 2)[-1].replace("hook_", "") for c in ("hook_name", "hook_name_out"))
        label = f"layer {summary['layer']}, {sites}, {of}"
        tables.append(pd.read_parquet(folder / "histogram.parquet").assign(jacobian_key=folder.name, label=label))
    return pd.concat(tables) if tables else pd.DataFrame()


FAITHFULNESS = {"explained_variance": "explained variance", "loss_recovered_zero": "CE loss recovered (zero ablation)"}


def _with_evaluations(summaries: pd.DataFrame, evaluations: pd.DataFrame) -> pd.DataFrame:
    """Adds `FAITHFULNESS` of both dictionaries of each study; NaN where one was not evaluated."""
    if summaries.empty:
        return summaries
    wanted = ["train_key", "part", *FAITHFULNESS]
    held = evaluations.reindex(columns=wanted)
    for side, key in (("input", "train_key_in"), ("output", "train_key_out")):
        mine = held[held["part"].fillna("").isin(["", side])].drop(columns="part").drop_duplicates("train_key")
        named = mine.rename(columns={name: f"{name}_{side}" for name in FAITHFULNESS} | {"train_key": key})
        summaries = summaries.merge(named, on=key, how="left")
    return summaries


def arm(summary: dict[str, Any]) -> str:
    """Name of the language model's arm."""
    kind = summary.get("randomise") or "none"
    return {"none": "trained model", "reinit": "re-initialised model", "permuted": "permuted model"}[kind]


def _with_panels(summaries: pd.DataFrame) -> pd.DataFrame:
    """Names each study by what differs between studies besides coefficient and seed; '' where nothing does."""
    if summaries.empty:
        return summaries
    differing = [c for c in _IDENTITY if summaries[c].nunique(dropna=False) > 1]
    if "layer" in differing:
        differing = [c for c in differing if not c.startswith("hook_name")]
    says = {
        "layer": "layer {}",
        "k": "k = {}",
        "d_sae": "{} latents",
        "arm": "{}",
        "jacobian_penalty": "penalty {}",
        "at": "at the {}",
        "norm": "norm {}",
    }
    usual = {"arm": "trained model", "jacobian_penalty": "l1"}  # goes without saying where something else is said
    names = []
    for _, row in summaries.iterrows():
        said = [c for c in differing if row[c] != usual.get(c)] or differing
        names.append(", ".join(says.get(c, "{}").format(row[c]) for c in said))
    return summaries.assign(panel=names)


def _read_examples(folder: Path) -> pd.DataFrame:
    """The entries of the first tokens: `token`, `output`, `input`, `jacobian`."""
    import zarr

    group = zarr.open_group(folder / "tokens.zarr", mode="r")
    n = int(np.searchsorted(group["token"][:], EXAMPLE_TOKENS))  # type: ignore[index,arg-type]
    return pd.DataFrame({name: group[name][:n] for name in ("token", "output", "input", "jacobian")})  # type: ignore[index]


# -------------------------------------------------------------------- series
def _coefficients(table: pd.DataFrame) -> dict[float, Any]:
    """Colour by coefficient."""
    values = sorted(table["jacobian_coefficient"].unique())
    return dict(zip(values, plt.get_cmap("viridis")(np.linspace(HIGH, LOW, len(values))), strict=True))


def _by_coefficient(rows: pd.DataFrame) -> list[tuple[float, pd.DataFrame]]:
    """From the baseline up."""
    found = sorted(map(float, rows["jacobian_coefficient"].unique()))
    return [(c, rows[rows["jacobian_coefficient"] == c]) for c in found]


def _label(coefficient: float) -> str:
    return "λ = 0 (baseline)" if coefficient == 0 else f"λ = {coefficient:g}"


def _panels(table: pd.DataFrame) -> list[tuple[str, pd.DataFrame]]:
    """Panels in the order of the studies."""
    return [(str(name), rows) for name, rows in table.groupby("panel", sort=False)]


def _first_panel(summaries: pd.DataFrame) -> pd.DataFrame:
    """Of the first panel one study a coefficient, at most four of them, the baseline and the largest included."""
    _, rows = _panels(summaries)[0]
    by_coefficient = rows.drop_duplicates("jacobian_coefficient").sort_values("jacobian_coefficient")
    return by_coefficient.iloc[np.unique(np.linspace(0, len(by_coefficient) - 1, 4).round().astype(int))]


def _over_seeds(rows: pd.DataFrame, by: str, value: str) -> pd.DataFrame:
    """Mean over seeds of `value`, the lowest of its lower ends, the highest of its upper ends; one row a `by`."""
    names = {"value": (value, "mean"), "low": (f"{value}_low", "min"), "high": (f"{value}_high", "max")}
    return rows.groupby(by, sort=True).agg(**names).reset_index()


def _bars(axis: Axes, groups: list[str], series: dict[float, pd.DataFrame], colours: dict[float, Any]) -> None:
    """Grouped bars in percent, with intervals; a frame of `series` has a row a group."""
    width = 0.8 / max(len(series), 1)
    for n, (coefficient, rows) in enumerate(series.items()):
        at = np.arange(len(groups)) + (n - (len(series) - 1) / 2) * width
        value, low, high = (100 * rows[c].to_numpy() for c in ("value", "low", "high"))
        axis.bar(at, value, 0.9 * width, color=colours[coefficient], label=_label(coefficient))
        errors = np.nan_to_num(np.maximum([value - low, high - value], 0))
        axis.errorbar(at, value, errors, fmt="none", ecolor="0.2", elinewidth=0.8, capsize=1.5)
    axis.set_xticks(range(len(groups)), groups)


def _legend(figure: Figure, axes: Iterable[Axes], columns: int = 6) -> None:
    """Below everything: each label once, in the order of the first that has it, the baseline first."""
    unique: dict[str, Any] = {}
    for axis in axes:
        unique |= dict(zip(*reversed(axis.get_legend_handles_labels()), strict=True))
    unique = dict(sorted(unique.items(), key=lambda item: _label_order(item[0])))
    figure.legend(
        unique.values(), unique.keys(), loc="upper center", bbox_to_anchor=(0.5, 0.01), ncols=min(columns, len(unique))
    )


def _label_order(label: str) -> float:
    found = re.match(r"λ = ([\d.e+-]+)", label)
    return float(found[1]) if found else 0.0


def _wrapped(places: int, most: int) -> tuple[Figure, list[np.ndarray]]:
    """Columns of two axes each, at most `most` beside one another."""
    beside, bands = min(places, most), -(-places // most)
    figure, grid = plt.subplots(2 * bands, beside, figsize=(max(4.4, 2.5 * beside), 4.4 * bands), squeeze=False)
    columns = [grid[2 * (n // beside) : 2 * (n // beside) + 2, n % beside] for n in range(bands * beside)]
    for column in columns[places:]:
        for axis in column:
            axis.set_axis_off()
    return figure, columns[:places]


def _key(figure: Figure, colours: dict[float, Any], panels: list[str], more: Iterable[Line2D] = ()) -> None:
    """A legend of colours (coefficients) and dashes (panels)."""
    handles = [Line2D([], [], color=colour, label=_label(c)) for c, colour in colours.items()]
    if len(panels) > 1:
        dashes = {panel: DASHES[n % len(DASHES)] for n, panel in enumerate(panels)}
        handles += [Line2D([], [], color="0.3", linestyle=dash, label=panel) for panel, dash in dashes.items()]
    handles += more
    figure.legend(handles=handles, loc="upper center", bbox_to_anchor=(0.5, 0.01), ncols=min(5, len(handles)))


def _title(panel: str, text: str = "") -> str:
    return "\n".join(part for part in (panel, text) if part)


# -------------------------------------------------------------------- figures
def jacobian_examples(studies: Studies) -> tuple[Figure, pd.DataFrame]:
    """|J| of a few tokens, raw and divided by its own L1 and L2 norm; rows and columns of a block shuffled (seeded).

    One panel's studies, at most four coefficients of them, from the baseline up.
    """
    chosen = _first_panel(studies.summaries)
    table = studies.of("examples")
    table = table[table["jacobian_key"].isin(chosen["jacobian_key"])]
    blocks: dict[tuple[str, int], np.ndarray] = {}
    for _, study in chosen.iterrows():
        shape = (int(study["k_out"]), int(study["k"]))
        for token in range(EXAMPLE_TOKENS):
            entries = table[(table["jacobian_key"] == study["jacobian_key"]) & (table["token"] == token)]
            blocks[str(study["jacobian_key"]), token] = _shuffled(entries, shape, token)
    norms = {"none": lambda b: 1.0, "l1": lambda b: b.sum() or 1.0, "l2": lambda b: float(np.linalg.norm(b)) or 1.0}
    columns = [(norm, token) for norm in norms for token in range(EXAMPLE_TOKENS)]
    figure, grid = plt.subplots(
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
        axis.set_xticks([])
        axis.set_yticks([])
        for side in axis.spines.values():
            side.set(visible=True, linewidth=0.4)
    for line, coefficient in zip(grid, chosen["jacobian_coefficient"], strict=True):
        line[0].set_ylabel(_label(coefficient).replace(" (", "\n("), fontsize=7)
    for axis, (_, token) in zip(grid[0], columns, strict=True):
        axis.set_title(f"token {token + 1}")
    figure.suptitle(chosen["panel"].iloc[0], y=1.0)
    return figure, table.drop(columns="seed")


def _shuffled(entries: pd.DataFrame, shape: tuple[int, int], seed: int) -> np.ndarray:
    """|J| of a token (k_out, k_in) with rows and columns in random order; latents at 0 have no entries."""
    block = np.zeros(shape)
    outputs, inputs = (np.unique(entries[c], return_inverse=True)[1] for c in ("output", "input"))
    block[outputs, inputs] = entries["jacobian"].abs()
    rng = np.random.default_rng(seed)
    return block[rng.permutation(shape[0])][:, rng.permutation(shape[1])]


def jacobian_thresholds(studies: Studies) -> tuple[Figure, pd.DataFrame]:
    """Share of the entries above thresholds, with intervals over documents: of |J|, and in units of a token's RMS."""
    table = studies.of("thresholds")
    colours = _coefficients(table)
    panels = _panels(table)
    figure, columns = _wrapped(len(panels), PANELS_BESIDE)
    for place, ((panel, mine), column) in enumerate(zip(panels, columns, strict=True)):
        for axis, norm in zip(column, ("none", "rms"), strict=True):
            here = mine[mine["normalisation"] == norm]
            series = {c: _over_seeds(one, "threshold", "fraction") for c, one in _by_coefficient(here)}
            _bars(axis, [f"{t:g}" for t in sorted(here["threshold"].unique())], series, colours)
            axis.set_xlabel("threshold of " + NORMS[norm])
            axis.set(ylim=(0, 105), ylabel="entries above it (%)" if place % PANELS_BESIDE == 0 else "")
        column[0].set_title(panel)
    figure.tight_layout()
    _legend(figure, figure.axes)
    return figure, table[["panel", "jacobian_coefficient", "seed", *studies.tables["thresholds"].columns]]


def jacobian_distribution(studies: Studies) -> tuple[Figure, pd.DataFrame]:
    """Histogram and CDF of |J|: as it is on a linear and a logarithmic axis, and divided by its token's RMS.

    Drawn is the panel with the most coefficients, as curves of several hide each other; the data have all.
    """
    linear, logarithmic = studies.of("histogram"), studies.of("log_histogram")
    entries = studies.summaries.set_index("jacobian_key")["entries_per_token"]
    scale = 100 / linear["jacobian_key"].map(entries)
    for name in ("count_per_token", "above_per_token"):
        linear[name] *= scale
    keep = ["panel", "jacobian_coefficient", "seed", *studies.tables["log_histogram"].columns]
    data = logarithmic.loc[logarithmic["fraction"] > 0, keep]
    panel, logarithmic = max(_panels(logarithmic), key=lambda one: one[1]["jacobian_coefficient"].nunique())
    linear = linear[linear["panel"] == panel]
    linear = linear.rename(columns={"count_low": "count_per_token_low", "count_high": "count_per_token_high"})
    linear = linear.rename(columns={"above_low": "above_per_token_low", "above_high": "above_per_token_high"})
    colours = _coefficients(logarithmic)
    figure, grid = plt.subplots(2, 3, figsize=(8.2, 4.6), sharex="col")
    for coefficient, colour in colours.items():
        here = linear[linear["jacobian_coefficient"] == coefficient]
        counts, above = (_over_seeds(here, "bin_left", f"{name}_per_token") for name in ("count", "above"))
        grid[0][0].plot(counts["bin_left"], counts["value"], color=colour)
        grid[1][0].plot(above["bin_left"], 100 - above["value"], color=colour)
        for place, norm in ((1, "none"), (2, "rms")):
            mine = logarithmic["jacobian_coefficient"] == coefficient
            here = logarithmic[mine & (logarithmic["normalisation"] == norm)]
            for axis, name in zip(grid[:, place], ("fraction", "cdf"), strict=True):
                curve = _over_seeds(here, "bin_right", name)
                axis.plot(curve["bin_right"], 100 * curve["value"], color=colour)
                low, high = 100 * curve["low"], 100 * curve["high"]
                axis.fill_between(curve["bin_right"], low, high, color=colour, alpha=0.2, lw=0)
    used = logarithmic[logarithmic["fraction"] > 1e-4]
    for place, norm in ((1, "none"), (2, "rms")):
        mine_used = used[used["normalisation"] == norm]
        for axis in grid[:, place]:
            axis.set(xscale="log", xlim=(mine_used["bin_left"].min(), mine_used["bin_right"].max()))
    grid[0][0].set(yscale="log", ylabel="entries (% per bin)", xlim=(0, linear["bin_right"].max()))
    grid[0][1].set_ylabel("entries (% per 1/32 decade)")
    grid[1][0].set_ylabel("entries at most that large (%)")
    for axis, norm in zip(grid[1], ("none", "none", "rms"), strict=True):
        axis.set_xlabel(NORMS[norm])
    figure.suptitle(panel)
    figure.tight_layout(w_pad=1.5)
    _key(figure, colours, [panel])
    return figure, data


def jacobian_global(studies: Studies) -> tuple[Figure, pd.DataFrame]:
    """The n x n mean |J|: how many entries exceed a threshold, and how many inputs an output latent needs for 90 %."""
    table, outputs = studies.of("global_exceedance"), studies.of("outputs")
    colours = _coefficients(table)
    panels = [name for name, _ in _panels(table)]
    figure, (left, middle, right) = plt.subplots(1, 3, figsize=(8.2, 2.7))
    series = [(panel, c, rows) for panel, mine in _panels(table) for c, rows in _by_coefficient(mine)]
    for panel, coefficient, rows in series:
        dashes, colour = DASHES[panels.index(panel) % len(DASHES)], colours[coefficient]
        for axis, convention in ((left, "active"), (middle, "all")):
            fraction = rows[rows["convention"] == convention].groupby("threshold")["fraction"].mean()
            shown = fraction[fraction > 0]
            axis.plot(shown.index, 100 * shown, dashes, color=colour)
        mine = outputs[(outputs["panel"] == panel) & (outputs["jacobian_coefficient"] == coefficient)]
        needed = np.sort(mine["inputs_for_90_percent"])
        right.plot(needed, 100 * np.arange(1, len(needed) + 1) / len(needed), dashes, color=colour)
    for axis, over in ((left, "tokens with the output active"), (middle, "all tokens")):
        axis.set(xscale="log", yscale="log", xlabel="threshold of mean |J|", title=f"mean over {over}")
        axis.set_ylabel("entries of n × n above it (%)" if axis is left else "")
    right.set(xscale="log", xlabel="inputs for 90 % of Σ|J|", ylabel="output latents (%)", title="per output latent")
    figure.tight_layout()
    _key(figure, colours, panels)
    return figure, table[["panel", "jacobian_coefficient", "seed", *studies.tables["global_exceedance"].columns]]


def jacobian_linearity(studies: Studies) -> tuple[Figure, pd.DataFrame]:
    """Classes of the functions of one output latent by one input latent, under both tolerances, and examples."""
    summaries, table = studies.summaries, studies.of("linearity")
    colours = _coefficients(summaries)
    panels = _panels(summaries)
    figure, places = _wrapped(len(panels) + 2, PANELS_BESIDE)
    columns = [f"{kind}_{name}" for kind in ("absolute", "relative") for name in CLASSES]
    long = pd.concat(
        summaries[["panel", "jacobian_coefficient", "seed"]].assign(
            tolerance=column.split("_")[0], function=column.split("_")[1], share=summaries[column],
            share_low=summaries[f"{column}_low"], share_high=summaries[f"{column}_high"],
        )
        for column in columns
    )  # fmt: skip
    says = {"absolute": f"residual < {ABSOLUTE:g} (paper)", "relative": f"residual < {100 * RELATIVE:g} % of the range"}
    for place, ((panel, _), pair) in enumerate(zip(panels, places, strict=False)):
        for axis, kind in zip(pair, ("absolute", "relative"), strict=True):
            here = long[(long["panel"] == panel) & (long["tolerance"] == kind)]
            series: dict[float, pd.DataFrame] = {}
            for coefficient, rows in _by_coefficient(here):
                order = _over_seeds(rows, "function", "share").set_index("function").reindex(list(CLASSES))
                series[coefficient] = order.reset_index()
            _bars(axis, list(CLASSES.values()), series, colours)
            axis.set(ylim=(0, 105), ylabel="functions (%)" if place % PANELS_BESIDE == 0 else "")
            axis.set_title(_title(panel, says[kind]))
    _draw_curves(np.concatenate(places[len(panels) :]), table)
    figure.tight_layout()
    _legend(figure, figure.axes)
    return figure, long


def _draw_curves(axes: np.ndarray, table: pd.DataFrame) -> None:
    """Three functions of each class (relative tolerance), one of four axes a class."""
    found = [name for name in CLASSES if (table["class_relative"] == name).any()]
    for axis in axes:
        axis.set_axis_off()
    for axis, name in zip(axes, found, strict=False):
        axis.set_axis_on()
        some = table[table["class_relative"] == name].head(3)
        for n, (end, curve) in enumerate(zip(some["sweep_end"], some["curve"], strict=True)):
            axis.plot(np.linspace(0, end, len(curve)), curve, color=f"{0.15 + 0.25 * n}")
        axis.set(title=f"examples: {CLASSES[name]}", xlabel="input latent", ylabel="output latent")


def jacobian_ablation(studies: Studies) -> tuple[Figure, pd.DataFrame]:
    """What J predicts against what happens: one unit of the decoder row subtracted (paper), and the latent ablated.

    Drawn of one panel's studies, at most four coefficients of them; the table has all.
    """
    table = studies.of("linearity")
    summaries = studies.summaries
    colours = _coefficients(summaries)
    chosen = _first_panel(summaries)
    figure, grid = plt.subplots(2, len(chosen), figsize=(max(4.4, 2.1 * len(chosen)), 4.5), squeeze=False)
    for column, (_, study) in zip(grid.T, chosen.iterrows(), strict=True):
        rows = table[table["jacobian_key"] == study["jacobian_key"]]
        unit = (-rows["jacobian"], rows["delta_unit"])
        whole = (-rows["jacobian"] * rows["activation"], rows["delta_ablation"])
        for axis, (predicted, found) in zip(column, (unit, whole), strict=True):
            axis.scatter(predicted, found, s=3, color=colours[study["jacobian_coefficient"]], alpha=0.5, lw=0)
            ends = [min(predicted.min(), found.min()), max(predicted.max(), found.max())]
            axis.plot(ends, ends, color="0.4", linewidth=0.7)
        column[0].set_title(_title(study["panel"], _label(study["jacobian_coefficient"])))
        on_line = f"{100 * study['on_line']:.1f} % within 0.1"
        fit = f"R² {study['ablation_r2']:.2f}, slope {study['ablation_slope']:.2f}"
        for axis, text in zip(column, (on_line, fit), strict=True):
            axis.text(0.04, 0.96, text, transform=axis.transAxes, va="top", fontsize=6.5)
        column[0].set_xlabel("−J")
        column[1].set_xlabel("−J × activation")
    grid[0][0].set_ylabel("change of the output latent,\none unit subtracted")
    grid[1][0].set_ylabel("change of the output latent,\ninput latent ablated")
    figure.tight_layout()
    keep = ["panel", "jacobian_coefficient", "seed", "jacobian_key", "token", "input", "output", "activation"]
    return figure, table[[*keep, "jacobian", "delta_unit", "delta_ablation", "class_absolute", "class_relative"]]


def jacobian_sweep(studies: Studies) -> tuple[Figure, pd.DataFrame]:
    """Sizes and scale-free measures of J by the Jacobian coefficient, with intervals over documents."""
    table = studies.summaries
    panels = _panels(table)
    colours = plt.get_cmap("viridis")(np.linspace(0.15, 0.75, len(panels)))
    series = [
        (panel, rows, colour, DASHES[n % len(DASHES)])
        for n, ((panel, rows), colour) in enumerate(zip(panels, colours, strict=True))
    ]
    return _measures(table, "jacobian_coefficient", "Jacobian coefficient λ", series)


def jacobian_layers(studies: Studies) -> tuple[Figure, pd.DataFrame]:
    """The same by layer, one line a coefficient."""
    table = studies.summaries
    rest = table["panel"].str.replace(r"layer \d+(, )?", "", regex=True)
    series = []
    for n, panel in enumerate(rest.unique()):
        for coefficient, rows in _by_coefficient(table[rest == panel]):
            if rows["layer"].nunique() == 1 < table["layer"].nunique():
                continue  # no line by layer
            label = ", ".join(part for part in (_label(coefficient), panel) if part)
            series.append((label, rows, _coefficients(table)[coefficient], DASHES[n % len(DASHES)]))
    return _measures(table, "layer", "layer", series)


_MEASURES = {
    "mean_absolute": "mean |J|",
    "fraction_above_0.01": "share of |J| > 0.01",
    "kurtosis": "kurtosis",
    "hoyer": "Hoyer sparsity",
    "gini": "Gini coefficient",
    "effective_inputs": "effective inputs per output",
}
_MARKERS = ("o", "s", "^", "D", "v", "P")


def _measures(
    table: pd.DataFrame, by: str, label: str, series: list[tuple[str, pd.DataFrame, Any, str]]
) -> tuple[Figure, pd.DataFrame]:
    """A panel a measure, its values at equal steps along `by`; `series`: label, rows, colour and dashes."""
    measures = {name: text for name, text in _MEASURES.items() if name in table}  # thresholds are configured
    values = sorted(table[by].unique())
    figure, grid = plt.subplots(2, 3, figsize=(7.6, 4.2), sharex=True)
    for axis, (name, text) in zip(grid.flat, measures.items(), strict=False):
        for n, (title, rows, colour, dashes) in enumerate(series):
            curve = _over_seeds(rows, by, name)
            errors = np.nan_to_num(np.maximum([curve["value"] - curve["low"], curve["high"] - curve["value"]], 0))
            look = {"marker": _MARKERS[n % len(_MARKERS)], "linestyle": dashes, "color": colour, "capsize": 2}
            axis.errorbar([values.index(v) for v in curve[by]], curve["value"], errors, label=title or "pair", **look)
        axis.set(ylabel=text)
        if name == "kurtosis":
            axis.set_yscale("log")
        axis.set_xticks(range(len(values)), [f"{v:g}" for v in values])
    for axis in grid[1]:
        axis.set_xlabel(label)
    figure.tight_layout()
    if len(series) > 1:
        _legend(figure, grid[0][:1], columns=3)
    ends = [f"{name}{end}" for name in measures for end in ("", "_low", "_high")]
    return figure, table[["jacobian_key", "panel", "layer", "jacobian_coefficient", "seed", *ends]]


def jacobian_pareto(studies: Studies) -> tuple[Figure, pd.DataFrame]:
    """What sparsity costs: faithfulness of both dictionaries against the sparsity of J; points are coefficients."""
    table = studies.summaries
    colours = _coefficients(table)
    measures = {"fraction_above_0.01": "share of |J| > 0.01", "effective_inputs": "effective inputs per output"}
    measures = {name: label for name, label in (measures | {"hoyer": "Hoyer sparsity"}).items() if name in table}
    figure, grid = plt.subplots(2, len(measures), figsize=(2.7 * len(measures), 4.4), sharex="col", squeeze=False)
    for axis, label in zip(grid[-1], measures.values(), strict=True):
        axis.set_xlabel(label)
    for (score, name), line in zip(FAITHFULNESS.items(), grid, strict=True):
        for axis, measure in zip(line, measures, strict=True):
            for n, (_, rows) in enumerate(_panels(table)):
                for side, marker in (("input", "o"), ("output", "s")):
                    points = rows.groupby("jacobian_coefficient")[[measure, f"{score}_{side}"]].mean()
                    x, y = points[measure], points[f"{score}_{side}"]
                    axis.plot(x, y, DASHES[n % len(DASHES)], color="0.6", marker=marker, mfc="none", zorder=1)
                    axis.scatter(x, y, c=[colours[c] for c in points.index], marker=marker, s=22, zorder=2)
        line[0].set_ylabel(name)
    figure.tight_layout()
    sides = [
        Line2D([], [], color="0.6", marker=marker, mfc="none", linestyle="", label=f"{side} SAE")
        for side, marker in (("input", "o"), ("output", "s"))
    ]
    _key(figure, colours, [name for name, _ in _panels(table)], sides)
    scores = [f"{score}_{side}" for score in FAITHFULNESS for side in ("input", "output")]
    return figure, table[["jacobian_key", "panel", "jacobian_coefficient", "seed", *measures, *scores]]


_MEASURED = {
    "fraction_above_0.005": "|J| > 0.005 (%)",
    "fraction_above_0.01": "|J| > 0.01 (%)",
    "fraction_above_0.015": "|J| > 0.015 (%)",
    "fraction_above_0.02": "|J| > 0.02 (%)",
    "absolute_linear": "linear functions (%)",
    "absolute_jumprelu": "JumpReLU-like (%)",
    "absolute_other": "other (%)",
    "on_line": "|J + Δ| < 0.1 (%)",
}
_PAPER = {  # arm, study: the same measures in percent; of its figures 2, 6 and 7 and its notebooks
    ("trained model", "Pythia-410m layer 15, λ = 0"): (77.1, 58.3, 44.0, 33.4, 74.6, 17.6, 7.7, None),
    ("trained model", "Pythia-410m layer 15, λ = 0.5"): (16.5, 6.2, 3.2, 1.9, 88.3, 9.5, 2.2, 97.7),
    ("trained model", "Pythia-70m layer 3, λ = 0"): (83.5, 68.8, 56.8, 47.1, 71.9, 14.5, 13.6, None),
    ("trained model", "Pythia-70m layer 3, λ = 1"): (22.8, 11.3, 7.1, 4.9, 86.8, 10.4, 2.8, 97.5),
    ("re-initialised model", "Pythia-410m layer 15, λ = 0"): (92.1, 84.4, 77.0, 69.9, None, None, None, None),
    ("re-initialised model", "Pythia-410m layer 15, λ = 0.5"): (42.1, 22.5, 14.1, 9.7, None, None, None, None),
    ("re-initialised model", "Pythia-70m layer 3, λ = 0"): (93.4, 86.9, 80.5, 74.3, None, None, None, None),
    ("re-initialised model", "Pythia-70m layer 3, λ = 1"): (55.7, 33.6, 21.9, 15.1, None, None, None, None),
}


def jacobian_reproduction(studies: Studies) -> tuple[Figure, pd.DataFrame]:
    """The paper's numbers beside ours: every study with the L1 penalty, means over seeds.

    arXiv 2502.18147, figures 2, 6 and 7: 300 million tokens of training, position 0 left out, taken at the true input;
    its trained models' weights were folded for the analysis and not for the training, its random models' were not.
    """
    rows: list[dict[str, Any]] = [
        {"source": "paper", "arm": arm, "study": study} | dict(zip(_MEASURED, values, strict=True))
        for (arm, study), values in _PAPER.items()
    ]
    ours = studies.summaries[studies.summaries["jacobian_penalty"] == "l1"]
    kinds = ours["arm"].str.replace(r", seed \d+", "", regex=True)
    held = [name for name in _MEASURED if name in ours]  # thresholds are configured
    for (kind, layer, coefficient), mine in ours.groupby([kinds, "layer", "jacobian_coefficient"]):
        study = f"ours, layer {layer}, λ = {coefficient:g}"
        values = {name: 100 * mine[name].mean() for name in held}
        rows.append({"source": "ours", "arm": kind, "study": study} | values)
    order = {arm: n for n, arm in enumerate(dict.fromkeys(row["arm"] for row in rows))}
    table = pd.DataFrame(rows).sort_values("arm", key=lambda column: column.map(order), kind="stable")
    cells = [
        [row["arm"], row["study"], *("" if pd.isna(row.get(name)) else f"{row[name]:.1f}" for name in _MEASURED)]
        for row in table.to_dict("records")
    ]
    figure, axis = plt.subplots(figsize=(8.4, 0.2 * len(cells) + 0.6))
    axis.set_axis_off()
    names = [
        "language model",
        "study",
        *(text.replace(" functions", "").replace(" (%)", "\n(%)") for text in _MEASURED.values()),
    ]
    widths = [0.21, 0.27, *[0.075] * len(_MEASURED)]
    grid = axis.table(cells, colLabels=names, colWidths=widths, loc="center", cellLoc="right", edges="")
    grid.auto_set_font_size(False)
    grid.set_fontsize(6.5)
    for (line, column), cell in grid.get_celld().items():
        cell.visible_edges = "B" if line == 0 else ""
        cell.set_height(cell.get_height() * (1.9 if line == 0 else 1))
        if column < 2:
            cell.set_text_props(ha="left")
    return figure, table


FIGURES = {
    f.__name__: f
    for f in (
        jacobian_examples,
        jacobian_thresholds,
        jacobian_distribution,
        jacobian_global,
        jacobian_linearity,
        jacobian_ablation,
        jacobian_sweep,
        jacobian_layers,
        jacobian_pareto,
        jacobian_reproduction,
    )
}
