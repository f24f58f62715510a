"""The finished dictionary takes raw activations and computes what training computed on scaled ones."""

import itertools

import pytest
import torch

from saeflow.config import TrainingConfig
from saeflow.dictionaries import Origin
from saeflow.dictionaries.kinds.heads import HeadSAEsConfig
from saeflow.dictionaries.kinds.sae import SAEConfig
from saeflow.dictionaries.kinds.transcoder import TranscoderConfig
from saeflow.training.heads import HeadsTrainer
from saeflow.training.protocol import HookStatistics
from saeflow.training.trainer import Trainer

HEADS, D_HEAD, K, N = 4, 8, 5, 2048
D = HEADS * D_HEAD
SIZES = torch.tensor([0.3, 1.0, 3.0, 10.0])
"""Of the heads: far apart, so that a scale by head changes which latents are the largest."""
OPTIONS = {
    "activation": ("topk", "batchtopk", "relu"),
    "sparsity": ("unit_norm", "decoder_norm"),
    "normalize_activations": ("none", "expected_average_only_in", "per_head"),
}
COMBINATIONS = [dict(zip(OPTIONS, values, strict=True)) for values in itertools.product(*OPTIONS.values())]


def activations(seed):
    """Of heads of several sizes, side by side, (N, D), and what training knows of them."""
    g = torch.Generator().manual_seed(seed)
    z = torch.relu(torch.randn(N, HEADS, D_HEAD, generator=g)) * SIZES[:, None] + 0.2
    norms = z.double().square().sum(dim=2).mean(dim=0).sqrt()
    x = z.flatten(1)
    return x, HookStatistics(x.double().mean(dim=0), x.double().norm(dim=1).mean().item(), norms)


X, STATISTICS = activations(0)
Y, STATISTICS_OUT = activations(1)


def take_steps(trainer, *columns):
    for step in range(trainer.n_steps):
        rows = torch.randint(0, N, (256,), generator=torch.Generator().manual_seed(step))
        trainer.train_step(tuple(column[rows] for column in columns))


def forward(trainer, x):
    """What training computes of raw x in its own units, scaled back: its formula, written out."""
    encoder, b_enc, W_dec, b_dec, W_skip = trainer.weights
    spec, scaled = trainer.spec, x * trainer.scale_in
    f = ((scaled - b_dec if spec.apply_b_dec_to_input else scaled) @ encoder.T + b_enc).relu()
    rank = f * (W_dec.norm(dim=1) if spec.sparsity == "decoder_norm" else 1.0)
    if spec.activation == "topk":
        f = f * torch.zeros_like(f).scatter(1, rank.topk(K).indices, 1.0)
    elif spec.activation == "batchtopk":
        f = f * (rank > trainer.threshold.float())
    y = f @ W_dec + b_dec
    return (y if W_skip is None else y + scaled @ W_skip.T) / trainer.scale_out


def check(trainer, x):
    found, wanted = trainer.finished().forward(x), forward(trainer, x)
    assert wanted.std() > 0.1
    assert (found - wanted).norm() < 1e-5 * wanted.norm()
    assert ((found - wanted).norm(dim=1) < 1e-4 * wanted.norm(dim=1)).all()


def options(combination):
    amount = {"l1_coefficient": 0.05} if combination["activation"] == "relu" else {"k": K}
    return combination | amount | {"expansion": 4}


TRAINING = TrainingConfig(n_tokens=256 * 40, batch_size=256, lr=5e-3)


@pytest.mark.parametrize("combination", COMBINATIONS, ids=lambda c: "-".join(c.values()))
@pytest.mark.parametrize("kind", ["sae", "uncentred", "transcoder", "skip"])
def test_finished_on_raw_activations_is_training_on_scaled_ones(kind, combination):
    if kind in ("sae", "uncentred"):
        config = SAEConfig("sae", apply_b_dec_to_input=kind == "sae", **options(combination))
        trainer = Trainer(config.spec(D, D, "z", "z", 0, Origin()), TRAINING, STATISTICS, STATISTICS)
        take_steps(trainer, X)
    else:
        config = TranscoderConfig("transcoder", skip=kind == "skip", **options(combination))
        trainer = Trainer(config.spec(D, D, "z", "y", 0, Origin()), TRAINING, STATISTICS, STATISTICS_OUT)
        take_steps(trainer, X, Y)
    check(trainer, X)


OF_HEADS = [c for c in COMBINATIONS if c["normalize_activations"] != "expected_average_only_in"]  # which is refused


@pytest.mark.parametrize("combination", OF_HEADS, ids=lambda c: "-".join(c.values()))
def test_finished_heads_on_raw_activations_are_training_on_scaled_ones(combination):
    config = HeadSAEsConfig("heads", **options(combination))
    specs = config.specs((["z"], [(HEADS, D_HEAD)], None), 0, Origin())
    trainer = HeadsTrainer(specs, TRAINING, STATISTICS)
    take_steps(trainer, X)
    for head, x in zip(trainer.heads, X.tensor_split(HEADS, dim=1), strict=True):
        check(head, x)
