"""The figures of the stages `circuits`, the largest paths down from each latent as a graph and what weights alone say
of means over text, and `greater_than`."""

from typing import Any, NamedTuple

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from saeflow.circuits.attribution import Node
from saeflow.circuits.paths import Path, edges_of
from saeflow.dictionaries.series import with_names
from saeflow.dictionaries.settings import read_summaries
from saeflow.features.show import visible
from saeflow.figures.axes import empty_panel, labelled, legend_beside, log_axis, subplots, wrapped_panels
from saeflow.figures.registry import figure
from saeflow.figures.style import COLOURS, look
from saeflow.jobs.job import Job

SHOWN = 12  # paths of a latent, of those that end there or go on the largest, with all that they pass
TRIES, HALF_WIDTH = 300, 0.075  # of a layout; of a node
_BOXES: dict[str, dict[str, Any]] = {
    "target": {"boxstyle": "round,pad=0.3", "facecolor": "white", "edgecolor": "black", "linewidth": 1.6},
    "feature": {"boxstyle": "round,pad=0.3", "facecolor": "#d7e8f5", "edgecolor": COLOURS[0]},
    "head": {"boxstyle": "square,pad=0.3", "facecolor": "#fbe3d3", "edgecolor": COLOURS[1], "linestyle": "--"},
    "embedding": {"boxstyle": "square,pad=0.3", "facecolor": "white", "edgecolor": "0.55"},
}
"""What nodes look like: kinds differ in grey too."""
_NUMBER = {"facecolor": "white", "edgecolor": "none", "pad": 0.4}
_CENTRED: dict[str, Any] = {"ha": "center", "va": "center"}


class Circuits(NamedTuple):
    """Of all studies of an experiment; `key` says of which a row is."""

    latents: pd.DataFrame
    paths: pd.DataFrame
    text: pd.DataFrame


def read_circuits(job: Job) -> Circuits:
    folders = job.inputs("circuits")
    return Circuits(
        *(
            pd.concat([pd.read_parquet(folder / f"{name}.parquet").assign(key=folder.name) for folder in folders])
            for name in Circuits._fields
        )
    )


@figure("circuits", stage="circuits", reads=read_circuits)
def circuits(data: Circuits) -> tuple[Figure, pd.DataFrame]:
    """What makes latents of transcoders active: of each the largest paths down through earlier latents, heads and token
    embeddings, in % of its pre-activation without `b_enc`; the transcoders' errors and biases are named beside it.

    A row of nodes is the latents, or the heads, of a layer; a head's node is the token that it reads. The table has the
    nodes of every path that is shown.
    """
    latents, shown = list(data.latents.itertuples()), []
    heights = []
    for one in latents:
        rows = _of(data.paths, one)
        shown.append(largest(as_paths(rows)))
        heights.append(0.8 + 0.4 * len({_level(node) for path in shown[-1] for node in path.nodes}))
    drawn, grid = subplots(len(latents), 1, figsize=(7.2, sum(heights)), squeeze=False, height_ratios=heights)
    table = []
    for axis, one, paths in zip(grid[:, 0], latents, shown, strict=True):
        tokens = [visible(text) for text in _of(data.text, one)["text"]]
        draw_graph(axis, paths, one, tokens)
        for number, path in enumerate(paths):
            node, parent = path.nodes[-1], path.nodes[-2] if len(path.nodes) > 1 else path.nodes[-1]
            table.append(
                {"key": one.key, "latent": one.latent, "path": number, **node._asdict(), "text": tokens[node.token]}
                | {f"to_{name}": value for name, value in parent._asdict().items()}
                | {"contribution": path.contributions[-1], "share": path.contributions[-1] / _total(one)}
            )
    drawn.tight_layout()
    return drawn, pd.DataFrame(table)


def _of(table: pd.DataFrame, one: Any) -> pd.DataFrame:
    return table[(table["key"] == one.key) & (table["latent"] == one.latent)]


def _total(one: Any) -> float:
    """A row of `latents`: its pre-activation without b_enc."""
    return float(one.pre_activation - one.b_enc)


def as_paths(rows: pd.DataFrame) -> list[Path]:
    """Of the rows of one latent in `paths.parquet`."""
    found = []
    for _, steps in rows.groupby("path", sort=True):
        steps = steps.sort_values("step")
        nodes = steps[["kind", "layer", "unit", "token"]].itertuples(index=False)
        found.append(Path(tuple(Node(*node) for node in nodes), tuple(steps["contribution"])))
    return found


def largest(paths: list[Path], n: int = SHOWN) -> list[Path]:
    """The `n` paths of the largest contributions, with those that they go on from, the root's first."""
    ordered = sorted(paths[1:], key=lambda path: -path.contributions[-1])[:n]
    kept = {path.nodes[: i + 1] for path in ordered for i in range(len(path.nodes))}
    return [paths[0], *(path for path in paths[1:] if path.nodes in kept)]


def _level(node: Node) -> float:
    """Height of a node: embeddings lowest, then the heads and the latents of each layer."""
    return {"embedding": -1.0, "head": 2.0 * node.layer, "feature": 2.0 * node.layer + 1}.get(node.kind, np.inf)


def layout(paths: list[Path], levels: list[float]) -> dict[Node, tuple[float, float]]:
    """Where the nodes are: those of a level in a row, in the order of the text, rows moved so that as few edges as can
    be found pass behind a node."""
    rows = [sorted({n for p in paths for n in p.nodes if _level(n) == level}, key=_by_token) for level in levels]
    edges, best, fewest = list(edges_of(paths)), {}, np.inf
    for attempt in range(TRIES):
        moves = np.random.default_rng(attempt).uniform(-0.3, 0.3, len(rows)) * (attempt > 0)
        place = {
            node: ((i + 0.5 + move) / len(row), float(height))
            for height, (row, move) in enumerate(zip(rows, moves, strict=True))
            for i, node in enumerate(row)
        }
        if (n := _hidden(place, edges)) < fewest:
            best, fewest = place, n
    return best


def _by_token(node: Node) -> tuple[int, int]:
    return node.token, node.unit


def _hidden(place: dict[Node, tuple[float, float]], edges: list[tuple[Node, Node]]) -> int:
    """How often an edge passes behind a node."""
    ends = np.array([(*place[lower], *place[upper]) for upper, lower in edges]).reshape(-1, 4)
    x, y = np.array(list(place.values())).T
    share = (y - ends[:, 1, None]) / (ends[:, 3] - ends[:, 1])[:, None]  # of the way up, (edges, nodes)
    at = ends[:, 0, None] + share * (ends[:, 2] - ends[:, 0])[:, None]
    return int(((share > 0) & (share < 1) & (abs(at - x) < HALF_WIDTH)).sum())


def draw_graph(axis: Axes, paths: list[Path], one: Any, tokens: list[str]) -> None:
    """The graph of `paths`; `one` is the latent's row of `latents`, `tokens` the text."""
    levels = sorted({_level(node) for path in paths for node in path.nodes})
    place = layout(paths, levels)
    for (upper, lower), contribution in edges_of(paths).items():
        (x, y), (x0, y0) = place[upper], place[lower]
        share = contribution / _total(one)
        axis.plot([x0, x], [y0, y], color="0.45", linewidth=0.5 + 6 * min(share, 1.0), alpha=0.55, zorder=1)
        place_of_number = (x0 + 0.38 * (x - x0), y0 + 0.38 * (y - y0))
        axis.text(*place_of_number, f"{100 * share:.0f}", fontsize=5.5, zorder=2, bbox=_NUMBER, **_CENTRED)
    for node, (x, y) in place.items():
        axis.text(x, y, node_name(node, one, tokens), fontsize=6, zorder=3, bbox=_BOXES[node.kind], **_CENTRED)
    axis.set(xlim=(0, 1), ylim=(-0.6, len(levels) - 0.4), title=title(one))
    axis.set_yticks(range(len(levels)), [_level_name(level, one) for level in levels])
    axis.set_xticks([])
    axis.spines[:].set_visible(False)
    axis.tick_params(length=0)


def node_name(node: Node, one: Any, tokens: list[str]) -> str:
    at = f"“{tokens[node.token].strip() or tokens[node.token]}” {node.token}"
    unit = {"target": f"latent {one.latent}", "feature": f"latent {node.unit}", "head": f"head {node.unit}"}
    return f"{unit[node.kind]}\n{at}" if node.kind in unit else at


def _level_name(level: float, one: Any) -> str:
    if level == -1 or np.isinf(level):
        return "embedding" if level < 0 else f"layer {one.layer}"
    return f"layer {int(level // 2)}, {'latents' if level % 2 else 'heads'}"


def title(one: Any) -> str:
    parts = {"errors": one.error, "biases": one.bias, "MLPs": one.mlp + one.skip}
    told = [f"{name} {100 * value / _total(one):+.0f} %" for name, value in parts.items() if value]
    return f"latent {one.latent} of layer {one.layer}, activation {one.activation:.3g}: {', '.join(told)}".replace(
        "-", "−"
    )


# -------------------------------------------------------------------- means over text
def read_overlaps(job: Job) -> pd.DataFrame:
    """`overlap.parquet` of all studies; `key` says of which a row is, `of_layer` whose latents they explain."""
    folders = job.inputs("circuits")
    layers = [job.plan.instance("circuits", folder.name).config["layer"] for folder in folders]
    tables = (pd.read_parquet(folder / "overlap.parquet") for folder in folders)
    named = zip(folders, layers, tables, strict=True)
    return pd.concat([table.assign(key=f.name, of_layer=n) for f, n, table in named], ignore_index=True)


@figure("circuits_overlap", stage="circuits", reads=read_overlaps)
def circuits_overlap(data: pd.DataFrame) -> tuple[Figure, pd.DataFrame]:
    """How far the weights alone name the latents that matter on text: of the k latents of an earlier layer that bring a
    latent most on average, the share that are among the k largest pullbacks.

    A panel a study, a line an earlier layer: the mean over the latents that are explained, from the least to the
    largest of them. Dashed is a random choice.
    """
    studies = list(data.groupby("key", sort=False)) or [("", data)]
    drawn, grid = wrapped_panels(len(studies), 2.9, 2.6, least_width=4.2)
    for axis, (_, rows) in zip(grid.flat, studies, strict=False):
        if rows.empty:
            empty_panel(axis, "No latent that is explained fires on the text.")
            continue
        for n, (layer, of_layer) in enumerate(rows.groupby("layer")):
            of_k, style = 100 * of_layer.groupby("k")["overlap"].agg(["mean", "min", "max"]), look(n)
            axis.plot(of_k.index, of_k["mean"], label=f"layer {layer}", **style.line)
            axis.fill_between(of_k.index, of_k["min"], of_k["max"], color=style.color, alpha=0.15, linewidth=0)
        chance = 100 * rows.groupby("k")["by_chance"].mean()
        axis.plot(chance.index, chance, color="0.35", linestyle="--", label="by chance")
        n_latents = rows["latent"].nunique()
        axis.set(xlabel="k", ylim=(0, 102), title=f"{n_latents} latents of layer {rows['of_layer'].iloc[0]}")
        log_axis(axis, "x")
    grid[0][0].set_ylabel("overlap@k (%)")
    drawn.tight_layout()
    legend_beside(grid, labelled(grid.flat))
    return drawn, data


# -------------------------------------------------------------------- greater-than
class GreaterThan(NamedTuple):
    """Of all studies of an experiment: a row a study, and a row a study, kind of unit and number of units."""

    studies: pd.DataFrame
    curves: pd.DataFrame


def read_greater_than(job: Job) -> GreaterThan:
    named = with_names(read_summaries(job, "greater_than"))
    curves = [pd.read_parquet(f"{folder}/curve.parquet").assign(dictionary_key=key)
              for folder, key in zip(named["folder"], named["dictionary_key"], strict=True)]  # fmt: skip
    return GreaterThan(named, pd.concat(curves, ignore_index=True))


@figure("greater_than", stage="greater_than", reads=read_greater_than)
def greater_than(data: GreaterThan) -> tuple[Figure, pd.DataFrame]:
    """How well the model tells later years from earlier ones with only the k units of an MLP in it whose activations
    vary most over the years: latents of a transcoder, and the MLP's own neurons.

    A panel a place, a line a series and amount; of several seeds the mean, within their range. All hundred prompts are
    used, so that there is no interval over prompts.
    """
    names = ["place", "series", "amount_name", "amount", "point", "dictionary_key", "score_model", "score_transcoder"]
    table = data.studies[names].merge(data.curves, on="dictionary_key", sort=False)
    places = list(dict.fromkeys(table["place"]))
    drawn, grid = wrapped_panels(len(places), 3.2, 2.9, least_width=4.2)
    for axis, place in zip(grid.flat, places, strict=False):
        mine = table[table["place"] == place]
        neurons = mine[mine["units"] == "neurons"].drop_duplicates("k")  # of the MLP, whatever the transcoder
        axis.plot(neurons["k"], neurons["score"], color="0.35", linestyle="--", label="neurons")
        for n, (_, rows) in enumerate(mine[mine["units"] == "latents"].groupby("point", sort=False)):
            first, of_k = rows.iloc[0], rows.groupby("k")["score"]
            label = f"{first['series']}, {first['amount_name']} = {first['amount']:g}"
            label += f" ({rows['dictionary_key'].nunique()} seeds)" if rows["dictionary_key"].nunique() > 1 else ""
            style = look(n)
            axis.plot(of_k.mean(), markevery=(2 + 4 * n, 10), label=label, **style.line)
            axis.fill_between(of_k.min().index, of_k.min(), of_k.max(), color=style.color, alpha=0.2, linewidth=0)
        axis.axhline(mine["score_model"].iloc[0], color="0.35", linewidth=1, label="the model")
        axis.set(xlabel="units kept", title=place)
    grid[0][0].set_ylabel("p(later years) − p(others)")
    drawn.tight_layout()
    legend_beside(grid, labelled(grid.flat))
    return drawn, table.drop(columns="point")
