"""Our training and SAELens's `SAETrainer`, from the same weights on the same batches: loss by loss, then the output."""

import pytest
import torch

from saeflow.config import TrainingConfig
from saeflow.dictionaries import Origin
from saeflow.dictionaries.kinds.sae import SAEConfig
from saeflow.training.protocol import HookStatistics
from saeflow.training.trainer import Trainer

D, N_LATENTS, BATCH, STEPS = 16, 64, 256, 200
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def batches():
    g = torch.Generator().manual_seed(0)
    atoms = torch.nn.functional.normalize(torch.randn(48, D, generator=g), dim=1)
    f = (torch.rand(STEPS * BATCH, 48, generator=g) < 0.06) * (0.5 + torch.rand(STEPS * BATCH, 48, generator=g))
    return (f @ atoms + 0.3 * torch.randn(D, generator=g)).split(BATCH)


def theirs(kind, options, weights, batches, training):
    """SAELens's trainer from given weights: its loss at every step, and the dictionary that it would save."""
    from sae_lens import StandardTrainingSAE, StandardTrainingSAEConfig, TopKTrainingSAE, TopKTrainingSAEConfig
    from sae_lens.config import LoggingConfig, SAETrainerConfig
    from sae_lens.training.sae_trainer import SAETrainer

    classes = {
        "topk": (TopKTrainingSAE, TopKTrainingSAEConfig),
        "relu": (StandardTrainingSAE, StandardTrainingSAEConfig),
    }
    sae_class, config_class = classes[kind]
    sae = sae_class(config_class(d_in=D, d_sae=N_LATENTS, dtype="float32", device="cpu", **options))
    with torch.no_grad():
        sae.W_enc.copy_(weights.encoder.T)
        for name in ("b_enc", "W_dec", "b_dec"):
            getattr(sae, name).copy_(getattr(weights, name))
    config = SAETrainerConfig(
        n_checkpoints=0, checkpoint_path=None, save_final_checkpoint=False, total_training_samples=STEPS * BATCH,
        device="cpu", autocast=False, lr=training.lr, lr_end=training.lr / 10, lr_scheduler_name="constant",
        lr_warm_up_steps=training.lr_warm_up_steps, adam_beta1=0.9, adam_beta2=0.999, lr_decay_steps=0,
        n_restart_cycles=1, train_batch_size_samples=BATCH, dead_feature_window=1000, feature_sampling_window=2000,
        logger=LoggingConfig(log_to_wandb=False),
    )  # fmt: skip
    trainer = SAETrainer(config, sae, iter(batches))
    losses = []
    for batch in batches:
        losses.append(trainer.step(batch).loss.item())
        trainer.n_training_steps += 1
    return losses, sae


@pytest.mark.parametrize(
    ("config", "options"),
    [
        (SAEConfig("sae", "topk", k=4, expansion=4), {"k": 4}),
        (SAEConfig("sae", "relu", l1_coefficient=0.2, expansion=4), {"l1_coefficient": 0.2}),
        (
            SAEConfig("sae", "relu", l1_coefficient=0.2, expansion=4),
            {"l1_coefficient": 0.2, "l1_warm_up_steps": 50},
        ),
    ],
    ids=["topk", "relu", "relu with warm-up"],
)
def test_two_hundred_steps_follow_saelens_loss_by_loss(config, options, batches):
    training = TrainingConfig(
        STEPS * BATCH, BATCH, lr=2e-3, clip_grad_norm=1.0, log_every=1, initial="saelens",
        l1_warm_up_steps=options.get("l1_warm_up_steps", 0),
    )  # fmt: skip
    spec = config.spec(D, D, "hook", "hook", 0, Origin())
    side = HookStatistics(torch.zeros(D), 1.0)
    trainer = Trainer(spec, training, side, side)
    wanted, sae = theirs(config.activation, options, trainer.weights, batches, training)
    for batch in batches:
        trainer.train_step((batch,))
    losses = [row["loss"] for row in trainer.metrics.rows]
    torch.testing.assert_close(torch.tensor(losses), torch.tensor(wanted), rtol=1e-4, atol=0)
    assert losses[-1] < 0.5 * losses[0]  # it did train
    with torch.no_grad():
        reconstruction = sae(batches[0])
    torch.testing.assert_close(trainer.finished().forward(batches[0]), reconstruction, rtol=1e-3, atol=1e-4)
