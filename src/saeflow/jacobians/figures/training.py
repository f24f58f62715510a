"""Figures of J while pairs are trained."""

from collections.abc import Hashable
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from saeflow.dictionaries.settings import by_one_width, settings, tell_apart
from saeflow.figures.axes import empty_panel, legend_below, log_axis, subplots
from saeflow.figures.registry import figure
from saeflow.jacobians.figures import studies
from saeflow.jobs.job import Job
from saeflow.models.resources import block_of
from saeflow.training.jacobian_histogram import BINS, EDGES
from saeflow.training.jacobian_histogram import PLACES as AT

PLACES = {"": ("at the input", "-"), "_at_reconstruction": ("at its reconstruction", (0, (3, 1.5)))}
"""Where J is taken: columns of `jacobian.parquet` by their ends, what they are called and how they are drawn."""
IDENTITY = ["panel", "jacobian_coefficient", "seed", "train_key"]
JOINED = 4  # bins of the file in one of the figure
SHOWN = 3  # coefficients of which the histogram is drawn: the least, one between, the largest


def read_training(job: Job) -> pd.DataFrame:
    """One row a logged step of every pair that is trained as one: `jacobian.parquet`, with what identifies the pair.

    Raises `ValueError` where there is none.
    """
    return _read(job, "jacobian")


def read_training_histograms(job: Job) -> pd.DataFrame:
    """One row a step, place and bin that has entries: `jacobian_histogram.parquet`, with what identifies the pair;
    empty where all pairs were trained by releases that logged none. Raises `ValueError` where there are no pairs."""
    return _read(job, "jacobian_histogram")


def _read(job: Job, table: str) -> pd.DataFrame:
    found, about, folders = [], [], [f for f in job.inputs("train") if (f / "jacobian.parquet").is_file()]
    if not folders:
        raise ValueError("the figure jacobian_training needs pairs that are trained as one: use dictionary=jacobian")
    for folder in folders:
        held, hooks = settings(job.plan, "train", folder.name), job.plan.instance("train", folder.name).config
        summary: dict[Hashable, Any] = {name: hooks[name] for name in ("hook_name", "hook_name_out")}
        summary |= {"layer": block_of(hooks["hook_name"]), "randomise": held.get("model.randomise")}
        summary |= {"k": held["dictionary.k"], "d_sae": held.get("dictionary.d_sae")}
        about.append(studies.about_study(summary, held, ""))
        own = {"jacobian_coefficient": held["dictionary.jacobian_coefficient"], "seed": held["seed"]}
        there = (folder / f"{table}.parquet").is_file()
        rows = pd.read_parquet(folder / f"{table}.parquet") if there else pd.DataFrame()
        found.append(rows.assign(train_key=folder.name, **own))
    named = zip(found, tell_apart(by_one_width(about)), strict=True)
    joined = pd.concat([rows.assign(panel=", ".join(said)) for rows, said in named], ignore_index=True)
    return joined[[*IDENTITY, *(column for column in joined if column not in IDENTITY)]]


@figure("jacobian_training", stage="train", reads=read_training)
def jacobian_training(data: pd.DataFrame) -> tuple[Figure, pd.DataFrame]:
    """Mean |J| and the share above 0.01 by training tokens, at the true input and at its reconstruction.

    It is of the first tokens of each logged batch, without intervals. Drawn is the panel with the most coefficients, of
    several seeds the mean; the table has all.
    """
    shown = data[data["panel"] == studies.shown_panel(data)]
    colours = studies.coefficient_colours(shown)
    drawn, axes = subplots(1, 2, figsize=(6.2, 2.6))
    for coefficient, rows in studies.by_coefficient(shown):
        by_tokens = rows.groupby("tokens").mean(numeric_only=True)
        for end, (_, dashes) in PLACES.items():
            style = {"color": colours[coefficient], "linestyle": dashes}
            axes[0].plot(by_tokens.index / 1e3, by_tokens[f"jacobian_l1{end}"], **style)
            axes[1].plot(by_tokens.index / 1e3, 100 * by_tokens[f"jacobian_above_0.01{end}"], **style)
    log_axis(axes[0], "y")
    axes[0].set_ylabel("mean |J|")
    axes[1].set(ylabel="entries with |J| > 0.01 (%)", ylim=(0, 102))
    for axis in axes:
        axis.set_xlabel("tokens (thousands)")
    drawn.suptitle(shown["panel"].iloc[0])
    drawn.tight_layout()
    handles = [Line2D([], [], color=colour, label=studies.label_of(c)) for c, colour in colours.items()]
    handles += [Line2D([], [], color="0.3", linestyle=dashes, label=text) for text, dashes in PLACES.values()]
    legend_below(drawn, handles, columns=4)
    return drawn, data


@figure("jacobian_training_histogram", stage="train", reads=read_training_histograms)
def jacobian_training_histogram(data: pd.DataFrame) -> tuple[Figure, pd.DataFrame]:
    """J with its sign while pairs are trained: its histogram at the last step, on a linear and a logarithmic axis, how
    many |J| exceed a threshold, and the histogram by training tokens.

    It is of the first tokens of a logged batch and of the entries of latents that are above 0, without intervals. Drawn
    is the panel with the most coefficients, at most three of them and of several seeds the mean, as far as 99.9 % of
    the entries of the last step; the table has all. Pairs of releases that logged no histogram have none.
    """
    if data.empty:
        drawn, axis = subplots(figsize=(6.2, 1.2))
        empty_panel(axis, "These pairs were trained by a release that logged no histogram.")
        return drawn, data
    table = data.assign(count_per_token=data["count"] / data["of_tokens"])
    shown = table[table["panel"] == studies.shown_panel(table)]
    every = studies.coefficient_colours(shown)
    few = [list(every)[n] for n in np.unique(np.linspace(0, len(every) - 1, SHOWN).round().astype(int))]
    drawn = Figure(figsize=(7.6, 4.8), layout="constrained")
    parts: Any = drawn.subfigures(2, 1)
    upper, lower = parts
    linear, logarithmic, exceeding = upper.subplots(1, 3)
    maps = lower.subplots(1, len(few), squeeze=False)[0]
    edges, zero, most = EDGES[1:-1], BINS, 0.0
    coarse = edges[::JOINED]
    for coefficient in few:
        rows = shown[shown["jacobian_coefficient"] == coefficient]
        last = rows[rows["step"] == rows["step"].max()]
        for at, (_, dashes) in zip(AT, PLACES.values(), strict=True):
            counts = _by_bin(last[last["at"] == at])
            above = (counts[zero + 1 :] + counts[zero::-1])[::-1].cumsum()[::-1]  # by the left edge of |J|'s bins
            style = {"color": every[coefficient], "linestyle": dashes}
            for axis in (linear, logarithmic):
                axis.stairs(_joined(counts), coarse, **style)
            exceeding.plot(edges[zero:], np.where(above > 0, above, np.nan), **style)
            most = max(most, *edges[zero:][above > 1e-3 * above[0]] + edges[1] - edges[0])
    scale = LogNorm(1 / shown["of_tokens"].max(), JOINED * shown["count_per_token"].max())
    for axis, coefficient in zip(maps, few, strict=True):
        rows = shown[(shown["jacobian_coefficient"] == coefficient) & (shown["at"] == AT[0])]
        by_step = {tokens: _joined(_by_bin(of_step)) for tokens, of_step in rows.groupby("tokens")}
        image = np.ma.masked_equal(np.stack(list(by_step.values()), axis=1), 0)
        ends = np.concatenate([[0], np.array(list(by_step)) / 1e3])
        mesh = axis.pcolormesh(ends, coarse, image, norm=scale, cmap="viridis_r", rasterized=True)
        axis.set(title=f"{studies.label_of(coefficient)}, {PLACES[''][0]}", xlabel="tokens (thousands)")
        axis.set_ylim(-most, most)
    for axis in (linear, logarithmic):
        axis.set(xlabel="J", xlim=(-most, most))
    per = f"entries per token\nand {coarse[1] - coarse[0]:.2g} of J"
    linear.set_ylabel(per)
    logarithmic.set_yscale("log")
    exceeding.set(xlabel="threshold", xlim=(0, most), ylabel="entries per token\nwith |J| above it")
    log_axis(exceeding, "y")
    maps[0].set_ylabel("J")
    lower.colorbar(mesh, ax=list(maps), label=per)
    drawn.suptitle(shown["panel"].iloc[0])
    handles = [Line2D([], [], color=every[c], label=studies.label_of(c)) for c in few]
    handles += [Line2D([], [], color="0.3", linestyle=dashes, label=text) for text, dashes in PLACES.values()]
    legend_below(drawn, handles, columns=5)
    return drawn, table


def _joined(counts: np.ndarray) -> np.ndarray:
    """Of `_by_bin` the bins within the edges, `JOINED` in one: 128 tokens leave single ones ragged."""
    return counts[1:-1].reshape(-1, JOINED).sum(1)


def _by_bin(rows: pd.DataFrame) -> np.ndarray:
    """Entries per token in each of all bins, the outer ones included: of one step and place, the mean over seeds."""
    bins = np.searchsorted(EDGES, rows["bin_left"])
    return np.bincount(bins, rows["count_per_token"], len(EDGES) - 1) / max(rows["train_key"].nunique(), 1)
