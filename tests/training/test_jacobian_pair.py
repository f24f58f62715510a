"""Training Jacobian pairs: its gradients against autograd of the loss as written, resume, and what lambda = 0 is."""

import json
import os
import signal
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from jacobian_formulas import AS_WRITTEN
from stores import contents, tokens_instance, weights_of, write_store
from torch import Tensor

from saeflow.config import ConfigError, DictionaryConfig, ModelConfig, TrainingConfig, build
from saeflow.config.dictionary import Columns
from saeflow.dictionaries import Origin, load_dictionary
from saeflow.dictionaries.kinds.jacobian import JacobianPairConfig
from saeflow.dictionaries.kinds.sae import alone
from saeflow.jobs.job import Job
from saeflow.jobs.signals import Preempted
from saeflow.models.blocks import MLP, Block, read_block
from saeflow.models.loading import load_model
from saeflow.planning.graph import Instance, Plan
from saeflow.training import loop as jobs
from saeflow.training.jacobian_histogram import BINS, EDGES, KEPT, MOST, JacobianHistograms, count_entries
from saeflow.training.jacobian_pair import JacobianTrainer
from saeflow.training.metrics import TrainingError
from saeflow.training.protocol import HookStatistics, Inputs
from saeflow.training.trainer import Trainer

D, N_LATENTS, K, N = 6, 24, 3, 64
TRAINING = TrainingConfig(64 * 40, batch_size=N, lr=3e-3, log_every=10)
PAIR = JacobianPairConfig("jacobian", "topk", k=K, expansion=4, squared_error="mean", sparsity="unit_norm",
                        jacobian_coefficient=0.5)  # fmt: skip


def block_of(dtype: torch.dtype = torch.float32) -> Block:
    g = torch.Generator().manual_seed(0)
    d, m = D, 10
    shapes = ((d, m), (m,), (m, d), (d,))
    return Block(MLP("gelu", *(torch.randn(s, generator=g, dtype=torch.float64).to(dtype) for s in shapes)))


def batch_of(step: int, block: Block) -> tuple[Tensor, Tensor]:
    x = torch.randn(N, D, generator=torch.Generator().manual_seed(step))
    return x, block(x)


def trainer_of(
    config: JacobianPairConfig = PAIR, training: TrainingConfig = TRAINING, seed: int = 0
) -> JacobianTrainer:
    specs = [alone(config).spec(D, D, hook, hook, seed, Origin()) for hook in ("in", "out")]
    sides = [HookStatistics(torch.zeros(D), 2.0), HookStatistics(torch.ones(D), 5.0)]
    return JacobianTrainer(specs, config, training, sides, block_of())


def tensors_of(trainer: JacobianTrainer) -> list[Tensor]:
    return [t for part in trainer.parts.values() for t in part.weights.parameters()]


# -------------------------------------------------------------------- lambda = 0
@pytest.mark.parametrize("revive", ["none", "auxk"])
def test_without_penalty_the_pair_is_two_saes_trained_alone(revive: str) -> None:
    config = replace(PAIR, jacobian_coefficient=0.0)
    training = replace(TRAINING, revive=revive, dead_after_tokens=200, clip_grad_norm=1.0)
    pair, other = trainer_of(config, training), trainer_of(config, training)
    for step in range(40):
        x, y = batch_of(step, pair.block)
        pair.train_step((x, y))
        other.input.train_step((x,))
        other.output.train_step((y,))
    assert all(torch.equal(a, b) for a, b in zip(tensors_of(pair), tensors_of(other), strict=True))
    assert pair.input.metrics.rows == other.input.metrics.rows
    assert type(other.input) is Trainer


def test_the_penalty_makes_the_jacobian_smaller() -> None:
    found = {}
    for coefficient in (0.0, 0.5):
        trainer = trainer_of(replace(PAIR, jacobian_coefficient=coefficient))
        for step in range(40):
            trainer.train_step(batch_of(step, trainer.block))
        found[coefficient] = trainer.rows[-1]
    assert found[0.5]["jacobian_l1"] < 0.8 * found[0.0]["jacobian_l1"]
    assert found[0.5]["jacobian_loss"] > 0 == found[0.0]["jacobian_loss"]


# -------------------------------------------------------------------- one step
@pytest.mark.parametrize("at", ["input", "reconstruction"])
@pytest.mark.parametrize("normalize", ["none", "expected_average_only_in"])
@pytest.mark.parametrize("penalty", ["l1", "scad", "l1_over_l2"])
@pytest.mark.parametrize("fraction", [1.0, 0.25])
@pytest.mark.parametrize("subtracts", [True, False])
def test_gradients_are_those_of_the_loss_as_written(
    at: str, normalize: str, penalty: str, fraction: float, subtracts: bool
) -> None:
    """The loss of the paper (reference 1.2), from raw activations by plain operations, differentiated by autograd;
    with its encoder, and with one that subtracts b_dec from its input."""
    config = replace(PAIR, jacobian_at=at, normalize_activations=normalize, jacobian_penalty=penalty)
    config = replace(config, apply_b_dec_to_input=subtracts)
    trainer = trainer_of(config, replace(TRAINING, jacobian_fraction=fraction))
    for part in trainer.parts.values():  # so that pre-activations are well apart, and float64 picks the same latents
        part.weights = type(part.weights)(*(None if t is None else t.double() for t in part.weights))
        part.weights.b_dec.add_(0.1)
    trainer.block = block_of(torch.float64)
    x, y = (t.double() for t in batch_of(0, block_of()))
    y = trainer.block(x)
    seen: dict[str, Any] = {}
    for name, part in trainer.parts.items():
        part.apply_gradients = lambda found, y, name=name: seen.update({name: found})  # type: ignore[method-assign]
        part.metrics.row = lambda *_: {}  # type: ignore[method-assign]
    leaves = {
        name: [t.detach().clone().requires_grad_() for t in part.weights.parameters()]
        for name, part in trainer.parts.items()
    }
    some = trainer._some_tokens(N)
    trainer.training = replace(trainer.training, log_every=10**9)
    for part in trainer.parts.values():
        part._logged = lambda: False  # type: ignore[method-assign]
    trainer.train_step((x, y))

    scales = [part.scale_in for part in trainer.parts.values()]
    loss = torch.zeros((), dtype=torch.float64)
    latents, decoded = [], []
    for value, scale, (encoder, b_enc, W_dec, b_dec) in zip((x, y), scales, leaves.values(), strict=True):
        pre = (value * scale - subtracts * b_dec) @ encoder.T + b_enc
        f = torch.relu(torch.where(pre >= pre.topk(K, dim=1).values[:, -1:], pre, 0.0))
        error = f @ W_dec + b_dec - value * scale
        loss = loss + error.square().mean()
        latents.append(f)
        decoded.append((f @ W_dec + b_dec) / scale)
    place = decoded[0] if at == "reconstruction" else x
    (_, _, W_dec_in, _), (encoder_out, b_enc_out, _, b_dec_out) = leaves.values()
    pre_out = (trainer.block(place) * scales[1] - subtracts * b_dec_out) @ encoder_out.T + b_enc_out
    on_out = (pre_out > 0) & (pre_out >= pre_out.topk(K, dim=1).values[:, -1:])
    whole = torch.func.vmap(torch.func.jacrev(lambda v: trainer.block(v[None])[0]))(place)
    J = torch.einsum("nd,tde,me->tnm", encoder_out * scales[1], whole, W_dec_in / scales[0])
    J = J * on_out.detach()[:, :, None] * (latents[0] > 0).detach()[:, None]
    if some is not None:
        J = J[some]
    assert len(J) == round(fraction * N)
    loss = loss + 0.5 / K**2 / len(J) * AS_WRITTEN[penalty](J)
    loss.backward()
    for name, tensors in leaves.items():
        for found, wanted in zip(seen[name].gradients.parameters(), tensors, strict=True):
            torch.testing.assert_close(found, wanted.grad, rtol=1e-8, atol=1e-10)


def test_the_subset_is_unbiased_and_another_one_at_each_step() -> None:
    trainer = trainer_of(training=replace(TRAINING, jacobian_fraction=0.25))
    drawn = []
    for step in range(400):
        trainer.input.step = step
        some = trainer._some_tokens(N)
        assert some is not None and len(some.unique()) == N // 4
        drawn.append(some)
    counts = torch.bincount(torch.cat(drawn), minlength=N)
    assert not torch.equal(drawn[0], drawn[1])
    assert (counts - 100).abs().max() < 5 * (400 * 0.25 * 0.75) ** 0.5  # five standard deviations


def test_the_coefficient_rises() -> None:
    trainer = trainer_of(training=replace(TRAINING, jacobian_warm_up_steps=4))
    seen = []
    for step in range(6):
        seen.append(trainer._coefficient())
        trainer.train_step(batch_of(step, trainer.block))
    assert seen == [0.0, 0.125, 0.25, 0.375, 0.5, 0.5]


def test_a_loss_that_is_not_finite_is_an_error() -> None:
    trainer = trainer_of(replace(PAIR, jacobian_coefficient=1e39))
    with pytest.raises(TrainingError, match=r"Jacobian's penalty became (nan|inf) at step 1: lower training\.lr"):
        for step in range(40):
            trainer.train_step(batch_of(step, trainer.block))


# -------------------------------------------------------------------- the histogram
def test_entries_are_counted_with_their_sign_in_bins_without_their_right_ends() -> None:
    values = torch.tensor([-0.6, -0.5, -0.0001, 0.0, 0.001, 0.25, 0.4999, 0.5, 9.0, 7.0])
    on = torch.ones(10, dtype=torch.bool)
    on[-1] = False
    counts = count_entries(values[:, None, None], on[:, None, None])
    found = {(EDGES[b].round(6), EDGES[b + 1].round(6)): n for b, n in enumerate(counts.tolist()) if n}
    assert found == {
        (-np.inf, -0.5): 1, (-0.5, -0.4975): 1, (-0.0025, 0.0): 1, (0.0, 0.0025): 2, (0.25, 0.2525): 1,
        (0.4975, 0.5): 1, (0.5, np.inf): 2,
    }  # fmt: skip
    endless = torch.tensor([torch.inf, -torch.inf, torch.nan])[:, None, None]
    assert count_entries(endless, endless != 0)[[0, BINS + 1, -1]].tolist() == [1, 1, 1]


@pytest.mark.parametrize("normalize", ["none", "expected_average_only_in"])
def test_the_histogram_is_of_the_jacobian_by_autograd(normalize: str) -> None:
    """At the input and at its reconstruction, of latents above 0, for raw activations."""
    trainer = trainer_of(replace(PAIR, normalize_activations=normalize), replace(TRAINING, log_every=1))
    x, y = batch_of(0, trainer.block)
    w_in, w_out = (part.weights._replace() for part in trainer.parts.values())
    scale_in, scale_out = (part.scale_in for part in trainer.parts.values())
    trainer.input.apply_gradients = trainer.output.apply_gradients = lambda *_: None  # type: ignore[method-assign]
    trainer.input.metrics.rows.append({})  # that step's, which the SAE would write
    trainer.train_step((x, y))

    def kept(value: Tensor, weights: Any, scale: float) -> tuple[Tensor, Tensor]:
        pre = (value * scale - weights.b_dec) @ weights.encoder.T + weights.b_enc
        return pre.topk(K, dim=1).values.clamp(min=0), pre.topk(K, dim=1).indices

    f, A = kept(x, w_in, scale_in)
    at = ((f[:, :, None] * w_in.W_dec[A]).sum(1) + w_in.b_dec) / scale_in
    for place, (point, written) in enumerate(((x, y), (at, trainer.block(at)))):
        g, B = kept(written, w_out, scale_out)
        J = torch.func.vmap(torch.func.jacrev(lambda v: trainer.block(v[None])[0]))(point)
        J = torch.einsum("tbe,ted,tad->tba", w_out.encoder[B] * scale_out, J, w_in.W_dec[A] / scale_in)
        entries = J[(g[:, :, None] > 0) & (f[:, None] > 0)].numpy()
        counts = trainer.histograms.counts[0][place].numpy()
        assert counts.sum() == len(entries) > 0
        for edge, below in zip(EDGES[1:-1], counts.cumsum(), strict=False):
            near = (np.abs(entries - edge) < 1e-5).sum()
            assert abs(below - (entries < edge).sum()) <= near


def test_a_long_training_keeps_few_histograms_the_last_among_them() -> None:
    some = JacobianHistograms(n_steps=10_000, log_every=10, of_tokens=4)
    kept = [row for row in range(1001) if some.wants(row, last=row == 1000)]
    assert kept[:3] == [0, 10, 20] and kept[-1] == 1000 and len(kept) == KEPT + 1
    trainer = trainer_of()
    for step in range(40):
        trainer.train_step(batch_of(step, trainer.block))
    assert trainer.histograms.steps == [row["step"] for row in trainer.rows] == [1, 10, 20, 30, 40]
    (table,) = {name: pd.DataFrame(rows) for name, rows in trainer.tables().items() if "histogram" in name}.values()
    assert set(table["tokens"] / table["step"]) == {N} and set(table["at"]) == {"input", "reconstruction"}
    last = table[(table["step"] == 40) & (table["at"] == "input")]
    size = last[["bin_left", "bin_right"]].abs().max(axis=1)
    above = last.loc[size > 0.01 + 1e-9, "count"].sum()
    assert f"There are {above / N:.1f} values and above 0.010." in trainer.text().split("\n", 20)
    whole = last["count"].sum() / N
    assert above / N / K**2 == pytest.approx(trainer.rows[-1]["jacobian_above_0.01"], abs=0.01)
    assert last["of_tokens"].unique().tolist() == [N] and whole <= K**2
    beyond = last.loc[size > MOST + 1e-9, "count"].sum() / N
    assert f"of step 40, with |J| at the input; {beyond:.1f} values above 0.5 are counted" in trainer.text()


# -------------------------------------------------------------------- the norm
def test_the_norm_is_left_out_of_f_where_that_is_asked(neox_folder: Path) -> None:
    """f is then the model's own MLP of the residual stream, times the gain and plus the bias: notebook 000's
    `ignore_ln`, whose model has them folded into the MLP. What is logged is its Jacobian, by autograd."""
    model = load_model(neox_folder, ModelConfig("tiny", path=str(neox_folder)), "cpu")
    hooks = "blocks.1.hook_resid_pre", HOOKS[1]
    config = build(DictionaryConfig, CONFIG | {"jacobian_norm": "ignored"})
    assert isinstance(config, JacobianPairConfig) and config.options["jacobian_norm"] == "ignored"
    assert "jacobian_norm" not in replace(config, jacobian_norm="inside").options  # as it was always written
    specs = config.specs(Columns(list(hooks), [(32,), (32,)], None), 0, Origin())
    statistics = [HookStatistics(torch.zeros(32), 2.0)] * 2
    inputs = Inputs(config, specs, replace(TRAINING, log_every=1), statistics, "cpu", lambda row: None,
                    lambda: read_block(model, *hooks))  # fmt: skip
    trainer = JacobianTrainer.of_job(inputs)
    x = torch.randn(8, 32, generator=torch.Generator().manual_seed(1))
    norm, mlp = model.blocks[1].ln2, model.blocks[1].mlp

    def f(value: Tensor) -> Tensor:
        return mlp((value * norm.w + norm.b)[None, None])[0, 0]

    torch.testing.assert_close(trainer.block(x), torch.stack(list(map(f, x))), rtol=1e-5, atol=1e-5)
    E, D = trainer.output.weights.encoder.clone(), trainer.input.weights.W_dec.clone()
    kept = [part.weights for part in trainer.parts.values()]
    y = torch.randn(8, 32, generator=torch.Generator().manual_seed(2))
    sizes = []
    for x_t, y_t in zip(x, y, strict=True):
        pre = [(v - w.b_dec) @ w.encoder.T + w.b_enc for v, w in zip((x_t, y_t), kept, strict=True)]
        (A, in_), (B, out) = ((p.topk(4).indices, p.topk(4).values > 0) for p in pre)
        J = E[B] @ torch.autograd.functional.jacobian(f, x_t) @ D[A].T
        sizes.append((J.abs() * out[:, None] * in_).mean())
    trainer.train_step((x, y))
    assert trainer.rows[-1]["jacobian_l1"] == pytest.approx(torch.stack(sizes).mean().item(), rel=1e-4)
    model.cfg.act_fn = "xielu"
    with pytest.raises(ConfigError, match=r"dictionary.jacobian_norm=ignored needs an MLP with a closed form"):
        JacobianTrainer.of_job(inputs)


# -------------------------------------------------------------------- state
@pytest.mark.parametrize("training", [{}, {"revive": "auxk", "dead_after_tokens": 200}, {"jacobian_fraction": 0.1}])
def test_training_goes_on_from_a_state_as_if_it_had_not_stopped(training: dict[str, Any]) -> None:
    options = replace(TRAINING, **training)
    straight = trainer_of(training=options)
    for step in range(30):
        straight.train_step(batch_of(step, straight.block))
        if step == 14:
            state = {name: t.clone() for name, t in straight.state().items()}
    resumed = trainer_of(training=options, seed=0)
    resumed.restore(state)
    for step in range(15, 30):
        resumed.train_step(batch_of(step, resumed.block))
    assert all(torch.equal(a, b) for a, b in zip(tensors_of(straight), tensors_of(resumed), strict=True))
    assert straight.rows == resumed.rows and straight.tables() == resumed.tables()
    older = trainer_of(training=options)  # of a release that kept no histograms
    older.restore({name: t for name, t in state.items() if "histogram" not in name})
    assert older.text() == "" and "jacobian_histogram" not in older.tables() | older.state()
    older.train_step(batch_of(15, older.block))
    assert older.rows == straight.rows[: len(older.rows)]
    with pytest.raises(TrainingError, match="another dictionary"):
        resumed.restore(straight.input.state())


# -------------------------------------------------------------------- the job
HOOKS = ["blocks.1.ln2.hook_normalized", "blocks.1.hook_mlp_out"]
CONFIG = {"kind": "jacobian", "activation": "topk", "k": 4, "expansion": 2, "squared_error": "mean",
          "sparsity": "unit_norm", "jacobian_coefficient": 0.3}  # fmt: skip


def job_of(
    results: Path, model: Path, coefficient: float = 0.3, key: str = "pair", options: dict[str, Any] | None = None
) -> Job:
    store = "tiny-neox-float32-01234567"
    if not (results / "activations").exists():
        x = torch.randn(1000, 32, generator=torch.Generator().manual_seed(0))
        write_store(results / "activations" / store, dict(zip(HOOKS, (x, x.relu()), strict=True)), chunk_tokens=64,
                    shard_tokens=256)  # fmt: skip
    columns = [f"{store}/{hook}-1000" for hook in HOOKS]
    tokens = tokens_instance("text-train", model)
    tokens.config["tokens"] = {"prepend_bos": False}
    processing = {"fold_ln": False, "center_writing_weights": False, "center_unembed": False}
    processing["weights"] = weights_of(model)
    activations = {
        c: Instance(
            "activations", c, {"model": processing, "tokens": {"context_size": 64}}, {"tokens": [tokens.key]}, {}
        )
        for c in columns
    }
    config = {
        "dictionary": CONFIG | {"jacobian_coefficient": coefficient},
        "training": {"n_tokens": 4096, "batch_size": 128, "lr": 1e-2} | (options or {}),
        "seed": 5, "hook_name": HOOKS[0], "hook_name_out": HOOKS[1],
    }  # fmt: skip
    instance = Instance("train", key, config, {"activations": columns}, {"training": "{}", "model": str(model)})
    stages = {"tokens": {tokens.key: tokens}, "activations": activations, "train": {key: instance}}
    return Job(instance, Plan("tiny", stages, {}, results=str(results)), "cpu")


def test_a_job_writes_both_saes_and_again_the_same_bytes(
    tmp_path: Path, neox_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = job_of(tmp_path, neox_folder)
    said = jobs.train([job])
    first = contents(job.path)
    parts = ("cfg.json", "sae_weights.safetensors", "metrics.parquet")
    wanted = {
        "config.yaml",
        "provenance.json",
        "jacobian.parquet",
        "jacobian_histogram.parquet",
        "table.txt",
        *(f"{s}/{p}" for s in ("input", "output") for p in parts),
    }
    assert set(first) == wanted
    assert "input: L0 4.0" in said and "output: L0 4.0" in said and "mean |J|" in said
    specs = [load_dictionary(job.path / part).spec for part in ("input", "output")]
    assert [s.hook_name for s in specs] == HOOKS
    assert all(s.options == build(JacobianPairConfig, CONFIG).options and s.kind == "sae" for s in specs)
    table = pd.read_parquet(job.path / "jacobian.parquet")
    assert list(table["jacobian_scheduled"].unique()) == [0.3]
    assert table["jacobian_l1"].iloc[-1] < table["jacobian_l1"].iloc[0]

    take = JacobianTrainer.train_step

    def asked(trainer: JacobianTrainer, batch: tuple[Tensor, ...]) -> None:
        if trainer.step == 11:
            os.kill(os.getpid(), signal.SIGTERM)
        take(trainer, batch)

    monkeypatch.setattr(JacobianTrainer, "train_step", asked)
    with pytest.raises(Preempted):
        jobs.train([job_of(tmp_path, neox_folder)])
    monkeypatch.setattr(JacobianTrainer, "train_step", take)
    jobs.train([job_of(tmp_path, neox_folder)])
    again = contents(job.path)
    assert {name for name in first if first[name] != again[name]} <= {"provenance.json"}
    assert json.loads(again["input/cfg.json"])["architecture"] == "topk"


def test_a_pair_leaves_out_what_is_massive_at_either_of_its_sites(tmp_path: Path, neox_folder: Path) -> None:
    x = torch.randn(1000, 32, generator=torch.Generator().manual_seed(0))
    y = x.relu()
    x[::64] *= 300
    y[5::64] *= 300
    store = tmp_path / "activations" / "tiny-neox-float32-01234567"
    write_store(store, dict(zip(HOOKS, (x, y), strict=True)), chunk_tokens=64, shard_tokens=256)
    seen = []
    take = JacobianTrainer.train_step
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(JacobianTrainer, "train_step", lambda t, batch: (seen.append(batch), take(t, batch)))
        job = job_of(tmp_path, neox_folder, options={"exclude": {"norm_above": 10.0}})
        jobs.train([job])
    assert json.loads((job.path / "left_out.json").read_text())["left_out"] == {"norm_above": 32}
    assert len(seen) == 32 and all(len(batch[0]) == len(batch[1]) == 128 for batch in seen)
    for side, values in enumerate((x, y)):
        norms = torch.cat([batch[side] for batch in seen]).norm(dim=1)
        assert norms.max() < 10 * values.norm(dim=1).median()
    table = pd.read_parquet(job.path / "output" / "metrics.parquet")
    assert 0.05 < table["fvu_without_first"].iloc[-1] < 1


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"activation": "relu", "k": None, "l1_coefficient": 1.0}, "topk with kind=jacobian"),
        ({"sparsity": "decoder_norm"}, "unit_norm with kind=jacobian"),
        ({"jacobian_coefficient": None}, "0 or more with kind=jacobian"),
        ({"jacobian_coefficient": -1.0}, "0 or more with kind=jacobian"),
        ({"kind": "sae"}, "null with kind=sae"),
    ],
)
def test_what_is_no_jacobian_pair_is_refused(wrong: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        build(DictionaryConfig, CONFIG | wrong)
