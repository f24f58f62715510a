"""Checkpoints: what is killed or asked to stop goes on to the same bytes; who trains together does not matter."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from stores import TRAINING, TRAINING_STORE, contents, training_plan, write_store

from saeflow.jobs.job import Job
from saeflow.jobs.signals import Preempted
from saeflow.training import checkpoints
from saeflow.training import loop as training
from saeflow.training.checkpoints import Checkpoints, Timer
from saeflow.training.metrics import TrainingError
from saeflow.training.trainer import Trainer

HOOK, HOOK_OUT = "blocks.0.ln2.hook_normalized", "blocks.0.hook_mlp_out"
RELU = {"kind": "sae", "activation": "relu", "l1_coefficient": 0.1, "expansion": 3}
TOPK = {"kind": "sae", "activation": "topk", "k": 3, "expansion": 3}
SEVERAL = {"relu-1": RELU, "relu-2": RELU | {"l1_coefficient": 0.5}, "topk-3": TOPK}


@pytest.fixture
def results(tmp_path):
    """A results folder with a store of two columns, 8 and 6 wide."""
    x = torch.relu(torch.randn(1000, 8, generator=torch.Generator().manual_seed(0)))
    store = {HOOK: x, HOOK_OUT: x[:, :6] * 3 + 1}
    write_store(tmp_path / "activations" / TRAINING_STORE, store, chunk_tokens=64, shard_tokens=256)
    return tmp_path


def jobs(results, dictionaries=SEVERAL, training=TRAINING, how=None, seed=5):
    plan = training_plan(results, [HOOK], dictionaries, training, json.dumps(how or {}), seed)
    return [Job(instance, plan, "cpu") for instance in plan.stages["train"].values()]


def artifact(results, key):
    return {name: bytes_ for name, bytes_ in contents(results / "train" / key).items() if name != "provenance.json"}


# -------------------------------------------------------------------- together
def test_dictionaries_that_train_together_have_the_bytes_of_each_alone(results):
    training.train(jobs(results))
    together = {key: artifact(results, key) for key in SEVERAL}
    for job in reversed(jobs(results)):
        training.train([job])
    assert {key: artifact(results, key) for key in SEVERAL} == together
    assert together["relu-1"] != together["relu-2"]


def test_members_may_differ_in_length_and_schedule(results):
    short, long = (
        jobs(results, {key: TOPK}, TRAINING | {"n_tokens": n, "lr_decay_steps": 5})[0]
        for key, n in (("short", 1280), ("long", 2560))
    )
    training.train([long, short])
    assert artifact(results, "short") and artifact(results, "long")
    alone = artifact(results, "short")
    training.train([short])
    assert artifact(results, "short") == alone


def test_points_of_other_seeds_read_the_same_batches(results):
    first, second = jobs(results, {"a": TOPK}), jobs(results, {"b": TOPK}, seed=6)
    training.train(first + second)
    assert artifact(results, "a")["sae_weights.safetensors"] != artifact(results, "b")["sae_weights.safetensors"]


def test_a_failing_member_does_not_stop_the_others(results, monkeypatch):
    (bad,) = jobs(results, {"bad": RELU | {"l1_coefficient": 1e39}})
    with pytest.raises(TrainingError, match=r"^bad: the loss became inf at step 1"):
        training.train([bad, *jobs(results)])
    assert not (results / "train" / "bad").exists()
    wanted = artifact(results, "topk-3")
    # Snakemake now removes the receipts; the rerun must not train again
    monkeypatch.setattr(Trainer, "train_step", lambda *_: pytest.fail("trained again"))
    training.train(jobs(results))
    assert artifact(results, "topk-3") == wanted


def test_jobs_that_cannot_share_batches_are_refused(results):
    (other,) = jobs(results, {"other": TOPK}, TRAINING | {"batch_size": 64})
    with pytest.raises(ValueError, match=r"one training\.batch_size"):
        training.train([other, *jobs(results)])


# -------------------------------------------------------------------- SIGTERM
@pytest.mark.parametrize("name", ["SIGTERM", "SIGUSR1", "SIGINT"])
def test_a_job_that_is_asked_to_stop_saves_its_state_and_goes_on(results, monkeypatch, name):
    training.train(jobs(results))
    undisturbed = {key: artifact(results, key) for key in SEVERAL}
    take = Trainer.train_step

    def asked(trainer, batch):
        if trainer.step == 11 and trainer.spec.k:  # one of the three
            os.kill(os.getpid(), getattr(signal, name))
        take(trainer, batch)

    monkeypatch.setattr(Trainer, "train_step", asked)
    with pytest.raises(Preempted, match=f"stopped by {name} after step 12; run again"):
        training.train(jobs(results))
    steps = []
    monkeypatch.setattr(Trainer, "train_step", lambda t, batch: (steps.append(t.step), take(t, batch)))
    training.train(jobs(results))
    assert min(steps) == 12
    assert {key: artifact(results, key) for key in SEVERAL} == undisturbed
    assert not list((results / "checkpoints").rglob("*.safetensors"))


@pytest.mark.slow
def test_the_script_ends_with_the_code_of_a_temporary_failure(results):
    """75 within ten seconds of SIGTERM, and a message; run again, it ends well."""
    plan = training_plan(results, [HOOK], {"topk": TOPK}, TRAINING | {"n_tokens": 128 * 20_000})
    plan.freeze(results / "plan.json")
    script = Path(__file__).parents[2] / "scripts" / "job.py"
    command = [
        sys.executable,
        script,
        "train",
        "--plan",
        results / "plan.json",
        "--key",
        "topk",
        "--log",
        results / "log",
    ]
    with subprocess.Popen(list(map(str, command)), stderr=subprocess.PIPE, text=True) as process:
        deadline = time.monotonic() + 60
        log = results / "log"
        while not (log.exists() and "training 1" in log.read_text()) and time.monotonic() < deadline:
            time.sleep(0.1)
        time.sleep(2)
        asked = time.monotonic()
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) == 75, process.stderr.read()
        assert time.monotonic() - asked < 10
        assert "train stopped by SIGTERM after step" in process.stderr.read()
    assert list((results / "checkpoints" / "topk").glob("step-*.safetensors"))


# -------------------------------------------------------------------- SIGKILL
@pytest.mark.slow
def test_killed_anywhere_the_rerun_gives_the_bytes_of_an_undisturbed_run(results, tmp_path_factory):
    folder = tmp_path_factory.mktemp("killed")
    script = Path(__file__).parents[1].joinpath("kill_training.py")
    command = [sys.executable, script, folder, results / "activations" / TRAINING_STORE]
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    for revive in ("auxk", "resample"):
        keys = [p.name for p in (folder / revive / "undisturbed" / "train").iterdir()]
        wanted = {key: artifact(folder / revive / "undisturbed", key) for key in keys}
        runs = [p for p in (folder / revive).iterdir() if p.name != "undisturbed"]
        assert len(keys) == 3 and len(runs) == 9
        for run in runs:
            assert {key: artifact(run, key) for key in keys} == wanted, f"{revive}/{run.name}"


# ------------------------------------------------------------------ the files
def test_only_the_newest_checkpoints_are_kept(tmp_path):
    kept = Checkpoints(tmp_path / "it", keep=2)
    for step in (1, 20, 300):
        kept.save(step, {"step": torch.tensor(step)})
    assert sorted(p.name for p in (tmp_path / "it").iterdir()) == [
        "step-000000020.safetensors",
        "step-000000300.safetensors",
    ]
    assert kept.newest()["step"] == 300
    kept.remove()
    assert not (tmp_path / "it").exists() and kept.newest() is None


def test_a_damaged_checkpoint_is_passed_over(tmp_path, caplog):
    kept = Checkpoints(tmp_path, keep=2)
    for step in (1, 2):
        kept.save(step, {"step": torch.tensor(step)})
    (tmp_path / "step-000000002.safetensors").write_bytes(b"half")
    assert kept.newest()["step"] == 1
    assert "step-000000002.safetensors is damaged" in caplog.text


def test_the_state_of_another_dictionary_is_refused(results, monkeypatch):
    (one,), (other,) = jobs(results, {"one": TOPK}), jobs(results, {"one": TOPK | {"expansion": 4}})
    kept = Checkpoints(results / "checkpoints" / "one")
    monkeypatch.setattr(Checkpoints, "remove", lambda self: None)
    monkeypatch.setattr(checkpoints.Timer, "passed", True)
    training.train([one])
    assert kept.newest() is not None
    with pytest.raises(TrainingError, match="another dictionary"):
        training.train([other])


def test_checkpoints_never_take_more_than_a_hundredth_of_the_time(monkeypatch):
    clock = [0.0]
    monkeypatch.setattr(checkpoints.time, "monotonic", lambda: clock[0])
    timer = Timer(60.0)
    assert not timer.passed
    clock[0] = 61.0
    assert timer.passed
    with timer.saving():
        clock[0] += 2.0
    clock[0] += 199.0
    assert not timer.passed
    clock[0] += 2.0
    assert timer.passed
