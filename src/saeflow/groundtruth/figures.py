"""The figure of an experiment on models whose algorithm is known, in the style of all others."""

import json
from collections.abc import Hashable
from typing import Any

import matplotlib.pyplot as plt
import pandas as pd
from matplotlib.figure import Figure

from saeflow.figures import KINDS, STYLE, save_figure
from saeflow.groundtruth.network import HOOKS
from saeflow.job import Job
from saeflow.palette import COLOURS, MARKERS

FIGURES = {"recovery": ("l0", "amount"), "recovery_width": ("d_sae", "d_sae")}
"""By what recovery is drawn, and what dictionaries have in common that are one point of a curve."""
METHODS = {"compiled": "compiled model", "siit": "SIIT", "iit": "IIT", "supervised": "supervised"}


def draw_job(job: Job) -> str:
    """Draws what the `figures` stage of such an experiment asks for. Raises `ValueError` for a figure of another."""
    table = pd.DataFrame([json.loads((f / "summary.json").read_text()) for f in job.inputs("recover")])
    wanted = job.config["figures"]
    if unknown := set(wanted) - set(FIGURES):
        raise ValueError(
            f"an experiment with model=tracr has the figures {', '.join(FIGURES)}, not {', '.join(sorted(unknown))}"
        )
    stable = stability_table(job, table)
    with job.writing() as folder:
        with plt.rc_context(STYLE):
            for name in wanted:
                save_figure(recovery_figure(table, *FIGURES[name]), table, folder, name)
        stable.to_csv(folder / "stability.csv", index=False, float_format="%.6g")
    return f"wrote {', '.join(wanted)} (.png, .pdf, .csv) and stability.csv to {job.path}/"


def stability_table(job: Job, table: pd.DataFrame) -> pd.DataFrame:
    """A row each time that dictionaries differ in nothing but their seed: how far they have the same live latents."""
    from saeflow.dictionaries import load_dictionary
    from saeflow.groundtruth.redundancy import stability

    live = {f.name: pd.read_parquet(f / "labels.parquet")["latent"].to_numpy() for f in job.inputs("recover")}
    recovers = dict(zip((f.name for f in job.inputs("recover")), table["train_key"], strict=True))
    latents = {recovers[name]: rows for name, rows in live.items()}
    same = ["model_key", "hook_name", "hook_name_out", "kind", "activation", "saelens", "amount_name", "amount"]
    table = table[table["part"].isna()]
    found = []
    for names, rows in table.groupby(same, dropna=False):
        if len(rows) > 1:
            decoders = [
                load_dictionary(job.plan.folder("train", key)).tensors["W_dec"].double().numpy()[latents[key]]
                for key in rows["train_key"]
            ]
            found.append(dict(zip(same, names, strict=True)) | {"n": len(rows), "stability": stability(decoders)})
    return pd.DataFrame(found, columns=[*same, "n", "stability"])


def recovery_figure(table: pd.DataFrame, by: str = "l0", point: str = "amount") -> Figure:
    """Recovery and share of mixtures, `by` L0 or width; a colour a model's training, a marker a dictionary kind."""
    table = table.copy()
    table["series"] = [_series(row) for row in table.to_dict("records")]
    hooks = sorted(table["hook_name_out"].unique(), key=_depth)
    series = sorted(table["series"].unique())
    methods = [method for method in METHODS if method in set(table["method"])]
    figure, grid = plt.subplots(2, len(hooks), figsize=(1.9 * len(hooks) + 1.2, 4.0), sharey="row", squeeze=False)
    for column, hook in enumerate(hooks):
        here = table[table["hook_name_out"] == hook]
        for (method, kind), rows in here.groupby(["method", "series"]):
            colour, marker = COLOURS[methods.index(str(method))], MARKERS[series.index(str(kind))]
            means = (
                rows.groupby(point)[list({by, "recovery", "mixtures"} - {point})].mean().reset_index().sort_values(by)
            )
            for axis, value in zip(grid[:, column], ("recovery", "mixtures"), strict=True):
                axis.plot(means[by], means[value], color=colour, linewidth=0.8)
                axis.scatter(rows[by], rows[value], color=colour, marker=marker, s=14, alpha=0.8, zorder=3)
                axis.scatter(rows[by], rows[f"{value}_random"], color="0.6", marker="x", s=10, linewidth=0.7)
        grid[0][column].set_title(f"layer {hook.split('.')[1]}, {hook.split('.')[-1].removeprefix('hook_')}")
        grid[1][column].set_xlabel("L0" if by == "l0" else "latents")
        if by != "l0":
            for axis in grid[:, column]:
                axis.set_xscale("log", base=2)
    grid[0][0].set(ylabel="recovery of true variables", ylim=(-0.03, 1.03))
    grid[1][0].set(ylabel="share of latents\nthat are mixtures", ylim=(-0.03, 1.03))
    figure.tight_layout()
    handles = [plt.Line2D([], [], color=COLOURS[i], label=METHODS[m]) for i, m in enumerate(methods)]
    for i, name in enumerate(series):
        handles.append(plt.Line2D([], [], color="0.2", marker=MARKERS[i], linestyle="", label=name))
    handles.append(plt.Line2D([], [], color="0.6", marker="x", linestyle="", label="random directions"))
    figure.legend(handles=handles, loc="center left", bbox_to_anchor=(1.0, 0.55))
    return figure


def _series(row: dict[Hashable, Any]) -> str:
    if isinstance(row["part"], str):
        return f"Jacobian pair, $\\lambda$ = {row['jacobian_coefficient']:g}"
    if isinstance(row["saelens"], str):
        return f"SAELens {row['saelens']}"
    return KINDS[row["kind"], row["activation"]]


def _depth(hook_name: str) -> tuple[int, int]:
    _, layer, kind = hook_name.split(".")
    return int(layer), HOOKS.index(kind)
