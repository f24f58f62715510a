"""Parts of jobs in the plan: what of them is missing, what they ask for, and that they change nothing else."""

import dataclasses
from pathlib import Path

import pytest
from tests.planning.test_plan import home, plan_of  # noqa: F401 (home is a fixture)

from saeflow.config import ConfigError
from saeflow.planning.batches import look, resources, set_aside_broken
from saeflow.planning.explain import explain, sentence
from saeflow.planning.graph import Plan
from saeflow.planning.history import lines, record
from saeflow.planning.parts import Part, mark, without_hash, without_part
from saeflow.planning.stages import stages

SHARDS = "device.parts.activations=8"  # of 307,200 tokens there are five


def test_parts_enter_no_key_and_by_default_there_are_none(home: Path) -> None:  # noqa: F811
    plain, shared = plan_of(home), plan_of(home, SHARDS, "device.parts.tokens=2")
    assert plain.parts == {} and plain.device["parts"] == {"tokens": 1, "activations": 1}
    ours, theirs = (dataclasses.asdict(plan) for plan in (plain, shared))
    assert {name for name in ours if ours[name] != theirs[name]} == {"parts", "device", "overrides"}


def test_there_are_no_more_parts_than_shards_and_no_part_of_one(home: Path) -> None:  # noqa: F811
    (parts,) = plan_of(home, SHARDS).parts["activations"].values()
    assert parts == [f"{n}-of-5" for n in (1, 2, 3, 4, 5)]
    assert plan_of(home, SHARDS, "tokens.train_tokens=65536").parts == {}
    assert plan_of(home, "device.parts.tokens=9").parts["tokens"].popitem()[1][-1] == "5-of-5"  # of 65,536 tokens
    assert plan_of(home, "corpus=openwebtext", "device.parts.tokens=9").parts == {}  # it is streamed


def test_a_part_whose_shards_lie_ready_is_done_whatever_its_mark_says(home: Path, monkeypatch) -> None:  # noqa: F811
    monkeypatch.chdir(home)
    plan = plan_of(home, "device.parts.activations=2")
    (key,) = plan.parts["activations"]
    hook = plan.stages["activations"][key].config["hook_name"]
    folder = plan.folder("activations", key).parent / "parts" / hook
    folder.mkdir(parents=True)
    layout_bytes = 16 * (4096 * 128 * 4 + 4) + 16 * 16 + 4  # of a whole shard of this model
    for number in (0, 2, 4):
        with (folder / f"{number}-{65536 if number < 4 else 45056}-01234567.shard").open("wb") as file:
            file.truncate(layout_bytes)
    marks = [Path(mark("activations", key, part)) for part in ("1-of-2", "2-of-2")]
    for file in marks:
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text("")
    look(plan)
    assert plan.parts["activations"] == {key: ["2-of-2"]}
    assert [Path(file) for file in plan.marks("activations", key)] == marks[1:]
    set_aside_broken(plan)
    assert [file.exists() for file in marks] == [True, False]
    next(folder.glob("2-*")).unlink()
    look(plan)
    assert plan.parts["activations"] == {key: ["1-of-2", "2-of-2"]}
    plan.device["parts"] = {"activations": 8}
    look(plan)
    assert plan.parts["activations"] == {key: ["2-of-5", "3-of-5", "4-of-5"]}


def test_a_part_asks_for_its_share_of_the_time_and_all_of_the_memory(home: Path) -> None:  # noqa: F811
    plan = plan_of(home, SHARDS)
    (key,) = plan.parts["activations"]
    whole, part = (resources(plan, "activations", [key], parts=n) for n in (1, 3))
    assert part == whole | {"runtime": 80} and whole["runtime"] == 240
    assert resources(plan, "activations", [key], attempt=2, parts=3)["runtime"] == 160
    assert resources(plan, "activations", [key], parts=8)["runtime"] == 60
    said = plan_of(home, SHARDS, "device.runtime.activations=30")
    assert resources(said, "activations", [key], parts=3)["runtime"] == 30


def test_the_plan_says_how_many_parts_there_are(home: Path) -> None:  # noqa: F811
    assert "1 activation column (5 parts ahead), " in sentence(explain(plan_of(home, SHARDS)))
    assert "ahead" not in sentence(explain(plan_of(home)))


def test_what_cannot_be_shared_is_refused(home: Path) -> None:  # noqa: F811
    with pytest.raises(
        ConfigError, match=r"device\.parts\.train=2: its jobs cannot be shared; .*: tokens, activations"
    ):
        plan_of(home, "+device.parts.train=2")
    plan_of(home, "+device.parts.train=1")
    with pytest.raises(
        ConfigError, match=r"device\.parts\.tokens=0 is out of range: it must be a whole number above 0"
    ):
        plan_of(home, "device.parts.tokens=0")
    for name in ("0-of-2", "3-of-2", "2", "2-of-2/"):
        with pytest.raises(ConfigError, match=r"it must be like 2-of-8"):
            Part.parse(name)


def test_names_of_parts_are_read_again() -> None:
    assert Part.parse(str(Part(2, 8))) == (2, 8)
    assert [[u for u in range(7) if Part(n, 3).has(u)] for n in (1, 2, 3)] == [[0, 3, 6], [1, 4], [2, 5]]
    assert without_part("store/a-0.part-2-of-8") == without_part("store/a-0") == "store/a-0"
    assert without_hash("L1.mlp_out-9rows-0123.part-2-of-8") == "L1.mlp_out-9rows, part 2 of 8"
    assert without_hash("L1.mlp_out-9rows-0123") == "L1.mlp_out-9rows"


def test_what_parts_took_counts_with_what_they_are_of(home: Path, monkeypatch) -> None:  # noqa: F811
    monkeypatch.chdir(home)
    plan: Plan = plan_of(home)
    (instance,) = plan.stages["activations"].values()
    Path(plan.results).mkdir()
    for part, seconds in (("1-of-2", 10.0), ("2-of-2", 20.0), ("", 5.0), ("1-of-1", 1.0), ("", 2.0)):
        record(stages()["activations"], plan, [instance], "cpu", seconds, 2 * seconds, 10**9, part)
    assert [(line["seconds"], line["cpu_s"]) for line in lines(plan.results)] == [(35.0, 70.0), (3.0, 6.0)]
