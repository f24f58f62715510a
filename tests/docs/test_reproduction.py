"""docs/reproduction.md is what its table says, and its table is of what the plan would make today."""

import re
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import reproduction
from reproduction import COLUMNS, PAGE, TABLE, look_up, page, published, quantities, shown

from saeflow.config import ConfigError


@pytest.fixture(scope="module")
def table() -> pd.DataFrame:
    return pd.read_csv(TABLE)


def test_the_page_is_written_from_the_table(table: pd.DataFrame) -> None:
    assert PAGE.read_text() == page(table), ".venv/bin/python docs/reproduction.py"


def test_every_number_is_there_once_and_in_order(table: pd.DataFrame) -> None:
    """Those of an experiment that has not been run yet are not."""
    asked = [(row.id, model, where["experiment"]) for row, model, where in quantities()]
    there = set(table["experiment"])
    assert len(set(asked)) == len(asked)
    held = list(table[["id", "model", "experiment"]].itertuples(index=False, name=None))
    assert held == [one for one in asked if one[-1] in there]
    assert list(table) == COLUMNS and table["value"].notna().all()
    held = table.dropna(subset=["low"])
    assert (held["low"] <= held["value"]).all() and (held["value"] <= held["high"]).all()


def test_every_quantity_says_where_ours_is_or_why_there_is_none() -> None:
    for source in published()["sources"]:
        for row in source["rows"]:
            assert set(row.ours) <= set(reproduction.MODELS)
            assert all(("experiment" in where) != ("none" in where) for where in row.ours.values()), row.id


@pytest.mark.parametrize("experiment", sorted({where["experiment"] for _, _, where in quantities()}))
def test_a_number_is_of_what_the_plan_would_make_today(table: pd.DataFrame, experiment: str) -> None:
    if experiment.startswith("smollm2") and not (reproduction.ROOT / "models/smollm2/config.json").exists():
        pytest.skip("its key needs the model: make model NAME=smollm2")
    if experiment == "greater_than":
        pytest.skip("its key holds the weights of a model that every processor trains a little differently")
    keys = set(table.loc[table["experiment"] == experiment, "key"])
    if not keys:
        pytest.skip(f"nothing is there of {experiment} yet")
    assert keys == {reproduction.key(experiment)}, f'make run HYDRA="experiment={experiment}", then make reproduction'


# -------------------------------------------------------------------- how it reads
@pytest.fixture
def figures(tmp_path: Path) -> Path:
    rows = [
        {"place": "a", "l0": 10.0, "seed": 0, "ce": 2.0, "ce_low": 1.5, "ce_high": 2.5},
        {"place": "a", "l0": 30.0, "seed": 0, "ce": 3.0, "ce_low": 2.5, "ce_high": 3.5},
        {"place": None, "l0": 31.0, "seed": 0, "ce": 4.0, "ce_low": 3.5, "ce_high": 4.5},
        {"place": None, "l0": 31.0, "seed": 1, "ce": 5.0, "ce_low": 4.5, "ce_high": 5.5},
    ]
    pd.DataFrame(rows).to_csv(tmp_path / "t.csv", index=False)
    return tmp_path


@pytest.mark.parametrize(
    ("where", "found"),
    [
        ({"where": {"place": "a", "l0": 30.0}}, (3.0, 2.5, 3.5, None)),
        ({"where": {"place": "a"}, "value": "seed", "over": "points"}, (0.0, None, None, None)),
        ({"where": {"place": "a"}, "near": {"l0": 12}}, (2.0, 1.5, 2.5, 10.0)),
        ({"where": {"place": None}, "over": "seeds"}, (4.5, 4.0, 5.0, None)),
        ({"where": {"place": "a", "l0": 30.0}, "interval": ["l0", "seed"]}, (3.0, 30.0, 0, None)),
    ],
    ids=["row", "one-value", "nearest", "seeds", "named-interval"],
)
def test_a_lookup_finds_its_number(figures: Path, where: dict[str, Any], found: tuple[Any, ...]) -> None:
    assert tuple(look_up(figures, {"table": "t", "value": "ce", **where}).values()) == found


@pytest.mark.parametrize(
    "where", [{"where": {"place": "b"}}, {"where": {"place": None}}, {"where": {"l0": 10.0}, "over": "seeds"}, {}]
)
def test_a_lookup_that_names_no_row_or_several_is_refused(figures: Path, where: dict[str, Any]) -> None:
    with pytest.raises(LookupError, match=r"t\.csv: \d rows for"):
        look_up(figures, {"table": "t", "value": "ce", **where})


def test_what_cannot_be_planned_here_keeps_its_rows(
    table: pd.DataFrame, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def key(experiment: str) -> str:
        if experiment.startswith("smollm2"):
            raise ConfigError("no such folder")
        return "none"

    monkeypatch.setattr(reproduction, "key", key)
    pd.testing.assert_frame_equal(reproduction.collect([tmp_path]), table, check_dtype=False)
    said = capsys.readouterr().out
    assert "smollm2_jsae: its rows stay, as it cannot be planned here: no such folder" in said
    assert "stack: is in none of the folders; its rows stay" in said


def test_a_number_is_shown_with_its_unit_and_interval() -> None:
    nothing = float("nan")
    assert shown({"value": 0.165, "low": 0.159, "high": 0.17, "at": nothing}, "%") == "16.5 % [15.9, 17.0]"
    assert shown({"value": -0.0046, "low": -0.01, "high": 0.001, "at": 109.9}, "nats") == (
        "−0.0046 [−0.0100, +0.0010] at 110"
    )
    assert shown({"value": 28.2, "low": 26, "high": 32, "at": nothing}, "count") == "28 [26, 32]"
    assert shown({"value": 21, "low": nothing, "high": nothing, "at": nothing}, "latents") == "21 latents"


def test_bars_within_cells_are_escaped() -> None:
    tables = re.split(r"\n\n", PAGE.read_text())
    rows = [[line for line in table.splitlines() if line.startswith("|")] for table in tables]
    assert sum(map(len, rows)) > 20 and r"\|J\|" in PAGE.read_text()
    for table in rows:
        assert len({len(re.findall(r"(?<!\\)\|", line)) for line in table}) <= 1
