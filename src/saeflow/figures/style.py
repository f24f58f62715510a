"""The look of all figures, and how they are saved.

Nothing here, or in any module of figures, imports pyplot: figures are objects that no window or notebook knows of, so
that importing them leaves Matplotlib's backend as its user has set it.
"""

from pathlib import Path
from typing import Any, NamedTuple

import matplotlib
import numpy as np
import pandas as pd
from matplotlib.figure import Figure

# Okabe and Ito's colours, without the yellow, are safe for colour-blind readers; every series has a marker of its own
# too, for print.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "<", ">", "p", "h", "*")
DASHES: tuple[Any, ...] = ("-", (0, (5, 2)), (0, (1, 1.2)), (0, (5, 1.5, 1, 1.5)))
STYLE = {
    "font.size": 8,
    "axes.titlesize": 8,
    "legend.fontsize": 7,
    "legend.frameon": False,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "lines.linewidth": 1.2,
    "lines.markersize": 4,
    "figure.dpi": 200,
    "savefig.dpi": 200,
    "pdf.fonttype": 42,
}


class Look(NamedTuple):
    """How a series is drawn: of two in a figure, something differs that is seen in grey too."""

    color: str
    marker: str
    linestyle: Any
    hollow: bool

    @property
    def line(self) -> dict[str, Any]:
        """Arguments of `Axes.plot`."""
        face = "white" if self.hollow else self.color
        return {"color": self.color, "marker": self.marker, "linestyle": self.linestyle, "markerfacecolor": face}


def look(i: int) -> Look:
    """Of series i of a figure: a colour each while colours last, then other dashes, then hollow markers."""
    turn, place = divmod(i, 2 * len(MARKERS))
    if turn == len(MARKERS):
        raise ValueError(f"a figure can tell {2 * len(MARKERS) ** 2} series apart, not more; ask for fewer at once")
    marker = MARKERS[(place + turn) % len(MARKERS)]
    dashes = DASHES[place // len(COLOURS)]
    return Look(COLOURS[place % len(COLOURS)], marker, dashes, place >= len(MARKERS))


def track(n: int) -> dict[str, Any]:
    """Dashes and marker of line n where colours say something else."""
    turn, place = divmod(n, len(MARKERS))
    if turn == len(DASHES):
        raise ValueError(f"a figure can tell {len(DASHES) * len(MARKERS)} lines of one colour apart; ask for fewer")
    return {"linestyle": DASHES[n % len(DASHES)], "marker": MARKERS[(place + turn) % len(MARKERS)]}


def sequence(n: int, start: float = 0.0, end: float = 0.85) -> np.ndarray:
    """(n, 4): colours of ordered values, from a map that prints in grey too."""
    return np.asarray(matplotlib.colormaps["viridis"](np.linspace(start, end, n)))


def colours(n: int) -> list[Any]:
    """Of n things without an order: those that are safe for colour-blind readers while they last."""
    return list(COLOURS[:n]) if n <= len(COLOURS) else list(sequence(n, end=0.9))


def save_figure(figure: Figure, table: pd.DataFrame, folder: Path, name: str) -> None:
    """Writes `<name>.png`, `.pdf` and, of the table, `.csv`. To be called in the figure's style."""
    figure.savefig(folder / f"{name}.png", bbox_inches="tight")
    figure.savefig(folder / f"{name}.pdf", bbox_inches="tight", metadata={"CreationDate": None})  # equal bytes
    save_table(table, folder, name)


def save_table(table: pd.DataFrame, folder: Path, name: str) -> None:
    table.to_csv(folder / f"{name}.csv", index=False, float_format="%.6g")
