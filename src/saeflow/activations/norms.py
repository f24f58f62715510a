"""How large activations are at each layer: the first token of a row against others, and dimensions that outweigh all
others (massive activations and outlier dimensions, arXiv 2402.17762), before anything is cached."""

from collections.abc import Iterable

import pandas as pd
import torch
from matplotlib.figure import Figure
from torch import Tensor

from saeflow.figures.axes import legend_below, log_axis, subplots
from saeflow.figures.style import look
from saeflow.models.protocol import LanguageModel
from saeflow.models.splicing import run_clean

PLACES = {
    "hook_resid_post": "residual stream after the block",
    "hook_attn_out": "what attention writes",
    "ln2.hook_normalized": "what the MLP reads",
    "hook_mlp_out": "what the MLP writes",
}
ROWS = 4  # of a pass


def norms_by_layer(model: LanguageModel, tokens: Tensor, places: Iterable[str] = tuple(PLACES)) -> pd.DataFrame:
    """One row a hook, of all layers, on rows `tokens` (B, P), of P >= 2:

    `median`: the median L2 norm of the tokens that are not the first of their row; `first`: the mean norm of the first
    tokens, and `largest`: the largest norm of the others, both over that median; `outlier`, `two_outliers`: the share
    of the others' summed squares in the dimension, and in the two, that have most of them; `dimensions`: which two.
    """
    hooks = [f"blocks.{layer}.{place}" for place in places for layer in range(len(model.blocks))]
    first: dict[str, list[Tensor]] = {hook: [] for hook in hooks}
    others: dict[str, list[Tensor]] = {hook: [] for hook in hooks}
    squares: dict[str, Tensor | float] = dict.fromkeys(hooks, 0.0)
    for rows in tokens.split(ROWS):
        for hook, values in run_clean(model, rows, hooks, []).values.items():
            flat = values.flatten(2).float()
            lengths = flat.norm(dim=-1)
            first[hook].append(lengths[:, 0])
            others[hook].append(lengths[:, 1:].flatten())
            squares[hook] = squares[hook] + flat[:, 1:].double().square().sum((0, 1))
    found = []
    for hook in hooks:
        _, layer, place = hook.split(".", 2)
        rest, dimensions = torch.cat(others[hook]), torch.as_tensor(squares[hook])
        median, top = rest.median(), dimensions.topk(2)
        share = top.values / dimensions.sum()
        found.append(
            {"place": place, "layer": int(layer), "median": median.item()}
            | {"first": (torch.cat(first[hook]).mean() / median).item(), "largest": (rest.max() / median).item()}
            | {"outlier": share[0].item(), "two_outliers": share.sum().item()}
            | {"dimensions": " ".join(map(str, top.indices.tolist()))}
        )
    return pd.DataFrame(found)


def draw_norms(table: pd.DataFrame) -> Figure:
    """By layer: norms over the median of tokens that are not first, and the share of two dimensions."""
    places = list(dict.fromkeys(table["place"]))
    figure, (left, right) = subplots(1, 2, figsize=(7.2, 2.8))
    for n, place in enumerate(places):
        rows = table[table["place"] == place]
        style = look(n).line | {"markersize": 3}
        left.plot(rows["layer"], rows["first"], label=PLACES.get(place, place), **style)
        right.plot(rows["layer"], 100 * rows["two_outliers"], **style)
    log_axis(left, "y")
    left.axhline(1, color="0.6", linewidth=0.6, zorder=0)
    left.set(xlabel="layer", ylabel="norm of the first token\nover the others' median")
    right.set(xlabel="layer", ylabel="squares in two dimensions (%)", ylim=(0, 100))
    figure.tight_layout()
    legend_below(figure, left.get_legend_handles_labels()[0], columns=2)
    return figure
