"""What a run makes of what is missing, and what is said about it. That Snakemake agrees is in test_dry_runs.py."""

import collections
import itertools
import json
import os
import shutil
from pathlib import Path

import pytest
from tests.planning.test_plan import SWEEP, finish, home  # noqa: F401 (home is a fixture)

from saeflow.config import ConfigError
from saeflow.planning import frozen
from saeflow.planning.batches import look, set_aside_broken
from saeflow.planning.expansion import compose
from saeflow.planning.explain import costs, explain, sentence
from saeflow.planning.graph import Plan
from saeflow.planning.history import FILE, asked_mb, lines, predict, work_of
from saeflow.planning.machine import check_disk
from saeflow.planning.stages import downstream, stages

PAIR = ["sweep=[{dictionary:relu,dictionary.l1_coefficient:[1,2]},{dictionary:pair,site:mlp,dictionary.k:4}]"]
MORE = [PAIR[0].replace("[1,2]", "[1,2,3]")]


def plan_of(home: Path, *overrides: str) -> Plan:  # noqa: F811
    sweep = [] if overrides and overrides[0].startswith("sweep") else [SWEEP]
    return compose(home / "conf", [*sweep, *overrides], results=str(home / "results"), digests=home / "digests.json")


@pytest.fixture
def done(home: Path) -> Path:  # noqa: F811
    plan = plan_of(home, *PAIR)
    for stage, table in plan.stages.items():
        finish(plan, stage, table)
    return home


def made_by_definition(plan: Plan) -> dict[str, set[str]]:
    """What is missing, and a target or needed for something that is made: from the end, one artifact at a time."""
    made: dict[str, set[str]] = {stage: set() for stage in plan.stages}
    for stage in reversed(plan.stages):
        for key in plan.stages[stage]:
            needed = any(key in plan.stages[s][k].needs.get(stage, ()) for s in made for k in made[s])
            if not Path(plan.receipt(stage, key)).exists() and (stage == "figures" or needed):
                made[stage].add(key)
    return made


def test_only_what_is_missing_for_something_missing_is_made(done: Path) -> None:
    plans = [plan_of(done, *sweep) for sweep in (PAIR, MORE)]
    there = [stage for stage, table in plans[0].stages.items() if table]
    n_made = 0
    for gone in (set(g) for n in (1, 2) for g in itertools.combinations(there, n)):
        for stage in gone:
            (done / "results" / stage).rename(done / stage)
        for plan in plans:
            look(plan)
            assert {stage: set(keys) for stage, keys in plan.to_make.items()} == made_by_definition(plan)
            n_made += sum(map(len, plan.to_make.values()))
        for stage in gone:
            (done / stage).rename(done / "results" / stage)
    assert n_made > 100
    look(plans[0])
    assert not any(plans[0].to_make.values())


def test_one_more_value_after_the_activations_were_deleted_is_one_training(done: Path) -> None:
    shutil.rmtree(done / "results" / "activations")
    assert sentence(explain(plan_of(done, *PAIR))) == "nothing to do: what this experiment shows is there"
    made = {stage: len(keys) for stage, keys in plan_of(done, *MORE).to_make.items() if keys}
    assert made == {"activations": 1, "train": 1, "evaluate": 1, "figures": 1}
    said = sentence(explain(plan_of(done, *MORE)))
    assert "1 training, 1 evaluation, 1 set of figures: 1 activation column was deleted" in said
    assert "dictionary.l1_coefficient=3 is new" in said


@pytest.mark.parametrize("torn", [b"", b'{"blake2s": {"a', b"[]", b"\x00" * 100])
def test_a_receipt_that_cannot_be_read_or_lists_what_is_gone_is_none(done: Path, torn: bytes) -> None:
    plan = plan_of(done, *PAIR)
    (key,) = plan.stages["figures"]
    receipt = Path(plan.receipt("figures", key))
    held = receipt.read_bytes()
    for text, made in ((torn, [key]), (held, [])):
        receipt.write_bytes(text)
        look(plan)
        assert plan.to_make["figures"] == made
        set_aside_broken(plan)
        assert receipt.exists() == (not made)
    receipt.with_name("config.yaml").unlink()
    look(plan)
    assert plan.to_make["figures"] == [key]


def test_the_disk_has_to_hold_what_is_made_and_not_what_is_gone(done: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shutil.rmtree(done / "results" / "activations")
    usage = collections.namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(10**12, 10**12 - 10**5, 10**5))
    check_disk(plan_of(done, *PAIR))
    with pytest.raises(ConfigError, match="the disk cannot hold this plan"):
        check_disk(plan_of(done, *MORE))


# -------------------------------------------------------------------- what is said
def reasons(home: Path, *overrides: str) -> list[str]:  # noqa: F811
    return explain(plan_of(home, *overrides)).reasons


def test_reasons_are_what_is_so(done: Path) -> None:
    assert reasons(done, *PAIR) == []
    assert reasons(done, *PAIR, "experiment_name=other") == ["the experiment other is new"]
    assert reasons(done, PAIR[0].replace("[1,2]", "1")) == ["what the experiment default holds has changed"]
    assert reasons(done, *PAIR, "tokens.train_tokens=100_000") == ["tokens.train_tokens=100000 is new"]
    assert reasons(done, *PAIR, "training.lr=0.5") == ["training.lr=0.5 is new"]
    assert reasons(done, *PAIR, "training.lr=4e-4") == ["training.lr=0.0004 is new"]  # the dataclass's default
    plan = plan_of(done, *PAIR)
    shutil.rmtree(done / "results" / "evaluate")
    finish(plan, "figures", plan.stages["figures"])
    shutil.rmtree(done / "results" / "figures")
    (done / "results" / FILE).write_text(
        json.dumps({"stage": "evaluate", "key": "x", "seconds": 1, "work": 1}) + "\n{to"
    )
    assert reasons(done, *PAIR) == ["the experiment default is new"]  # nobody says what was there
    ledger = [{"stage": s, "key": k, "seconds": 1, "work": 1} for s in ("evaluate", "figures") for k in plan.stages[s]]
    (done / "results" / FILE).write_text("".join(json.dumps(line) + "\n" for line in ledger))
    assert reasons(done, *PAIR) == [
        "4 evaluations were deleted or lost a file", "1 set of figures was deleted or lost a file",
    ]  # fmt: skip


def test_a_fresh_clone_and_an_emptied_folder_say_so(home: Path) -> None:  # noqa: F811
    assert reasons(home) == ["nothing is there yet"]
    assert "an artifact was removed" not in sentence(explain(plan_of(home)))
    (home / "results").mkdir()
    (home / "results" / FILE).write_text(json.dumps({"stage": "train", "key": "k", "seconds": 1, "work": 1}) + "\n")
    assert reasons(home) == ["all that was made has been deleted"]


def test_time_is_that_of_all_stages_by_what_they_took_here(home: Path) -> None:  # noqa: F811
    plan = plan_of(home)
    guess = predict(plan, lines(plan.results))
    n_jobs = sum(len({plan.leaders.get((s, k), k) for k in keys}) for s, keys in plan.to_make.items())
    jobs = {s: [[table[k] for k in plan.members(s, key)] for key in table if plan.leaders.get((s, key), key) == key]
            for s, table in plan.stages.items()}  # fmt: skip
    operations = sum(stages()[s].operations(plan, job) for s, found in jobs.items() for job in found)
    assert guess.seconds == pytest.approx(10 * n_jobs + operations / 1e11) and guess.measured == 0
    assert guess.guessed == [stage for stage, keys in plan.to_make.items() if keys]
    here = {"host": os.uname().nodename, "device": "cpu"}
    made = [{"stage": s, "key": "k", "seconds": 3.0, "work": 1.0, "sharing": 1} | here for s in stages()]
    made += [made[0] | {"host": "elsewhere", "seconds": 1e9}]
    work = sum(work_of(stages()[s], plan, job) for s, found in jobs.items() for job in found)
    found = predict(plan, made)
    assert found.seconds == pytest.approx(3 * work) and not found.guessed
    assert found.measured == sum(map(bool, plan.to_make.values()))


def test_jobs_of_two_sizes_tell_their_start_from_their_work(home: Path) -> None:  # noqa: F811
    """Four seconds to start, and a nanosecond an operation, however many artifacts share a job."""
    plan = plan_of(home)
    plan.to_make = {stage: keys if stage == "train" else [] for stage, keys in plan.to_make.items()}
    made = []
    for sharing, work in ((1, 1e9), (2, 6e9), (4, 2e9), (3, 9e8)):
        line = {"stage": "train", "seconds": (4 + 1e-9 * work) / sharing, "work": work / sharing, "sharing": sharing}
        made += [line | {"host": os.uname().nodename, "device": "cpu", "key": "k"}] * sharing
    jobs = [plan.members("train", key) for key in plan.to_make["train"] if plan.leaders.get(("train", key), key) == key]
    instances = [[plan.stages["train"][key] for key in keys] for keys in jobs]
    expected = sum(4 + 1e-9 * stages()["train"].operations(plan, job) for job in instances)
    assert predict(plan, made).seconds == pytest.approx(expected)
    one_size = [m for m in made if m["sharing"] == 1]
    assert predict(plan, one_size).seconds == pytest.approx(
        5e-9 * sum(work_of(stages()["train"], plan, job) for job in instances)
    )


def test_memory_is_what_earlier_jobs_had_of_what_they_asked_for(home: Path) -> None:  # noqa: F811
    """A quarter of a gigabyte, and half of what a job asks for; of a stage that did not run, what it asks for."""
    plan = plan_of(home)
    jobs = [[plan.stages["train"][key] for key in keys] for keys in plan.jobs("train")]
    asked = max(asked_mb(stages()["train"], plan, job) for job in jobs)
    here = {"host": os.uname().nodename, "device": "cpu", "stage": "train", "seconds": 1, "work": 1, "sharing": 1}
    made = [here | {"peak_mb": 250 + mb / 2, "asked_mb": mb} for mb in (4000, 5000, 9000)]
    found = predict(plan, [*made, here])  # what earlier releases wrote says no memory
    assert found.memory_mb["train"] == pytest.approx(250 + asked / 2)
    assert found.memory_mb["activations"] == asked_mb(
        stages()["activations"], plan, [*plan.stages["activations"].values()]
    )
    assert "figures" not in found.memory_mb  # it asks for none


def test_a_plan_says_time_and_memory_of_every_stage(home: Path) -> None:  # noqa: F811
    plan = plan_of(home)
    here = {"host": os.uname().nodename, "device": "cpu", "stage": "train", "seconds": 90.0, "work": 1e-9, "sharing": 1}
    explanation = explain(plan)
    time = predict(
        plan, [here | {"work": work_of(stages()["train"], plan, [i])} for i in plan.stages["train"].values()]
    )
    table = costs(explanation._replace(time=time), {stage: len(plan.jobs(stage)) for stage in plan.to_make})
    rows = {line.split()[0]: line for line in table.splitlines()[1:]}
    assert list(rows) == [stage for stage, keys in plan.to_make.items() if keys]
    assert " 3 min " in rows["train"] and "earlier jobs here" in rows["train"]
    assert "4.0 GB" in rows["activations"] and "device.flops" in rows["activations"]
    assert costs(explanation._replace(time=predict(done_plan(plan), [])), {}) == ""


def done_plan(plan: Plan) -> Plan:
    """Nothing of it is to be made."""
    plan.to_make = {stage: [] for stage in plan.to_make}
    return plan


# -------------------------------------------------------------------- plans of runs
def test_every_run_has_a_plan_of_its_own(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:  # noqa: F811
    monkeypatch.chdir(home)
    one, other = plan_of(home), plan_of(home, "seed=1")
    files = [frozen.freeze_run(plan) for plan in (one, other, one)]
    assert files[0] == files[2] != files[1] and [Plan.load(f) for f in files] == [one, other, one]
    held = files[0].stat().st_ino
    os.utime(files[0], (0, 0))
    assert frozen.freeze_run(one) == files[0] and files[0].stat().st_ino == held  # neither removed nor rewritten
    os.utime(files[0], (0, 0))
    frozen.freeze_run(other)
    assert not files[0].exists() and files[1].exists()


@pytest.mark.parametrize(
    ("content", "stays"),
    [(b'{"rule": "train"}', True), (b"", True), (b"\xf2\x80noise", False), (b"[]", False), (b'{"rule": "tr', False)],
)
def test_notes_of_snakemake_that_it_cannot_read_are_removed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, content: bytes, stays: bool
) -> None:
    monkeypatch.chdir(tmp_path)
    frozen.remove_torn_records()  # none are there
    file = frozen.RECORDS[0] / "deep/cmVzdWx0cw=="
    file.parent.mkdir(parents=True)
    file.write_bytes(content)
    frozen.remove_torn_records()
    assert file.exists() == stays


def test_what_follows_from_a_stage() -> None:
    assert downstream([]) == set()
    assert downstream(["figures"]) == {"figures"} and downstream(["heads"]) == {"heads", "figures"}
    assert downstream(["train"]) >= {"train", "jacobian", "evaluate", "stack", "heads", "recover", "blind", "figures"}
    assert not downstream(["train"]) & {"tokens", "activations", "baseline", "foreign"}
