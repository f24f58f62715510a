"""Figures of latents: their heads' shares, their decomposition in single heads' atoms, their attribution."""

from typing import Any

import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch

from saeflow.figures.axes import empty_panel, labelled, legend_below, log_axis, matrix_axis, panels
from saeflow.figures.registry import figure
from saeflow.figures.style import COLOURS, MARKERS, colours
from saeflow.heads.decomposition import METHODS
from saeflow.heads.figures.shared import NULL, concat, identified, of_dictionaries, read_heads, shown_rows
from saeflow.heads.folder import HeadStudy
from saeflow.heads.shares import AGREEING, MEASURES

NAMES = {
    "decoder": "decoder",
    "decoder_squared": "decoder²",
    "encoder": "encoder",
    "lifted": "after W_O",
    "dfa": "attribution",
    "dfa_centred": "attribution,\ncentred",
}
METHOD_NAMES = {"pseudo_inverse": "pseudo-inverse", "omp": "OMP", "nn_omp": "OMP, ≥ 0", "nn_lasso": "lasso, ≥ 0"}
DICTIONARIES = {"own": "own head's dictionary", "other_head": "another head's", "random": "random atoms"}
HATCHES = ("", "////", "....", "\\\\\\\\", "xxxx")
DISTANCES = {"the same": (0, 0), "1 back": (1, 1)}
DISTANCES |= {f"{low} to {2 * low - 1}": (low, 2 * low - 1) for low in (2, 4, 8, 16, 32, 64)}
DISTANCES |= {"128 and more": (128, 10**9)}


@figure("heads_shares", stage="heads", reads=read_heads)
def shares(studies: list[HeadStudy]) -> tuple[Figure, pd.DataFrame]:
    """Mean share of each head by every measure, one panel a dictionary of all heads: the "head 5" question."""
    most = min(3, max((len(study.of_kind("concat")) for study in studies), default=0))
    figure, grid = panels(len(studies), max(1, most), width=3.4, sharey="row")
    for line, study in zip(grid, studies, strict=True):
        keys = study.of_kind("concat")
        shown = [keys[i] for i in np.unique(np.linspace(0, len(keys) - 1, most).round().astype(int))] if keys else []
        if not shown:
            empty_panel(line[0], "no dictionary of all heads")
        for axis in line[max(1, len(shown)) :]:
            axis.set_axis_off()
        for axis, key in zip(line, shown, strict=False):
            dataset = study.dataset("measures", key)
            n_heads = dataset.sizes["head"]
            width = 0.84 / n_heads
            for head in range(n_heads):
                at = np.arange(len(MEASURES)) + (head - (n_heads - 1) / 2) * width
                axis.bar(at, 100 * dataset["mean_share"].sel(head=head), 0.92 * width, **_bar(head, n_heads))
            axis.axhline(0, color="0.35", linewidth=0.8)
            axis.axhline(100 / n_heads, color="0.35", linewidth=0.8, linestyle=":")
            axis.set_xticks(range(len(MEASURES)), [NAMES[m] for m in MEASURES], rotation=40, ha="right")
            axis.set_title(f"{study.name}: {study.label(key)}")
        line[0].set_ylabel("mean share of a head (%)")
    figure.tight_layout()
    n_heads = max((study.summary["n_heads"] for study in studies), default=0)
    bars = [Patch(label=f"head {head}", **_bar(head, n_heads)) for head in range(n_heads)]
    legend_below(figure, [*bars, Line2D([], [], color="0.35", linestyle=":", label="equal shares")])
    of_head = ["mean_share", "top_share"]
    return figure, of_dictionaries(studies, "concat", lambda study, key: study.dataset("measures", key)[of_head])


def _bar(head: int, n_heads: int) -> dict[str, Any]:
    """The look of a head's bars, which differ in grey too."""
    hatch = HATCHES[head % len(HATCHES)]
    return {"facecolor": colours(n_heads)[head], "edgecolor": "white", "linewidth": 0, "hatch": hatch}


@figure("heads_measures", stage="heads", reads=read_heads)
def measures(studies: list[HeadStudy]) -> tuple[Figure, pd.DataFrame]:
    """Do the measures order heads alike? Spearman's rank correlation, and how often the top head is the same."""
    figure, grid = panels(len(studies), 2, width=3.7, height=3.1)
    labels = [NAMES[m].replace("\n", " ") for m in AGREEING]
    for (left, right), study, key in shown_rows(studies, grid, "concat", without="no dictionary of all heads"):
        dataset = study.dataset("measures", key)
        by_chance = f"same top head (by chance {dataset.attrs['chance_of_top']:.2f})"
        for axis, name, title, low in (
            (left, "rank_correlation", "rank correlation over heads", -1.0),
            (right, "top_agreement", by_chance, 0.0),
        ):
            values = dataset[name].values
            image = axis.imshow(values, cmap="RdBu_r" if low else "Blues", vmin=low, vmax=1)
            for i, j in np.ndindex(values.shape):
                colour = "white" if abs(values[i, j]) > 0.6 else "black"
                axis.text(j, i, f"{values[i, j]:.2f}", ha="center", va="center", fontsize=7, color=colour)
            axis.set_xticks(range(len(labels)), labels, rotation=40, ha="right")
            axis.set_yticks(range(len(labels)), labels)
            matrix_axis(axis)
            axis.set_title(title)
            figure.colorbar(image, ax=axis, shrink=0.75)
        right.set_yticks([])
        left.set_ylabel(f"{study.name}: {study.label(key)}", fontsize=7)
    figure.tight_layout()
    between = ["rank_correlation", "top_agreement"]
    return figure, of_dictionaries(studies, "concat", lambda study, key: study.dataset("measures", key)[between])


@figure("heads_decomposition", stage="heads", reads=read_heads)
def decomposition(studies: list[HeadStudy]) -> tuple[Figure, pd.DataFrame]:
    """Residual against number of atoms by method, in the heads' own dictionaries and in both nulls; above each latent's
    top head, below all heads at once. Lines are medians over latents, bands quartiles."""
    parts = {"top_head": "top head's part", "all_heads": "all heads at once"}
    figure, grid = panels(2 * len(studies), len(METHODS), width=2.0, height=2.1, sharex=True, sharey=True)
    by_study, file = grid.reshape(len(studies), -1), "curves.parquet"
    for both, study, key in shown_rows(studies, by_study, "concat", without="nothing decomposed", file=file):
        held = study.table("curves", key)
        for line, (of, name) in zip(both.reshape(2, -1), parts.items(), strict=True):
            for axis, method in zip(line, METHODS, strict=True):
                for i, dictionary in enumerate(DICTIONARIES):
                    mine = held[(held["of"] == of) & (held["method"] == method) & (held["dictionary"] == dictionary)]
                    colour = NULL if dictionary == "random" else COLOURS[i]
                    axis.fill_between(mine["n_atoms"], mine["low"], mine["high"], color=colour, alpha=0.2, linewidth=0)
                    axis.plot(mine["n_atoms"], mine["median"], color=colour, marker=MARKERS[i], markersize=2.5)
                if axis.get_subplotspec().is_first_row():
                    axis.set_title(METHOD_NAMES[method])
                axis.set_ylim(0, 1)
            line[0].set_ylabel(f"{study.name}, {name}\nrelative residual")
    for axis in grid[-1]:
        axis.set_xlabel("atoms")
    figure.tight_layout()
    handles = [
        Line2D([], [], color=NULL if d == "random" else COLOURS[i], marker=MARKERS[i], label=label)
        for i, (d, label) in enumerate(DICTIONARIES.items())
    ]
    legend_below(figure, handles, note="lines: medians over latents; bands: quartiles")
    return figure, of_dictionaries(studies, "concat", lambda study, key: study.table("curves", key), file)


@figure("heads_coefficients", stage="heads", reads=read_heads)
def coefficients(studies: list[HeadStudy]) -> tuple[Figure, pd.DataFrame]:
    """All coefficients of the pseudo-inverse, as notebook 001 wants them drawn: of one latent on its top head, and
    of all, each over the norm of the latent's part there, the largest first (median over latents, quartiles)."""
    figure, grid = panels(len(studies), 2, width=3.4)
    tables, file = [], "coefficients.zarr"
    rows = shown_rows(studies, grid, "concat", without="nothing decomposed", file=file, once=True)
    for (left, right), study, key in rows:
        dataset = study.dataset("coefficients", key)
        top = dataset["size"].argmax("head")
        shares = (dataset["coefficient"] / dataset["size"]).isel(head=top)
        first = shares.isel(latent=0)
        latent, head = int(first["latent"]), int(first["head"])
        atoms = dataset["atom"].values
        left.vlines(atoms, 0, first, color=COLOURS[0], linewidth=0.6)
        left.axhline(0, color="0.35", linewidth=0.6)
        left.set(xlabel=f"atom of head {head}", ylabel=f"{study.name}\ncoefficient / norm", title=f"latent {latent}")
        low, median, high = np.quantile(-np.sort(-np.abs(shares.values), axis=1), [0.25, 0.5, 0.75], axis=0)
        right.fill_between(atoms + 1, low, high, color=COLOURS[0], alpha=0.2, linewidth=0)
        right.plot(atoms + 1, median, color=COLOURS[0])
        right.set(xlabel="rank of the atom", ylabel="|coefficient| / norm", title=study.label(key), ylim=(0, None))
        log_axis(right, "x")
        right.set_xticks([10**power for power in range(len(str(len(atoms))))])
        columns = {"rank": atoms + 1, "low": low, "median": median, "high": high, "latent": latent, "head": head}
        tables.append(identified(pd.DataFrame(columns | {"atom": atoms, "coefficient": first}), study, key))
    figure.tight_layout()
    return figure, concat(tables)


@figure("heads_agreement", stage="heads", reads=read_heads)
def agreement(studies: list[HeadStudy]) -> tuple[Figure, pd.DataFrame]:
    """Do a latent and the atoms that it decomposes into fire alike? By order of the atom, beside the average atom of
    its head and the best of all."""
    figure, grid = panels(len(studies), 2, width=3.2)
    file, labels = (
        "agreement.parquet",
        {"correlation": "correlation of activations", "jaccard": "Jaccard index of firing"},
    )
    for line, study, key in shown_rows(studies, grid, "concat", without="nothing decomposed", file=file):
        held = study.table("agreement", key)
        for axis, (name, label) in zip(line, labels.items(), strict=True):
            by_rank = held.groupby("rank")[name].quantile(np.array([0.25, 0.5, 0.75])).unstack()
            axis.fill_between(by_rank.index, by_rank[0.25], by_rank[0.75], color=COLOURS[0], alpha=0.2, linewidth=0)
            axis.plot(by_rank.index, by_rank[0.5], color=COLOURS[0], marker="o", label="the atom: median, quartiles")
            others = held.groupby("rank")[f"{name}_mean_of_head"].median()
            under = {"color": NULL, "marker": "s", "markersize": 2.5, "zorder": 1.5}
            axis.plot(others.index, others, label="average atom of its head", **under)
            best = held.drop_duplicates("latent")[f"{name}_best"].median()
            axis.axhline(best, color=COLOURS[1], linestyle="--", label="best of all atoms, median")
            axis.set(xlabel="order of the atom in the decomposition", ylabel=label)
            axis.set_title(f"{study.name}: {study.label(key)}")
            axis.set_ylim(min(0.0, float(by_rank.min().min())), None)
            ranks = list(by_rank.index)
            axis.set_xticks(ranks if len(ranks) <= 8 else [1, *range(4, ranks[-1] + 1, 4)])
    figure.tight_layout()
    legend_below(figure, labelled(figure.axes[:1]), columns=3)
    return figure, of_dictionaries(studies, "concat", lambda study, key: study.table("agreement", key), file)


@figure("heads_attribution", stage="heads", reads=read_heads)
def attribution(studies: list[HeadStudy]) -> tuple[Figure, pd.DataFrame]:
    """Direct feature attribution of the latents shown in the dashboards, at their strongest tokens: what each head
    gives to each latent, and from how far back."""
    figure, grid = panels(len(studies), 2, width=3.7, height=3.0, width_ratios=[1, 1.25])
    tables = []
    rows = shown_rows(studies, grid, "concat", without="nothing attributed", file="attribution.parquet", once=True)
    for (left, right), study, key in rows:
        held = study.table("attribution", key)
        sums = held.groupby(["latent", "context", "head"])["attribution"].sum()
        shares = sums / sums.abs().groupby(["latent", "context"]).transform("sum")
        by_head = shares.groupby(["latent", "head"]).mean()
        wide = by_head.unstack()
        image = left.imshow(wide, cmap="RdBu_r", vmin=-1, vmax=1, aspect="auto")
        left.set_yticks(range(len(wide)), wide.index)
        left.set_xticks(range(wide.shape[1]), wide.columns)
        left.set(xlabel="head", ylabel="latent", title=f"{study.name}: share of the attribution")
        left.spines[:].set_visible(False)
        figure.colorbar(image, ax=left)
        distance = _by_distance(held)
        tables += [
            identified(by_head.rename("value").reset_index().assign(of="head"), study, key),
            identified(distance.assign(of="distance"), study, key),
        ]
        by_distance = distance.pivot(index="distance", columns="head", values="value").fillna(0)
        names = list(dict.fromkeys(distance["distance"]))
        bottom = np.zeros(len(names))
        for head, colour in enumerate(colours(study.summary["n_heads"])):
            values = by_distance.loc[names, head].to_numpy()
            right.bar(np.arange(len(names)), 100 * values, 0.8, bottom=100 * bottom, color=colour, label=f"head {head}")
            bottom += values
        right.set_xticks(range(len(names)), names, rotation=40, ha="right")
        right.set(xlabel="source token", ylabel="share of |attribution| (%)", title=study.label(key))
        right.legend(ncols=2)
    figure.tight_layout()
    return figure, concat(tables)


def _by_distance(held: pd.DataFrame) -> pd.DataFrame:
    """Share of |attribution| by distance of the source and head; position 0 by itself."""
    back = held["position"] - held["source"]
    label = pd.Series("", index=held.index)
    for name, (low, high) in DISTANCES.items():
        label[(back >= low) & (back <= high)] = name
    label[held["source"] == 0] = "position 0"
    size = held["attribution"].abs().groupby([label, held["head"]]).sum()
    table = (size / size.sum()).rename("value").rename_axis(["distance", "head"]).reset_index()
    order = [*DISTANCES, "position 0"]
    return table.sort_values("distance", key=lambda c: c.map(order.index), kind="stable").reset_index(drop=True)
