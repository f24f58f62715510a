"""The table of an experiment's dictionaries: what it says of those that are of no use."""

from pathlib import Path
from typing import Any

import pytest
from measured import write_evaluations
from tests.dictionaries.test_series import plan_of
from tests.planning.test_plan import home  # noqa: F401 (a fixture)

from saeflow.evaluation.overview import overview


@pytest.mark.parametrize(("variance", "useless"), [(-4e11, True), (-0.11, True), (-0.05, False), (0.5, False)])
def test_a_dictionary_that_explains_less_than_the_mean_is_marked(home: Path, variance: float, useless: bool) -> None:  # noqa: F811
    plan = plan_of(home, "sweep={dictionary:topk,dictionary.k:[4,8]}")

    def values(summary: dict[str, Any]) -> dict[str, float]:
        return {"l0": 4.0, "ce_replaced": 3.5} | ({"explained_variance": variance} if summary["k"] == 4 else {})

    table, page = overview(write_evaluations(plan, values))
    assert page.count("<strong>worse than the mean</strong>") == useless
    assert ("worse_than_the_mean" in table) == useless
    if useless:
        assert table.set_index("amount")["worse_than_the_mean"].to_dict() == {4: True, 8: False}
