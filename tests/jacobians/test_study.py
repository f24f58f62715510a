"""Jacobians of pairs and transcoders: the closed form against autograd in float64, the study against the notebook."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from stores import contents, tokens_instance, weights_of, write_receipt
from torch import Tensor

from saeflow.config import ConfigError, JacobianConfig, ModelConfig
from saeflow.dictionaries import Dictionary, Origin, Spec, save_dictionary
from saeflow.dictionaries.fitting import FitError
from saeflow.dictionaries.sae import build
from saeflow.jacobians.maps import Pair, TranscoderMap
from saeflow.jacobians.one_pass import Tokens, iterate_jacobians
from saeflow.jacobians.statistics import Tally, histogram_table, notebook_lines, summarise, survival_table
from saeflow.jacobians.study import jacobian_job, open_map
from saeflow.jobs.job import Job
from saeflow.models.blocks import ACTIVATIONS, MLP, Block, ModuleBlock, read_block, read_mlp
from saeflow.models.loading import load_model
from saeflow.models.splicing import read_hooks, run_clean, run_spliced
from saeflow.planning.graph import Instance, Plan
from saeflow.storage.receipts import RECEIPT

LAYER = 1
IN, OUT = f"blocks.{LAYER}.ln2.hook_normalized", f"blocks.{LAYER}.hook_mlp_out"
INTO = f"blocks.{LAYER}.mlp.hook_in"
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
@pytest.mark.parametrize("site", ["after the gain", "after the norm", "before the norm", "with the residual stream"])
def test_closed_form_matches_autograd_float64(model_folder: Path, fold_ln: bool, site: str) -> None:
    model = load_model(model_folder, ModelConfig("tiny", path=str(model_folder), fold_ln=fold_ln), "cpu")
    model.to(torch.float64)
    block = model.blocks[LAYER]
    block.mlp.b_in.normal_(generator=torch.Generator().manual_seed(0))  # Llama itself has none
    before = f"blocks.{LAYER}.hook_resid_{'pre' if model.cfg.parallel_attn_mlp else 'mid'}"
    hook_in = {"after the norm": IN, "after the gain": INTO}.get(site, before)
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
        if site == "after the gain":
            return block.apply_mlp(value)[0, 0]
        if site != "after the norm":
            out = block.apply_mlp(block.ln2(value))
            return (out + value if hook_out != OUT else out)[0, 0]
        with model.hooks(fwd_hooks=[(IN, lambda _, hook: value)]):
            return block.apply_mlp(block.ln2(torch.zeros_like(value)))[0, 0]

    closed = read_block(model, hook_in, hook_out)
    by_modules = ModuleBlock(model, LAYER, not site.startswith("after"), hook_out != OUT, gain=site != "after the gain")
    torch.testing.assert_close(torch.stack([f(v) for v in x]), y, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(closed(x), y, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(by_modules(x), y, rtol=1e-12, atol=1e-12)

    J, other = (torch.cat([blocks.J for blocks in Pair(f, input, output).blocks([x, y])]) for f in (closed, by_modules))
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
        pair = Pair(read_block(model, IN, OUT), input, output)
        found.append(sum(blocks.J.abs().sum().item() for blocks in pair.blocks([x, y])))
    assert found[0] == pytest.approx(found[1], rel=1e-4)


# -------------------------------------------------------------------- units
def unit_norm(rows: Tensor) -> Tensor:
    return rows / rows.norm(dim=1, keepdim=True)


def test_units_of_the_mlps_input_are_the_papers_at_either_side_of_the_gain(model_folder: Path) -> None:
    """The paper's J, from the weights of transformers alone, in float64: a pair before the gain whose directions behind
    it are the same has it too, for a unit step of what the MLP reads, and no other one as it stands."""
    from transformers import AutoModelForCausalLM

    plain = AutoModelForCausalLM.from_pretrained(model_folder, dtype=torch.float64).eval().requires_grad_(False)
    norm, mlp = norm_and_mlp(plain)
    norm.weight.copy_(0.2 + torch.rand(32, generator=torch.Generator().manual_seed(7), dtype=torch.float64))
    model = load_model(model_folder, ModelConfig("tiny", path=str(model_folder)), "cpu").to(torch.float64)
    model.blocks[LAYER].ln2.w.copy_(norm.weight)
    seen: list[Tensor] = []
    mlp.register_forward_hook(lambda _, args, out: seen.extend([args[0], out]))
    tokens = torch.from_numpy(rows_of_tokens(2)).long()
    plain(tokens)
    x, into, y = (v.flatten(0, 1) for v in read_hooks(model, tokens, [IN, INTO, OUT]))
    torch.testing.assert_close(into, seen[0].flatten(0, 1), rtol=1e-3, atol=1e-5)  # their rotary angles are float32
    torch.testing.assert_close(y, seen[1].flatten(0, 1), rtol=1e-3, atol=1e-5)

    after, output = (topk_sae(hook, seed=s, dtype=torch.float64) for s, hook in ((1, INTO), (2, OUT)))
    after.W_dec = unit_norm(after.W_dec)
    before = topk_sae(IN, seed=1, dtype=torch.float64)
    before.W_dec = unit_norm(after.W_dec / norm.weight)
    bias = getattr(norm, "bias", None)
    shift = 0 if bias is None else bias
    before.W_enc = norm.weight[:, None] * after.W_enc  # so that it has the latents of `after`
    before.b_enc = after.b_enc + (shift @ after.W_enc if bias is not None else 0)
    found = {}
    for hook, dictionary, values in ((IN, before, x), (INTO, after, into)):
        pair = open_map(model, [dictionary, output], JacobianConfig())
        assert isinstance(pair, Pair) and pair.lengths is not None
        blocks = list(pair.blocks([values, y]))
        tally = Tally(JacobianConfig(), 1)
        for b in blocks:
            tally.add(b.J, np.zeros(len(b.J), int), b.n_entries, pair.lengths[b.inputs])
        found[hook] = summarise(tally)
        active = blocks[0].inputs[0], blocks[0].outputs[0]
        J_f = torch.autograd.functional.jacobian(lambda v: mlp(v[None, None])[0, 0], into[0])
        wanted = (output.W_enc[:, active[1]].T @ J_f @ after.W_dec[active[0]].T).abs()
        wanted *= (blocks[0].values_out[0] > 0)[:, None] * (blocks[0].values_in[0] > 0)
        per_unit = blocks[0].J[0].abs() / pair.lengths[active[0]]
        torch.testing.assert_close(per_unit, wanted, rtol=1e-9, atol=1e-9)
        assert wanted.max() > 1e-3
    for name in ("mean_absolute", "fraction_above_0.01", "fraction_above_0.02"):
        assert found[IN][f"{name}_unit"] == pytest.approx(found[INTO][f"{name}_unit"], rel=1e-6)
        assert found[INTO][f"{name}_unit"] == pytest.approx(found[INTO][name], rel=1e-6)
    assert abs(found[IN]["mean_absolute"] / found[INTO]["mean_absolute"] - 1) > 0.05


def norm_and_mlp(plain: Any) -> tuple[Any, Any]:
    """The norm before the MLP of a block, and the MLP, of a transformers model."""
    base = plain.base_model
    block = (base.layers if hasattr(base, "layers") else base.h)[LAYER]
    return (block.ln_2 if hasattr(block, "ln_2") else block.post_attention_layernorm), block.mlp


def test_splices_at_the_mlps_input_are_behind_the_gain(model_folder: Path) -> None:
    """Against transformers with the norm's output replaced."""
    from transformers import AutoModelForCausalLM

    plain = AutoModelForCausalLM.from_pretrained(model_folder, dtype=torch.float64).eval().requires_grad_(False)
    model = load_model(model_folder, ModelConfig("tiny", path=str(model_folder)), "cpu").to(torch.float64)
    tokens = torch.from_numpy(rows_of_tokens(2)).long()
    value = torch.randn(2, 32, 32, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    clean = run_clean(model, tokens, [INTO], [INTO])
    final = run_spliced(model, clean, INTO, value)
    found = (final @ model.W_U + model.b_U).log_softmax(-1)
    mlp = norm_and_mlp(plain)[1]
    mlp.register_forward_pre_hook(lambda _, args: (value, *args[1:]))
    torch.testing.assert_close(found, plain(tokens).logits.log_softmax(-1), rtol=1e-6, atol=1e-6)


def test_where_the_norm_is_inside_there_is_no_unit(neox_folder: Path) -> None:
    model = load_model(neox_folder, ModelConfig("tiny", path=str(neox_folder)), "cpu")
    pair = open_map(model, [topk_sae("blocks.1.hook_resid_pre"), topk_sae(OUT)], JacobianConfig())
    assert pair.lengths is None


# -------------------------------------------------------------------- study
def counted(model: Any, pair: Pair, rows: np.ndarray, config: JacobianConfig) -> Tally:
    tokens = Tokens(rows, np.arange(len(rows)), np.arange(config.n_tokens) // 31)
    tally = Tally(config, tokens.n_documents)
    for part in iterate_jacobians(model, pair, tokens):
        tally.add(part.blocks.J, tokens.document[part.first : part.first + part.n_tokens], part.blocks.n_entries)
    return tally


@pytest.mark.parametrize(
    ("hook", "at", "norm"),
    [
        (IN, "input", "inside"),
        (IN, "reconstruction", "inside"),
        ("blocks.1.hook_resid_pre", "reconstruction", "inside"),  # ignore_ln = False
        ("blocks.1.hook_resid_pre", "reconstruction", "ignored"),  # ignore_ln = True
    ],
)
def test_study_counts_as_the_notebook_does(
    neox_folder: Path, monkeypatch: pytest.MonkeyPatch, hook: str, at: str, norm: str
) -> None:
    """Notebook 000's loop: the Jacobian of the sandwich of decoder, MLP and encoder by autograd, all n x n of it, its
    slice of active latents, `torch.histc`, sums of the tail; the model with its norms folded, as that loads it."""
    model = load_model(neox_folder, ModelConfig("tiny", path=str(neox_folder), fold_ln=True), "cpu")
    block = model.blocks[LAYER]
    input, output = topk_sae(hook, seed=1), topk_sae(OUT, seed=2)
    monkeypatch.setattr("saeflow.jacobians.one_pass.ROWS", 1)
    rows = rows_of_tokens(3)  # the third is not used up
    config = JacobianConfig(n_tokens=31 * 2 + 7, bins=200, max_value=0.5, at=at, norm=norm)
    tally = counted(model, open_map(model, [input, output], config), rows, config)
    assert tally.n_tokens == config.n_tokens

    (x,) = read_hooks(model, torch.from_numpy(rows).long(), [hook])
    sliced = []
    for x_t in x[:, 1:].flatten(0, 1)[: config.n_tokens]:
        feature_acts_pre = input.pre_activations(x_t[None])[0]
        keep = feature_acts_pre.topk(6).indices

        def sandwich(pre: Tensor, keep: Tensor = keep, x_t: Tensor = x_t) -> Tensor:
            feature_acts = torch.zeros(80).index_put((keep,), pre[keep].relu())
            value = feature_acts @ input.W_dec + input.b_dec
            if at == "input":  # the values of x, the derivative of its reconstruction
                value = value + (x_t - value).detach()
            inside = hook != IN and norm == "inside"
            mlp_out = block.mlp(block.ln2(value[None, None]) if inside else value[None, None])[0]
            pre_out = output.pre_activations(mlp_out)[0]
            return torch.zeros(80).index_put((pre_out.topk(6).indices,), pre_out.topk(6).values.relu())

        in_indices, out_indices = keep[feature_acts_pre[keep] > 0], sandwich(feature_acts_pre).nonzero().flatten()
        jacobian = torch.autograd.functional.jacobian(sandwich, feature_acts_pre)
        sliced.append(jacobian[out_indices][:, in_indices].flatten().abs())
    counts = torch.histc(torch.cat(sliced), bins=200, min=0, max=0.5) / len(sliced)

    histogram = histogram_table(tally).to_pandas()["count_per_token"].to_numpy(copy=True)
    histogram[0] -= 36 - sum(map(len, sliced)) / len(sliced)  # latents at 0 are not active in the notebook
    assert histogram[1:].sum() > 5
    assert np.abs(histogram - counts.numpy()).sum() * config.n_tokens / 2 < 2.5  # float32 rounds some across an edge
    survival = survival_table(tally).to_pandas().set_index("threshold")["values_above_per_token"]
    beyond = survival.iloc[-1]  # the notebook drops what exceeds the last edge
    np.testing.assert_allclose(survival.iloc[:19] - beyond, [counts[i:].sum() for i in range(1, 20)], atol=0.03)
    edges = torch.linspace(0, 0.5, 201)
    printed = [f"There are {counts[i:].sum() + beyond:.1f} values and above {edges[i]:.3f}." for i in range(1, 20)]
    *ours, said = notebook_lines(tally)
    assert said.startswith(
        f"The histogram is of 200 bins from 0 to 0.5; there are {beyond:.1f} values above 0.5, which"
    )
    assert [line.split("values")[1] for line in ours] == [line.split("values")[1] for line in printed]
    assert sum(a != b for a, b in zip(ours, printed, strict=True)) <= 3  # one value may round to another tenth


def relu_sae(hook: str, seed: int = 0) -> Dictionary:
    made = topk_sae(hook, seed=seed)
    return build(replace(made.spec, activation="relu", k=None), **made.tensors)


def test_a_varying_number_of_active_latents_is_padded_with_zeros_that_count_for_nothing(neox_folder: Path) -> None:
    model = load_model(neox_folder, ModelConfig("tiny", path=str(neox_folder)), "cpu")
    x, y = (v.flatten(0, 1) for v in read_hooks(model, torch.from_numpy(rows_of_tokens(2)).long(), [IN, OUT]))
    input, output, mlp = relu_sae(IN, seed=1), relu_sae(OUT, seed=2), read_mlp(model, LAYER)
    seen = 0
    for blocks in Pair(Block(mlp), input, output).blocks([x, y]):
        for t, J, A, B, n in zip(
            range(blocks.tokens.start, blocks.tokens.stop),
            blocks.J, blocks.inputs, blocks.outputs, blocks.n_entries, strict=True,
        ):  # fmt: skip
            active_in = input.encode(x[t : t + 1])[0] > 0
            active_out = output.encode(y[t : t + 1])[0] > 0
            J_f = torch.autograd.functional.jacobian(lambda v: mlp(v[None])[0], x[t])
            wanted = (output.W_enc.T @ J_f @ input.W_dec.T) * active_out[:, None] * active_in
            dense = torch.zeros(80, 80).index_put((B[:, None], A[None]), J, accumulate=True)
            torch.testing.assert_close(dense, wanted, rtol=1e-4, atol=1e-5)
            assert n == active_in.sum() * active_out.sum()
            seen += 1
    assert seen == len(x)


@pytest.mark.parametrize(("activation", "skip"), [("relu", False), ("topk", True), ("jumprelu", False)])
def test_transcoder_jacobian_matches_autograd_float64(activation: Any, skip: bool) -> None:
    g = torch.Generator().manual_seed(0)
    d, p, n = 7, 5, 20

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=g, dtype=torch.float64)

    spec = Spec("transcoder", activation, d, p, n, IN, OUT, k=4 if activation == "topk" else None, skip=skip)
    threshold = draw(n).abs() if activation == "jumprelu" else None
    transcoder = build(spec, draw(d, n), draw(n), draw(n, p), draw(p), draw(p, d) if skip else None, threshold)
    x = draw(9, d)
    seen = 0
    for blocks in TranscoderMap(transcoder).blocks([x]):
        for t, J in zip(range(blocks.tokens.start, blocks.tokens.stop), blocks.J, strict=True):
            wanted = torch.autograd.functional.jacobian(
                lambda v: transcoder.decode(transcoder.encode(v[None]), v[None])[0], x[t]
            )
            torch.testing.assert_close(J, wanted, rtol=1e-12, atol=1e-12)
            seen += 1
        assert (blocks.n_entries == d * p).all()
    assert seen == 9


# -------------------------------------------------------------------- job
def make_job(tmp_path: Path, folder: Path, tokens: Path, pair: tuple[Dictionary, ...], **jacobian: Any) -> Job:
    names = ["in", "out"][: len(pair)]
    for name, dictionary in zip(names, pair, strict=True):
        (tmp_path / "train" / name).mkdir(parents=True, exist_ok=True)
        save_dictionary(_of_model(dictionary, folder), tmp_path / "train" / name)
        write_receipt(tmp_path / "train" / name, "train")
    (tmp_path / "tokens").mkdir(exist_ok=True)
    if not (tmp_path / "tokens" / "held").exists():
        (tmp_path / "tokens" / "held").symlink_to(tokens)
    config = {
        "jacobian": {"n_tokens": 100, "bins": 200, "max_value": 0.5, "thresholds": [0.005, 0.02]} | jacobian,
        "model": {"weights": weights_of(folder), **PROCESSING},
    }
    instance = Instance("jacobian", "j", config, {"train": names, "tokens": ["held"]}, {"model": str(folder)})
    stages = {"jacobian": {"j": instance}, "tokens": {"held": tokens_instance("held", folder)}}
    return Job(instance, Plan("tiny", stages, {}, results=str(tmp_path)), "cpu")


def _of_model(dictionary: Dictionary, folder: Path) -> Dictionary:
    origin = replace(dictionary.spec.origin, model_weights=weights_of(folder))
    return build(replace(dictionary.spec, origin=origin), **dictionary.tensors)


def test_job_writes_tables_with_equal_bytes_each_time(tmp_path: Path, neox_folder: Path, tokens_folder: Path) -> None:
    written = []
    for _ in range(2):
        job = make_job(tmp_path, neox_folder, tokens_folder, (topk_sae(IN, seed=1), topk_sae(OUT, seed=2, k=4)))
        jacobian_job(job)
        written.append({name: held for name, held in contents(job.path).items() if name != RECEIPT})
    assert written[0] == written[1]
    assert {"histogram.parquet", "survival.parquet", "log_histogram.parquet", "thresholds.parquet"} <= written[0].keys()
    summary = json.loads((job.path / "summary.json").read_text())
    assert (summary["n_tokens"], summary["k"], summary["k_out"]) == (100, 6, 4)
    assert (summary["hook_name"], summary["hook_name_out"]) == (IN, OUT)
    histogram = pq.read_table(job.path / "histogram.parquet").to_pandas()
    assert histogram["count_per_token"].sum() + summary["overflow_per_token"] == pytest.approx(24)
    assert list(histogram.columns)[:4] == ["bin_left", "bin_right", "count_per_token", "above_per_token"]
    title, *lines = (job.path / "table.txt").read_text().splitlines()
    assert (
        title.startswith(f"{IN} to {OUT}, k = 6, Jacobian coefficient 0, trained model, 100 tokens: at the true input")
        and len(lines) == 20
    )
    assert lines[0].startswith("There are ") and lines[0].endswith(" values and above 0.002.")


def test_ten_tokens_are_enough(tmp_path: Path, neox_folder: Path, tokens_folder: Path) -> None:
    """No pair is frequent enough to be shown, one document gives no interval: the tables are there, and empty."""
    job = make_job(tmp_path, neox_folder, tokens_folder, (topk_sae(IN, seed=1), topk_sae(OUT, seed=2)), n_tokens=10)
    summary = jacobian_job(job)
    assert summary["rms"] > 0 and summary["rms_low"] is None
    for name in ("pairs", "top_inputs", "contexts", "pair_contexts"):
        assert pq.read_table(job.path / f"{name}.parquet").num_rows == 0
    assert "longtable" in (job.path / "pairs.tex").read_text()


def test_a_jacobian_pair_lies_in_one_artifact(tmp_path: Path, neox_folder: Path, tokens_folder: Path) -> None:
    pair = (topk_sae(IN, seed=1), topk_sae(OUT, seed=2))
    job = make_job(tmp_path, neox_folder, tokens_folder, pair)
    wanted = jacobian_job(job)
    both = tmp_path / "train" / "both"
    for side, dictionary in zip(("input", "output"), pair, strict=True):
        (both / side).mkdir(parents=True)
        spec = replace(dictionary.spec, options={"jacobian_coefficient": 0.25})
        save_dictionary(_of_model(build(spec, **dictionary.tensors), neox_folder), both / side)
    write_receipt(both, "train")
    job.instance.needs["train"] = ["both"]
    found = jacobian_job(job)
    assert (found.pop("jacobian_coefficient"), wanted.pop("jacobian_coefficient")) == (0.25, 0.0)
    for name in ("train_key_in", "train_key_out"):
        assert found.pop(name) == "both" != wanted.pop(name)
    assert found == wanted


def test_a_transcoder_is_studied_in_the_basis_of_the_model(
    tmp_path: Path, neox_folder: Path, tokens_folder: Path
) -> None:
    sae = relu_sae(IN)
    spec = replace(sae.spec, kind="transcoder", hook_name_out=OUT)
    summary = jacobian_job(make_job(tmp_path, neox_folder, tokens_folder, (build(spec, **sae.tensors),)))
    assert (summary["kind"], summary["entries_per_token"]) == ("transcoder", 32 * 32)


def test_a_texts_tokens_are_those_of_a_row_that_goes_on(tmp_path: Path, neox_folder: Path, tokens_folder: Path) -> None:
    """Tokens 11 to 20 in a row that ends there, against autograd where the model has read on; nothing else counts."""
    pair = topk_sae(IN, seed=1), topk_sae(OUT, seed=2)
    job = make_job(tmp_path, neox_folder, tokens_folder, pair, text="any", text_tokens=[11, 20], min_count=1)
    rows = rows_of_tokens(1)
    job.config["row"] = rows[0, :21].tolist()
    job.config["tokenizer"] = job.plan.instance("tokens", job.instance.needs.pop("tokens")[0]).config["tokenizer"]
    summary = jacobian_job(job)
    assert (summary["n_tokens"], summary["text"], summary["rms_low"]) == (10, "any", None)
    assert "at the true input, tokens 11 to 20 of a text; " in summary["convention"]

    model = load_model(neox_folder, ModelConfig("tiny", path=str(neox_folder)), "cpu")
    x, y = (v[0, 11:21] for v in read_hooks(model, torch.from_numpy(rows).long(), [IN, OUT]))
    mlp, sizes = read_mlp(model, LAYER), []
    for x_t, y_t in zip(x, y, strict=True):
        on = [latents[0] > 0 for latents in (pair[0].encode(x_t[None]), pair[1].encode(y_t[None]))]
        J_f = torch.autograd.functional.jacobian(lambda v: mlp(v[None])[0], x_t)
        sizes.append((pair[1].W_enc.T[on[1]] @ J_f @ pair[0].W_dec[on[0]].T).abs().sum().item() / 36)
    assert summary["mean_absolute"] == pytest.approx(np.mean(sizes), rel=1e-4)
    frame = pq.read_table(job.path / "pair_contexts.parquet").to_pandas()
    shown = np.concatenate([np.flatnonzero(J) + p for J, p in zip(frame["jacobian"], frame["position"], strict=True)])
    assert len(shown) and shown.min() >= 11 and shown.max() <= 20


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


def test_dictionaries_that_are_no_pair_are_refused(tmp_path: Path, neox_folder: Path, tokens_folder: Path) -> None:
    job = make_job(tmp_path, neox_folder, tokens_folder, (topk_sae(IN),))
    with pytest.raises(
        FitError, match=r"needs two TopK, ReLU or JumpReLU SAEs around one MLP, or one transcoder, but .*in is a"
    ):
        jacobian_job(job)
