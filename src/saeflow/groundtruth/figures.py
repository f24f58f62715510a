"""The figures of an experiment on models whose algorithm is known, in the style of all others."""

from collections.abc import Hashable, Iterator
from typing import Any, NamedTuple

import matplotlib.pyplot as plt
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from saeflow.dictionaries import load_dictionary
from saeflow.dictionaries.naming import amount_name, hook_title, series_name
from saeflow.evaluation.figures import read_summaries
from saeflow.figures.registry import figure
from saeflow.figures.style import COLOURS, MARKERS
from saeflow.groundtruth.network import HOOKS
from saeflow.groundtruth.recovery import stability
from saeflow.jobs.job import Job

_IDENTITY = ["place", "hook_name_out", "case", "method", "model_seed", "series", "amount_name", "amount"]
_IDENTITY += ["d_sae", "seed", "train_key", "part"]
METHODS = {"compiled": "compiled model", "siit": "SIIT", "iit": "IIT", "supervised": "supervised"}


class Recoveries(NamedTuple):
    """What dictionaries find of known algorithms."""

    table: pd.DataFrame
    """One row a dictionary: its `summary.json`."""
    stability: pd.DataFrame
    """See `stability_table`."""

    @property
    def extra_tables(self) -> dict[str, pd.DataFrame]:
        """All metrics of all dictionaries, and how far those of several seeds agree."""
        return {"recoveries": self.table, "stability": self.stability}


def read_recoveries(job: Job) -> Recoveries:
    table = read_summaries(job.inputs("recover"))
    return Recoveries(table, stability_table(job, table))


def stability_table(job: Job, table: pd.DataFrame) -> pd.DataFrame:
    """A row each time that dictionaries differ in nothing but their seed: how far they have the same live latents."""
    live = (pd.read_parquet(f / "labels.parquet")["latent"].to_numpy() for f in job.inputs("recover"))
    trained = {folder.name: folder for folder in job.inputs("train")}
    latents = dict(zip(table["train_key"], live, strict=True))
    same = ["model_key", "hook_name", "hook_name_out", "kind", "activation", "saelens", "amount_name", "amount"]
    table = table[table["part"].isna()]
    found = []
    for names, rows in table.groupby(same, dropna=False):
        if len(rows) > 1:
            decoders = [
                load_dictionary(trained[key]).tensors["W_dec"].double().numpy()[latents[key]]
                for key in rows["train_key"]
            ]
            found.append(dict(zip(same, names, strict=True)) | {"n": len(rows), "stability": stability(decoders)})
    return pd.DataFrame(found, columns=[*same, "n", "stability"])


@figure("recovery", stage="recover", reads=read_recoveries)
def recovery(data: Recoveries) -> tuple[Figure, pd.DataFrame]:
    """Recovery of true variables and share of mixtures by L0, one column a hook, beside random directions."""
    return _recovery(data, "l0", "amount")


@figure("recovery_width", stage="recover", reads=read_recoveries)
def recovery_width(data: Recoveries) -> tuple[Figure, pd.DataFrame]:
    """Recovery of true variables and share of mixtures by the number of latents, at one sparsity a kind of dictionary.

    One column a hook; crosses are as many random directions, as sparse.
    """
    return _recovery(data, "d_sae", "d_sae")


def _recovery(data: Recoveries, by: str, point: str) -> tuple[Figure, pd.DataFrame]:
    """Dictionaries with the same `point` are one point of a curve."""
    table = _with_names(data.table)
    hooks = sorted(table["hook_name_out"].unique(), key=_depth)
    figure, grid = plt.subplots(2, len(hooks), figsize=(1.9 * len(hooks) + 1.2, 4.0), sharey="row", squeeze=False)
    for column, hook in enumerate(hooks):
        for colour, marker, rows in _groups(table, table["hook_name_out"] == hook):
            for axis, value in zip(grid[:, column], ("recovery", "mixtures"), strict=True):
                _draw_curve(axis, rows, by, value, point, colour, marker)
                axis.scatter(rows[by], rows[f"{value}_random"], color="0.6", marker="x", s=10, linewidth=0.7)
        grid[0][column].set_title(hook_title(hook))
        grid[1][column].set_xlabel("L0" if by == "l0" else "latents")
        if by != "l0":
            for axis in grid[:, column]:
                axis.set_xscale("log", base=2)
    grid[0][0].set(ylabel="recovery of true variables", ylim=(-0.03, 1.03))
    grid[1][0].set(ylabel="share of latents\nthat are mixtures", ylim=(-0.03, 1.03))
    figure.tight_layout()
    _key(figure, table, Line2D([], [], color="0.6", marker="x", linestyle="", label="random directions"))
    return figure, table[[*_IDENTITY, "l0", "recovery", "recovery_random", "mixtures", "mixtures_random"]]


@figure("true_jacobian", stage="recover", reads=read_recoveries)
def true_jacobian(data: Recoveries) -> tuple[Figure, pd.DataFrame]:
    """How far the derivative of what stands in for an MLP is the MLP's, by L0 and by how well the MLP's output is
    explained."""
    table = _with_names(data.table[data.table["jacobian_cosine"].notna()])
    if table.empty:
        raise ValueError("figure true_jacobian needs transcoders or Jacobian pairs around an MLP: use tracr_mlp")
    hooks = sorted(table["hook_name_out"].unique(), key=_depth)
    figure, grid = plt.subplots(len(hooks), 2, figsize=(5.4, 2.3 * len(hooks) + 0.3), sharey=True, squeeze=False)
    for axes, hook in zip(grid, hooks, strict=True):
        for colour, marker, rows in _groups(table, table["hook_name_out"] == hook):
            for axis, by in zip(axes, ("l0", "fvu"), strict=True):
                _draw_curve(axis, rows, by, "jacobian_cosine", "amount", colour, marker)
        axes[0].set(ylabel="cosine of the Jacobian\nwith the true one", ylim=(-0.03, 1.03))
        axes[0].set_title(f"MLP of layer {hook.split('.')[1]}")
        axes[1].set_xscale("log")
    grid[-1][0].set_xlabel("L0")
    grid[-1][1].set_xlabel("unexplained variance of the MLP's output")
    figure.tight_layout()
    _key(figure, table)
    return figure, table[[*_IDENTITY, "l0", "fvu", "jacobian_cosine"]]


def _with_names(table: pd.DataFrame) -> pd.DataFrame:
    """With what the markers tell apart, for all panels alike."""
    names = {"place": table["hook_name_out"].map(hook_title), "amount_name": table["amount_name"].map(amount_name)}
    return table.assign(series=[_series(row) for row in table.to_dict("records")], **names)


def _groups(table: pd.DataFrame, some: pd.Series) -> Iterator[tuple[Any, str, pd.DataFrame]]:
    """Colour of a model's training, marker of a dictionary kind, rows."""
    methods, series = _methods(table), sorted(table["series"].unique())
    for (method, kind), rows in table[some].groupby(["method", "series"]):
        yield COLOURS[methods.index(str(method))], MARKERS[series.index(str(kind))], rows


def _methods(table: pd.DataFrame) -> list[str]:
    return [method for method in METHODS if method in set(table["method"])]


def _draw_curve(axis: Axes, rows: pd.DataFrame, by: str, value: str, point: str, colour: Any, marker: str) -> None:
    """A curve through the means of the rows that are one `point`, and all rows."""
    means = rows.groupby(point)[list({by, value} - {point})].mean().reset_index().sort_values(by)
    axis.plot(means[by], means[value], color=colour, linewidth=0.8)
    axis.scatter(rows[by], rows[value], color=colour, marker=marker, s=14, alpha=0.8, zorder=3)


def _key(figure: Figure, table: pd.DataFrame, *more: Line2D) -> None:
    handles = [Line2D([], [], color=COLOURS[i], label=METHODS[m]) for i, m in enumerate(_methods(table))]
    for i, name in enumerate(sorted(table["series"].unique())):
        handles.append(Line2D([], [], color="0.2", marker=MARKERS[i], linestyle="", label=name))
    figure.legend(handles=[*handles, *more], loc="center left", bbox_to_anchor=(1.0, 0.55))


def _series(row: dict[Hashable, Any]) -> str:
    if isinstance(row["part"], str):
        return f"Jacobian pair, $\\lambda$ = {row['jacobian_coefficient']:g}"
    return series_name(row["kind"], row["activation"], row["skip"], row["saelens"])


def _depth(hook_name: str) -> tuple[int, int]:
    _, layer, kind = hook_name.split(".")
    return int(layer), HOOKS.index(kind)
