"""The look of all figures, and how they are saved."""

from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.figure import Figure

# Okabe and Ito's colours are safe for colour-blind readers; every series has a marker of its own too, for print.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
MARKERS = ("o", "s", "^", "D", "v", "P")
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


def sequence(n: int, start: float = 0.0, end: float = 0.85) -> np.ndarray:
    """(n, 4): colours of ordered values, from a map that prints in grey too."""
    return np.asarray(plt.get_cmap("viridis")(np.linspace(start, end, n)))


def colours(n: int) -> list[Any]:
    """Of n things without an order: those that are safe for colour-blind readers while they last."""
    return list(COLOURS[:n]) if n <= len(COLOURS) else list(sequence(n, end=0.9))


def look(i: int) -> tuple[str, str]:
    """Colour and marker of series i."""
    return COLOURS[i % len(COLOURS)], MARKERS[i % len(MARKERS)]


def save_figure(figure: Figure, table: pd.DataFrame, folder: Path, name: str) -> None:
    """Writes `<name>.png`, `.pdf` and, of the table, `.csv`; closes the figure. To be called in the figure's style."""
    figure.savefig(folder / f"{name}.png", bbox_inches="tight")
    figure.savefig(folder / f"{name}.pdf", bbox_inches="tight", metadata={"CreationDate": None})  # equal bytes
    plt.close(figure)
    save_table(table, folder, name)


def save_table(table: pd.DataFrame, folder: Path, name: str) -> None:
    table.to_csv(folder / f"{name}.csv", index=False, float_format="%.6g")
