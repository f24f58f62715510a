"""Figures of the heads stage: one row of panels for each layer that was studied.

Where a figure is of one dictionary, it is the one of all heads whose L0 is nearest to 20 (what Kissane et al. aim for)
and the one of single heads that it is decomposed in; the table beside the figure has all dictionaries.
"""

import json
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import xarray as xr
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator

from saeflow.heads.cross_terms import MODEL, NO_HEADS
from saeflow.heads.decomposition import METHODS
from saeflow.heads.shares import AGREEING, MEASURES
from saeflow.heads.store import read_dataset
from saeflow.palette import COLOURS, MARKERS

WANTED_L0 = 20
NULL = "0.6"
WAYS = {
    "orthogonal": "heads made orthogonal",
    "others": "projection on the\nother heads' sum removed",
    "row_spaces": "projection on the other\nheads' row spaces removed",
}
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
DISTANCES = ((0, 0), (1, 1), (2, 3), (4, 7), (8, 15), (16, 31), (32, 63), (64, 127), (128, 10**9))


class HeadStudy(NamedTuple):
    """One artifact of the stage."""

    folder: Path
    summary: dict[str, Any]

    @property
    def key(self) -> str:
        return self.folder.name

    @property
    def name(self) -> str:
        return f"layer {self.summary['layer']}"

    def dataset(self, name: str, dictionary: str | None = None) -> xr.Dataset:
        return read_dataset(self._file(f"{name}.zarr", dictionary))

    def table(self, name: str, dictionary: str | None = None) -> pd.DataFrame:
        return pd.read_parquet(self._file(f"{name}.parquet", dictionary))

    def of_kind(self, kind: str) -> list[str]:
        """Keys of the dictionaries of a kind, the sparsest last."""
        held = self.summary["dictionaries"]
        return sorted((key for key in held if held[key]["kind"] == kind), key=lambda key: -held[key]["l0"])

    def chosen(self, kind: str) -> str | None:
        """The dictionary of a kind that figures of one dictionary show."""
        keys, held = self.of_kind(kind), self.summary["dictionaries"]
        if kind == "heads":
            concat = self.chosen("concat")
            if concat is not None and "decomposed_in" in held[concat]:
                return str(held[concat]["decomposed_in"])
        return min(keys, key=lambda key: abs(np.log(max(held[key]["l0"], 1e-9) / WANTED_L0))) if keys else None

    def says(self, key: str) -> str:
        held = self.summary["dictionaries"][key]
        of = "SAEs of heads" if held["kind"] == "heads" else "SAE of all heads"
        name = {"l1_coefficient": "L1"}.get(held["amount_name"], held["amount_name"])
        amount = f", {name} = {held['amount']:g}" if held["amount"] is not None else ""
        return f"{of}{amount}, L0 {held['l0']:.0f}"

    def _file(self, name: str, dictionary: str | None) -> Path:
        return self.folder / "dictionaries" / dictionary / name if dictionary else self.folder / name


def read_head_studies(folders: Iterable[Path]) -> list[HeadStudy]:
    """Their summaries; datasets are read when a figure wants them."""
    found = [HeadStudy(folder, json.loads((folder / "summary.json").read_text())) for folder in folders]
    return sorted(found, key=lambda study: (study.summary["layer"], study.key))


# -------------------------------------------------------------------- what figures share
def _colours(n: int) -> list[Any]:
    """One a head: those that are safe for colour-blind readers while they last."""
    return list(COLOURS[:n]) if n <= len(COLOURS) else list(plt.get_cmap("viridis")(np.linspace(0, 0.9, n)))


def _grid(rows: int, columns: int, width: float = 2.9, height: float = 2.6, **more: Any) -> tuple[Figure, np.ndarray]:
    return plt.subplots(rows, columns, figsize=(width * columns, height * rows), squeeze=False, **more)


def _legend(figure: Figure, handles: list[Any], columns: int = 6) -> None:
    if handles:
        figure.legend(handles=handles, loc="upper center", bbox_to_anchor=(0.5, 0.01), ncols=min(columns, len(handles)))


def _head_handles(n: int) -> list[Line2D]:
    return [Line2D([], [], color=colour, label=f"head {h}") for h, colour in enumerate(_colours(n))]


def _pair_names(dataset: xr.Dataset) -> list[str]:
    return [f"{g}, {h}" for g, h in zip(dataset["head"].values, dataset["other_head"].values, strict=True)]


def _nothing(axis: Axes, text: str) -> None:
    axis.text(0.5, 0.5, text, ha="center", va="center", transform=axis.transAxes)
    axis.set_axis_off()


def _concat(tables: list[pd.DataFrame]) -> pd.DataFrame:
    return pd.concat(tables, ignore_index=True) if tables else pd.DataFrame()


def _with_chosen(studies: list[HeadStudy], kind: str) -> Iterator[tuple[int, HeadStudy, str | None]]:
    for row, study in enumerate(studies):
        yield row, study, study.chosen(kind)


# -------------------------------------------------------------------- geometry
def norms(studies: list[HeadStudy]) -> tuple[Figure, pd.DataFrame]:
    """Norms of decoder rows as trained, by head, one panel a dictionary; folded, all of them are 1."""
    most = max((len(study.of_kind("heads")) for study in studies), default=0)
    figure, grid = _grid(len(studies), min(4, max(1, most)), sharex="row")
    tables = []
    for line, study in zip(grid, studies, strict=True):
        keys = study.of_kind("heads")
        held = {key: study.dataset("norms", key) for key in keys}
        top = max((float(np.quantile(one["decoder_norm"], 0.995)) for one in held.values()), default=1.0)
        edges = np.linspace(0, 1.05 * max(top, 1), 41)
        for axis in line[len(keys) :]:
            axis.set_axis_off()
        for axis, (key, one) in zip(line, held.items(), strict=False):
            for head, colour in enumerate(_colours(one.sizes["head"])):
                values = one["decoder_norm"].sel(head=head).values
                axis.stairs(np.histogram(np.minimum(values, edges[-1]), edges)[0], edges, color=colour)
            axis.axvline(1, color="0.35", linestyle="--", linewidth=1)
            axis.set(xlabel="norm of a decoder row", title=f"{study.name}: {study.says(key)}")
        line[0].set_ylabel("latents of a head")
        for key, one in held.items():
            tables.append(one.to_dataframe().reset_index().assign(study=study.key, dictionary=key))
    figure.tight_layout()
    n_heads = max((study.summary["n_heads"] for study in studies), default=0)
    folded = Line2D([], [], color="0.35", linestyle="--", label="all, once folded")
    _legend(figure, [*_head_handles(n_heads), folded])
    return figure, _concat(tables)


def spectra(studies: list[HeadStudy]) -> tuple[Figure, pd.DataFrame]:
    """Singular values of D_h, W_O[h] and D_h W_O[h] over the largest of each, by head."""
    titles = {"D": "dictionary D", "W_O": "output weights W_O", "D_W_O": "D W_O: atoms in the stream"}
    figure, grid = _grid(len(studies), 3, sharey="row")
    tables = []
    for row, study, key in _with_chosen(studies, "heads"):
        for other in study.of_kind("heads"):
            one = study.dataset("spectra", other)
            tables.append(one.to_dataframe().reset_index().assign(study=study.key, dictionary=other))
        if key is None:
            for axis in grid[row]:
                _nothing(axis, "no dictionaries of heads")
            continue
        held = study.dataset("spectra", key)
        lowest = 1.0
        for axis, (matrix, title) in zip(grid[row], titles.items(), strict=True):
            ranks = held["rank"].sel(matrix=matrix).values
            for head, colour in enumerate(_colours(held.sizes["head"])):
                values = held["singular_value"].sel(matrix=matrix, head=head).values
                values = values[: int(ranks[head])] / values[0]
                axis.plot(np.arange(1, len(values) + 1), values, color=colour)
                lowest = min(lowest, values[-1])
            said = f"rank {ranks.min()}" + (f" to {ranks.max()}" if ranks.min() < ranks.max() else "")
            axis.set(xlabel="index", title=f"{title}: {said} of {held.attrs['d_head']}", yscale="log")
        grid[row][0].set_ylabel(f"{study.name}\nsingular value / largest")
        if lowest > 0.1:
            grid[row][0].set_ylim(0.08, 1.2)
    figure.tight_layout()
    n_heads = max((study.summary["n_heads"] for study in studies), default=0)
    _legend(figure, _head_handles(n_heads))
    return figure, _concat(tables)


def angles(studies: list[HeadStudy]) -> tuple[Figure, pd.DataFrame]:
    """Principal angles between the row spaces of W_O of every two heads, and of random subspaces."""
    figure, grid = _grid(1, max(1, len(studies)), width=3.2)
    tables = []
    for axis, study in zip(grid[0], studies, strict=True):
        held = study.dataset("angles")
        index = held["index"].values + 1
        n = held.sizes["pair"]
        for pair in range(n):
            axis.plot(index, np.degrees(held["angle_random"][pair]), color=NULL, linewidth=0.8)
        for pair, (name, colour) in enumerate(zip(_pair_names(held), _colours(n), strict=True)):
            label = f"heads {name}" if n <= 6 else None
            axis.plot(index, np.degrees(held["angle"][pair]), color=colour, label=label)
        axis.plot([], [], color=NULL, label="random subspaces")
        axis.set(xlabel="index, largest first", ylabel="principal angle (degrees)", ylim=(0, 92), title=study.name)
        axis.legend(loc="lower left")
        tables.append(held.to_dataframe().reset_index().assign(study=study.key))
    figure.tight_layout()
    return figure, _concat(tables)


# -------------------------------------------------------------------- cosines and cross terms
def cosines(studies: list[HeadStudy]) -> tuple[Figure, pd.DataFrame]:
    """The notebook's line and box: cosine of two heads' outputs by position in one text and over all, and its spread
    over all texts for every pair, beside randomly rotated heads."""
    most = max((study.dataset("cosines").sizes["pair"] for study in studies), default=1)
    wide = min(9.0, max(3.2, 0.55 * most))
    figure, grid = plt.subplots(
        len(studies), 2, figsize=(3.4 + wide, 2.7 * len(studies)), squeeze=False, width_ratios=[3.4, wide], sharey="row"
    )
    tables = []
    for (left, right), study in zip(grid, studies, strict=True):
        held = study.dataset("cosines")
        position = held["position"].values[held.attrs["first_position"] :]
        one = held.isel(pair=0).sel(position=position)
        bands = one["cosine_by_position"]
        left.fill_between(position, bands.sel(quantile=0.05), bands.sel(quantile=0.95), color=COLOURS[0], alpha=0.2)
        left.plot(position, bands.sel(quantile=0.5), color=COLOURS[0], label="median over texts, 5 to 95 %")
        left.plot(position, one["cosine_in_row"][0], "-", color="0.25", linewidth=0.5, label="one text")
        left.set(xlabel="position", ylabel=f"{study.name}\ncosine of two heads' outputs")
        left.set_title(f"heads {_pair_names(held)[0]}")
        left.legend(loc="lower right")
        for offset, name, colour in ((-0.17, "cosine", COLOURS[0]), (0.17, "cosine_rotated", NULL)):
            boxes = [
                dict(
                    zip(
                        ("whislo", "q1", "med", "q3", "whishi"),
                        held[name][pair].sel(quantile=list(BOX)).values,
                        strict=True,
                    )
                )
                for pair in range(held.sizes["pair"])
            ]
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
            drawn["boxes"][0].set_label({"cosine": "heads", "cosine_rotated": "randomly rotated heads"}[name])
        small = 5 if held.sizes["pair"] > 15 else None
        right.set_xticks(range(held.sizes["pair"]), _pair_names(held), fontsize=small, rotation=90 if small else 0)
        for axis in (left, right):
            axis.axhline(0, color="0.35", linewidth=0.8)
        right.set(xlabel="pair of heads", title="all texts: median, quartiles, 5 to 95 %")
        right.legend(loc="lower right")
        low, high = left.get_ylim()
        left.set_ylim(low - 0.22 * (high - low), high)  # room for the legends
        columns = ["cosine", "cosine_rotated", "mean_cosine", "mean_cosine_rotated"]
        tables.append(held[columns].to_dataframe().reset_index().assign(study=study.key))
    figure.tight_layout()
    return figure, _concat(tables)


BOX = (0.05, 0.25, 0.5, 0.75, 0.95)


def cross_terms(studies: list[HeadStudy]) -> tuple[Figure, pd.DataFrame]:
    """CE increase when cross terms between heads are removed, beside a random change of the same size; one panel the
    model's own heads, one the reconstructions of a dictionary of heads."""
    figure, grid = _grid(len(studies), 2, width=3.6, height=1.9, sharey=True)
    tables = []
    for row, study, key in _with_chosen(studies, "heads"):
        table = study.table("cross_terms")
        tables.append(table.assign(study=study.key))
        for axis, source in zip(grid[row], (MODEL, key), strict=True):
            mine = table[table["source"] == source]
            if mine.empty:
                _nothing(axis, "no dictionaries of heads")
                continue
            whole = float(mine.loc[mine["way"] == NO_HEADS, "ce_increase"].iloc[0])
            for control, marker, colour, label, offset in (
                (False, "o", COLOURS[1], "cross terms removed", 0.12),
                (True, "s", NULL, "random change of that size", -0.12),
            ):
                rows = mine[(mine["control"] == control) & mine["way"].isin(WAYS)].set_index("way").loc[list(WAYS)]
                y = np.arange(len(rows))[::-1] + offset
                ends = [(rows[f"ce_increase_{e}"] - rows["ce_increase"]).abs().fillna(0) for e in ("low", "high")]
                axis.errorbar(rows["ce_increase"], y, xerr=ends, fmt=marker, color=colour, label=label, capsize=2)
            axis.axvline(0, color="0.35", linewidth=0.8)
            axis.set_xscale("symlog", linthresh=1e-3)
            axis.axvline(whole, color="0.35", linestyle=":", linewidth=1)
            axis.set_xticks([-1e-3, 0, 1e-3, 1e-2, 1e-1, 1], ["-0.001", "0", "0.001", "0.01", "0.1", "1"])
            axis.set_xlim(-2e-3, 2 * max(whole, 0.1))
            axis.set(xlabel="increase in CE loss (nats per token)")
            of = "the model's heads" if source == MODEL else study.says(str(source))
            axis.set_title(f"{study.name}: {of}")
        grid[row][0].set_yticks(range(len(WAYS)), list(WAYS.values())[::-1])
        grid[row][0].set_ylim(-0.5, len(WAYS) - 0.5)
    figure.tight_layout()
    handles, labels = figure.axes[0].get_legend_handles_labels()
    dotted = Line2D([], [], color="0.35", linestyle=":", label="all heads set to 0")
    figure.legend(
        [*handles, dotted], [*labels, "all heads set to 0"], loc="upper center", bbox_to_anchor=(0.5, 0.01), ncols=3
    )
    return figure, _concat(tables)


def interference(studies: list[HeadStudy]) -> tuple[Figure, pd.DataFrame]:
    """Cosines between lifted atoms of different heads: of all pairs, weighted by how they fire together, and with heads
    rotated; and by pair of heads what interference adds up to."""
    most = max((study.dataset("cosines").sizes["pair"] for study in studies), default=1)
    wide = min(9.0, max(3.2, 0.55 * most))
    figure, grid = plt.subplots(
        len(studies), 2, figsize=(3.4 + wide, 2.7 * len(studies)), squeeze=False, width_ratios=[3.4, wide]
    )
    tables = []
    for row, study, key in _with_chosen(studies, "heads"):
        for other in study.of_kind("heads"):
            sums = study.dataset("interference", other).drop_dims("bin")
            tables.append(sums.to_dataframe().reset_index().assign(study=study.key, dictionary=other))
        left, right = grid[row]
        if key is None:
            _nothing(left, "no dictionaries of heads")
            right.set_axis_off()
            continue
        held = study.dataset("interference", key)
        centre = held["bin"].values
        edges = np.append(centre - (centre[1] - centre[0]) / 2, centre[-1] + (centre[1] - centre[0]) / 2)
        coarse = edges[::4]
        for name, label, colour, style in (
            ("plain_rotated", "rotated heads", "0.35", ":"),
            ("plain", "all pairs of latents", COLOURS[0], "--"),
            ("weighted", "weighted by co-activation", COLOURS[1], "-"),
        ):
            counts = held[name].sum("pair").values.reshape(-1, 4).sum(1)
            density = counts / max(counts.sum(), 1e-30) / (coarse[1] - coarse[0])
            left.stairs(density, coarse, color=colour, linestyle=style, label=label, linewidth=1.2)
        left.set(xlabel="cosine of two heads' lifted atoms", ylabel=f"{study.name}\ndensity", yscale="log")
        left.set(ylim=(1e-4, 300), xlim=(-1, 1), title=study.says(key))
        left.legend(loc="upper left")
        at = np.arange(held.sizes["pair"])
        for place, suffix, colour, label in ((-0.2, "", COLOURS[1], "heads"), (0.2, "_rotated", NULL, "rotated heads")):
            weight = held["weight" + suffix].values
            right.bar(at + place, held["total" + suffix] / weight, 0.36, color=colour, label=label)
            means = held["from_means" + suffix].values / weight
            right.plot(at + place, means, "_", color="black", markersize=8, label=None if suffix else "if independent")
        small = 5 if len(at) > 15 else None
        right.set_xticks(at, _pair_names(held), fontsize=small, rotation=90 if small else 0)
        right.axhline(0, color="0.35", linewidth=0.8)
        right.set(xlabel="pair of heads", ylabel="mean cosine,\nweighted by co-activation")
        low, high = right.get_ylim()
        right.set_ylim(low, high + 0.25 * (high - low))
        right.legend(loc="upper center", ncols=3, columnspacing=1.0, handlelength=1.2)
    figure.tight_layout()
    return figure, _concat(tables)


# -------------------------------------------------------------------- shares
def shares(studies: list[HeadStudy]) -> tuple[Figure, pd.DataFrame]:
    """Mean share of each head by every measure, one panel a dictionary of all heads: the "head 5" question."""
    most = min(3, max((len(study.of_kind("concat")) for study in studies), default=0))
    figure, grid = _grid(len(studies), max(1, most), width=3.4, sharey="row")
    tables = []
    for line, study in zip(grid, studies, strict=True):
        keys = study.of_kind("concat")
        shown = (
            keys if len(keys) <= most else [keys[i] for i in np.linspace(0, len(keys) - 1, most).round().astype(int)]
        )
        if not shown:
            _nothing(line[0], "no dictionary of all heads")
        for axis in line[max(1, len(shown)) :]:
            axis.set_axis_off()
        for key in keys:
            one = study.dataset("measures", key)[["mean_share", "top_share"]]
            tables.append(one.to_dataframe().reset_index().assign(study=study.key, dictionary=key))
        for axis, key in zip(line, shown, strict=False):
            held = study.dataset("measures", key)
            n_heads = held.sizes["head"]
            width = 0.84 / n_heads
            for head, colour in enumerate(_colours(n_heads)):
                at = np.arange(len(MEASURES)) + (head - (n_heads - 1) / 2) * width
                axis.bar(at, 100 * held["mean_share"].sel(head=head), 0.92 * width, color=colour)
            axis.axhline(0, color="0.35", linewidth=0.8)
            axis.axhline(100 / n_heads, color="0.35", linewidth=0.8, linestyle=":")
            axis.set_xticks(range(len(MEASURES)), [NAMES[m] for m in MEASURES], rotation=40, ha="right")
            axis.set_title(f"{study.name}: {study.says(key)}")
        line[0].set_ylabel("mean share of a head (%)")
    figure.tight_layout()
    n_heads = max((study.summary["n_heads"] for study in studies), default=0)
    equal = Line2D([], [], color="0.35", linestyle=":", label="equal shares")
    _legend(figure, [*_head_handles(n_heads), equal])
    return figure, _concat(tables)


def measures(studies: list[HeadStudy]) -> tuple[Figure, pd.DataFrame]:
    """Do the measures order heads alike? Spearman's rank correlation, and how often the top head is the same."""
    figure, grid = _grid(len(studies), 2, width=3.7, height=3.1)
    tables = []
    labels = [NAMES[m].replace("\n", " ") for m in AGREEING]
    for row, study, key in _with_chosen(studies, "concat"):
        for other in study.of_kind("concat"):
            one = study.dataset("measures", other)[["rank_correlation", "top_agreement"]]
            tables.append(one.to_dataframe().reset_index().assign(study=study.key, dictionary=other))
        if key is None:
            for axis in grid[row]:
                _nothing(axis, "no dictionary of all heads")
            continue
        held = study.dataset("measures", key)
        chance = held.attrs["chance_of_top"]
        for axis, name, title, low in (
            (grid[row][0], "rank_correlation", "rank correlation over heads", -1.0),
            (grid[row][1], "top_agreement", f"same top head (by chance {chance:.2f})", 0.0),
        ):
            values = held[name].values
            image = axis.imshow(values, cmap="RdBu_r" if low else "Blues", vmin=low, vmax=1)
            for i, j in np.ndindex(values.shape):
                dark = abs(values[i, j]) > 0.6
                axis.text(
                    j,
                    i,
                    f"{values[i, j]:.2f}",
                    ha="center",
                    va="center",
                    fontsize=7,
                    color="white" if dark else "black",
                )
            axis.set_xticks(range(len(labels)), labels, rotation=40, ha="right")
            axis.set_yticks(range(len(labels)), labels)
            axis.spines[:].set_visible(False)
            axis.tick_params(length=0)
            axis.set_title(title)
            figure.colorbar(image, ax=axis, shrink=0.75)
        grid[row][1].set_yticks([])
        grid[row][0].set_ylabel(f"{study.name}: {study.says(key)}", fontsize=7)
    figure.tight_layout()
    return figure, _concat(tables)


# -------------------------------------------------------------------- decomposition
def decomposition(studies: list[HeadStudy]) -> tuple[Figure, pd.DataFrame]:
    """Residual against number of atoms by method, in the heads' own dictionaries and in both nulls; above each latent's
    top head, below all heads at once. Lines are medians over latents, bands quartiles."""
    parts = {"top_head": "top head's part", "all_heads": "all heads at once"}
    figure, grid = _grid(2 * len(studies), len(METHODS), width=2.0, height=2.1, sharex=True, sharey=True)
    tables = []
    for row, study, key in _with_chosen(studies, "concat"):
        decomposed = [k for k in study.of_kind("concat") if "best_cosine" in study.summary["dictionaries"][k]]
        tables += [study.table("curves", k).assign(study=study.key, dictionary_key=k) for k in decomposed]
        for offset, (of, name) in enumerate(parts.items()):
            line = grid[2 * row + offset]
            if key not in decomposed:
                for axis in line:
                    _nothing(axis, "nothing decomposed")
                continue
            held = study.table("curves", key)
            for axis, method in zip(line, METHODS, strict=True):
                for i, dictionary in enumerate(DICTIONARIES):
                    mine = held[(held["of"] == of) & (held["method"] == method) & (held["dictionary"] == dictionary)]
                    colour = NULL if dictionary == "random" else COLOURS[i]
                    axis.fill_between(mine["n_atoms"], mine["low"], mine["high"], color=colour, alpha=0.2, linewidth=0)
                    axis.plot(mine["n_atoms"], mine["median"], color=colour, marker=MARKERS[i], markersize=2.5)
                if row == offset == 0:
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
    _legend(figure, handles)
    return figure, _concat(tables)


def agreement(studies: list[HeadStudy]) -> tuple[Figure, pd.DataFrame]:
    """Do a latent and the atoms that it decomposes into fire alike? By order of the atom, beside the average atom of
    its head and the best of all."""
    figure, grid = _grid(len(studies), 2, width=3.2)
    tables = []
    for row, study, key in _with_chosen(studies, "concat"):
        decomposed = [k for k in study.of_kind("concat") if "best_cosine" in study.summary["dictionaries"][k]]
        tables += [study.table("agreement", k).assign(study=study.key, dictionary_key=k) for k in decomposed]
        if key not in decomposed:
            for axis in grid[row]:
                _nothing(axis, "nothing decomposed")
            continue
        held = study.table("agreement", key)
        for axis, name, label in zip(
            grid[row],
            ("correlation", "jaccard"),
            ("correlation of activations", "Jaccard index of firing"),
            strict=True,
        ):
            by_rank = held.groupby("rank")[name].quantile(np.array([0.25, 0.5, 0.75])).unstack()
            axis.fill_between(by_rank.index, by_rank[0.25], by_rank[0.75], color=COLOURS[0], alpha=0.2, linewidth=0)
            axis.plot(by_rank.index, by_rank[0.5], color=COLOURS[0], marker="o", label="the atom: median, quartiles")
            others = held.groupby("rank")[f"{name}_mean_of_head"].median()
            axis.plot(others.index, others, color=NULL, marker="s", label="average atom of its head")
            best = held.drop_duplicates("latent")[f"{name}_best"].median()
            axis.axhline(best, color=COLOURS[1], linestyle="--", label="best of all atoms, median")
            axis.set(
                xlabel="order of the atom in the decomposition", ylabel=label, title=f"{study.name}: {study.says(key)}"
            )
            axis.set_ylim(min(0.0, float(by_rank.min().min())), None)
            axis.xaxis.set_major_locator(MaxNLocator(integer=True))
    figure.tight_layout()
    handles, labels = figure.axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="upper center", bbox_to_anchor=(0.5, 0.01), ncols=3)
    return figure, _concat(tables)


# -------------------------------------------------------------------- attribution
def attribution(studies: list[HeadStudy]) -> tuple[Figure, pd.DataFrame]:
    """Direct feature attribution of the latents shown in the dashboards, at their strongest tokens: what each head
    gives to each latent, and from how far back."""
    figure, grid = plt.subplots(
        len(studies), 2, figsize=(7.4, 3.0 * len(studies)), squeeze=False, width_ratios=[1, 1.25]
    )
    tables = []
    for row, study, key in _with_chosen(studies, "concat"):
        left, right = grid[row]
        if key is None or not study._file("attribution.parquet", key).is_file():
            _nothing(left, "nothing attributed")
            right.set_axis_off()
            continue
        held = study.table("attribution", key)
        by_head = held.groupby(["latent", "context", "head"])["attribution"].sum()
        by_head = (
            (by_head / by_head.abs().groupby(["latent", "context"]).transform("sum")).groupby(["latent", "head"]).mean()
        )
        wide = by_head.unstack()
        image = left.imshow(wide, cmap="RdBu_r", vmin=-1, vmax=1, aspect="auto")
        left.set_yticks(range(len(wide)), wide.index)
        left.set_xticks(range(wide.shape[1]), wide.columns)
        left.set(xlabel="head", ylabel="latent", title=f"{study.name}: share of the attribution")
        left.spines[:].set_visible(False)
        figure.colorbar(image, ax=left)
        distance = _by_distance(held)
        tables += [
            by_head.rename("value").reset_index().assign(study=study.key, of="head"),
            distance.assign(study=study.key, of="distance"),
        ]
        names = list(dict.fromkeys(distance["distance"]))
        bottom = np.zeros(len(names))
        for head, colour in enumerate(_colours(study.summary["n_heads"])):
            values = (
                distance[distance["head"] == head].set_index("distance")["value"].reindex(names).fillna(0).to_numpy()
            )
            right.bar(np.arange(len(names)), 100 * values, 0.8, bottom=100 * bottom, color=colour, label=f"head {head}")
            bottom += values
        right.set_xticks(range(len(names)), names, rotation=40, ha="right")
        right.set(xlabel="source token", ylabel="share of |attribution| (%)", title=study.says(key))
        right.legend(ncols=2)
    figure.tight_layout()
    return figure, _concat(tables)


def _by_distance(held: pd.DataFrame) -> pd.DataFrame:
    """Share of |attribution| by distance of the source and head; position 0 by itself."""
    back = held["position"] - held["source"]
    names = {0: "the same", 1: "1 back"}
    label = pd.Series("", index=held.index)
    for low, high in DISTANCES:
        name = names.get(low) or (f"{low} to {high}" if high < 10**9 else f"{low} and more")
        label[(back >= low) & (back <= high)] = name
    label[held["source"] == 0] = "position 0"
    size = held["attribution"].abs().groupby([label, held["head"]]).sum()
    table = (size / size.sum()).rename("value").rename_axis(["distance", "head"]).reset_index()
    order = [names.get(low) or (f"{low} to {high}" if high < 10**9 else f"{low} and more") for low, high in DISTANCES]
    order = [*order, "position 0"]
    return table.sort_values("distance", key=lambda c: c.map(order.index), kind="stable").reset_index(drop=True)


FIGURES: dict[str, Callable[[list[HeadStudy]], tuple[Figure, pd.DataFrame]]] = {
    "heads_norms": norms,
    "heads_spectra": spectra,
    "heads_cosines": cosines,
    "heads_cross_terms": cross_terms,
    "heads_angles": angles,
    "heads_interference": interference,
    "heads_shares": shares,
    "heads_measures": measures,
    "heads_decomposition": decomposition,
    "heads_agreement": agreement,
    "heads_attribution": attribution,
}
