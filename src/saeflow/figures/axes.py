"""Axes, grids of panels and legends that figures of several stages share."""

import math
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import Formatter, LogLocator, NullFormatter

PANELS_BESIDE = 4


class _FewTicks(LogLocator):
    """So many of each decade that labels of one size do not touch and a short axis still has some: the fewer, the more
    decades there are, and the less room."""

    def tick_values(self, vmin: float, vmax: float) -> Sequence[float]:
        low, high = (math.log10(vmin), math.log10(vmax)) if 0 < vmin < vmax else (0.0, 0.0)
        powers = [10.0**n for n in range(math.floor(low), math.ceil(high) + 1)]
        room = self.axis.get_tick_space() if self.axis else _ROOM
        for most, subs in _SUBS.items():
            if high - low <= most and sum(vmin <= sub * power <= vmax for sub in subs for power in powers) <= room:
                break
        self.set_params(subs=subs)
        return super().tick_values(vmin, vmax)

    def nonsingular(self, vmin: float, vmax: float) -> tuple[float, float]:
        """Points that are all but at one place, as TopK dictionaries of one k are, get room around them."""
        low, high = super().nonsingular(vmin, vmax)
        return (low / 2, high * 2) if high < _ONE_PLACE * low else (low, high)


_SUBS = {0.4: (1, 1.2, 1.5, 2, 2.5, 3, 4, 5, 6, 8), 0.8: (1, 1.5, 2, 3, 4, 6, 8), 2: (1, 2, 3, 5), 4: (1, 3)}
_SUBS |= {math.inf: (1,)}
"""Up to how many decades an axis says which numbers of each, if they have room."""
_ROOM = 9  # ticks
_ONE_PLACE = 1.01


class _Plain(Formatter):
    """0.2 and 50 where all labels are short so, else powers of ten."""

    def __call__(self, value: float, pos: int | None = None) -> str:
        low, high = sorted(self.axis.get_view_interval())  # type: ignore[union-attr]
        if value == 0 or (0 < high <= 1e4 * low and 1e-4 <= abs(value) < 1e6):
            return f"{value:g}"
        mantissa, exponent = f"{value:.1e}".replace(".0e", "e").split("e")
        return f"${'' if mantissa == '1' else mantissa + ' × '}10^{{{int(exponent)}}}$"


def log_axis(axis: Axes, which: str) -> None:
    """A log scale that says 0.2 and 50 rather than powers of ten where it is short."""
    axis.set(**{f"{which}scale": "log"})
    ticks = axis.xaxis if which == "x" else axis.yaxis
    ticks.set_major_locator(_FewTicks())
    ticks.set_major_formatter(_Plain())
    ticks.set_minor_formatter(NullFormatter())


def subplots(
    rows: int = 1, columns: int = 1, *, figsize: tuple[float, float] | None = None, squeeze: bool = True, **more: Any
) -> tuple[Figure, Any]:
    """`pyplot.subplots`, of a figure that pyplot does not know; `figsize` in inches."""
    figure = Figure(figsize=figsize)
    return figure, figure.subplots(rows, columns, squeeze=squeeze, **more)


def wrapped_panels(n: int, width: float, height: float, least_width: float) -> tuple[Figure, np.ndarray]:
    """A grid with room for n panels, at most four beside one another, in rows as equal as can be; those that are left
    over are off."""
    rows = max(1, math.ceil(n / PANELS_BESIDE))
    columns = max(1, math.ceil(n / rows))
    figure, grid = subplots(rows, columns, figsize=(max(least_width, width * columns), height * rows), squeeze=False)
    for axis in grid.flat[n:]:
        axis.set_axis_off()
    return figure, grid


def panels(rows: int, columns: int, width: float = 2.9, height: float = 2.6, **more: Any) -> tuple[Figure, np.ndarray]:
    """A grid of panels of one size."""
    return subplots(rows, columns, figsize=(width * columns, height * rows), squeeze=False, **more)


def empty_panel(axis: Axes, text: str) -> None:
    """Says why there is nothing to draw."""
    axis.text(0.5, 0.5, text, ha="center", va="center", transform=axis.transAxes)
    axis.set_axis_off()


def matrix_axis(axis: Axes) -> None:
    """No frame and no tick marks: the cells of a matrix are frame enough."""
    axis.spines[:].set_visible(False)
    axis.tick_params(length=0)


def plain_table(
    axis: Axes, cells: list[list[str]], names: list[str], widths: list[float], size: float, *, head: float, loc: str
) -> Any:
    """A table of text with a line below its head, whose cells are `head` times as high as the others."""
    grid = axis.table(cells, colLabels=names, colWidths=widths, loc=loc, cellLoc="right", edges="")
    grid.auto_set_font_size(False)
    grid.set_fontsize(size)
    for (line, _), cell in grid.get_celld().items():
        cell.visible_edges = "B" if line == 0 else ""
        cell.set_height(cell.get_height() * (head if line == 0 else 1))
    return grid


def labelled(axes: Iterable[Axes]) -> dict[str, Any]:
    """What is drawn in any of them by its label, each label once."""
    entries: dict[str, Any] = {}
    for axis in axes:
        entries |= dict(zip(*reversed(axis.get_legend_handles_labels()), strict=True))
    return entries


def legend_below(figure: Figure, entries: dict[str, Any] | list[Any], columns: int = 6, note: str = "") -> None:
    """One legend for the whole figure, of handles by label or of handles that have their labels; `note` stands above
    it: what bars and bands cover."""
    if entries:
        handles = list(entries.values()) if isinstance(entries, dict) else entries
        labels = list(entries) if isinstance(entries, dict) else [handle.get_label() for handle in handles]
        ncols = min(columns, len(handles))
        figure.legend(handles, labels, loc="upper center", bbox_to_anchor=(0.5, 0.01), ncols=ncols, title=note or None)
        figure.legends[-1].get_title().set_fontsize(7)


def legend_beside(grid: np.ndarray, entries: dict[str, Any]) -> None:
    """One legend for all panels: where a panel is left over, or right of the first row and of what hangs on its last
    axis."""
    left_over = [axis for axis in grid.flat if not axis.axison]
    axis = left_over[0] if left_over else grid[0][-1]
    right = 0.0 if left_over else 1.02 + (0.2 if axis.child_axes else 0)
    axis.legend(entries.values(), entries.keys(), loc="center left", bbox_to_anchor=(right, 0.5))
