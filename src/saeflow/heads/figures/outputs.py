"""Figures of what heads write: geometry, cosines, interference, the loss without cross terms. A row for each layer."""

from typing import Any

import numpy as np
import pandas as pd
import xarray as xr
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch

from saeflow.figures.axes import empty_panel, labelled, legend_below, log_axis, panels, subplots
from saeflow.figures.registry import figure
from saeflow.figures.style import COLOURS, colours, track
from saeflow.heads.cross_terms import MODEL, NO_HEADS
from saeflow.heads.figures.shared import (
    NULL,
    head_legend,
    of_dictionaries,
    of_studies,
    pair_names,
    read_heads,
    shown_rows,
)
from saeflow.heads.folder import HeadStudy
from saeflow.heads.interference import lifted_medians

WAYS = {
    "orthogonal": "heads made orthogonal",
    "others": "projection on the\nother heads' sum removed",
    "row_spaces": "projection on the other\nheads' row spaces removed",
}
TOP_PAIRS = 12
BOX = {0.05: "whislo", 0.25: "q1", 0.5: "med", 0.75: "q3", 0.95: "whishi"}


@figure("heads_norms", stage="heads", reads=read_heads)
def norms(studies: list[HeadStudy]) -> tuple[Figure, pd.DataFrame]:
    """Norms of decoder rows as trained, by head, one panel a dictionary; folded, all of them are 1."""
    most = max((len(study.of_kind("heads")) for study in studies), default=0)
    figure, grid = panels(len(studies), min(4, max(1, most)), sharex="row", sharey="row")
    for line, study in zip(grid, studies, strict=True):
        keys = study.of_kind("heads")
        dataset = {key: study.dataset("norms", key) for key in keys}
        top = max((float(np.quantile(one["decoder_norm"], 0.995)) for one in dataset.values()), default=1.0)
        edges = np.linspace(0, 1.05 * max(top, 1), 41)
        for axis in line[len(keys) :]:
            axis.set_axis_off()
        for axis, (key, one) in zip(line, dataset.items(), strict=False):
            for head, colour in enumerate(colours(one.sizes["head"])):
                values = one["decoder_norm"].sel(head=head).values
                axis.stairs(np.histogram(np.minimum(values, edges[-1]), edges)[0], edges, color=colour)
            axis.axvline(1, color="0.35", linestyle="--", linewidth=1)
            mean = float(one["decoder_norm"].mean())
            axis.set(xlabel="norm of a decoder row (last bin: and above)")
            axis.set_title(f"{study.name}: {study.label(key)}\nmean norm {mean:.2f}")
        line[0].set_ylabel("latents of a head")
    figure.tight_layout()
    head_legend(figure, studies, Line2D([], [], color="0.35", linestyle="--", label="all, once folded"))
    return figure, of_dictionaries(studies, "heads", lambda study, key: study.dataset("norms", key))


@figure("heads_spectra", stage="heads", reads=read_heads)
def spectra(studies: list[HeadStudy]) -> tuple[Figure, pd.DataFrame]:
    """Singular values of D_h, W_O[h] and D_h W_O[h] over the largest of each, by head."""
    titles = {"D": "dictionary D", "W_O": "output weights W_O", "D_W_O": "D W_O: atoms in the stream"}
    figure, grid = panels(len(studies), 3, sharey="row")
    for line, study, key in shown_rows(studies, grid, "heads", without="no dictionaries of heads"):
        dataset = study.dataset("spectra", key)
        lowest = 1.0
        for axis, (matrix, title) in zip(line, titles.items(), strict=True):
            ranks = dataset["rank"].sel(matrix=matrix).values
            for head, colour in enumerate(colours(dataset.sizes["head"])):
                values = dataset["singular_value"].sel(matrix=matrix, head=head).values
                values = values[: int(ranks[head])] / values[0]
                axis.plot(np.arange(1, len(values) + 1), values, color=colour)
                lowest = min(lowest, values[-1])
            rank_text = f"rank {ranks.min()}" + (f" to {ranks.max()}" if ranks.min() < ranks.max() else "")
            axis.set(xlabel="index", title=f"{title}: {rank_text} of {dataset.attrs['d_head']}", yscale="log")
        line[0].set_ylabel(f"{study.name}\nsingular value / largest")
        if lowest > 0.1:
            line[0].set_ylim(0.08, 1.2)
    figure.tight_layout()
    head_legend(figure, studies)
    return figure, of_dictionaries(studies, "heads", lambda study, key: study.dataset("spectra", key))


@figure("heads_angles", stage="heads", reads=read_heads)
def angles(studies: list[HeadStudy]) -> tuple[Figure, pd.DataFrame]:
    """Principal angles between the row spaces of W_O of every two heads, and of random subspaces."""
    figure, grid = panels(1, max(1, len(studies)), width=3.2)
    for axis, study in zip(grid[0], studies, strict=True):
        dataset = study.dataset("angles")
        index = dataset["index"].values + 1
        n = dataset.sizes["pair"]
        thin: dict[str, Any] = {"linewidth": 0.8, "zorder": 3}  # above the others, which they are like
        for pair in range(n):
            axis.plot(index, np.degrees(dataset["angle_random"][pair]), color="black", linestyle=":", **thin)
        for pair, (name, colour) in enumerate(zip(pair_names(dataset), colours(n), strict=True)):
            label = f"heads {name}" if n <= 6 else None
            axis.plot(index, np.degrees(dataset["angle"][pair]), color=colour, label=label)
        axis.plot([], [], color="black", linestyle=":", label="random subspaces", **thin)
        axis.set(xlabel="index, largest first", ylabel="principal angle (degrees)", ylim=(0, 92), title=study.name)
    entries = labelled(grid[0])
    figure.tight_layout()
    legend_below(figure, entries, columns=4)
    return figure, of_studies(studies, lambda study: study.dataset("angles"))


@figure("heads_cosines", stage="heads", reads=read_heads)
def cosines(studies: list[HeadStudy]) -> tuple[Figure, pd.DataFrame]:
    """The notebook's line and box: cosine of two heads' outputs by position in one text and over all, and its spread
    over all texts for every pair, beside randomly rotated heads."""
    figure, grid = _beside_pairs(studies, sharey="row")
    for (left, right), study in zip(grid, studies, strict=True):
        dataset = study.dataset("cosines")
        position = dataset["position"].values[dataset.attrs["first_position"] :]
        one = dataset.isel(pair=0).sel(position=position)
        bands = one["cosine_by_position"]
        left.fill_between(position, bands.sel(quantile=0.05), bands.sel(quantile=0.95), color=COLOURS[0], alpha=0.2)
        left.plot(position, bands.sel(quantile=0.5), color=COLOURS[0], label="median over texts, 5 to 95 %")
        left.plot(position, one["cosine_in_row"][0], "-", color="0.25", linewidth=0.5, label="one text")
        left.set(xlabel="position", ylabel=f"{study.name}\ncosine of two heads' outputs")
        left.set_title(f"heads {pair_names(dataset)[0]}")
        null = dataset["cosine_rotated"]
        for offset, name, values, colour in (
            (-0.17, "heads", dataset["cosine"], COLOURS[0]),
            (0.17, f"randomly rotated heads, mean of {null.sizes['rotation']} draws", null.mean("rotation"), NULL),
        ):
            quantiles = values.sel(quantile=list(BOX)).transpose("pair", "quantile").values
            boxes = [dict(zip(BOX.values(), values, strict=True)) for values in quantiles]
            drawn = right.bxp(
                [box | {"fliers": []} for box in boxes],
                positions=np.arange(len(boxes)) + offset,
                widths=0.28,
                showfliers=False,
                patch_artist=True,
                medianprops={"color": "black"},
                boxprops={"facecolor": colour, "linewidth": 0.6},
                whiskerprops={"linewidth": 0.8},
                capprops={"linewidth": 0.8},
                manage_ticks=False,
            )
            drawn["boxes"][0].set_label(name)
        medians = null.sel(quantile=0.5)
        at, ends = np.arange(medians.sizes["pair"]) + 0.4, (medians.min("rotation"), medians.max("rotation"))
        right.vlines(at, *ends, color="0.35", linewidth=2, label="their medians, lowest to highest")
        small = 5 if dataset.sizes["pair"] > 15 else None
        right.set_xticks(range(dataset.sizes["pair"]), pair_names(dataset), fontsize=small, rotation=90 if small else 0)
        for axis in (left, right):
            axis.axhline(0, color="0.35", linewidth=0.8)
        right.set(xlabel="pair of heads", title="all texts: median, quartiles, 5 to 95 %")
    figure.tight_layout()
    legend_below(figure, labelled(grid.flat), columns=3)

    def shown(study: HeadStudy) -> xr.Dataset:
        dataset = study.dataset("cosines")
        null = dataset["cosine_rotated"]
        lowest, highest = null.min("rotation"), null.max("rotation")
        means = {"cosine_rotated": null.mean("rotation"), "rotated_lowest": lowest, "rotated_highest": highest}
        return dataset[["cosine", "mean_cosine"]].assign(means)

    return figure, of_studies(studies, shown)


def _beside_pairs(studies: list[HeadStudy], **more: Any) -> tuple[Figure, np.ndarray]:
    """A panel, and beside it one as wide as the pairs of heads need."""
    most = max((study.dataset("cosines").sizes["pair"] for study in studies), default=1)
    wide = min(6.0, max(3.2, 0.55 * most))
    size = (3.4 + wide, 2.7 * len(studies))
    return subplots(len(studies), 2, figsize=size, squeeze=False, width_ratios=[3.4, wide], **more)


@figure("heads_cross_terms", stage="heads", reads=read_heads)
def cross_terms(studies: list[HeadStudy]) -> tuple[Figure, pd.DataFrame]:
    """CE increase when cross terms between heads are removed, beside a random change of the same size; one panel the
    model's own heads, one the reconstructions of a dictionary of heads."""
    figure, grid = panels(len(studies), 2, width=3.6, height=1.9, sharey=True)
    for line, study in zip(grid, studies, strict=True):
        table = study.table("cross_terms")
        for axis, source in zip(line, (MODEL, study.shown_dictionary("heads")), strict=True):
            of_source = table[table["source"] == source]
            if of_source.empty:
                empty_panel(axis, "no dictionaries of heads")
                continue
            zeroed = float(of_source.loc[of_source["way"] == NO_HEADS, "ce_increase"].iloc[0])
            for control, marker, colour, label, offset in (
                (False, "o", COLOURS[1], "cross terms removed", 0.12),
                (True, "s", NULL, "random change of that size", -0.12),
            ):
                rows = of_source[of_source["control"] == control].set_index("way").loc[list(WAYS)]
                y = np.arange(len(rows))[::-1] + offset
                ends = [(rows[f"ce_increase_{e}"] - rows["ce_increase"]).abs().fillna(0) for e in ("low", "high")]
                axis.errorbar(rows["ce_increase"], y, xerr=ends, fmt=marker, color=colour, label=label, capsize=2)
            axis.axvline(0, color="0.35", linewidth=0.8)
            axis.set_xscale("symlog", linthresh=1e-3)
            axis.axvline(zeroed, color="0.35", linestyle=":", linewidth=1)
            axis.set_xticks([-1e-3, 0, 1e-3, 1e-2, 1e-1, 1], ["-0.001", "0", "0.001", "0.01", "0.1", "1"])
            axis.set_xlim(-2e-3, 2 * max(zeroed, 0.1))
            axis.set(xlabel="increase in CE loss (nats per token;\nlogarithmic but between ±0.001)")
            of = "the model's heads" if source == MODEL else study.label(str(source))
            axis.set_title(f"{study.name}: {of}")
        line[0].set_yticks(range(len(WAYS)), list(WAYS.values())[::-1])
        line[0].set_ylim(-0.5, len(WAYS) - 0.5)
    figure.tight_layout()
    dotted = Line2D([], [], color="0.35", linestyle=":")
    legend_below(figure, labelled(figure.axes[:1]) | {"all heads set to 0": dotted}, columns=3)
    return figure, of_studies(studies, lambda study: study.table("cross_terms"))


@figure("heads_interference", stage="heads", reads=read_heads)
def interference(studies: list[HeadStudy]) -> tuple[Figure, pd.DataFrame]:
    """Cosines between lifted atoms of different heads: of all pairs, weighted by how they fire together, and with heads
    rotated; and by pair of heads what interference adds up to."""
    figure, grid = _beside_pairs(studies)
    for (left, right), study, key in shown_rows(studies, grid, "heads", without="no dictionaries of heads", once=True):
        dataset = study.dataset("interference", key)
        centre = dataset["bin"].values
        edges = np.append(centre - (centre[1] - centre[0]) / 2, centre[-1] + (centre[1] - centre[0]) / 2)
        coarse = edges[::4]
        for name, label, colour, style in (
            ("plain_rotated", "rotated heads", "0.35", ":"),
            ("plain", "all pairs of latents", COLOURS[0], "--"),
            ("weighted", "weighted by co-activation", COLOURS[1], "-"),
        ):
            counts = dataset[name].sum("pair").values.reshape(-1, 4).sum(1)
            density = counts / max(counts.sum(), 1e-30) / (coarse[1] - coarse[0])
            left.stairs(density, coarse, color=colour, linestyle=style, label=label, linewidth=1.2)
        left.set(xlabel="cosine of two heads' lifted atoms", ylabel=f"{study.name}\ndensity", yscale="log")
        left.set(ylim=(1e-4, 300), xlim=(-1, 1), title=study.label(key))
        left.legend(loc="upper left")
        at = np.arange(dataset.sizes["pair"])
        weight = dataset["weight"].where(lambda w: w > 0).values  # 0: of a head that never fires
        right.bar(at - 0.2, dataset["total"] / weight, 0.36, color=COLOURS[1])
        right.plot(at - 0.2, dataset["from_means"].values / weight, "_", color="black", markersize=8)
        null = dataset["total_rotated"] / weight
        lowest, highest = null.min("rotation"), null.max("rotation")
        right.bar(at + 0.2, highest - lowest, 0.36, bottom=lowest, color=NULL)
        right.use_sticky_edges = False  # the ends of ranges are not those of the axis
        right.plot(at + 0.2, null.mean("rotation"), "_", color="white", markersize=8)
        small = 5 if len(at) > 15 else None
        right.set_xticks(at, pair_names(dataset), fontsize=small, rotation=90 if small else 0)
        right.axhline(0, color="0.35", linewidth=0.8)
        right.set(xlabel="pair of heads", ylabel="mean cosine,\nweighted by co-activation")
    figure.tight_layout()
    named = ((COLOURS[1], "heads"), (NULL, "randomly rotated heads, lowest to highest draw, mean in white"))
    handles: list[Any] = [Patch(color=c, label=label) for c, label in named]
    legend_below(figure, [*handles, Line2D([], [], color="black", label="if latents fired independently")])

    def shown(study: HeadStudy, key: str) -> xr.Dataset:
        dataset = study.dataset("interference", key)
        null = dataset["total_rotated"]
        ends = {"total_rotated_lowest": null.min("rotation"), "total_rotated_highest": null.max("rotation")}
        kept = ["total", "absolute", "from_means", "weight", "mean_square"]
        return dataset[kept].assign(ends | {"total_rotated": null.mean("rotation")})

    return figure, of_dictionaries(studies, "heads", shown)


@figure("heads_top_pairs", stage="heads", reads=read_heads)
def top_pairs(studies: list[HeadStudy]) -> tuple[Figure, pd.DataFrame]:
    """Which latents of different heads interfere: the pairs of largest |E[f_i f_j] ⟨a_i, a_j⟩|, the cosines of their
    lifted atoms, with the tokens on which both fire."""
    figure, grid = panels(len(studies), 2, width=3.4, height=3.2, sharey="row")
    for (left, right), study, key in shown_rows(studies, grid, "heads", without="no dictionaries of heads", once=True):
        rows = _largest(study.table("interference", key)).head(TOP_PAIRS)[::-1]
        at = np.arange(len(rows))
        names = [f"{g}:{i}, {h}:{j}" for g, i, h, j in rows[["head", "latent", "other_head", "other_latent"]].values]
        for axis, column, label in (
            (left, "interference", "E[f_i f_j] ⟨a_i, a_j⟩ (squared norm in the stream)"),
            (right, "cosine", "cosine of the lifted atoms"),
        ):
            hatches = ["" if value > 0 else "////" for value in rows[column]]
            axis.barh(at, rows[column], 0.7, color=COLOURS[0], hatch=hatches, edgecolor="white", linewidth=0)
            axis.axvline(0, color="0.35", linewidth=0.8)
            axis.set(xlabel=label)
        left.set_yticks(at, names)
        left.set(ylabel=f"{study.name}\nhead:latent, head:latent", title=study.label(key))
        for y, (cosine, n) in enumerate(zip(rows["cosine"], rows["tokens_together"], strict=True)):
            right.text(cosine, y, f" {n:,} ", va="center", ha="left" if cosine > 0 else "right", fontsize=6)
        right.set_title("beside the bars: tokens on which both fire")
        right.margins(x=0.25)
    figure.tight_layout()
    return figure, of_dictionaries(studies, "heads", lambda study, key: _largest(study.table("interference", key)))


def _largest(pairs: pd.DataFrame) -> pd.DataFrame:
    return pairs.sort_values("interference", key=abs, ascending=False, kind="stable")


@figure("heads_lifted", stage="heads", reads=read_heads)
def lifted(studies: list[HeadStudy]) -> tuple[Figure, pd.DataFrame]:
    """Is a latent of one head a sum of another's? The part of lifted latents that lies in other heads' row spaces, and
    what sums of other heads' lifted atoms (coefficients ≥ 0) leave, beside heads that are rotated at random."""
    figure, grid = panels(len(studies), 2, width=3.4)
    for (left, right), study, key in shown_rows(studies, grid, "heads", without="no dictionaries of heads", once=True):
        held, medians = study.table("lifted", key), lifted_medians(study.table("lifted", key))
        for rotated, colour, dashes, label in (
            (False, COLOURS[0], "-", "other heads"),
            (True, "0.35", "--", "rotated"),
        ):
            inside = held[held["rotated"] == rotated].drop_duplicates(["head", "latent", "other_head"])["in_row_space"]
            left.stairs(np.histogram(inside, 30, (0, 1))[0], np.linspace(0, 1, 31), color=colour, linestyle=dashes)
            of_atoms = medians[(medians["rotated"] == rotated) & (medians["n_atoms"] > 0)]
            ends = np.nan_to_num(np.abs(of_atoms[["low", "high"]].to_numpy().T - of_atoms["median"].to_numpy()))
            offset = of_atoms["n_atoms"] * (1.03 if rotated else 0.97)
            style = {"color": colour, "linestyle": dashes, "marker": "s" if rotated else "o", "capsize": 2}
            right.errorbar(offset, of_atoms["median"], yerr=ends, label=label, **style)
        left.set(xlabel="part of a lifted latent's norm in another head's row space", ylabel=f"{study.name}\npairs")
        left.set_title(study.label(key))
        log_axis(right, "x")
        right.set_xticks(sorted(held["n_atoms"].unique()))
        right.set(xlabel="atoms of the other head", ylabel="relative residual", ylim=(0, 1.02))
    figure.tight_layout()
    legend_below(figure, labelled(figure.axes), note="bars: 95 % intervals of medians, over draws of latents")
    return figure, of_dictionaries(studies, "heads", lambda study, key: lifted_medians(study.table("lifted", key)))


@figure("heads_ov", stage="heads", reads=read_heads)
def ov(studies: list[HeadStudy]) -> tuple[Figure, pd.DataFrame]:
    """Singular values of W_V W_O by head, over the largest of each: how many directions a head moves, how evenly."""
    figure, grid = panels(1, max(1, len(studies)), width=4.8)
    for axis, study in zip(grid[0], studies, strict=True):
        dataset = study.dataset("ov")
        for head, colour in enumerate(colours(dataset.sizes["head"])):
            values = dataset["singular_value"].sel(head=head).values[: int(dataset["rank"].sel(head=head))]
            shared = float(dataset["participation"].sel(head=head))
            dashes, at = track(head)["linestyle"], np.arange(1, len(values) + 1)
            label = f"head {head}: {shared:.1f} of {len(values)} share"
            axis.plot(at, values / values[:1], color=colour, linestyle=dashes, label=label)  # of a pruned head nothing
        axis.set(xlabel="index", ylabel="singular value of W_V W_O / largest", ylim=(0, None), title=study.name)
        axis.legend(title="directions that share the energy", loc="upper left", bbox_to_anchor=(1.0, 1.0))
    figure.tight_layout()
    return figure, of_studies(studies, lambda study: study.dataset("ov"))
