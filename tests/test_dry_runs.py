"""Snakemake runs what the plan says, whatever is gone, touched or copied; stages can be named on its command line."""

import itertools
import os
import random
import shutil
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
from dry_runs import ROOT, dry_run, opened
from snakemake.exceptions import WorkflowError
from snakemake.io import is_flagged
from snakemake.settings.types import ExecutionSettings

from saeflow.planning.batches import look
from saeflow.planning.expansion import compose
from saeflow.planning.frozen import freeze_run
from saeflow.planning.graph import Plan
from saeflow.planning.stages import downstream, stages
from saeflow.storage.locks import locked
from saeflow.storage.receipts import RECEIPT

SWEEP = (
    "sweep=[{dictionary:relu,site:mlp_out,dictionary.l1_coefficient:[1,2]},{dictionary:pair,site:mlp,dictionary.k:4}]"
)
MORE = SWEEP.replace("[1,2]", "[1,2,3]")


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder in which an experiment seems to have run: the plan asks for receipts, and these are there."""
    from tests.planning.test_plan import finish

    home = tmp_path_factory.mktemp("dry")
    shutil.copytree(ROOT / "conf", home / "conf")
    shutil.copytree(ROOT / "resources", home / "resources")
    plan = compose(home / "conf", [SWEEP], results=str(home / "results"))
    for stage, table in plan.stages.items():
        finish(plan, stage, table)
    return home


@pytest.fixture
def home(finished: Path, tmp_path: Path) -> Path:
    for name in ("conf", "resources"):
        (tmp_path / name).symlink_to(finished / name)
    shutil.copytree(finished / "results", tmp_path / "results")
    return tmp_path


def planned(home: Path, hydra: str) -> Plan:
    return compose(home / "conf", [hydra], results=str(home / "results"), digests=home / "digests.json")


def made(plan: Plan) -> dict[str, list[str]]:
    look(plan)
    return {stage: sorted(keys) for stage, keys in plan.to_make.items() if keys}


def test_snakemake_runs_what_the_plan_says_whatever_is_gone(home: Path) -> None:
    """Every stage alone and, of pairs, a few; with what Snakemake remembers and without."""
    plans = {hydra: planned(home, hydra) for hydra in (SWEEP, MORE)}
    there = [stage for stage, table in plans[SWEEP].stages.items() if table]
    pairs = random.Random(0).sample(list(itertools.combinations(there, 2)), 6)
    for n, gone in enumerate([(), *((stage,) for stage in there), *pairs]):
        for stage in gone:
            (home / "results" / stage).rename(home / stage)
        if n % 2:
            shutil.rmtree(home / ".snakemake", ignore_errors=True)
        for hydra in (SWEEP, MORE) if len(gone) < 2 else (MORE,):
            expected = made(plans[hydra])
            assert dry_run(home, hydra) == expected, (gone, hydra)
        for stage in gone:
            (home / stage).rename(home / "results" / stage)


def test_parts_are_jobs_that_run_ahead_and_no_artifacts(home: Path) -> None:
    """The same artifacts as without them; by one job where there is nothing to share."""
    shutil.rmtree(home / "results")
    device = ["device.parts.activations=3", "device.parts.tokens=2"]
    plan = compose(home / "conf", [SWEEP, *device], results=str(home / "results"), digests=home / "digests.json")
    in_parts = " ".join([SWEEP, *device])
    (tokens,), (columns,) = plan.parts["tokens"].items(), plan.parts["activations"].items()
    assert (tokens[1], columns[1]) == (["1-of-2", "2-of-2"], ["1-of-3", "2-of-3", "3-of-3"])
    for stage, key in (("tokens", tokens[0]), ("activations", columns[0])):  # left over from an earlier run
        for mark in plan.marks(stage, key):
            (home / mark).parent.mkdir(parents=True, exist_ok=True)
            (home / mark).write_text("")
    with opened(home, in_parts) as dag:
        files: list[str] = []
        dag.execute_workflow(executor="dryrun", updated_files=files)
    marks = {file for file in files if not file.startswith("results/")}
    assert marks == {*plan.marks("tokens", tokens[0]), *plan.marks("activations", columns[0])}
    assert dry_run(home, in_parts) == dry_run(home, SWEEP) == made(plan)


@pytest.mark.slow
def test_a_run_waits_for_all_parts_and_makes_again_those_that_are_lost(home: Path) -> None:
    shutil.rmtree(home / "results")
    run = [sys.executable, "-m", "snakemake", "-s", ROOT / "Snakefile", "--directory", home, "--cores", "1"]
    run += ["--until", "tokens", "--config", f"conf={home / 'conf'}", f"hydra={SWEEP} device.parts.tokens=2"]
    said = [subprocess.run(run, capture_output=True, text=True, cwd=home).stderr for _ in range(2)]
    name = "tokens train-1200rows-text.51f3"
    assert said[0].count(f"{name}, part ") == 2 and "failed" not in said[0]
    assert said[0].rindex(f"{name}, part ") < said[0].index(f"{name}: wrote 1,200 rows")
    assert name not in said[1]
    (key,) = (key for key in planned(home, SWEEP).found["tokens"] if key.startswith("train"))
    marks = [home / ".snakemake/parts/tokens" / f"{key}.part-{part}" for part in ("1-of-2", "2-of-2")]
    assert all(mark.is_file() for mark in marks)
    shutil.rmtree(home / "results" / "tokens" / key)
    said = subprocess.run(run, capture_output=True, text=True, cwd=home).stderr
    assert said.count(f"{name}, part ") == 2 and f"[3 of 3] {name}: wrote 1,200 rows" in said


def test_times_make_nothing_stale(home: Path) -> None:
    receipts = sorted((home / "results").rglob(RECEIPT))
    for place, receipt in enumerate(reversed(receipts)):
        os.utime(receipt, (time.time() + 86400 * (place - 5),) * 2)
    assert dry_run(home, SWEEP) == {}


def test_what_has_lost_a_file_is_made_again_and_nothing_that_follows(home: Path) -> None:
    plan = planned(home, SWEEP)
    (figures,) = plan.stages["figures"]
    evaluation, trained = (next(iter(plan.stages[stage])) for stage in ("evaluate", "train"))
    column = next(iter(plan.stages["activations"]))
    (plan.folder("activations", column) / "config.yaml").unlink()
    assert dry_run(home, SWEEP) == made(plan) == {}  # a cache, which nothing that is to be made needs
    hurt = {"evaluate": [evaluation], "train": [trained]}
    for stage, (key,) in hurt.items():
        (plan.folder(stage, key) / "config.yaml").unlink()
    needed = {"activations": [column]} if column in plan.stages["train"][trained].needs["activations"] else {}
    assert dry_run(home, SWEEP) == made(plan) == hurt | needed
    figure = plan.folder("figures", figures)
    config = (figure / "config.yaml").rename(home / "config.yaml")
    assert dry_run(home, SWEEP) == made(plan) == hurt | needed | {"figures": [figures]}
    for stage, (
        key,
    ) in hurt.items():  # deleted with its folder: somebody meant it, and figures that are there need none
        shutil.rmtree(plan.folder(stage, key))
    (figure / "provenance.damaged.json").rename(figure / RECEIPT)
    config.rename(figure / "config.yaml")
    assert dry_run(home, SWEEP) == made(plan) == {}


@pytest.mark.parametrize("stage", ["tokens", "train", "evaluate", "figures"])
def test_a_stage_is_forced_by_its_name_with_all_that_follows(home: Path, stage: str) -> None:
    plan = planned(home, SWEEP)
    shutil.rmtree(home / "results" / "activations")
    forced = dry_run(home, SWEEP, forcerun=[stage])
    follows = {s: sorted(plan.stages[s]) for s in downstream([stage]) if plan.stages[s]}
    if stage in ("tokens", "train"):
        follows["activations"] = sorted(plan.stages["activations"])  # which a training cannot do without
    assert forced == follows


def test_one_artifact_is_forced_by_its_receipt_with_all_that_follows(home: Path) -> None:
    """Also one that would share its job with others."""
    plan = planned(home, SWEEP)
    (batch,) = plan.batches["train"]
    for key in (batch[0], batch[-1]):
        forced = dry_run(home, SWEEP, forcerun=[f"./{os.path.relpath(plan.receipt('train', key), home)}"])
        follows = {s: sorted(plan.stages[s]) for s in downstream(["train"]) if plan.stages[s]}
        assert forced == follows | {"train": sorted(batch) if key == batch[0] else [key]}


@pytest.mark.parametrize("gone", ["", "activations", "train"])
def test_all_is_forced(home: Path, gone: str) -> None:
    if gone:
        shutil.rmtree(home / "results" / gone)
    assert dry_run(home, SWEEP, forceall=True) == {s: sorted(t) for s, t in planned(home, SWEEP).stages.items() if t}


def test_what_is_omitted_is_not_made_nor_what_follows_from_it(home: Path) -> None:
    shutil.rmtree(home / "results")
    assert dry_run(home, SWEEP, omit_from=["train"]).keys() == {"tokens", "activations", "baseline"}
    assert dry_run(home, SWEEP, omit_from=["activations"]).keys() == {"tokens"}


def test_activations_whose_shards_are_gone_are_made_again_for_what_is_missing(home: Path) -> None:
    plan = planned(home, MORE)
    (lost,) = {k for i in plan.to_make["train"] for k in plan.stages["train"][i].needs["activations"]}
    column = plan.folder("activations", lost)
    (column / "column.json").write_text('{"hook_name": "blocks.0.hook_mlp_out", "n_tokens": 64, "size": [4]}')
    assert dry_run(home, SWEEP) == {} and made(plan)["activations"] == [lost]
    assert dry_run(home, MORE) == made(plan)


# -------------------------------------------------------------------- what is no run
def test_all_output_is_deleted_with_what_belongs_to_it_and_nothing_of_others(home: Path) -> None:
    """After a kill too: what is half written, checkpoints, and no word of a run in `.snakemake`."""
    plan, other = planned(home, SWEEP), planned(home, "seed=1")
    from tests.planning.test_plan import finish

    finish(other, "train", other.stages["train"])
    kept = sorted(p for key in other.stages["train"] for p in other.folder("train", key).iterdir())
    trained = next(iter(plan.stages["train"]))
    checkpoint = home / "results/checkpoints" / trained / "step-000000001.safetensors"
    checkpoint.parent.mkdir(parents=True)
    checkpoint.write_text("")
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    half = plan.folder("train", trained).with_name(f"{trained}.{socket.gethostname()}-{dead.pid}.partial")
    half.mkdir()
    before = sorted((home / "results").rglob("*"))
    with opened(home, SWEEP) as dag:
        dag.delete_output(dryrun=True)
        dag.delete_output(only_temp=True)
    assert sorted((home / "results").rglob("*")) == before
    with opened(home, SWEEP, targets=["figures"]) as dag, pytest.raises(WorkflowError, match="removes all of"):
        dag.delete_output()
    with locked(plan.folder("train", trained).with_name(f"{trained}.lock"), "x"):
        code = "import sys; from dry_runs import opened; from pathlib import Path\n"
        code += "with opened(Path(sys.argv[1]), sys.argv[2]) as dag: dag.delete_output()"
        command = [sys.executable, "-c", code, home, SWEEP]
        done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT / "tests")
        assert f"nothing was removed: process {os.getpid()} on" in done.stdout + done.stderr
    assert sorted((home / "results").rglob("*")) == before
    with opened(home, SWEEP) as dag:
        dag.delete_output()
    assert sorted(p for p in (home / "results").rglob("*") if p.is_file()) == kept
    assert dry_run(home, SWEEP) == {s: sorted(t) for s, t in plan.stages.items() if t}


def test_nothing_is_touched_instead_of_made(home: Path) -> None:
    shutil.rmtree(home / "results" / "train")
    for settings in ({}, {"forceall": True}):
        with opened(home, MORE, **settings) as dag, pytest.raises(WorkflowError, match="run without --touch"):
            dag.execute_workflow(pseudo_executor="touch")
    assert not (home / "results" / "train").exists()


def test_the_summary_is_of_every_artifact(home: Path, capsys: pytest.CaptureFixture) -> None:
    (column,) = (home / "results").glob("activations/*/L*.mlp_out*")
    shutil.rmtree(column)
    plan = planned(home, MORE)
    with opened(home, MORE) as dag:
        dag.summary()
    header, *rows = [line.split("\t") for line in capsys.readouterr().out.strip().splitlines()]
    assert header == ["output_file", "date", "rule", "log-file(s)", "status", "plan"]
    found = {row[0]: tuple(row[-2:]) for row in rows}
    expected = {}
    for stage, key in ((s, k) for s, table in plan.stages.items() for k in table):
        status = "ok" if key in plan.found[stage] else "missing"
        receipt = os.path.relpath(plan.receipt(stage, key), home)
        expected[receipt] = status, "update pending" if key in plan.to_make[stage] else "no update"
    assert found == expected and len(set(found.values())) == 2
    with opened(home, SWEEP, forcerun=["evaluate"]) as dag:
        dag.summary(detailed=True)
    _, *rows = [line.split("\t") for line in capsys.readouterr().out.strip().splitlines()]
    assert {row[2] for row in rows if row[-1] == "update pending"} == {"evaluate", "figures"}
    assert all("results/train/" in row[4] for row in rows if row[2] == "evaluate")


def test_nothing_that_another_run_has_made_is_deleted_before_a_job(home: Path) -> None:
    """Snakemake deletes outputs that are not to be updated, figures too, though they are there by then."""
    with opened(home, SWEEP) as dag:
        rules = [rule for rule in dag.workflow_api._workflow.rules if rule.name in stages()]
    assert len(rules) == len(stages()) and all(is_flagged(out, "update") for rule in rules for out in rule.output)


def test_a_run_without_hooks_has_a_plan_all_the_same(home: Path) -> None:
    with opened(home, SWEEP) as dag:
        dag.execute_workflow(execution_settings=ExecutionSettings(no_hooks=True))
        plan = dag.workflow_api._workflow.globals["PLAN"]
    (file,) = (home / ".snakemake/plans").glob("*.json")
    assert Plan.load(file) == plan


def test_a_full_disk_stops_runs_and_nothing_else(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(1, 1, 0))  # type: ignore[attr-defined]
    shutil.rmtree(home / "results" / "figures")
    shutil.rmtree(home / "results" / "train")
    shutil.rmtree(home / "results" / "evaluate")
    shutil.rmtree(home / "results" / "activations")
    with pytest.raises(WorkflowError, match="the disk cannot hold this plan"):
        dry_run(home, SWEEP)
    with opened(home, SWEEP) as dag:
        dag.unlock()
        dag.delete_output()
    assert not [p for p in (home / "results").rglob("*") if p.is_file()]


def test_a_job_on_a_cluster_finds_the_plan_of_its_run(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each parses the Snakefile again, as executors call it; meanwhile conf/ was edited and another run began."""
    shutil.rmtree(home / "results")
    monkeypatch.chdir(home)
    plan, other = (compose(home / "conf", [hydra]) for hydra in (SWEEP, "seed=1"))
    file = freeze_run(plan)
    freeze_run(other)
    key = plan.batches["activations"][0][0]
    command = [sys.executable, "-m", "snakemake", "-s", str(ROOT / "Snakefile"), "--mode", "remote", "--force", "-n"]
    command += ["--cores", "1", "--allowed-rules", "activations", "--target-jobs", f"activations:key={key}"]
    command += ["--printshellcmds", "--ignore-incomplete", "--nolock", "--config", "hydra=gone", "conf=gone"]
    for tokens in plan.stages["tokens"]:
        (home / plan.receipt("tokens", tokens)).parent.mkdir(parents=True)
        (home / plan.receipt("tokens", tokens)).write_text("{}")
    done = subprocess.run(command, env=os.environ | {"SAEFLOW_PLAN": str(file)}, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"--plan {file} --job {key}" in done.stdout + done.stderr
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 1 and "a job has no plan: let the executor pass SAEFLOW_PLAN" in done.stdout + done.stderr


def test_a_run_ends_with_the_stage_that_is_named(home: Path) -> None:
    shutil.rmtree(home / "results")
    assert dry_run(home, SWEEP, until=["train"]).keys() == {"tokens", "activations", "train"}
    assert dry_run(home, SWEEP, until=["tokens"]).keys() == {"tokens"}
