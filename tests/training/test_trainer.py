"""Training: what it learns, its units and schedules, that it repeats itself, and how it fails."""

import dataclasses
import importlib
import json
import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from saeflow.config import TrainingConfig
from saeflow.dictionaries import DictionaryError, Origin, load_dictionary, save_dictionary
from saeflow.dictionaries.initial import geometric_median, initial_weights
from saeflow.dictionaries.kinds.sae import SAEConfig
from saeflow.dictionaries.kinds.transcoder import TranscoderConfig
from saeflow.kernels.step import Objective, loss_slow
from saeflow.training import trainer
from saeflow.training.loop import fit
from saeflow.training.metrics import TrainingError, write_metrics
from saeflow.training.protocol import HookStatistics
from saeflow.training.trainer import CACHED, DENSE_ABOVE, SPARSE_BELOW, l1_coefficient, learning_rate

HOOK, HOOK_OUT = "blocks.0.ln2.hook_normalized", "blocks.0.hook_mlp_out"


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


class InMemory:
    """Batches drawn from rows in memory, each a function of (seed, step)."""

    def __init__(self, *columns, batch_size=256, seed=0):
        self.columns, self.batch_size, self.seed = columns, batch_size, seed

    def iterate(self, start, n_steps):
        for step in range(start, start + n_steps):
            g = torch.Generator().manual_seed(self.seed * 10_007 + step)
            rows = torch.randint(0, len(self.columns[0]), (self.batch_size,), generator=g)
            yield tuple(c[rows] for c in self.columns)


def side(x):
    return HookStatistics(x.double().mean(dim=0), x.double().norm(dim=1).mean().item())


def sparse_truth(N=20_000, d=16, n=24, seed=0):
    """Sums of two or three of n random unit atoms with positive sizes, around a mean: x (N, d), atoms (n, d)."""
    g = torch.Generator().manual_seed(seed)
    atoms = torch.nn.functional.normalize(torch.randn(n, d, generator=g), dim=1)
    f = (torch.rand(N, n, generator=g) < 2.5 / n) * (0.5 + torch.rand(N, n, generator=g))
    return f @ atoms + torch.randn(d, generator=g), atoms


def trained(config, x, y=None, steps=300, batch_size=256, seed=0, **fields):
    schedule = {"lr": 1e-2, "lr_warm_up_steps": 10, "lr_decay_steps": steps // 3, "l1_warm_up_steps": 20}
    options = TrainingConfig(n_tokens=steps * batch_size, batch_size=batch_size, **(schedule | fields))
    columns = (x,) if y is None else (x, y)
    out = x if y is None else y
    spec = config.spec(x.shape[1], out.shape[1], HOOK, HOOK if y is None else HOOK_OUT, seed, Origin())
    return fit(spec, options, InMemory(*columns, batch_size=batch_size, seed=seed), side(x), side(out))


TOPK = SAEConfig("sae", "topk", k=3, expansion=2)
RELU = SAEConfig("sae", "relu", l1_coefficient=0.1, expansion=2)
NORMALISED = SAEConfig("sae", "relu", l1_coefficient=0.1, expansion=2, normalize_activations="expected_average_only_in")
UNIT_NORM = SAEConfig("sae", "relu", l1_coefficient=0.1, expansion=2, sparsity="unit_norm")
UNIT_TOPK = SAEConfig("sae", "topk", k=3, expansion=2, sparsity="unit_norm")


@pytest.mark.parametrize("config", [TOPK, UNIT_TOPK, RELU, NORMALISED, UNIT_NORM])
def test_atoms_of_a_sparse_ground_truth_are_recovered(config):
    x, atoms = sparse_truth()
    dictionary, rows = trained(config, x)
    assert rows[-1]["loss"] < 0.35 * rows[0]["loss"] and rows[-1]["explained_variance"] > 0.85
    cosines = atoms @ torch.nn.functional.normalize(dictionary.W_dec, dim=1).T
    assert cosines.max(dim=1).values.median() > 0.95


def test_a_transcoder_learns_a_sparse_map_to_another_width():
    x, atoms = sparse_truth()
    y = torch.relu((x - x.mean(dim=0)) @ atoms[:6].T)
    config = TranscoderConfig("transcoder", "relu", l1_coefficient=0.01, expansion=2)
    dictionary, rows = trained(config, x, y)
    assert (dictionary.d_in, dictionary.d_out) == (16, 6)
    assert rows[-1]["explained_variance"] > 0.9


@pytest.mark.parametrize("config", [TOPK, NORMALISED])
def test_the_saved_weights_take_raw_activations(config):
    """The last row of the metrics is about the last batch before its update; the learning rate has decayed to 0."""
    x, _ = sparse_truth()
    dictionary, rows = trained(config, 7.0 * x)
    (last,) = InMemory(7.0 * x).iterate(299, 1)
    f = dictionary.encode(last[0])
    unexplained = (dictionary.decode(f) - last[0]).square().sum() / (last[0] - last[0].mean(dim=0)).square().sum()
    assert unexplained.item() == pytest.approx(rows[-1]["fvu"], rel=0.02)
    assert (f > 0).sum(dim=1).double().mean().item() == pytest.approx(rows[-1]["l0"], rel=0.02)


def test_normalisation_makes_training_free_of_the_activations_scale():
    x, atoms = sparse_truth()
    y = torch.relu(x @ atoms[:6].T)
    config = TranscoderConfig(
        "transcoder", "relu", l1_coefficient=0.5, expansion=2, normalize_activations="expected_average_only_in"
    )
    _, rows = trained(config, x, y, steps=30)
    _, scaled = trained(config, 8 * x, y / 16, steps=30)  # powers of two: not even the rounding changes
    assert scaled == rows


@pytest.mark.parametrize("config", [UNIT_NORM, UNIT_TOPK, TOPK])
def test_decoder_rows_have_norm_one(config):
    dictionary, _ = trained(config, sparse_truth()[0], steps=20)
    torch.testing.assert_close(dictionary.W_dec.norm(dim=1), torch.ones(32))


def test_two_runs_write_the_same_bytes_and_another_seed_does_not(tmp_path):
    x, _ = sparse_truth()
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        folder = tmp_path / name
        folder.mkdir()
        dictionary, rows = trained(RELU, x, steps=50, seed=seed)
        save_dictionary(dictionary, folder)
        write_metrics(rows, folder / "metrics.parquet")
    for file in ("cfg.json", "sae_weights.safetensors", "metrics.parquet"):
        a, b, c = ((tmp_path / name / file).read_bytes() for name in "abc")
        assert a == b != c
    assert load_dictionary(tmp_path / "c").spec.seed == 1


def test_metrics_have_a_row_for_the_first_step_every_tenth_and_the_last(tmp_path):
    import pandas as pd

    _, rows = trained(RELU, sparse_truth()[0], steps=34)
    write_metrics(rows, tmp_path / "metrics.parquet")
    table = pd.read_parquet(tmp_path / "metrics.parquet")
    assert table["step"].tolist() == [1, 10, 20, 30, 34]
    assert (table["tokens"] == 256 * table["step"]).all()
    torch.testing.assert_close(
        torch.tensor(table["loss"]), torch.tensor(table["squared_error"] + table["l1_scheduled"] * table["sparsity"])
    )


def test_latents_that_never_fire_are_counted_as_dead_after_the_window(monkeypatch):
    drawn = trainer.initial_weights

    def with_seven_dead(*arguments):
        weights = drawn(*arguments)
        weights.b_enc[:7] = -100.0
        return weights

    monkeypatch.setattr(trainer, "initial_weights", with_seven_dead)
    _, rows = trained(RELU, sparse_truth()[0], steps=8, log_every=1, dead_after_tokens=5 * 256)
    assert [row["dead"] for row in rows] == [0, 0, 0, 0, 7, 7, 7, 7]


def test_learning_rate_rises_and_falls_linearly():
    options = TrainingConfig(n_tokens=100, batch_size=10, lr=1.0, lr_warm_up_steps=4, lr_decay_steps=2)
    rates = [learning_rate(options, step, 10) for step in range(10)]
    assert rates == [0.25, 0.5, 0.75, 1, 1, 1, 1, 1, 1, 0.5]


def test_l1_rises_from_zero():
    options = TrainingConfig(n_tokens=100, batch_size=10, l1_warm_up_steps=4)
    spec = RELU.spec(16, 16, HOOK, HOOK, 0, Origin())
    assert [l1_coefficient(spec, options, s) for s in range(6)] == pytest.approx([0, 0.025, 0.05, 0.075, 0.1, 0.1])


# ------------------------------------------------------------ what one step does
@pytest.mark.parametrize("squared_error", ["sum", "mean", "target_norm"])
@pytest.mark.parametrize("sparsity", ["decoder_norm", "unit_norm"])
@pytest.mark.parametrize("normalize", ["none", "expected_average_only_in"])
def test_the_first_loss_is_the_loss_as_written_at_the_initial_weights(squared_error, sparsity, normalize):
    x, atoms = sparse_truth()
    y = torch.relu(x @ atoms[:6].T)
    fields = {"squared_error": squared_error, "sparsity": sparsity, "normalize_activations": normalize}
    config = TranscoderConfig("transcoder", "relu", l1_coefficient=0.3, expansion=2, **fields)
    _, rows = trained(config, x, y, steps=3, l1_warm_up_steps=0)
    scale_x, scale_y = 1.0, 1.0
    if normalize != "none":
        scale_x, scale_y = 4 / x.norm(dim=1).mean(), math.sqrt(6) / y.norm(dim=1).mean()
    (first,) = InMemory(x * scale_x, y * scale_y).iterate(0, 1)
    spec = config.spec(16, 6, HOOK, HOOK_OUT, 0, Origin())
    weights = initial_weights(spec, y.mean(dim=0) * scale_y, 0)
    objective = Objective("relu", by_norm=sparsity == "decoder_norm", squared_error=squared_error)
    wanted = loss_slow(objective, weights, *first, 0.3)
    assert rows[0]["loss"] == pytest.approx(wanted.item(), rel=1e-5)


@pytest.mark.parametrize("normalize", ["none", "expected_average_only_in"])
def test_kaiming_starts_at_the_geometric_median_of_what_it_will_see(normalize):
    x, _ = sparse_truth()
    x[:4000] += 5  # where the mean is another point
    config = SAEConfig("sae", "relu", l1_coefficient=0.3, expansion=2, normalize_activations=normalize)
    _, rows = trained(config, x, steps=3, initial="kaiming", l1_warm_up_steps=0)
    scale = 1.0 if normalize == "none" else float(4 / x.norm(dim=1).mean())
    seen = [batch for (batch,) in InMemory(x * scale).iterate(0, 3)]
    weights = initial_weights(config.spec(16, 16, HOOK, HOOK, 0, Origin()), torch.zeros(16), 0, "kaiming")
    losses = {}
    for name, b_dec in (("median", geometric_median(torch.cat(seen))), ("mean", x.mean(dim=0) * scale)):
        weights.b_dec.copy_(b_dec)
        losses[name] = loss_slow(Objective("relu", by_norm=True, centred=True), weights, seen[0], seen[0], 0.3).item()
    assert rows[0]["loss"] == pytest.approx(losses["median"], rel=1e-5)
    assert rows[0]["loss"] != pytest.approx(losses["mean"], rel=1e-2)


@pytest.mark.parametrize("config", [UNIT_NORM, UNIT_TOPK])
def test_adam_sees_no_gradient_along_rows_of_norm_one(config, monkeypatch):
    seen = []

    class Spy(trainer.Adam):
        def step(self, gradients, lr):
            rows, gradient = self.parameters[2], gradients[2]
            seen.append(((rows * gradient).sum(dim=1).abs().max() / gradient.norm(dim=1).max()).item())
            super().step(gradients, lr)

    monkeypatch.setattr(trainer, "Adam", Spy)
    trained(config, sparse_truth()[0], steps=5)
    assert len(seen) == 5 and max(seen) < 1e-6


@pytest.mark.parametrize("config", [RELU, TOPK, UNIT_TOPK])
def test_initial_weights_depend_on_the_seed_alone(config):
    spec = config.spec(16, 16, HOOK, HOOK, 0, Origin())
    mean = torch.arange(16.0)
    weights, again, other = (initial_weights(spec, mean, seed) for seed in (4, 4, 5))
    assert all(torch.equal(a, b) for a, b in zip(weights.parameters(), again.parameters(), strict=True))
    assert not torch.equal(weights.W_dec, other.W_dec)
    cosines = torch.nn.functional.cosine_similarity(weights.encoder, weights.W_dec)
    torch.testing.assert_close(cosines, torch.ones(32))
    assert torch.equal(weights.b_dec, mean)


# ------------------------------------------------------------------- failures
@pytest.mark.parametrize("bad", [0, 3, 12])
def test_a_loss_that_is_not_finite_names_its_step(bad):
    x, _ = sparse_truth()

    class Broken(InMemory):
        def iterate(self, start, n_steps):
            for step, (batch,) in enumerate(super().iterate(start, n_steps)):
                yield (batch * (math.inf if step == bad else 1.0),)

    spec = TOPK.spec(16, 16, HOOK, HOOK, 0, Origin())
    options = TrainingConfig(n_tokens=256 * 30, batch_size=256)
    with pytest.raises(TrainingError, match=rf"became (nan|inf) at step {bad + 1} .*lower training\.lr"):
        fit(spec, options, Broken(x), side(x), side(x))


def test_statistics_that_are_not_finite_are_refused():
    x, _ = sparse_truth()
    spec = TOPK.spec(16, 16, HOOK, HOOK, 0, Origin())
    with pytest.raises(TrainingError, match=f"activations of {HOOK} have mean norm nan"):
        fit(spec, TrainingConfig(n_tokens=512, batch_size=256), InMemory(x), side(x * math.nan), side(x))


def test_activations_of_zeros_are_refused_by_name():
    x, _ = sparse_truth()
    training, zeros = TrainingConfig(n_tokens=512, batch_size=256), torch.zeros(2000, 16)
    for head, message in (
        (None, f"^{HOOK} is 0 on every token: .* another site$"),
        (2, f"head 2 of {HOOK} .*site.head"),
    ):
        spec = dataclasses.replace(TOPK.spec(16, 16, HOOK, HOOK, 0, Origin()), hook_head_index=head)
        with pytest.raises(TrainingError, match=message):
            fit(spec, training, InMemory(zeros), side(zeros), side(zeros))
    spec = TranscoderConfig("transcoder", "topk", k=3, expansion=2).spec(16, 16, HOOK, HOOK_OUT, 0, Origin())
    with pytest.raises(TrainingError, match=f"{HOOK_OUT} is 0 on every token"):
        fit(spec, training, InMemory(x, zeros), side(x), side(zeros))


def test_the_docs_state_the_densities_of_the_code():
    text = " ".join((Path(__file__).parents[2] / "docs/training.md").read_text().split())
    wide, small = ([100 * SPARSE_BELOW[cached], 100 * SPARSE_BELOW[cached] * DENSE_ABOVE] for cached in (False, True))
    assert f"fewer than {wide[0]:.4g} % of its activations are above 0" in text
    assert f"above {wide[1]:.4g} % ({small[0]:.4g} % and {small[1]:.4g} % where" in text
    assert f"at most {CACHED:,} numbers" in text


def test_k_above_d_sae_is_refused():
    with pytest.raises(DictionaryError, match="k=64 is out of range: it must be 1 to d_sae=32"):
        SAEConfig("sae", "topk", k=64, expansion=2).spec(16, 16, HOOK, HOOK, 0, Origin())


# ------------------------------------------------------------------ importing
def test_a_training_job_imports_nothing_slow():
    code = (
        "import sys, json, saeflow.training.loop; "
        "print(json.dumps([m for m in sys.modules if m.split('.')[0] in "
        "('sae_lens', 'transformer_lens', 'transformers', 'pandas', 'wandb', 'hydra')] + "
        "[m for m in ('torch._dynamo', 'torch.utils.tensorboard') if m in sys.modules]))"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert json.loads(found.stdout) == []


def test_the_dictionaries_package_is_cheap_to_import():
    assert importlib.import_module("saeflow.dictionaries").__all__
    code = "import sys, saeflow.dictionaries; print('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip() == "False"
