"""Massive activations at the first token of every row, and `training.exclude`, in training jobs.

The data are sparse combinations of 256 directions in rows of 64 tokens, of which the first has 100 or 1,000 times the
mean norm in two dimensions, as GPT-2, Llama and Qwen have it. A dictionary of the others alone leaves some .15 of their
variance unexplained.
"""

import json
import logging
import shutil

import numpy as np
import pandas as pd
import pytest
import torch
from stores import TRAINING_STORE, contents, training_plan, write_store

from saeflow.config import ConfigError, TrainingConfig
from saeflow.config.training import ExcludeConfig
from saeflow.dictionaries import load_dictionary
from saeflow.jobs.job import Job
from saeflow.training import loop
from saeflow.training.loop import train
from saeflow.training.trainer import Trainer

HOOK, HOOK_OUT = "blocks.0.ln2.hook_normalized", "blocks.0.hook_mlp_out"
D, CONTEXT, BOS = 64, 64, 7
TOPK = {"kind": "sae", "activation": "topk", "k": 8, "expansion": 4, "sparsity": "unit_norm"}
TOPK |= {"normalize_activations": "expected_average_only_in"}
RELU = {"kind": "sae", "activation": "relu", "l1_coefficient": 1.0, "expansion": 4}
RELU |= {"normalize_activations": "expected_average_only_in"}
LONG = {"n_tokens": 1024 * 400, "batch_size": 1024, "lr": 6e-3, "lr_warm_up_steps": 50, "lr_decay_steps": 100}
LONG |= {"l1_warm_up_steps": 50, "log_every": 50}
SHORT = {"n_tokens": 4096, "batch_size": 128, "lr": 1e-2, "log_every": 4}
FIRST = {"exclude": {"positions": [0]}}


def activations(n, scale):
    """(n, D), the first of every row `scale` times the mean norm of the others."""
    g = torch.Generator().manual_seed(0)
    atoms = torch.nn.functional.normalize(torch.randn(256, D, generator=g), dim=1)
    codes = torch.rand(n, 256, generator=g) * (torch.rand(n, 256, generator=g) < 0.03)
    x = codes @ atoms
    massive = 0.1 * torch.randn(n // CONTEXT, D, generator=g)
    massive[:, [3, 17]] = scale * float(x.norm(dim=1).mean()) / 2**0.5
    x[::CONTEXT] = massive
    return x


def store(results, hooks):
    n = len(next(iter(hooks.values())))
    tokens = np.random.default_rng(0).integers(8, 99, (n // CONTEXT, CONTEXT))
    tokens[:, 0] = BOS
    folder = results / "activations" / TRAINING_STORE
    write_store(folder, hooks, tokens, chunk_tokens=1024, shard_tokens=16384)
    for hook in hooks:
        (folder / f"{hook}-{n}").rename(folder / f"{hook}-1000")  # as `training_plan` calls it
    return hooks


def jobs(results, dictionaries, training, hooks=(HOOK,), how=None):
    plan = training_plan(results, list(hooks), dictionaries, training, json.dumps(how or {}))
    return [Job(instance, plan, "cpu") for instance in plan.stages["train"].values()]


def artifact(results, key):
    return {name: bytes_ for name, bytes_ in contents(results / "train" / key).items() if name != "provenance.json"}


def fvu_of_others(dictionary, x):
    others = x[torch.arange(len(x)) % CONTEXT != 0]
    y = dictionary.forward(others)
    return float((others - y).square().sum() / (others - others.mean(0)).square().sum())


# -------------------------------------------------------------------- what it is for
@pytest.mark.parametrize("scale", [100.0, 1000.0])
@pytest.mark.parametrize("dictionary", [TOPK, RELU], ids=["topk", "relu"])
def test_without_the_massive_tokens_the_others_are_explained_again(tmp_path, dictionary, scale, caplog):
    x = store(tmp_path, {HOOK: activations(1 << 15, scale)})[HOOK]
    found, last = {}, {}
    for name, more in (("all", {}), ("kept", FIRST)):
        caplog.clear()
        with caplog.at_level(logging.INFO, "saeflow"):
            train(jobs(tmp_path, {name: dictionary}, LONG | more))
        warned = [r.getMessage() for r in caplog.records if r.levelno == logging.WARNING]
        assert len(warned) == (name == "all")
        if warned:
            assert f"{HOOK}: the first token of a row has" in warned[0]
            assert "training.exclude.positions=[0]" in warned[0]
        folder = tmp_path / "train" / name
        found[name] = fvu_of_others(load_dictionary(folder), x)
        last[name] = pd.read_parquet(folder / "metrics.parquet").iloc[-1]
    print(dictionary["activation"], scale, found)
    assert found["kept"] < 0.2
    assert last["kept"]["fvu"] == pytest.approx(found["kept"], abs=0.03)
    assert last["kept"]["fvu_without_first"] == last["kept"]["fvu"]
    if scale == 1000:
        assert found["all"] > 0.6
    assert found["all"] > 1.15 * found["kept"]
    # what counted all tokens says nothing of most of them; what leaves the first out does
    assert last["all"]["fvu"] < 0.01
    assert last["all"]["fvu_without_first"] == pytest.approx(found["all"], rel=0.25)


def test_what_was_left_out_is_stored_and_nothing_where_nothing_was(tmp_path):
    store(tmp_path, {HOOK: activations(4096, 100.0)})
    by = {"positions": [0], "norm_above": 20.0}
    (job,) = jobs(tmp_path, {"kept": TOPK}, SHORT | {"exclude": by})
    train([job])
    record = json.loads((tmp_path / "train/kept/left_out.json").read_text())
    assert record["left_out"] == {"positions": 64, "norm_above": 0}
    assert (record["n_stored"], record["n_kept"], record["first_of_rows"]) == (4096, 4032, 1.0)
    assert 0.5 < record["median_norms"][HOOK] < 5
    train(jobs(tmp_path, {"all": TOPK}, SHORT))
    assert "left_out.json" not in artifact(tmp_path, "all")


@pytest.mark.parametrize("how", [{"positions": [0]}, {"token_ids": [BOS]}, {"norm_above": 10.0}])
def test_ways_to_name_the_same_tokens_train_the_same_dictionary(tmp_path, how):
    store(tmp_path, {HOOK: activations(4096, 100.0)})
    train(jobs(tmp_path, {"a": TOPK}, SHORT | FIRST))
    train(jobs(tmp_path, {"b": TOPK}, SHORT | {"exclude": how}))
    a, b = artifact(tmp_path, "a"), artifact(tmp_path, "b")
    assert a["sae_weights.safetensors"] == b["sae_weights.safetensors"] and a["metrics.parquet"] == b["metrics.parquet"]


# -------------------------------------------------------------------- every kind
KINDS = {
    "topk": (TOPK, {}),
    "batchtopk": (TOPK | {"activation": "batchtopk"}, {}),
    "relu": (RELU, {"revive": "ghost", "dead_after_tokens": 300}),
    "resampled": (RELU, {"revive": "resample", "resample_steps": [9], "resample_batches": 2, "dead_after_tokens": 300}),
    "auxk": (TOPK, {"revive": "auxk", "dead_after_tokens": 300}),
    "saelens": (
        {"kind": "sae", "activation": "saelens", "saelens": "batchtopk", "k": 4, "expansion": 2, "options": {}}
        | {"normalize_activations": "expected_average_only_in"},
        {"revive": "auxk"},
    ),
    "transcoder": (TOPK | {"kind": "transcoder", "skip": True}, {}),
    "transcoder_relu": (RELU | {"kind": "transcoder", "squared_error": "target_norm"}, {}),
}


@pytest.mark.parametrize("by", [{"positions": [0]}, {"norm_above": 10.0}], ids=["positions", "norms"])
@pytest.mark.parametrize("name", KINDS)
def test_leaving_tokens_out_is_training_on_a_store_that_never_had_them(tmp_path, name, by):
    """But for the order of the sums in mean and norms: the same tokens in the same batches."""
    dictionary, more = KINDS[name]
    hooks = [HOOK, HOOK_OUT] if dictionary["kind"] == "transcoder" else [HOOK]
    x = activations(4096, 100.0)
    held = {HOOK: x, HOOK_OUT: (x @ torch.linalg.qr(x[1:65])[0])[:, :32].contiguous()}
    if by.get("norm_above"):  # massive at one side alone is enough to be left out
        held[HOOK_OUT][::CONTEXT] *= 1e-3
    store(tmp_path / "with", {hook: held[hook] for hook in hooks})
    kept = torch.arange(4096) % CONTEXT != 0
    without = {hook: held[hook][kept] for hook in hooks}
    folder = tmp_path / "without" / "activations" / TRAINING_STORE
    write_store(folder, without, np.zeros((64, CONTEXT - 1), dtype=np.int32), chunk_tokens=1024, shard_tokens=16384)
    for hook in hooks:
        (folder / f"{hook}-4032").rename(folder / f"{hook}-1000")
    train(jobs(tmp_path / "with", {"it": dictionary}, SHORT | more | {"exclude": by}, hooks))
    train(jobs(tmp_path / "without", {"it": dictionary}, SHORT | more, hooks))
    tables = [pd.read_parquet(tmp_path / side / "train/it/metrics.parquet") for side in ("with", "without")]
    columns = ["loss", "fvu", "l0", "sparsity", "dead"]
    assert np.allclose(*(table[columns] for table in tables), rtol=2e-3, atol=1e-5)
    ours, theirs = (load_dictionary(tmp_path / side / "train/it") for side in ("with", "without"))
    assert torch.allclose(ours.W_dec, theirs.W_dec, atol=1e-3)


def test_heads_and_one_of_them_leave_out_the_same_tokens(tmp_path):
    z = activations(4096, 100.0).view(4096, 4, 16)
    hook = "blocks.0.attn.hook_z"
    store(tmp_path, {hook: z})
    dictionary = RELU | {"kind": "heads", "normalize_activations": "per_head"}
    (job,) = jobs(tmp_path, {"heads": dictionary}, SHORT | {"exclude": {"norm_above": 10.0}}, [hook])
    train([job])
    (alone,) = jobs(tmp_path, {"one": dictionary | {"kind": "sae"}}, SHORT | {"exclude": {"norm_above": 10.0}}, [hook])
    alone.instance.config["head"] = 2
    train([alone])
    records = [json.loads((tmp_path / f"train/{key}/left_out.json").read_text()) for key in ("heads", "one")]
    assert records[0] == records[1] and records[0]["left_out"] == {"norm_above": 64}
    whole, one = (load_dictionary(tmp_path / f"train/{key}") for key in ("heads", "one"))
    for mine, theirs in ((whole.heads[2].W_dec, one.W_dec), (whole.heads[2].W_enc, one.W_enc)):
        assert torch.allclose(mine, theirs, atol=1e-3)
    table = pd.read_parquet(tmp_path / "train/heads/head_0/metrics.parquet")
    assert (table["fvu"] == table["fvu_without_first"]).all()


# -------------------------------------------------------------------- jobs of several, and killed ones
def test_those_that_share_a_job_have_the_bytes_of_each_alone_and_go_on_where_they_stopped(tmp_path, monkeypatch):
    store(tmp_path, {HOOK: activations(4096, 100.0)})
    several = {"topk": TOPK, "relu": RELU}
    options = SHORT | {"exclude": {"positions": [0], "norm_above": 3.0}}
    train(jobs(tmp_path, several, options))
    together = {key: artifact(tmp_path, key) for key in several}
    shutil.rmtree(tmp_path / "train")
    for job in reversed(jobs(tmp_path, several, options)):
        train([job])
    assert {key: artifact(tmp_path, key) for key in several} == together
    shutil.rmtree(tmp_path / "train")
    take = Trainer.train_step

    def dies(trainer, batch):
        if trainer.step == 17:
            raise KeyboardInterrupt
        take(trainer, batch)

    monkeypatch.setattr(Trainer, "train_step", dies)
    monkeypatch.setattr("saeflow.training.checkpoints.SHARE", float("inf"))
    with pytest.raises(KeyboardInterrupt):
        train(jobs(tmp_path, several, options, how={"checkpoint_seconds": 0.0}))
    monkeypatch.setattr(Trainer, "train_step", take)
    assert list((tmp_path / "checkpoints").rglob("*.safetensors"))
    train(jobs(tmp_path, several, options))
    assert {key: artifact(tmp_path, key) for key in several} == together


def test_those_that_leave_out_other_tokens_cannot_share_a_job(tmp_path):
    store(tmp_path, {HOOK: activations(4096, 100.0)})
    (a,), (b,) = (jobs(tmp_path, {key: TOPK}, SHORT | more) for key, more in (("a", {}), ("b", FIRST)))
    with pytest.raises(ConfigError, match=r"one training\.exclude"):
        train([a, b])


def test_where_norms_decide_those_that_read_other_columns_cannot_share_a_job(tmp_path):
    x = activations(4096, 100.0)
    store(tmp_path, {HOOK: x, HOOK_OUT: x.flip(0)})
    for exclude, shared in (({"positions": [0]}, True), ({"norm_above": 10.0}, False)):
        (a,), (b,) = (jobs(tmp_path, {hook: TOPK}, SHORT | {"exclude": exclude}, [hook]) for hook in (HOOK, HOOK_OUT))
        if shared:
            train([a, b])
            continue
        with pytest.raises(ConfigError, match="with norm_above read the same columns"):
            train([a, b])


def test_the_loop_without_jobs_takes_the_batches_that_it_gets(tmp_path):
    training = TrainingConfig(**SHORT, exclude=ExcludeConfig(positions=(0,)))
    with pytest.raises(ConfigError, match="leave tokens out of them"):
        loop.fit(None, training, None, None, None)
