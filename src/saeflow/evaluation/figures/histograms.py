"""How the active latents are spread over tokens."""

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from saeflow.dictionaries.naming import IDENTITY, with_names
from saeflow.evaluation.figures.reading import Evaluations, read_evaluations
from saeflow.figures.axes import wrapped_panels
from saeflow.figures.registry import figure
from saeflow.figures.style import sequence


@figure("l0_histograms", stage="evaluate", reads=read_evaluations)
def l0_histograms(data: Evaluations) -> tuple[Figure, pd.DataFrame]:
    """Share of the tokens, BOS left out, by number of active latents: one panel a kind of dictionary, hook and head.

    The table has the tokens with BOS too.
    """
    identity = [*IDENTITY, "dictionary_key"]
    table = data.l0.merge(with_names(data.table)[identity], on="dictionary_key", sort=False)
    groups = list(table.groupby(["place", "series"], sort=True))
    figure, grid = wrapped_panels(len(groups), 2.4, 2.5, least_width=3.2)
    for axis, ((place, series), rows) in zip(grid.flat, groups, strict=False):
        amounts = sorted(rows["amount"].unique())
        for amount, colour in zip(amounts, sequence(len(amounts)), strict=True):
            label: str | None = f"{rows['amount_name'].iloc[0]} = {amount:g}"
            for _, one in rows[rows["amount"] == amount].groupby("dictionary_key"):
                tokens = one.sort_values("l0")["tokens_without_bos"].to_numpy()
                shown = int(np.searchsorted(tokens.cumsum(), 0.999 * tokens.sum())) + 1
                share = 100 * tokens[:shown] / tokens.sum()
                axis.stairs(share, np.arange(shown + 1) - 0.5, color=colour, label=label)
                label = None
        axis.set(xlabel="active latents of a token", title=f"{series}\n{place}")
        axis.legend(handlelength=1.0)
    for line in grid:
        line[0].set_ylabel("tokens (%)")
    figure.tight_layout()
    return figure, table[[*identity, "l0", "tokens", "tokens_without_bos"]]
