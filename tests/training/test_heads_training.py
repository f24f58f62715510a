"""The SAEs of all heads trained as one: each is what it would be alone, stopped or not, and opens in SAELens."""

import dataclasses
import json

import numpy as np
import pandas as pd
import pytest
import torch
from stores import TRAINING_STORE, contents, training_plan, write_store

from saeflow.activations.reader import BatchReader
from saeflow.activations.store import open_column
from saeflow.config import DictionaryConfig, TrainingConfig, build
from saeflow.dictionaries import BlockDiagonal, Origin, load_dictionary
from saeflow.jobs.job import Job
from saeflow.jobs.signals import Preempted
from saeflow.training import loop as training
from saeflow.training.checkpoints import Checkpoints
from saeflow.training.heads import HeadsTrainer
from saeflow.training.metrics import TrainingError
from saeflow.training.protocol import HookStatistics
from saeflow.training.selection import hook_statistics
from saeflow.training.trainer import Trainer

HOOK, H, D = "blocks.0.attn.hook_z", 3, 6
STEPS, BATCH = 40, 128
TOPK = {"kind": "heads", "activation": "topk", "k": 2, "expansion": 4, "normalize_activations": "per_head"}
BATCHTOPK = TOPK | {"activation": "batchtopk"}
APRIL = {"kind": "heads", "activation": "relu", "l1_coefficient": 0.2, "expansion": 4}
APRIL |= {"normalize_activations": "per_head", "apply_b_dec_to_input": False}
KISSANE = APRIL | {"l1_coefficient": 4.0, "sparsity": "unit_norm", "normalize_activations": "none"}
KISSANE |= {"apply_b_dec_to_input": True}
RESAMPLING = {"revive": "resample", "resample_steps": [0, 10, 25], "resample_batches": 3, "dead_after_tokens": 256}
RESAMPLING |= {"resample_warm_up_steps": 8, "adam_beta1": 0.0}
CASES = {
    "topk": (TOPK, {}),
    "batchtopk": (BATCHTOPK, {}),
    "april": (APRIL, {"initial": "saelens", "clip_grad_norm": 0.5, "lr_decay_steps": 8}),
    "kissane": (KISSANE, RESAMPLING),
    "kaiming": (APRIL, {"initial": "kaiming"}),
}


def options(**more):
    return TrainingConfig(STEPS * BATCH, BATCH, lr=1e-2, log_every=5, l1_warm_up_steps=10, **more)


@pytest.fixture(scope="module")
def z():
    """(1000, H, D): heads of other scales and means."""
    g = torch.Generator().manual_seed(0)
    return torch.relu(torch.randn(1000, H, D, generator=g)) * torch.arange(1.0, H + 1)[:, None] + 0.3


@pytest.fixture
def results(tmp_path, z):
    store = tmp_path / "activations" / TRAINING_STORE
    write_store(store, {HOOK: z}, chunk_tokens=64, shard_tokens=256)
    return tmp_path


def plan_of(results, dictionary, more, how="{}"):
    config = dataclasses.asdict(options(**more))
    plain = {k: list(v) if isinstance(v, tuple) else v for k, v in config.items() if k != "loggers"}
    plain = {k: v for k, v in plain.items() if k not in ("together", "checkpoint_seconds", "keep_checkpoints")}
    return training_plan(results, [HOOK], {"it": dictionary}, plain, how)


def job_of(results, name, how="{}"):
    plan = plan_of(results, *CASES[name], how)
    return Job(plan.instance("train", "it"), plan, "cpu")


def side_of(z, dtype=torch.float64):
    rows = z.flatten(1).to(dtype)
    return HookStatistics(rows.mean(0), rows.norm(dim=1).mean().item(), z.to(dtype).square().sum(2).mean(0).sqrt())


def specs_of(dictionary):
    config = build(DictionaryConfig, dictionary | {"kind": "sae"})
    return [config.spec(D, D, HOOK, HOOK, 5, Origin(), h) for h in range(H)]


class Rows:
    """Batches drawn from rows, each a function of the step; `head` alone, or all side by side."""

    def __init__(self, z, head=None):
        self.z, self.head, self.reads = z, head, 0

    def iterate(self, start, n_steps):
        for step in range(start, start + n_steps):
            self.reads += 1
            rows = torch.randint(0, len(self.z), (BATCH,), generator=torch.Generator().manual_seed(step))
            yield (self.z[rows].flatten(1) if self.head is None else self.z[rows][:, self.head],)


def run(trainer, batches):
    for batch in batches.iterate(0, STEPS):
        if trainer.resamples_next():
            trainer.resample(batches)
        trainer.train_step(batch)
    return trainer


# -------------------------------------------------------------------- as alone
@pytest.mark.parametrize("name", CASES)
def test_each_head_gets_what_it_gets_alone(z, name, monkeypatch):
    """Loss by loss, resampling included, with its own scaling: that of its own RMS norm."""
    dictionary, more = CASES[name]
    resampled, reset = [], Trainer.reset_latents
    monkeypatch.setattr(
        Trainer, "reset_latents", lambda t, *args: (resampled.append(t.spec.hook_head_index), reset(t, *args))
    )
    training = options(**more)
    heads = run(HeadsTrainer(specs_of(dictionary), training, side_of(z)), Rows(z))
    for h, spec in enumerate(specs_of(dictionary)):
        own = z[:, h].double()
        rms = own.square().sum(1).mean().sqrt()
        side = HookStatistics(own.mean(0), own.norm(dim=1).mean().item(), rms[None])
        alone = run(Trainer(spec, training, side, side), Rows(z, h))
        for mine, theirs in zip(heads.heads[h].metrics.rows, alone.metrics.rows, strict=True):
            assert mine == pytest.approx(theirs, rel=2e-4, abs=1e-6)
        mine, theirs = heads.heads[h].finished(), alone.finished()
        assert mine.spec == theirs.spec and mine.spec.hook_head_index == h
        assert mine.spec.apply_b_dec_to_input == dictionary.get("apply_b_dec_to_input", True)
        torch.testing.assert_close(mine.W_dec, theirs.W_dec, rtol=1e-3, atol=1e-4)
        torch.testing.assert_close(mine.b_enc, theirs.b_enc, rtol=1e-3, atol=1e-4)
    assert bool(resampled) == (name == "kissane") and sorted(resampled) == sorted(2 * resampled[: len(resampled) // 2])
    starts = [Trainer(spec, training, side, side).weights.W_dec for spec in specs_of(dictionary)]
    assert not torch.allclose(starts[0], starts[1], atol=0.1)


def test_in_float64_each_head_is_the_one_alone_to_rounding(z, monkeypatch):
    """The same arithmetic, not only nearly: over 40 steps losses agree to 1e-12."""
    dictionary, more = CASES["kissane"]
    training = options(**more)

    def in_double(trainer):
        trainer.weights = type(trainer.weights)(*(None if t is None else t.double() for t in trainer.weights))
        trainer.optimiser = type(trainer.optimiser)(trainer.weights.parameters(), training.adam_beta1, 0.999)
        return trainer

    monkeypatch.setattr("saeflow.training.heads.Trainer", lambda *args: in_double(Trainer(*args)))
    heads = run(HeadsTrainer(specs_of(dictionary), training, side_of(z)), Rows(z.double()))
    for h, spec in enumerate(specs_of(dictionary)):
        side = side_of(z).by_head()[h]
        alone = run(in_double(Trainer(spec, training, side, side)), Rows(z.double(), h))
        losses = [np.array([row["loss"] for row in t.metrics.rows]) for t in (heads.heads[h], alone)]
        np.testing.assert_allclose(*losses, rtol=1e-12)


def test_resampling_reads_its_batches_once(z):
    dictionary, more = CASES["kissane"]
    trainer, rows = HeadsTrainer(specs_of(dictionary), options(**more), side_of(z)), Rows(z)
    for head in trainer.heads:
        head.metrics.idle_steps[:3] = 1000
    before = [head.weights.W_dec.clone() for head in trainer.heads]
    trainer.resample(rows)
    assert rows.reads == 3
    for head, old in zip(trainer.heads, before, strict=True):
        changed = (head.weights.W_dec != old).any(dim=1)
        assert changed[:3].all() and not changed[3:].any() and not head.metrics.idle_steps[:3].any()


# -------------------------------------------------------------------- in its job
@pytest.mark.parametrize("name", CASES)
def test_a_job_writes_a_dictionary_a_head_that_opens_as_one(results, z, name):
    job = job_of(results, name)
    said = training.train([job])
    folder = results / "train" / "it"
    files = {
        f"head_{h}/{name}" for h in range(H) for name in ("cfg.json", "sae_weights.safetensors", "metrics.parquet")
    }
    first = contents(folder)
    assert set(first) == files | {"config.yaml", "provenance.json"}
    whole = load_dictionary(folder)
    assert isinstance(whole, BlockDiagonal) and whole.spec.kind == "heads" and whole.spec.d_in == H * D
    tables = [pd.read_parquet(folder / f"head_{h}/metrics.parquet") for h in range(H)]
    if name != "kissane":  # whose coefficient lets latents die
        assert all(table["fvu"].iloc[-1] < 0.9 * table["fvu"].iloc[0] for table in tables)
    assert f"L0 {sum(table['l0'].iloc[-1] for table in tables):.1f} in all" in said
    # its batches and its sides are those of the store
    column = open_column(results / "activations" / TRAINING_STORE / f"{HOOK}-1000")
    _, more = CASES[name]
    again = HeadsTrainer(training.specs_of_job(job, [column]), options(**more), hook_statistics(column))
    run(again, BatchReader([column], BATCH, 0))
    for mine, head in zip(whole.heads, again.heads, strict=True):
        assert mine.spec.hook_head_index is not None and torch.equal(mine.W_dec, head.finished().W_dec)
    training.train([job])
    after = contents(folder)
    assert {key for key in first if first[key] != after[key]} <= {"provenance.json"}


@pytest.mark.parametrize("name", ["batchtopk", "kissane"])
def test_a_job_of_one_head_trains_what_the_job_of_all_does(results, name):
    training.train([job_of(results, name)])
    together = [pd.read_parquet(results / f"train/it/head_{h}/metrics.parquet") for h in range(H)]
    dictionary, more = CASES[name]
    jobs = []
    for h in range(H):
        plan = plan_of(results, dictionary | {"kind": "sae"}, more)
        alone = plan.stages["train"]["it"]
        jobs.append(Job(dataclasses.replace(alone, key=f"alone-{h}", config=alone.config | {"head": h}), plan, "cpu"))
    training.train(jobs)  # which read each batch once
    whole = load_dictionary(results / "train/it")
    for h in range(H):
        folder = results / f"train/alone-{h}"
        mine = pd.read_parquet(folder / "metrics.parquet")
        np.testing.assert_allclose(together[h].to_numpy(), mine.to_numpy(), rtol=2e-4, atol=1e-6)
        made = load_dictionary(folder)
        assert made.spec == whole.heads[h].spec
        torch.testing.assert_close(made.W_dec, whole.heads[h].W_dec, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("name", ["april", "kissane"])
def test_stopped_at_any_step_it_goes_on_to_the_same_bytes(results, monkeypatch, name):
    how = json.dumps({"checkpoint_seconds": 0.0})
    training.train([job_of(results, name, how)])
    folder = results / "train" / "it"
    wanted = {key: held for key, held in contents(folder).items() if key != "provenance.json"}
    take = HeadsTrainer.train_step
    stop = {11, 26, 33}

    def dying(trainer, batch):
        if trainer.step in stop:
            stop.remove(trainer.step)
            raise Preempted
        take(trainer, batch)

    monkeypatch.setattr("saeflow.training.checkpoints.SHARE", float("inf"))  # a checkpoint after every step
    monkeypatch.setattr(HeadsTrainer, "train_step", dying)
    for step in sorted(stop):
        (folder / "provenance.json").unlink(missing_ok=True)
        with pytest.raises(Preempted):
            training.train([job_of(results, name, how)])
        state = Checkpoints(results / "checkpoints" / "it").newest()
        assert json.loads(state["head_0.note"].numpy().tobytes())["step"] == step
    training.train([job_of(results, name, how)])
    assert {key: held for key, held in contents(folder).items() if key != "provenance.json"} == wanted


def test_a_head_that_diverges_is_named(results):
    plan = plan_of(results, KISSANE | {"l1_coefficient": 1e39}, {})
    with pytest.raises(TrainingError, match=r"^it: head \d: the loss became (nan|inf)"):
        training.train([Job(plan.instance("train", "it"), plan, "cpu")])
    assert not (results / "train" / "it").exists()


@pytest.mark.parametrize("name", CASES)
def test_a_head_that_is_zero_stops_no_other(tmp_path, z, name, caplog):
    """A pruned head is named; the others are what they are beside any head."""
    pruned = z.clone()
    pruned[:, 1] = 0
    folders = {}
    for case, held in (("whole", z), ("pruned", pruned)):
        write_store(tmp_path / case / "activations" / TRAINING_STORE, {HOOK: held}, chunk_tokens=64, shard_tokens=256)
        caplog.clear()
        says = training.train([job_of(tmp_path / case, name)])
        named = (
            f"head 1 of {HOOK} is 0 on every token" in caplog.text,
            "of head 1, 0 on every token, none fires" in says,
        )
        assert named == (case == "pruned",) * 2 and "nan" not in says
        folders[case] = tmp_path / case / "train" / "it"
    whole, found = (load_dictionary(folder) for folder in folders.values())
    zeros = torch.zeros(5, D)
    assert torch.equal(found.heads[1].encode(zeros), torch.zeros(5, 4 * D))
    assert torch.equal(found.heads[1].forward(zeros), zeros)
    for h in (0, 2):
        for tensor, wanted in found.heads[h].tensors.items():
            torch.testing.assert_close(wanted, whole.heads[h].tensors[tensor])
    row = pd.read_parquet(folders["pruned"] / "head_1" / "metrics.parquet").iloc[-1]
    assert row["l0"] == 0 and row["loss"] == 0


def test_heads_that_are_all_zero_are_refused(z):
    with pytest.raises(TrainingError, match=f"all heads of {HOOK} are 0 on every token: choose another site.layer"):
        HeadsTrainer(specs_of(TOPK), options(), side_of(torch.zeros_like(z)))


@pytest.mark.parametrize("name", CASES)
def test_concatenated_heads_are_trained_beside_one_that_is_zero(z, name):
    """Scaled by head or not, it is left near 0."""
    pruned = z.clone()
    pruned[:, 1] = 0
    config, x = build(DictionaryConfig, CASES[name][0] | {"kind": "sae"}), pruned.flatten(1)
    spec, side = config.spec(H * D, H * D, HOOK, HOOK, 5, Origin()), side_of(pruned)
    made, rows = training.fit(spec, options(), Rows(pruned), side, side)
    assert rows[-1]["fvu"] < 1 and all(t.isfinite().all() for t in made.tensors.values())
    y = made.forward(x).unflatten(1, (H, D)).abs().mean(dim=(0, 2))
    assert y[1] < 0.3 * y[0]


def test_the_state_of_another_number_of_heads_is_refused(z):
    trainer = HeadsTrainer(specs_of(TOPK), options(), side_of(z))
    state = {key: t for key, t in trainer.state().items() if not key.startswith("head_2.")}
    with pytest.raises(TrainingError, match="of head_0, head_1, not of 3 heads"):
        trainer.restore(state)


def test_loggers_get_one_row_of_all_heads(z):
    rows = []
    trainer = HeadsTrainer(specs_of(TOPK), options(), side_of(z), on_row=rows.append)
    run(trainer, Rows(z))
    assert [row["step"] for row in rows] == [1, 5, 10, 15, 20, 25, 30, 35, 40]
    assert rows[-1]["l0"] == sum(rows[-1][f"head_{h}.l0"] for h in range(H)) == 2 * H
    assert rows[-1]["head_1.loss"] == trainer.heads[1].metrics.rows[-1]["loss"]


# -------------------------------------------------------------------- in SAELens
@pytest.mark.parametrize("name", CASES)
def test_saelens_opens_each_head_and_reconstructs_the_same(results, z, name):
    from sae_lens import SAE

    training.train([job_of(results, name)])
    whole = load_dictionary(results / "train" / "it")
    made = whole.forward(z.flatten(1)).view_as(z)
    for h in range(H):
        sae = SAE.load_from_disk(results / "train" / "it" / f"head_{h}")
        assert sae.cfg.metadata.hook_head_index == h and sae.cfg.reshape_activations == "none"
        with torch.no_grad():
            theirs = sae(z[None, :, h, :])[0]
            latents = sae.encode(z[None, :, h, :])[0]
        torch.testing.assert_close(made[:, h], theirs, rtol=1e-5, atol=1e-5)
        f = whole.encode(z.flatten(1)).view(len(z), H, -1)[:, h]
        torch.testing.assert_close(f, latents.to_dense() if latents.is_sparse else latents, rtol=1e-5, atol=1e-5)
