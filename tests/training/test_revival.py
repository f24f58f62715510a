"""Dead latents: each remedy against its formula, and on a problem in which latents are dead from the start."""

import pytest
import torch

from saeflow.config import ConfigError, DictionaryConfig, TrainingConfig, build
from saeflow.dictionaries import Origin
from saeflow.dictionaries.kinds.sae import SAEConfig
from saeflow.kernels.step import AuxiliaryLossInput, Objective, Weights, take_step, token_weights
from saeflow.training import trainer as trainers
from saeflow.training.protocol import HookStatistics
from saeflow.training.revival import auxk, ghost, resample
from saeflow.training.trainer import Trainer, learning_rate

D, P, N_LATENTS, DEAD = 12, 12, 40, 25


def problem(seed=0, d=D, p=P, dtype=torch.float64):
    g = torch.Generator().manual_seed(seed)
    shapes = ((N_LATENTS, d), (N_LATENTS,), (N_LATENTS, p), (p,))
    weights = Weights(*(torch.randn(*s, generator=g, dtype=dtype) for s in shapes))
    weights.b_enc[:DEAD] -= 20.0
    return weights, torch.randn(50, d, generator=g, dtype=dtype), torch.randn(50, p, generator=g, dtype=dtype)


def situation_of(weights, x, y, squared_error="sum"):
    leaves = Weights(*(t.clone().requires_grad_() for t in weights.parameters()))
    f = torch.relu(x @ weights.encoder.T + weights.b_enc)
    return AuxiliaryLossInput(leaves, x, f @ weights.W_dec + weights.b_dec - y, token_weights(y, squared_error))


def test_auxk_is_saelens_auxiliary_loss():
    """`calculate_topk_aux_loss` itself, with more dead latents than d_in / 2, and with fewer."""
    from sae_lens import TopKTrainingSAE, TopKTrainingSAEConfig

    weights, x, y = problem(dtype=torch.float32)
    situation = situation_of(weights, x, y)
    sae = TopKTrainingSAE(TopKTrainingSAEConfig(d_in=D, d_sae=N_LATENTS, k=4, device="cpu", dtype="float32"))
    with torch.no_grad():
        for name in ("b_enc", "W_dec", "b_dec"):
            getattr(sae, name).copy_(getattr(weights, name))
        sae.W_enc.copy_(weights.encoder.T)
    hidden = (x @ weights.encoder.T + weights.b_enc) * weights.W_dec.norm(dim=1)
    for n_dead in (DEAD, 4):
        mask = torch.arange(N_LATENTS) < n_dead
        wanted = sae.calculate_topk_aux_loss(y, y + situation.error, hidden, mask)
        found = auxk(situation, mask.nonzero()[:, 0], 1.0, by_norm=True)
        assert found.item() == pytest.approx(wanted.item(), rel=1e-5)


def test_auxk_gives_gradients_to_dead_latents_alone():
    situation = situation_of(*problem())
    gradients = torch.autograd.grad(auxk(situation, torch.arange(DEAD), 1.0, False), situation.weights.parameters()[:3])
    for gradient in gradients:
        assert (gradient[DEAD:] == 0).all() and (gradient[:DEAD] != 0).any()


@pytest.mark.parametrize("p", [P, 7])
def test_ghost_gradients_are_those_of_the_transcoder_papers_code_with_the_target_as_target(p):
    """`reference/transcoders_attention_tracr.md` §1.4, written as there, with r = y - y_hat."""
    weights, x, y = problem(p=p)
    situation = situation_of(weights, x, y, "target_norm")
    leaves = Weights(*(t.clone().requires_grad_() for t in weights.parameters()))
    r = -situation.error
    g = torch.exp(x @ leaves.encoder[:DEAD].T + leaves.b_enc[:DEAD]) @ leaves.W_dec[:DEAD]
    scale = (r.norm(dim=1, keepdim=True) / (1e-6 + 2 * g.norm(dim=1, keepdim=True))).detach()
    elementwise = (g * scale - r).square() / r.norm(dim=1, keepdim=True)
    mse = situation.error.square() / y.norm(dim=1, keepdim=True)
    wanted = ((mse / (elementwise + 1e-6)).detach() * elementwise).mean()
    found = ghost(situation, torch.arange(DEAD))
    torch.testing.assert_close(found, wanted)
    mine = torch.autograd.grad(found, situation.weights.parameters()[:3])
    theirs = torch.autograd.grad(wanted, leaves.parameters()[:3])
    for a, b in zip(mine, theirs, strict=True):
        torch.testing.assert_close(a, b)


def test_resampled_latents_point_at_badly_reconstructed_tokens():
    weights, x, y = problem(p=7)
    before = Weights(*(t.clone() for t in weights.parameters()))
    losses = torch.zeros(50, dtype=torch.float64)
    losses[:3] = torch.tensor([1.0, 2.0, 3.0])  # only these can be drawn
    dead = torch.arange(3)
    moments = [torch.ones(N_LATENTS, 7), torch.ones(N_LATENTS)]
    resample(weights, moments, dead, x, y, losses, torch.Generator().manual_seed(0), centred=False, unit_norm=True)
    targets = torch.nn.functional.normalize(y[:3] - before.b_dec, dim=1)
    cosines = weights.W_dec[:3] @ targets.T
    torch.testing.assert_close(cosines.max(dim=1).values, torch.ones(3, dtype=torch.float64))
    assert sorted(cosines.argmax(dim=1).tolist()) == [0, 1, 2]  # without replacement
    inputs = torch.nn.functional.normalize(x - x.mean(dim=0), dim=1)[cosines.argmax(dim=1)]
    wanted = 0.2 * before.encoder[3:].norm(dim=1).mean() * inputs
    torch.testing.assert_close(weights.encoder[:3], wanted)
    assert (weights.b_enc[:3] == 0).all()
    assert all((m[:3] == 0).all() and (m[3:] == 1).all() for m in moments)
    for name in ("encoder", "b_enc", "W_dec"):
        assert torch.equal(getattr(weights, name)[3:], getattr(before, name)[3:])


def test_the_learning_rate_falls_to_a_tenth_after_each_resampling_and_rises_again():
    options = TrainingConfig(100, 1, lr=1.0, revive="resample", resample_steps=(20, 60), resample_warm_up_steps=10)
    rates = [learning_rate(options, step, 100) for step in range(100)]
    assert rates[19] == 1 and rates[20] == pytest.approx(0.1) and rates[25] == pytest.approx(0.55) and rates[30] == 1
    assert rates[60] == pytest.approx(0.1) and rates[99] == 1


@pytest.mark.parametrize(
    ("activation", "revive"),
    [("topk", "auxk"), ("batchtopk", "auxk"), ("relu", "auxk"), ("relu", "ghost"), ("relu", "resample")],
)
@pytest.mark.parametrize("kind", ["sae", "transcoder"])
def test_each_remedy_revives_latents_that_are_dead_from_the_start(activation, revive, kind, monkeypatch):
    """16 of 32 latents start out of reach. Without a remedy most stay dead; with it two fifths of those live."""
    g = torch.Generator().manual_seed(0)
    atoms = torch.nn.functional.normalize(torch.randn(32, 16, generator=g), dim=1)
    f = (torch.rand(8192, 32, generator=g) < 0.08) * (0.5 + torch.rand(8192, 32, generator=g))
    x = f @ atoms
    y = x if kind == "sae" else x @ torch.randn(16, 10, generator=g) / 4
    drawn = trainers.initial_weights

    def half_dead(*arguments):
        weights = drawn(*arguments)
        weights.b_enc[:16] = -1.0
        return weights

    monkeypatch.setattr(trainers, "initial_weights", half_dead)

    class Batches:
        def iterate(self, start, n):
            for s in range(start, start + n):
                rows = torch.randint(0, 8192, (256,), generator=torch.Generator().manual_seed(s))
                yield (x[rows],) if kind == "sae" else (x[rows], y[rows])

    def dead_in_the_end(revive):
        amount = {"l1_coefficient": 0.05} if activation == "relu" else {"k": 4}
        config = build(DictionaryConfig, {"kind": kind, "activation": activation, "expansion": 2, **amount})
        steps = {"resample_steps": (60, 180), "resample_batches": 4} if revive == "resample" else {}
        options = TrainingConfig(
            256 * 480, 256, lr=1e-2, revive=revive, dead_after_tokens=256 * 20, resample_warm_up_steps=20, **steps
        )
        sides = [HookStatistics(t.mean(dim=0), t.norm(dim=1).mean().item()) for t in (x, y)]
        spec = config.spec(16, y.shape[1], "in", "in" if kind == "sae" else "out", 0, Origin())
        trainer, batches = Trainer(spec, options, *sides), Batches()
        for batch in batches.iterate(0, 480):
            if trainer.resamples_next():
                trainer.resample(batches)
            trainer.train_step(batch)
        return trainer.metrics.rows[-1]["dead"]

    alone = dead_in_the_end("none")
    assert alone >= 9
    assert dead_in_the_end(revive) <= 0.6 * alone


def test_without_dead_latents_a_remedy_changes_nothing():
    weights, x, y = problem()
    objective = Objective("topk", 4)
    plain = take_step(objective, weights, x, y)
    spec = SAEConfig("sae", "topk", k=4, expansion=3).spec(D, D, "in", "in", 0, Origin())
    options = TrainingConfig(1000, 10, revive="auxk")
    side = HookStatistics(torch.zeros(D), 1.0)
    assert Trainer(spec, options, side, side)._auxiliary_loss() is None
    again = take_step(objective, weights, x, y, auxiliary_loss=None)
    assert torch.equal(plain.loss, again.loss)


def test_resampling_without_steps_is_refused():
    with pytest.raises(ConfigError, match=r"training\.resample_steps"):
        TrainingConfig(1000, 10, revive="resample")
