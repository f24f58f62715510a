"""Axes that figures share."""

import numpy as np
import pytest
from matplotlib.lines import Line2D

from saeflow.figures.axes import legend_beside, log_axis, subplots, wrapped_panels


@pytest.mark.parametrize(
    ("low", "high", "shown"),
    [
        (7, 70, [10, 20, 30, 50]),
        (22, 90, [30, 40, 60, 80]),
        (90, 200, [100, 120, 150, 200]),
        (0.01, 20, [0.01, 0.03, 0.1, 0.3, 1, 3, 10]),
        (1e-4, 20, [1e-4, 1e-3, 0.01, 0.1, 1, 10]),
    ],
)
def test_labels_of_a_log_axis_are_few_however_long_it_is(low: float, high: float, shown: list[float]) -> None:
    _, axis = subplots()
    log_axis(axis, "y")
    axis.set_ylim(low, high)
    ticks = axis.yaxis.get_major_locator()()
    assert ticks[(ticks >= low) & (ticks <= high)] == pytest.approx(np.array(shown))


def test_a_short_axis_has_fewer_labels() -> None:
    _, axis = subplots(figsize=(2.2, 2.0))
    log_axis(axis, "x")
    axis.set_xlim(9, 600)
    ticks = axis.xaxis.get_major_locator()()
    assert list(ticks[(ticks >= 9) & (ticks <= 600)]) == [10, 30, 100, 300]


@pytest.mark.parametrize(
    ("low", "high", "said"),
    [
        (8, 60, {0.2: "0.2", 50: "50"}),
        (1e-5, 1e-3, {2e-5: "$2 × 10^{-5}$", 1e-4: "0.0001"}),
        (1e-5, 1, {1e-5: "$10^{-5}$", 0.1: "$10^{-1}$"}),
    ],
)
def test_numbers_of_a_log_axis_are_written_out_where_they_are_short(
    low: float, high: float, said: dict[float, str]
) -> None:
    _, axis = subplots()
    log_axis(axis, "y")
    axis.set_ylim(low, high)
    assert {value: axis.yaxis.get_major_formatter()(value) for value in said} == said


@pytest.mark.parametrize(("n", "rows", "columns"), [(1, 1, 1), (4, 1, 4), (5, 2, 3), (9, 3, 3), (0, 1, 1)])
def test_panels_are_spread_over_equal_rows_and_the_legend_fills_a_gap(n: int, rows: int, columns: int) -> None:
    _, grid = wrapped_panels(n, 2.0, 2.0, 2.0)
    assert grid.shape == (rows, columns) and [axis.axison for axis in grid.flat].count(True) == n
    legend_beside(grid, {"a line": Line2D([], [])})
    (holder,) = [axis for axis in grid.flat if axis.get_legend()]
    assert holder is (grid.flat[n] if n < rows * columns else grid[0][-1])


def test_points_at_one_place_have_room_around_them() -> None:
    """Where two TopK dictionaries of one k differ by what rounds, the axis was a billionth wide, and empty."""
    figure, axis = subplots(figsize=(3, 3))
    log_axis(axis, "x")
    axis.plot([32 - 1e-9], [3.8], marker="o")
    axis.plot([32], [3.7], marker="s")
    low, high = axis.get_xlim()
    assert low < 20 and high > 50
    figure.canvas.draw()
    assert any(low < tick < high for tick in axis.get_xticks())
