"""What figures read of the Jacobian stage, and how they show its series: colours, panels, bars and legends."""

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

from saeflow.evaluation.figures import read_summaries
from saeflow.figures.axes import PANELS_BESIDE, labelled, legend_below
from saeflow.figures.style import sequence
from saeflow.jobs.job import Job

EXAMPLE_TOKENS = 3
IDENTITY = ["panel", "jacobian_coefficient", "seed", "jacobian_key"]
FAITHFULNESS = {"explained_variance": "explained variance", "loss_recovered_zero": "CE loss recovered (zero ablation)"}
CONTROLS = {"none": "trained model", "reinit": "re-initialised model", "permuted": "permuted model"}
_DISTINGUISHED_BY = ["layer", "k", "d_sae", "control", "jacobian_penalty", "at", "norm", "hook_name", "hook_name_out"]
DASHES = ("-", "--", ":", "-.")
NORMS = {"none": "|J|", "l1": "|J| / L1 norm", "l2": "|J| / L2 norm", "rms": "|J| / RMS of its token"}


class Studies(NamedTuple):
    """What the Jacobian stage measured, of pairs. Every table has the column `jacobian_key`."""

    summaries: pd.DataFrame
    """One row a study, with its `panel`: what distinguishes it besides coefficient and seed. What evaluations of its
    dictionaries say has `_input` or `_output` added to its name."""
    tables: dict[str, pd.DataFrame]
    """By name: the stage's tables, and `examples`, the Jacobians of a few tokens, one row an entry."""

    def of(self, name: str) -> pd.DataFrame:
        """A table that begins with what identifies each row's study."""
        table = self.tables[name].merge(self.summaries[IDENTITY], on="jacobian_key", sort=False)
        return table[[*IDENTITY, *(column for column in table if column not in IDENTITY)]]


def read_pairs(job: Job) -> Studies:
    """Raises `ValueError` where no study is of a pair."""
    studies = read_studies(job.inputs("jacobian"), read_summaries(job.inputs("evaluate")))
    if studies.summaries.empty:
        raise ValueError("figures of Jacobians but jacobian_histogram need pairs: use dictionary=pair or jacobian")
    return studies


def read_labelled_histograms(job: Job) -> pd.DataFrame:
    return read_histograms(job.inputs("jacobian"))


def read_studies(folders: Iterable[Path], evaluations: pd.DataFrame) -> Studies:
    """Reads the artifacts of the Jacobian stage; those of transcoders, which have no coefficient, are left out.

    `evaluations`: one row a dictionary, those of the pairs among them.
    """
    found = {folder: json.loads((folder / "summary.json").read_text()) for folder in folders}
    pairs = {f: summary for f, summary in found.items() if summary["kind"] == "pair"}  # others have no coefficient
    if not pairs:
        return Studies(pd.DataFrame(), {})
    summaries = pd.DataFrame([s | {"jacobian_key": f.name, "control": control(s)} for f, s in pairs.items()])

    def joined(tables: Iterable[pd.DataFrame]) -> pd.DataFrame:
        named = (table.assign(jacobian_key=f.name) for f, table in zip(pairs, tables, strict=True))
        return pd.concat(named, ignore_index=True)

    names = ("histogram", "log_histogram", "thresholds", "global_exceedance", "outputs", "linearity")
    tables = {name: joined(pd.read_parquet(f / f"{name}.parquet") for f in pairs) for name in names}
    tables["examples"] = joined(map(_read_examples, pairs))
    return Studies(_with_evaluations(_with_panels(summaries), evaluations), tables)


def read_histograms(folders: Iterable[Path]) -> pd.DataFrame:
    """`histogram.parquet` of every study, those of transcoders too, with `jacobian_key` and `label`."""
    tables = []
    for folder in folders:
        summary = json.loads((folder / "summary.json").read_text())
        of = "transcoder"
        if summary["kind"] == "pair":  # others have neither k nor λ
            of = f"k = {summary['k']}, λ = {summary['jacobian_coefficient']:g}, {control(summary)}"
        sites = " → ".join(summary[c].split(".", 2)[-1].replace("hook_", "") for c in ("hook_name", "hook_name_out"))
        label = f"layer {summary['layer']}, {sites}, {of}"
        tables.append(pd.read_parquet(folder / "histogram.parquet").assign(label=label, jacobian_key=folder.name))
    return pd.concat(tables) if tables else pd.DataFrame()


def _with_evaluations(summaries: pd.DataFrame, evaluations: pd.DataFrame) -> pd.DataFrame:
    """Adds `FAITHFULNESS` of both dictionaries of each study; NaN where one was not evaluated."""
    wanted = ["train_key", "part", *FAITHFULNESS]
    held = evaluations.reindex(columns=wanted)
    for side, key in (("input", "train_key_in"), ("output", "train_key_out")):
        mine = held[held["part"].fillna("").isin(["", side])].drop(columns="part").drop_duplicates("train_key")
        named = mine.rename(columns={name: f"{name}_{side}" for name in FAITHFULNESS} | {"train_key": key})
        summaries = summaries.merge(named, on=key, how="left")
    return summaries


def control(summary: dict[str, Any]) -> str:
    """Name of the language model: trained, or which control."""
    return CONTROLS[summary.get("randomise") or "none"]


def _with_panels(summaries: pd.DataFrame) -> pd.DataFrame:
    """Names each study by what differs between studies besides coefficient and seed; '' where nothing does."""
    differing = [c for c in _DISTINGUISHED_BY if summaries[c].nunique(dropna=False) > 1]
    if "layer" in differing:
        differing = [c for c in differing if not c.startswith("hook_name")]
    says = {"layer": "layer {}", "k": "k = {}", "d_sae": "{} latents"}
    says |= {"jacobian_penalty": "penalty {}", "at": "at the {}", "norm": "norm {}"}
    usual = {"control": "trained model", "jacobian_penalty": "l1"}  # goes without saying where something else is said
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
def dash(n: int) -> str:
    """Of line n."""
    return DASHES[n % len(DASHES)]


def coefficient_colours(table: pd.DataFrame) -> dict[float, Any]:
    """Colour by coefficient."""
    values = sorted(table["jacobian_coefficient"].unique())
    return dict(zip(values, sequence(len(values), 0.82, 0.02), strict=True))


def by_coefficient(rows: pd.DataFrame) -> list[tuple[float, pd.DataFrame]]:
    """From the baseline up."""
    found = sorted(map(float, rows["jacobian_coefficient"].unique()))
    return [(c, rows[rows["jacobian_coefficient"] == c]) for c in found]


def label_of(coefficient: float) -> str:
    return "λ = 0 (baseline)" if coefficient == 0 else f"λ = {coefficient:g}"


def by_panel(table: pd.DataFrame) -> list[tuple[str, pd.DataFrame]]:
    """Panels in the order of the studies."""
    return [(str(name), rows) for name, rows in table.groupby("panel", sort=False)]


def first_panel(summaries: pd.DataFrame) -> pd.DataFrame:
    """Of the first panel one study a coefficient, at most four of them, the baseline and the largest included."""
    _, rows = by_panel(summaries)[0]
    by_coefficient = rows.drop_duplicates("jacobian_coefficient").sort_values("jacobian_coefficient")
    return by_coefficient.iloc[np.unique(np.linspace(0, len(by_coefficient) - 1, 4).round().astype(int))]


def over_seeds(rows: pd.DataFrame, by: str, value: str) -> pd.DataFrame:
    """Mean over seeds of `value`, the lowest of its lower ends, the highest of its upper ends; one row a `by`."""
    names = {"value": (value, "mean"), "low": (f"{value}_low", "min"), "high": (f"{value}_high", "max")}
    return rows.groupby(by, sort=True).agg(**names).reset_index()


def bars(axis: Axes, groups: list[str], series: dict[float, pd.DataFrame], colours: dict[float, Any]) -> None:
    """Grouped bars in percent, with intervals; a frame of `series` has a row a group."""
    width = 0.8 / max(len(series), 1)
    for n, (coefficient, rows) in enumerate(series.items()):
        at = np.arange(len(groups)) + (n - (len(series) - 1) / 2) * width
        value, low, high = (100 * rows[c].to_numpy() for c in ("value", "low", "high"))
        axis.bar(at, value, 0.9 * width, color=colours[coefficient], label=label_of(coefficient))
        errors = np.nan_to_num(np.maximum([value - low, high - value], 0))
        axis.errorbar(at, value, errors, fmt="none", ecolor="0.2", elinewidth=0.8, capsize=1.5)
    axis.set_xticks(range(len(groups)), groups)


def legend(figure: Figure, axes: Iterable[Axes], columns: int = 6) -> None:
    """Below everything: each label once, in the order of the first that has it, the baseline first."""
    unique = sorted(labelled(axes).items(), key=lambda item: _label_order(item[0]))
    legend_below(figure, dict(unique), columns)


def _label_order(label: str) -> float:
    found = re.match(r"λ = ([\d.e+-]+)", label)
    return float(found[1]) if found else 0.0


def paired_panels(places: int) -> tuple[Figure, list[np.ndarray]]:
    """Columns of two axes each, at most four beside one another."""
    beside, bands = min(places, PANELS_BESIDE), -(-places // PANELS_BESIDE)
    figure, grid = plt.subplots(2 * bands, beside, figsize=(max(4.4, 2.5 * beside), 4.4 * bands), squeeze=False)
    columns = [grid[2 * (n // beside) : 2 * (n // beside) + 2, n % beside] for n in range(bands * beside)]
    for column in columns[places:]:
        for axis in column:
            axis.set_axis_off()
    return figure, columns[:places]


def legend_of_lines(figure: Figure, colours: dict[float, Any], panels: list[str], more: Iterable[Line2D] = ()) -> None:
    """A legend of colours (coefficients) and dashes (panels)."""
    handles = [Line2D([], [], color=colour, label=label_of(c)) for c, colour in colours.items()]
    if len(panels) > 1:
        handles += [Line2D([], [], color="0.3", linestyle=dash(n), label=panel) for n, panel in enumerate(panels)]
    legend_below(figure, [*handles, *more], columns=5)


def title(panel: str, text: str = "") -> str:
    return "\n".join(part for part in (panel, text) if part)
