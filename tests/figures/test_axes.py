"""Axes that figures share."""

import numpy as np
import pytest

from saeflow.figures.axes import log_axis, subplots


@pytest.mark.parametrize(
    ("low", "high", "shown"),
    [
        (8, 60, [10, 20, 30, 50]),
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
