"""The cost of an experiment is the sum of what its artifacts took, and says where that is not known."""

import json
import os
import time
from pathlib import Path

import pandas as pd
import pytest
from tests.planning.test_plan import SWEEP, finish, home  # noqa: F401 (home is a fixture)

from saeflow.planning import frozen
from saeflow.planning.expansion import compose
from saeflow.planning.graph import Plan
from saeflow.planning.history import FILE, lines, record
from saeflow.planning.ledger import ALL, UNKNOWN, as_text, ledger, ledger_file, save_ledger
from saeflow.planning.stages import stages
from saeflow.storage.receipts import RECEIPT

MORE = SWEEP.replace("0.003", "0.003,0.01")


def plan_of(sweep: str = SWEEP) -> Plan:
    return compose(Path("conf"), [sweep], results="results", digests="digests.json")


def run(plan: Plan, device: str = "cpu") -> None:
    """Makes what is missing: artifact number n of a stage takes n seconds, and twice as many of all cores."""
    frozen.freeze_run(plan)
    for stage, keys in plan.to_make.items():
        finish(plan, stage, keys)
        for n, key in enumerate(keys, start=1):
            record(stages()[stage], plan, [plan.instance(stage, key)], device, float(n), 2.0 * n, 10**9)


@pytest.fixture
def here(home: Path, monkeypatch: pytest.MonkeyPatch) -> Path:  # noqa: F811
    monkeypatch.chdir(home)
    return home


def table_of(plan: Plan) -> pd.DataFrame:
    save_ledger(plan)
    return pd.read_parquet(ledger_file(plan)).set_index("stage")


def test_what_all_took_and_what_the_last_run_saved_is_summed_by_stage(here: Path) -> None:
    run(plan_of())
    table = table_of(plan_of())
    assert list(table.index) == ["tokens", "activations", "train", "baseline", "evaluate", "figures", ALL]
    assert list(table["artifacts"]) == list(table["made"]) == [2, 1, 2, 1, 2, 1, 9] and not table["found"].any()
    assert list(table["wall_s"]) == [3, 1, 3, 1, 3, 1, 12] and list(table["cpu_s"]) == [6, 2, 6, 2, 6, 2, 24]
    assert not table[["gpu_s", "saved_wall_s", "wall_unknown", "cpu_unknown", "saved_cpu_unknown"]].any(axis=None)

    os.utime(next(frozen.FOLDER.glob("*.json")), (time.time() - 60,) * 2)
    run(plan_of(MORE), device="cuda:0")
    table = table_of(plan_of(MORE))
    assert list(table["made"]) == [0, 0, 1, 0, 1, 1, 3] and list(table["found"]) == [2, 1, 2, 1, 2, 0, 8]
    assert list(table["gpu_s"]) == [0, 0, 1, 0, 1, 1, 3] and table["wall_s"][ALL] == 14
    assert list(table["saved_wall_s"]) == [3, 1, 3, 1, 3, 0, 11] and table["saved_cpu_s"][ALL] == 22
    csv = pd.read_csv(ledger_file(plan_of(MORE)).with_suffix(".csv")).set_index("stage")
    assert csv["wall_s"].to_dict() == table["wall_s"].to_dict() and list(csv) == list(table)


def test_bytes_are_what_lies_on_disk(here: Path) -> None:
    plan = plan_of()
    run(plan)
    (column,) = plan.stages["activations"]
    hook = plan.stages["activations"][column].config["hook_name"]
    array = here / "results/activations" / column.split("/")[0] / "activations.zarr" / hook / "c/0"
    array.mkdir(parents=True)
    (array / "0").write_bytes(bytes(10_000))
    rows = {row.stage: row for row in ledger(plan_of())}
    for stage in ("train", "evaluate", "activations"):
        files = [file for file in (here / "results" / stage).rglob("*") if file.is_file()]
        assert rows[stage].n_bytes == sum(file.stat().st_size for file in files) > 0
    assert rows["activations"].n_bytes > 10_000
    assert rows[ALL].n_bytes == sum(row.n_bytes for stage, row in rows.items() if stage != ALL)


def test_what_nobody_recorded_is_unknown_and_not_nothing(here: Path) -> None:
    plan = plan_of()
    run(plan)
    old = [{k: v for k, v in line.items() if k not in ("cpu_s", "gpu_s", "experiment")} for line in lines("results")]
    old = [line for line in old if line["stage"] != "tokens"]
    first = next(line for line in old if line["stage"] == "train")
    first["cpu_s"] = 7.0
    (here / "results" / FILE).write_text("".join(json.dumps(line) + "\n" for line in old))
    rows = {row.stage: row for row in ledger(plan_of())}
    assert rows["tokens"].spent == (None, None, None, 2, 2)
    assert rows["train"].spent == (3.0, 7.0, 0.0, 0, 1)
    assert rows["evaluate"].spent == (3.0, None, 0.0, 0, 2)
    assert rows[ALL].spent == (9.0, 7.0, 0.0, 2, 8)
    text = as_text(list(rows.values()))
    assert f"9.0 s + 2 {UNKNOWN}" in text and f"7.0 s + 8 {UNKNOWN}" in text
    table = table_of(plan_of())
    assert table.loc["tokens", "wall_s"] is pd.NA and table.loc["tokens", "cpu_unknown"] == 2
    assert table["peak_memory_bytes"].isna().all()


def test_without_made_jsonl_receipts_tell(here: Path) -> None:
    plan = plan_of()
    run(plan)
    (here / "results" / FILE).unlink()
    for n, key in enumerate(plan.stages["train"], start=1):
        receipt = here / plan.receipt("train", key)
        told = {"wall_s": 10.0, "cpu_s": 6.0, "gpu_s": 5.0, "sharing": 2, "peak_memory_bytes": n * 1000}
        receipt.write_text(json.dumps(json.loads(receipt.read_text()) | told))
    (train,) = (row for row in ledger(plan_of()) if row.stage == "train")
    assert train.spent == (10.0, 12.0, 10.0, 0, 0) and train.peak_memory_bytes == 2000


def test_what_a_run_has_made_and_found_is_unknown_once_its_plan_is_gone(here: Path) -> None:
    run(plan_of())
    run(plan_of(MORE))
    (here / "results/activations").rename(here / "away")  # to free the disk: what it took is remembered
    for file in frozen.FOLDER.glob("*.json"):
        file.unlink()
    rows = {row.stage: row for row in ledger(plan_of())}
    assert all((row.made, row.found, row.saved) == (None, None, None) for row in rows.values())
    assert rows["activations"].spent.wall_s == 1.0 and rows["activations"].n_bytes == 0
    assert as_text(list(rows.values())).count(UNKNOWN) >= 4 * len(rows)
    assert table_of(plan_of())["found"].isna().all()


def test_nothing_made_is_no_ledger(here: Path) -> None:
    assert save_ledger(plan_of()) == "nothing has been made yet" and not ledger_file(plan_of()).parent.exists()


def test_it_is_written_anew_only_with_what_it_says(here: Path) -> None:
    run(plan_of())
    save_ledger(plan_of())
    state = ledger_file(plan_of()).stat().st_mtime_ns
    save_ledger(plan_of())
    assert ledger_file(plan_of()).stat().st_mtime_ns == state
    receipt = next((here / "results/train").rglob(RECEIPT))
    receipt.unlink()
    save_ledger(plan_of())
    assert ledger_file(plan_of()).stat().st_mtime_ns != state
