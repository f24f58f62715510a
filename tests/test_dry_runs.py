"""Snakemake runs what the plan says, whatever is gone, touched or copied; stages can be named on its command line."""

import itertools
import os
import random
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
from dry_runs import ROOT, dry_run

from saeflow.planning.batches import look
from saeflow.planning.expansion import compose
from saeflow.planning.frozen import freeze_run
from saeflow.planning.graph import Plan
from saeflow.planning.stages import downstream
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
    forced = dry_run(home, SWEEP, forced=[stage])
    follows = {s: sorted(plan.stages[s]) for s in downstream([stage]) if plan.stages[s]}
    if stage in ("tokens", "train"):
        follows["activations"] = sorted(plan.stages["activations"])  # which a training cannot do without
    assert forced == follows


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
