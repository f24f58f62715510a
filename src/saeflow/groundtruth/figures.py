"""The figures of an experiment on models whose algorithm is known, in the style of all others."""

from collections.abc import Iterator
from typing import Any, NamedTuple

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from saeflow.dictionaries import load_dictionary
from saeflow.dictionaries.naming import hook_title
from saeflow.dictionaries.series import natural, ordered_series, with_names
from saeflow.dictionaries.settings import Settings, read_summaries, tell_apart
from saeflow.figures.axes import log_axis, subplots
from saeflow.figures.registry import figure
from saeflow.figures.style import colours, track
from saeflow.groundtruth.network import HOOKS
from saeflow.groundtruth.recovery import stability
from saeflow.jobs.job import Job

_IDENTITY = ["place", "hook_name_out", "case", "method", "model", "model_seed", "series", "amount_name", "amount"]
_IDENTITY += ["d_sae", "seed", "train_key", "part"]
_NOT_OF_MODEL = ("tracr.case", "tracr.method", "tracr.seed")
RANGED = ("l0", "fvu", "n_live", "n_distinct", "states_identified", "recovery", "mixtures", "accuracy_replaced")
"""What is told with the range over seeds."""
_CEILING, _BEST = "jacobian_cosine_directions", "pair of the program's own directions"
_DASHES_OF_BEST: Any = (0, (4, 1, 1, 1, 1, 1))
METHODS = {"compiled": "compiled model", "siit": "SIIT", "iit": "IIT", "supervised": "supervised"}


class Recoveries(NamedTuple):
    """What dictionaries find of known algorithms."""

    table: pd.DataFrame
    """One row a dictionary: its `summary.json`, and its `settings`."""
    stability: pd.DataFrame
    """See `stability_table`."""
    states: list[pd.DataFrame]
    """`states.parquet` of each row of the table."""

    @property
    def extra_tables(self) -> dict[str, pd.DataFrame]:
        """All metrics of all dictionaries, ranges over seeds, and how far dictionaries of several seeds agree."""
        ranges = ranges_table(self.table)
        return {
            "recoveries": self.table.drop(columns="settings"), "recovery_ranges": ranges, "stability": self.stability,
        }  # fmt: skip


def read_recoveries(job: Job) -> Recoveries:
    table = read_summaries(job, "recover")
    states = [pd.read_parquet(f"{folder}/states.parquet") for folder in table["folder"]]
    return Recoveries(table.drop(columns="folder"), stability_table(job, table), states)


def stability_table(job: Job, table: pd.DataFrame) -> pd.DataFrame:
    """A row each time that dictionaries differ in nothing but their seed: how far they have the same live latents."""
    live = (pd.read_parquet(f"{folder}/labels.parquet")["latent"].to_numpy() for folder in table["folder"])
    trained = {folder.name: folder for folder in job.inputs("train")}
    latents = dict(zip(table["train_key"], live, strict=True))
    same = ["model_key", "hook_name", "hook_name_out", "kind", "activation", "saelens", "amount_name", "amount"]
    whole = table[table["part"].isna()]
    found = []
    for _, rows in with_names(whole.assign(given=whole["amount_name"])).groupby(
        ["place", "series", "point"], sort=False
    ):
        if len(rows) > 1:
            decoders = [
                load_dictionary(trained[key]).tensors["W_dec"].double().numpy()[latents[key]]
                for key in rows["train_key"]
            ]
            names = rows.iloc[0][[*same, "series"]].to_dict() | {"amount_name": rows["given"].iloc[0]}
            found.append(names | {"n": len(rows), "stability": stability(decoders)})
    return pd.DataFrame(found, columns=[*same, "series", "n", "stability"])


def ranges_table(table: pd.DataFrame) -> pd.DataFrame:
    """A row a place, model, series, amount and width: how many dictionaries, which differ in seeds alone, of their own
    or of their models, and of each of `RANGED` the mean, the least (`_low`) and the largest (`_high`)."""
    named = _with_names(table, "amount").astype(dict.fromkeys(RANGED, float))
    names = ["place", "model", "series", "amount_name", "amount", "d_sae"]
    groups = named.groupby([*names, "point"], sort=False, dropna=False)
    found = groups.size().rename("n").to_frame()
    for name in RANGED:
        found[[name, f"{name}_low", f"{name}_high"]] = groups[name].agg(["mean", "min", "max"])
    return found.reset_index().drop(columns="point")


@figure("recovery", stage="recover", reads=read_recoveries)
def recovery(data: Recoveries) -> tuple[Figure, pd.DataFrame]:
    """How well one latent for each true feature has it, between random directions (0) and the truth (1), and the share
    of latents that are mixtures, by L0.

    One column a hook. On the compiled model what latents write counts too.
    """
    return _recovery(data, "l0", "amount")


@figure("recovery_width", stage="recover", reads=read_recoveries)
def recovery_width(data: Recoveries) -> tuple[Figure, pd.DataFrame]:
    """How well one latent for each true feature has it, between random directions (0) and the truth (1), and the share
    of latents that are mixtures, by the number of latents.

    One column a hook. On the compiled model what latents write counts too.
    """
    return _recovery(data, "d_sae", "d_sae")


def _recovery(data: Recoveries, by: str, along: str) -> tuple[Figure, pd.DataFrame]:
    """Dictionaries and models that differ in their seeds alone are one point of a curve that is `along` the amount or
    the width."""
    table = _with_names(data.table, along).astype({"recovery": float, "mixtures": float, "mixtures_random": float})
    places = list(dict.fromkeys(table["place"]))
    figure, grid = subplots(2, len(places), figsize=(1.9 * len(places) + 1.2, 4.0), sharey="row", squeeze=False)
    for column, place in enumerate(places):
        for style, rows in _groups(table, table["place"] == place):
            for axis, value in zip(grid[:, column], ("recovery", "mixtures"), strict=True):
                _draw_curve(axis, rows, by, value, style)
            null = {"color": style["color"], "marker": "x", "s": 10, "linewidth": 0.7, "alpha": 0.6}
            grid[1][column].scatter(rows[by], rows["mixtures_random"], **null)
        grid[0][column].axhline(0, color="0.6", linewidth=0.8, zorder=0)
        grid[0][column].set_title(place.replace(", case", "\ncase"))
        grid[1][column].set_xlabel("L0" if by == "l0" else "latents")
        for axis in grid[:, column]:
            if by != "l0":
                axis.set_xscale("log", base=2)
            else:
                _not_too_near(axis)
    lowest = min(0.0, float(table["recovery"].min()))
    grid[0][0].set(ylabel="recovery of true features\n(0: random directions)", ylim=(lowest - 0.03, 1.03))
    grid[1][0].set(ylabel="share of latents\nthat are mixtures", ylim=(-0.03, 1.03))
    figure.tight_layout()
    crosses = "as many random directions,\nin the colour of the model"
    _key(figure, table, Line2D([], [], color="0.6", marker="x", linestyle="", label=crosses))
    shown = [
        "l0",
        "fvu",
        "recovery",
        "recovery_raw",
        "recovery_random",
        "decoder_cosine",
        "mixtures",
        "mixtures_random",
    ]
    return figure, table[[*_IDENTITY, *shown]]


@figure("true_jacobian", stage="recover", reads=read_recoveries)
def true_jacobian(data: Recoveries) -> tuple[Figure, pd.DataFrame]:
    """How far the derivative of what stands in for an MLP is the MLP's, by L0 and by how well the MLP's output is
    explained."""
    table = data.table[data.table["jacobian_cosine"].notna()]
    if table.empty:
        raise ValueError("figure true_jacobian needs transcoders or Jacobian pairs around an MLP: use tracr_mlp")
    table = _with_names(table, "amount")
    if _CEILING not in table:  # which only compiled models have
        table[_CEILING] = float("nan")
    places = list(dict.fromkeys(table["place"]))
    figure, grid = subplots(len(places), 2, figsize=(5.4, 2.3 * len(places) + 0.3), sharey=True, squeeze=False)
    for axes, place in zip(grid, places, strict=True):
        for style, rows in _groups(table, table["place"] == place):
            for axis, by in zip(axes, ("l0", "fvu"), strict=True):
                _draw_curve(axis, rows, by, "jacobian_cosine", style)
        axes[0].set(ylabel="cosine of the Jacobian\nwith the true one", ylim=(-0.03, 1.03))
        axes[0].set_title(f"MLP of {place.replace(', mlp_out', '')}")
        log_axis(axes[1], "x")
        _not_too_near(axes[0])
        _draw_best(axes, table[table["place"] == place])
    grid[-1][0].set_xlabel("L0")
    grid[-1][1].set_xlabel("unexplained variance of the MLP's output")
    figure.tight_layout()
    best = [Line2D([], [], color="0.2", linestyle=_DASHES_OF_BEST, linewidth=0.8, label=_BEST)]
    _key(figure, table, *(best if table[_CEILING].notna().any() else []))
    return figure, table[[*_IDENTITY, "l0", "fvu", "jacobian_cosine", _CEILING]]


def _draw_best(axes: Any, table: pd.DataFrame) -> None:
    """Of each model what the pair of its program's own directions reaches."""
    models = _models(table)
    for model, values in table.groupby("model")[_CEILING]:
        for axis in axes if values.notna().any() else ():
            colour = colours(len(models))[models.index(str(model))]
            axis.axhline(values.dropna().iloc[0], color=colour, linestyle=_DASHES_OF_BEST, linewidth=0.8)


def _not_too_near(axis: Axes) -> None:
    """Lets points at nearly one L0 look so."""
    low, high = axis.get_xlim()
    if high - low < (spread := 0.4 * (high + low) / 2):
        axis.set_xlim((low + high - spread) / 2, (low + high + spread) / 2)


@figure("latents_by_state", stage="recover", reads=read_recoveries)
def latents_by_state(data: Recoveries) -> tuple[Figure, pd.DataFrame]:
    """When each latent fires: its mean activation in every state of the program, relative to its largest.

    One row a model, one column a hook, of each the first dictionary. Latents are sorted by the state in which they are
    most active; a latent that stands for one state is one dark cell, one that stands for a token or a position several.
    States in which none fires are left out.
    """
    named = _with_names(data.table.assign(number=range(len(data.table))), "amount")
    firsts = named.groupby(["model", "place"], sort=False).first().reset_index()
    places, models = list(dict.fromkeys(firsts["place"])), _models(named)
    sizes = [max(int(firsts[firsts["model"] == m]["n_live"].max()), 8) for m in models]
    widths = [max(int(firsts[firsts["place"] == p]["n_states"].max()), 4) + 6 for p in places]
    figure, grid = subplots(
        len(models), len(places), squeeze=False, width_ratios=widths, height_ratios=sizes,
        figsize=(0.6 + 0.11 * sum(widths), 0.9 + 0.055 * sum(sizes) + 0.6 * len(models)),
    )  # fmt: skip
    found = []
    for (model, place), rows in firsts.groupby(["model", "place"], sort=False):
        axis, states = (
            grid[models.index(str(model))][places.index(str(place))],
            data.states[int(rows["number"].iloc[0])],
        )
        table = states.pivot_table(index="latent", columns="state", values="mean", fill_value=0.0)
        shown = (table.T / table.max(axis=1)).T
        shown = shown.loc[shown.assign(most=shown.to_numpy().argmax(axis=1)).sort_values("most", kind="stable").index]
        axis.imshow(shown.to_numpy(), cmap="Greys", vmin=0, vmax=1, aspect="auto", interpolation="nearest")
        names = states.drop_duplicates("state").set_index("state")["name"]
        axis.set_xticks(range(len(shown.columns)), [names[s] for s in shown.columns], rotation=90, fontsize=5)
        axis.set_yticks([])
        axis.set_title(f"{place}\n{model}", fontsize=7)
        axis.set_ylabel(f"{len(shown)} latents", fontsize=6)
        found.append(states.assign(model=str(model), place=str(place), train_key=str(rows["train_key"].iloc[0])))
    for axis in grid.flat:
        axis.set_visible(axis.has_data())
    figure.supxlabel("state; shade: mean activation there, from 0 (white) to the latent's largest (black)", fontsize=7)
    figure.tight_layout()
    return figure, pd.concat(found)[["model", "place", "train_key", "latent", "state", "name", "mean", "share"]]


def _with_names(table: pd.DataFrame, along: str) -> pd.DataFrame:
    """What `with_names` gives, but models are told apart by colours: `place` is the hook, and the case where there are
    several, and `model` says how a model was made, but for its seed."""
    held: list[Settings] = list(table["settings"]) if "settings" in table else [{}] * len(table)
    methods = [METHODS[str(method)] for method in table["method"]]
    models = list(methods)
    for method in dict.fromkeys(methods):  # a compiled model has none of the settings of one that was trained
        mine = [n for n, one in enumerate(methods) if one == method]
        made = [{p: v for p, v in held[n].items() if p.startswith("tracr.") and p not in _NOT_OF_MODEL} for n in mine]
        for n, said in zip(mine, tell_apart(made), strict=True):
            models[n] = ", ".join([method, *said])
    named = with_names(table.assign(model=models), along)
    several = named["case"].nunique() > 1
    places = [
        hook_title(str(hook)) + (f", case {case}" if several else "")
        for hook, case in zip(named["hook_name_out"], named["case"], strict=True)
    ]
    depth = [(case, _depth(str(hook))) for case, hook in zip(named["case"], named["hook_name_out"], strict=True)]
    return named.assign(place=places).iloc[sorted(range(len(named)), key=depth.__getitem__)]


def _groups(table: pd.DataFrame, some: pd.Series) -> Iterator[tuple[dict[str, Any], pd.DataFrame]]:
    """Colour of a model, dashes and marker of a series of dictionaries; rows."""
    models, series = _models(table), ordered_series(table)
    for (model, name), rows in table[some].groupby(["model", "series"], sort=False):
        colour = colours(len(models))[models.index(str(model))]
        yield {"color": colour, **track(series.index(str(name)))}, rows


def _models(table: pd.DataFrame) -> list[str]:
    order = list(METHODS.values())
    return sorted(table["model"].unique(), key=lambda name: (order.index(name.split(", ")[0]), natural(name)))


def _draw_curve(axis: Axes, rows: pd.DataFrame, by: str, value: str, style: dict[str, Any]) -> None:
    """A curve through the means of the rows that differ in seeds alone, and all rows."""
    means = rows.groupby("point")[[by, value]].mean().sort_values(by)
    axis.plot(means[by], means[value], color=style["color"], linestyle=style["linestyle"], linewidth=0.8)
    dots = {"color": style["color"], "marker": style["marker"]}
    axis.scatter(rows[by], rows[value], s=14, alpha=0.8, zorder=3, **dots)


def _key(figure: Figure, table: pd.DataFrame, *more: Line2D) -> None:
    models = _models(table)
    handles = [Line2D([], [], color=c, label=m) for m, c in zip(models, colours(len(models)), strict=True)]
    joined = table.groupby(["place", "model", "series"])["point"].nunique().max() > 1
    for n, name in enumerate(ordered_series(table)):
        handles.append(Line2D([], [], color="0.2", label=name, **track(n) | ({} if joined else {"linestyle": ""})))
    note = "marks: every seed" + ("; lines: means over seeds" if joined else "")
    place = {"loc": "center left", "bbox_to_anchor": (1.0, 0.55)}
    figure.legend(handles=[*handles, *more], title=note, title_fontsize=7, **place)


def _depth(hook_name: str) -> tuple[int, int]:
    _, layer, kind = hook_name.split(".")
    return int(layer), HOOKS.index(kind)
