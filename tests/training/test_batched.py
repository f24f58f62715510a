"""Small dictionaries of one shape trained as one: each gets what it gets alone, within rounding."""

import dataclasses

import pytest
import torch

from saeflow.config import ConfigError, TrainingConfig
from saeflow.dictionaries import Origin
from saeflow.dictionaries.kinds.sae import SAEConfig
from saeflow.dictionaries.kinds.transcoder import TranscoderConfig
from saeflow.training.heads import BatchedTrainer
from saeflow.training.protocol import HookStatistics
from saeflow.training.trainer import Trainer

D, BATCH, STEPS = 6, 128, 40
CONFIGS = {
    "topk": SAEConfig("sae", "topk", k=2, expansion=4, sparsity="unit_norm"),
    "topk by norm": SAEConfig("sae", "topk", k=2, expansion=4),
    "batchtopk": SAEConfig("sae", "batchtopk", k=2, expansion=4),
    "relu": SAEConfig("sae", "relu", l1_coefficient=0.2, expansion=4),
    "relu of unit norm": SAEConfig("sae", "relu", l1_coefficient=0.2, expansion=4, sparsity="unit_norm"),
    "skip transcoder": TranscoderConfig("transcoder", "relu", l1_coefficient=0.5, expansion=4, skip=True),
}


def data(H):
    """A batch for each of H members at each step, of other scales."""
    g = torch.Generator().manual_seed(0)
    x = torch.relu(torch.randn(STEPS, H, BATCH, D, generator=g)) * torch.arange(1.0, H + 1)[:, None, None]
    return [[(x[s, h],) for h in range(H)] for s in range(STEPS)]


def trainers(config, H, **training):
    options = TrainingConfig(STEPS * BATCH, BATCH, lr=1e-2, log_every=5, l1_warm_up_steps=10, **training)
    found = []
    for h in range(H):
        mine = config if config.l1_coefficient is None else dataclasses.replace(config, l1_coefficient=0.2 * (h + 1))
        hooks = ("in", "out" if config.kind == "transcoder" else "in")
        spec = mine.spec(D, D, *hooks, h, Origin())
        side = HookStatistics(torch.full((D,), 0.3 * (h + 1)), 1.5 * (h + 1))
        found.append(Trainer(spec, options, side, side))
    return found


def run(take, H, config):
    for batches in data(H):
        take([(x, 2 * x.roll(1, 1)) if config.kind == "transcoder" else (x,) for (x,) in batches])


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("clip", [None, 0.5])
def test_each_gets_what_it_gets_alone(name, clip):
    config, H = CONFIGS[name], 3
    alone, members = trainers(config, H, clip_grad_norm=clip), trainers(config, H, clip_grad_norm=clip)
    run(lambda batches: [t.train_step(b) for t, b in zip(alone, batches, strict=True)], H, config)
    run(BatchedTrainer(members).train_step, H, config)
    for one, other in zip(members, alone, strict=True):
        for mine, theirs in zip(one.metrics.rows, other.metrics.rows, strict=True):
            assert mine == pytest.approx(theirs, rel=1e-4, abs=1e-6)
        assert one.metrics.rows[-1]["fvu"] < 0.9 * one.metrics.rows[0]["fvu"]
        for (key, mine), theirs in zip(one.state().items(), other.state().values(), strict=True):
            if key != "note":
                torch.testing.assert_close(mine, theirs, rtol=1e-3, atol=1e-5, msg=lambda m, k=key: f"{k}: {m}")
        mine, theirs = one.finished(), other.finished()
        assert mine.spec == theirs.spec
        torch.testing.assert_close(mine.W_dec, theirs.W_dec, rtol=1e-3, atol=1e-4)


def test_members_are_written_down_and_go_on_alone_or_together():
    config = CONFIGS["topk"]
    whole, first = trainers(config, 2), trainers(config, 2)
    run(BatchedTrainer(whole).train_step, 2, config)
    batched = BatchedTrainer(first)
    for batches in data(2)[:17]:
        batched.train_step(batches)
    again = trainers(config, 2)
    for mine, held in zip(again, first, strict=True):
        mine.restore(held.state())
    batched = BatchedTrainer(again)
    for batches in data(2)[17:]:
        batched.train_step(batches)
    for mine, wanted in zip(again, whole, strict=True):
        assert all(torch.equal(held, wanted.state()[key]) for key, held in mine.state().items())


def test_what_cannot_train_as_one_is_refused():
    one, other = trainers(CONFIGS["topk"], 1), trainers(CONFIGS["relu"], 1)
    with pytest.raises(ConfigError, match="one shape, objective, training and step"):
        BatchedTrainer([*one, *other])
    with pytest.raises(ConfigError, match="no such term"):
        BatchedTrainer(trainers(CONFIGS["topk"], 2, revive="auxk"))
