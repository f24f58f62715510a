"""The figure of J while pairs are trained."""

from collections.abc import Hashable
from typing import Any

import pandas as pd
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from saeflow.dictionaries.settings import by_one_width, settings, tell_apart
from saeflow.figures.axes import legend_below, log_axis, subplots
from saeflow.figures.registry import figure
from saeflow.jacobians.figures import studies
from saeflow.jobs.job import Job
from saeflow.models.resources import block_of

PLACES = {"": ("at the input", "-"), "_at_reconstruction": ("at its reconstruction", (0, (3, 1.5)))}
"""Where J is taken: columns of `jacobian.parquet` by their ends, what they are called and how they are drawn."""


def read_training(job: Job) -> pd.DataFrame:
    """One row a logged step of every pair that is trained as one: `jacobian.parquet`, with what identifies the pair.

    Raises `ValueError` where there is none.
    """
    curves, about = [], []
    for folder in job.inputs("train", "jacobian.parquet"):
        if not (folder / "jacobian.parquet").is_file():
            continue
        held, hooks = settings(job.plan, "train", folder.name), job.plan.instance("train", folder.name).config
        summary: dict[Hashable, Any] = {name: hooks[name] for name in ("hook_name", "hook_name_out")}
        summary |= {"layer": block_of(hooks["hook_name"]), "randomise": held.get("model.randomise")}
        summary |= {"k": held["dictionary.k"], "d_sae": held.get("dictionary.d_sae")}
        about.append(studies.about_study(summary, held, ""))
        own = {"jacobian_coefficient": held["dictionary.jacobian_coefficient"], "seed": held["seed"]}
        curves.append(pd.read_parquet(folder / "jacobian.parquet").assign(train_key=folder.name, **own))
    if not curves:
        raise ValueError("the figure jacobian_training needs pairs that are trained as one: use dictionary=jacobian")
    named = zip(curves, tell_apart(by_one_width(about)), strict=True)
    return pd.concat([curve.assign(panel=", ".join(said)) for curve, said in named], ignore_index=True)


@figure("jacobian_training", stage="train", reads=read_training)
def jacobian_training(data: pd.DataFrame) -> tuple[Figure, pd.DataFrame]:
    """Mean |J| and the share above 0.01 by training tokens, at the true input and at its reconstruction.

    It is of the first tokens of each logged batch, without intervals, and its sign is not logged. Drawn is the panel
    with the most coefficients, of several seeds the mean; the table has all.
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
    identity = ["panel", "jacobian_coefficient", "seed", "train_key"]
    return drawn, data[[*identity, *(column for column in data if column not in identity)]]
