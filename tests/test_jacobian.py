"""Jacobians of TopK pairs: the closed form against autograd in float64, and the tables against counting by hand."""

import json
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from saeflow.config import ConfigError, JacobianConfig, ModelConfig
from saeflow.dictionaries import Dictionary, Origin, Spec, save_dictionary
from saeflow.dictionaries.sae import build
from saeflow.fitting import FitError
from saeflow.jacobian import (
    Tally,
    histogram_table,
    jacobian_job,
    make_pair,
    pair_jacobians,
    study,
    summarise,
    survival_table,
)
from saeflow.job import Job
from saeflow.loading import load_model
from saeflow.mlp import ACTIVATIONS, MLP, Block, ModuleBlock, read_block, read_mlp
from saeflow.plan import Instance, Plan
from saeflow.splicing import read_hooks

LAYER = 1
IN, OUT = f"blocks.{LAYER}.ln2.hook_normalized", f"blocks.{LAYER}.hook_mlp_out"
PROCESSING = {"fold_ln": False, "center_writing_weights": False, "center_unembed": False}


def topk_sae(hook: str, k: int = 6, seed: int = 0, dtype: torch.dtype = torch.float32) -> Dictionary:
    d, n = 32, 80
    g = torch.Generator().manual_seed(seed)
    W = torch.randn(n, d, generator=g, dtype=torch.float64).to(dtype) / d**0.5
    bias = 0.1 * torch.randn(n, generator=g, dtype=torch.float64).to(dtype)
    spec = Spec("sae", "topk", d, d, n, hook, hook, k=k, origin=Origin(model_weights="w", **PROCESSING))
    return build(spec, W.T.contiguous(), bias, W.flip(0).contiguous(), torch.zeros(d, dtype=dtype))


def rows_of_tokens(n: int = 8) -> np.ndarray:
    rows = np.random.default_rng(0).integers(1, 300, (n, 32)).astype(np.int32)
    rows[:, 0] = 0
    return rows


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_slope_is_the_derivative_of_the_models_activation(name: str) -> None:
    from transformer_lens.utilities.activation_functions import SUPPORTED_ACTIVATIONS

    z = torch.linspace(-6, 6, 1001, dtype=torch.float64, requires_grad=True)
    value = SUPPORTED_ACTIVATIONS[name](z)
    (wanted,) = torch.autograd.grad(value.sum(), z)
    phi, slope = ACTIVATIONS[name]
    tolerance = 1e-9 if name == "gelu_fast" else 1e-12  # it rounds sqrt(2 / pi) to ten digits
    torch.testing.assert_close(phi(z), value, rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(slope(z.detach()), wanted, rtol=tolerance, atol=tolerance)


def test_unknown_activation_is_refused_by_name() -> None:
    with pytest.raises(ConfigError, match="activation 'xielu' has no closed-form Jacobian here; these have: gelu"):
        MLP("xielu", *(torch.zeros(1, 1) for _ in range(4)))


# -------------------------------------------------------------------- against autograd through the model's own modules
@pytest.mark.parametrize("fold_ln", [False, True])
@pytest.mark.parametrize("site", ["after the norm", "before the norm", "with the residual stream"])
def test_closed_form_matches_autograd_float64(model_folder: Path, fold_ln: bool, site: str) -> None:
    model = load_model(model_folder, ModelConfig("tiny", path=str(model_folder), fold_ln=fold_ln), "cpu")
    model.to(torch.float64)
    block = model.blocks[LAYER]
    block.mlp.b_in.normal_(generator=torch.Generator().manual_seed(0))  # Llama itself has none
    before = f"blocks.{LAYER}.hook_resid_{'pre' if model.cfg.parallel_attn_mlp else 'mid'}"
    hook_in = IN if site == "after the norm" else before
    hook_out = f"blocks.{LAYER}.hook_resid_post" if site == "with the residual stream" else OUT
    if model.cfg.parallel_attn_mlp and hook_out != OUT:
        with pytest.raises(
            ConfigError, match=r"a Jacobian is that of one MLP: from .*hook_resid_pre to .*hook_mlp_out"
        ):
            read_block(model, hook_in, hook_out)
        return
    tokens = torch.from_numpy(rows_of_tokens(2)).long()
    x, y = (v[:, 1:4].flatten(0, 1) for v in read_hooks(model, tokens, [hook_in, hook_out]))
    assert x.dtype == torch.float64
    input, output = topk_sae(hook_in, seed=1, dtype=torch.float64), topk_sae(hook_out, seed=2, dtype=torch.float64)

    def f(value: Tensor) -> Tensor:
        """The model's own modules from hook to hook: their forward with `value` put in."""
        value = value[None, None]
        if site != "after the norm":
            out = block.apply_mlp(block.ln2(value))
            return (out + value if hook_out != OUT else out)[0, 0]
        with model.hooks(fwd_hooks=[(IN, lambda _, hook: value)]):
            return block.apply_mlp(block.ln2(torch.zeros_like(value)))[0, 0]

    closed = read_block(model, hook_in, hook_out)
    by_modules = ModuleBlock(model, LAYER, site != "after the norm", hook_out != OUT)
    torch.testing.assert_close(torch.stack([f(v) for v in x]), y, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(closed(x), y, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(by_modules(x), y, rtol=1e-12, atol=1e-12)

    J = torch.cat(list(pair_jacobians(make_pair(closed, input, output), x, y)))
    (other,) = pair_jacobians(make_pair(by_modules, input, output), x, y)
    torch.testing.assert_close(other, J, rtol=1e-9, atol=1e-9)
    for t in range(len(x)):
        values_in, A = input.top_latents(x[t : t + 1])
        values_out, B = output.top_latents(y[t : t + 1])
        s = torch.zeros(input.d_sae, dtype=torch.float64).index_put((A[0],), values_in[0])

        def latents(s_moved: Tensor, x_t: Tensor = x[t], s: Tensor = s) -> Tensor:
            return output.pre_activations(f(x_t + (s_moved - s) @ input.W_dec)[None])[0]

        whole = torch.autograd.functional.jacobian(latents, s)  # (n, n)
        wanted = whole[B[0]][:, A[0]]
        wanted = wanted * (values_out[0] > 0)[:, None] * (values_in[0] > 0)
        assert wanted.abs().max() > 1e-3
        torch.testing.assert_close(J[t], wanted, rtol=1e-10, atol=1e-10)


def test_a_block_without_closed_form_is_run_by_its_modules(llama_folder: Path) -> None:
    model = load_model(llama_folder, ModelConfig("tiny", path=str(llama_folder)), "cpu")
    assert isinstance(read_block(model, IN, OUT), Block)
    model.cfg.act_fn = "xielu"
    assert isinstance(read_block(model, IN, OUT), ModuleBlock)


def test_folding_the_norm_changes_no_jacobian_along_directions_of_mean_zero(model_folder: Path) -> None:
    tokens = torch.from_numpy(rows_of_tokens(2)).long()
    input, output = topk_sae(IN, seed=1), topk_sae(OUT, seed=2)
    input.W_dec = input.W_dec - input.W_dec.mean(1, keepdim=True)
    found = []
    for fold_ln in (False, True):
        model = load_model(model_folder, ModelConfig("tiny", path=str(model_folder), fold_ln=fold_ln), "cpu")
        x, y = (v.flatten(0, 1) for v in read_hooks(model, tokens, [IN, OUT]))
        pair = make_pair(read_block(model, IN, OUT), input, output)
        found.append(sum(J.abs().sum().item() for J in pair_jacobians(pair, x, y)))
    assert found[0] == pytest.approx(found[1], rel=1e-4)


# -------------------------------------------------------------------- tables
@given(seed=st.integers(0, 2**31), n=st.integers(1, 6), k=st.integers(1, 5), split=st.integers(0, 6))
@settings(deadline=None, max_examples=40)
def test_tables_equal_counting_by_hand(seed: int, n: int, k: int, split: int) -> None:
    g = torch.Generator().manual_seed(seed)
    J = torch.randn(n, k, k, generator=g) * 0.3
    J[J.abs() < 0.03] = 0
    config = JacobianConfig(n_tokens=n, bins=10, max_value=0.5, thresholds=(0.05, 0.13))
    tally = Tally(np.unique(np.array([*np.linspace(0, 0.5, 11), 0.05, 0.13], dtype=np.float32)))
    for part in (J[:split], J[split:]):
        if len(part):
            tally.add(part)

    size = J.abs().double().numpy()
    histogram = histogram_table(tally, config).to_pydict()
    edges = np.float32(np.linspace(0, 0.5, 11)).astype(float)
    wanted = [((size > a) & (size <= b)).sum() / n for a, b in pairwise(edges)]
    wanted[0] += (size == 0).sum() / n
    np.testing.assert_allclose(histogram["count_per_token"], wanted, atol=1e-12)
    np.testing.assert_allclose(histogram["above_per_token"], [(size > a).sum() / n for a in edges[:-1]], atol=1e-12)

    survival = survival_table(tally, config).to_pydict()
    assert survival["threshold"] == pytest.approx([0.05, 0.1, 0.13, *np.arange(0.15, 0.51, 0.05)])
    above = [(size > np.float32(t)).sum() / n for t in survival["threshold"]]
    np.testing.assert_allclose(survival["values_above_per_token"], above, atol=1e-12)
    np.testing.assert_allclose(survival["fraction"], np.array(above) / k**2, atol=1e-12)

    summary = summarise(tally, config)
    assert summary["rms"] == pytest.approx(np.sqrt((size**2).mean()))
    assert summary["fraction_above_0.13"] == pytest.approx((size > 0.13).mean())
    assert summary["overflow_per_token"] == pytest.approx((size > 0.5).sum() / n)
    assert sum(histogram["count_per_token"]) + summary["overflow_per_token"] == pytest.approx(k * k)
    tokens = [t for t in size if t.any()]
    if not tokens:
        assert summary["l1_over_l2"] is None
        return
    assert summary["l1_over_l2"] == pytest.approx(np.mean([t.sum() / np.sqrt((t**2).sum()) for t in tokens]))
    assert summary["kurtosis"] == pytest.approx(np.mean([(t**4).mean() / (t**2).mean() ** 2 for t in tokens]))
    outputs = [row for t in tokens for row in t if row.any()]
    assert summary["effective_inputs"] == pytest.approx(np.mean([r.sum() ** 2 / (r**2).sum() for r in outputs]))


def test_scaling_j_changes_no_scale_free_measure() -> None:
    J = torch.randn(4, 5, 5, generator=torch.Generator().manual_seed(0))
    config = JacobianConfig(n_tokens=4)
    summaries = []
    for scale in (1.0, 0.01):
        tally = Tally(np.unique(np.array([*np.linspace(0, 0.5, 201), *config.thresholds], dtype=np.float32)))
        tally.add(J * scale)
        summaries.append(summarise(tally, config))
    for name in ("l1_over_l2", "kurtosis", "effective_inputs"):
        assert summaries[0][name] == pytest.approx(summaries[1][name], rel=1e-5)
    assert summaries[0]["rms"] == pytest.approx(100 * summaries[1]["rms"], rel=1e-5)


def test_study_counts_as_the_notebook_does(neox_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Notebook 000's loop: autograd of the sandwich (here at x), slice, `torch.histc`, sums of the tail."""
    model = load_model(neox_folder, ModelConfig("tiny", path=str(neox_folder)), "cpu")
    input, output, mlp = topk_sae(IN, seed=1), topk_sae(OUT, seed=2), read_mlp(model, LAYER)
    monkeypatch.setattr("saeflow.jacobian.ROWS", 4)
    rows = rows_of_tokens(8)  # two batches, the second not used up
    config = JacobianConfig(n_tokens=31 * 6 + 7, bins=200, max_value=0.5)
    tally = study(model, make_pair(Block(mlp), input, output), rows, config)
    assert tally.n_tokens == config.n_tokens

    x, y = read_hooks(model, torch.from_numpy(rows).long(), [IN, OUT])
    x, y = (v[:, 1:].flatten(0, 1)[: config.n_tokens] for v in (x, y))
    entries = []
    for t in range(len(x)):
        values_in, A = input.top_latents(x[t : t + 1])
        values_out, B = output.top_latents(y[t : t + 1])
        J_f = torch.autograd.functional.jacobian(lambda v: mlp(v[None])[0], x[t])  # (d, d)
        J = output.W_enc.T[B[0]] @ J_f @ input.W_dec[A[0]].T
        entries.append((J * (values_out[0] > 0)[:, None] * (values_in[0] > 0)).flatten().abs())
    counts = torch.histc(torch.stack(entries).flatten(), bins=200, min=0, max=0.5) / len(entries)
    histogram = histogram_table(tally, config).to_pandas()
    assert histogram["count_per_token"].sum() > 10
    moved = np.abs(histogram["count_per_token"] - counts.numpy()).sum() * config.n_tokens / 2
    assert moved < 3.5  # of 6,948 entries: float32 rounds some across an edge
    survival = survival_table(tally, config).to_pandas().set_index("threshold")["values_above_per_token"]
    printed = survival.iloc[:19] - tally.above()[-1] / tally.n_tokens  # the notebook drops what exceeds the last edge
    np.testing.assert_allclose(printed, [counts[i:].sum() for i in range(1, 20)], atol=0.02)


# -------------------------------------------------------------------- job
def make_job(tmp_path: Path, folder: Path, tokens: Path, pair: tuple[Dictionary, Dictionary], **jacobian: Any) -> Job:
    for name, dictionary in zip(("in", "out"), pair, strict=True):
        (tmp_path / "train" / name).mkdir(parents=True, exist_ok=True)
        save_dictionary(dictionary, tmp_path / "train" / name)
    (tmp_path / "tokens").mkdir(exist_ok=True)
    if not (tmp_path / "tokens" / "held").exists():
        (tmp_path / "tokens" / "held").symlink_to(tokens)
    config = {
        "jacobian": {"n_tokens": 100, "bins": 200, "max_value": 0.5, "thresholds": [0.005, 0.02]} | jacobian,
        "model": {"weights": "w", **PROCESSING},
    }
    instance = Instance("jacobian", "j", config, {"train": ["in", "out"], "tokens": ["held"]}, {"model": str(folder)})
    return Job(instance, Plan("tiny", {"jacobian": {"j": instance}}, {}, results=str(tmp_path)), "cpu")


def test_job_writes_tables_with_equal_bytes_each_time(tmp_path: Path, neox_folder: Path, tokens_folder: Path) -> None:
    written = []
    for _ in range(2):
        job = make_job(tmp_path, neox_folder, tokens_folder, (topk_sae(IN, seed=1), topk_sae(OUT, seed=2, k=4)))
        jacobian_job(job)
        names = ("histogram.parquet", "survival.parquet", "summary.json")
        written.append([(job.path / name).read_bytes() for name in names])
    assert written[0] == written[1]
    summary = json.loads((job.path / "summary.json").read_text())
    assert (summary["n_tokens"], summary["k"], summary["k_out"]) == (100, 6, 4)
    assert (summary["hook_name"], summary["hook_name_out"]) == (IN, OUT)
    histogram = pq.read_table(job.path / "histogram.parquet").to_pandas()
    assert histogram["count_per_token"].sum() + summary["overflow_per_token"] == pytest.approx(24)
    assert list(histogram.columns) == ["bin_left", "bin_right", "count_per_token", "above_per_token"]


def test_too_few_tokens_are_refused(tmp_path: Path, neox_folder: Path, tokens_folder: Path) -> None:
    job = make_job(tmp_path, neox_folder, tokens_folder, (topk_sae(IN), topk_sae(OUT)), n_tokens=64 * 31 + 1)
    with pytest.raises(
        ConfigError, match=r"jacobian.n_tokens=1985, but .*held holds 1984 tokens .* raise tokens.held_out"
    ):
        jacobian_job(job)


@pytest.mark.parametrize("hooks", [(IN, IN), (OUT, IN), (IN, "blocks.0.hook_mlp_out")])
def test_what_is_no_pair_around_an_mlp_is_refused(
    hooks: tuple[str, str], tmp_path: Path, neox_folder: Path, tokens_folder: Path
) -> None:
    job = make_job(tmp_path, neox_folder, tokens_folder, (topk_sae(hooks[0]), topk_sae(hooks[1])))
    with pytest.raises(FitError, match="a Jacobian is that of one MLP") as error:
        jacobian_job(job)
    assert all(hook in str(error.value) for hook in hooks)
