"""Evaluation against full passes of the Hugging Face model with plain torch hooks, and against what must hold."""

import dataclasses
import json
import math
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from contextlib import nullcontext
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from evaluating import evaluate_all
from hypothesis import given, settings
from hypothesis import strategies as st
from stores import tokens_instance, weights_of, write_receipt
from torch import Tensor
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from saeflow.config import ModelConfig
from saeflow.dictionaries import Dictionary, Origin, Spec, save_dictionary
from saeflow.dictionaries.fitting import FitError, check_fit
from saeflow.dictionaries.sae import build
from saeflow.evaluation.baseline import baseline_jobs
from saeflow.evaluation.evaluate import Evaluation, evaluate_jobs
from saeflow.evaluation.metrics import firing, summarise
from saeflow.jobs.job import Job
from saeflow.kernels import next_token
from saeflow.models.attention import fused_attention
from saeflow.models.folder import read_geometry
from saeflow.models.loading import load_model
from saeflow.models.splicing import run_clean, run_spliced
from saeflow.planning.graph import Instance, Plan

D, N_LATENTS = 32, 80
IN, OUT = "blocks.1.ln2.hook_normalized", "blocks.1.hook_mlp_out"
PROCESSING = {"fold_ln": False, "center_writing_weights": False, "center_unembed": False}
ORIGIN = Origin(model_name="tiny", model_weights="w", **PROCESSING)


def dictionary(
    kind: str = "sae", activation: str = "topk", hook: str = OUT, seed: int = 0, scale: float = 0.3
) -> Dictionary:
    """Random weights; reads `hook`, or the MLP's input where it is a transcoder."""
    g = torch.Generator().manual_seed(seed)
    W_enc, W_dec = torch.randn(D, N_LATENTS, generator=g) / D**0.5, torch.randn(N_LATENTS, D, generator=g) * scale
    biases = [0.1 * torch.randn(size, generator=g) for size in (N_LATENTS, D)]
    k, l1 = (5, None) if activation == "topk" else (None, 1.0)
    hook_in = IN if kind == "transcoder" else hook
    spec = Spec(kind, activation, D, D, N_LATENTS, hook_in, hook, k=k, l1_coefficient=l1, seed=seed, origin=ORIGIN)  # type: ignore[arg-type]
    return build(spec, W_enc, biases[0], W_dec, biases[1])


def identity(hook: str = OUT) -> Dictionary:
    """x = relu(x) - relu(-x)."""
    eye = torch.eye(D)
    spec = Spec("sae", "relu", D, D, 2 * D, hook, hook, origin=ORIGIN)
    return build(spec, torch.cat([eye, -eye], 1), torch.zeros(2 * D), torch.cat([eye, -eye]), torch.zeros(D))


def constant(value: Tensor, hook: str = OUT) -> Dictionary:
    spec = Spec("sae", "relu", D, D, 3, hook, hook, origin=ORIGIN)
    return build(spec, torch.zeros(D, 3), torch.zeros(3), torch.zeros(3, D), value)


def load(folder: Path) -> Any:
    return load_model(folder, ModelConfig("tiny", path=str(folder)), "cpu")


@pytest.fixture(scope="module")
def model(neox_folder: Path) -> Any:
    return load(neox_folder)


@pytest.fixture(scope="module")
def rows(model: Any) -> np.ndarray:
    """12 rows of 24 tokens that the model itself wrote, so that ablating it raises its loss; 0 is BOS."""
    g = torch.Generator().manual_seed(0)
    tokens = torch.zeros(12, 1, dtype=torch.long)
    for _ in range(23):
        chosen = torch.multinomial(model(tokens)[:, -1].softmax(-1), 1, generator=g)
        tokens = torch.cat([tokens, chosen], 1)
    return tokens.numpy().astype(np.int32)


MEAN = 0.5 * torch.randn(D, generator=torch.Generator().manual_seed(9))


def run(model: Any, rows: np.ndarray, *dictionaries: Dictionary, prepend_bos: bool = True) -> list[Evaluation]:
    return evaluate_all(model, list(dictionaries), MEAN, rows, 5, prepend_bos)


def same(one: Evaluation, other: Evaluation) -> bool:
    """Every number of both, bit by bit."""
    tables = (one.batches, one.documents, one.summary) == (other.batches, other.documents, other.summary)
    drawn = all(np.array_equal(one.resamples[n], other.resamples[n], equal_nan=True) for n in other.resamples)
    return tables and drawn and np.array_equal(one.fired, other.fired)


# -------------------------------------------------------------------- splicing
@pytest.mark.parametrize("attention", [nullcontext, fused_attention])
def test_a_splice_is_bit_for_bit_a_full_pass_with_a_hook(model_folder: Path, attention: Any) -> None:
    model = load(model_folder)
    with attention(model):
        check_every_hook(model, model_folder)


def check_every_hook(model: Any, model_folder: Path) -> None:
    tokens = torch.from_numpy(np.random.default_rng(0).integers(0, 300, (3, 20)))
    geometry = read_geometry(model_folder)
    hooks = [f"blocks.{layer}.{hook}" for layer in (0, 1) for hook in geometry.block_hooks()]
    hooks += ["hook_embed", "ln_final.hook_normalized"]
    for hook in hooks:
        clean = run_clean(model, tokens, [], [hook])
        value = torch.randn(clean.values[hook].shape, generator=torch.Generator().manual_seed(0))
        seen = {}

        def keep(found: Tensor, hook: Any, seen: dict[str, Tensor] = seen) -> None:
            seen["final"] = found

        def replace(_: Tensor, hook: Any, value: Tensor = value) -> Tensor:
            return value

        model.run_with_hooks(tokens, fwd_hooks=[("unembed.hook_in", keep)])
        assert torch.equal(seen["final"], clean.final), hook
        model.run_with_hooks(tokens, fwd_hooks=[(hook, replace), ("unembed.hook_in", keep)])
        assert torch.equal(run_spliced(model, clean, hook, value.flatten(2)), seen["final"]), hook
        assert torch.equal(run_clean(model, tokens, [], [hook]).final, clean.final), "a splice left a hook behind"


def test_a_splice_runs_only_the_layers_above_it(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    tokens = torch.zeros(1, 4, dtype=torch.long)
    clean = run_clean(model, tokens, [], [IN, OUT])
    ran: list[int] = []
    for i, block in enumerate(model.blocks):
        block.register_forward_hook(lambda *_, i=i: ran.append(i))
    run_spliced(model, clean, IN, clean.values[IN])
    assert ran == [1]
    ran.clear()
    run_spliced(model, clean, OUT, clean.values[OUT])
    assert ran == []
    for block in model.blocks:
        block._forward_hooks.clear()


# -------------------------------------------------------------------- losses
@given(
    n=st.integers(1, 12),
    d=st.integers(1, 6),
    v=st.integers(2, 20),
    chunk=st.integers(1, 13),
    seed=st.integers(0, 2**31),
)
@settings(deadline=None, max_examples=50)
def test_losses_equal_their_definition(n: int, d: int, v: int, chunk: int, seed: int) -> None:
    g = torch.Generator().manual_seed(seed)
    W_U, b_U = torch.randn(d, v, generator=g), torch.randn(v, generator=g)
    clean, *variants = (torch.randn(n, d, generator=g) for _ in range(3))
    targets = torch.randint(0, v, (n,), generator=g)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(next_token, "CHUNK_POSITIONS", chunk)
        ce_clean, losses = next_token.next_token_losses(W_U, b_U, -1.0, targets, clean, [*variants, clean])
    logits = [(x.double() @ W_U.double() + b_U.double()) for x in (clean, *variants)]
    torch.testing.assert_close(
        ce_clean.double(), F.cross_entropy(logits[0], targets, reduction="none"), rtol=1e-4, atol=1e-4
    )
    for (ce, kl), of in zip(losses, logits[1:], strict=False):
        wanted = next_token.next_token_losses_slow(logits[0], of, targets)
        torch.testing.assert_close(ce.double(), wanted.ce, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(kl.double(), wanted.kl, rtol=1e-4, atol=1e-4)
    assert losses[-1].kl.abs().max() == 0  # the clean model from itself
    assert torch.equal(losses[-1].ce, ce_clean)


def test_a_softcap_bounds_the_logits() -> None:
    W_U, x = 100 * torch.eye(3), torch.eye(3)
    ce, _ = next_token.next_token_losses(W_U, torch.zeros(3), 2.0, torch.tensor([0, 1, 0]), x, [])
    torch.testing.assert_close(ce, F.cross_entropy(2 * torch.tanh(W_U / 2), torch.tensor([0, 1, 0]), reduction="none"))


def test_a_batch_of_logits_is_never_held(model: Any, rows: np.ndarray, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(next_token, "CHUNK_POSITIONS", 8)

    class Largest(TorchDispatchMode):
        numel = 0

        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            out = func(*args, **(kwargs or {}))
            for tensor in out if isinstance(out, tuple | list) else [out]:
                if isinstance(tensor, Tensor) and tensor.shape[-1:] == (300,):
                    self.numel = max(self.numel, tensor.numel())
            return out

    with Largest() as largest:
        run(model, rows, dictionary())
    assert largest.numel == 8 * 300  # a chunk; a batch of logits is 5 x 23 x 300


# -------------------------------------------------------------------- against Hugging Face
class Reference:
    """Full passes of the transformers model; MLP 1 replaced by torch hooks on its own modules."""

    def __init__(self, folder: Path) -> None:
        from transformers import AutoModelForCausalLM

        self.model = AutoModelForCausalLM.from_pretrained(folder).eval()
        name, block = {
            "GPTNeoXForCausalLM": ("post_attention_layernorm", lambda m: m.gpt_neox.layers[1]),
            "GPT2LMHeadModel": ("ln_2", lambda m: m.transformer.h[1]),
            "LlamaForCausalLM": ("post_attention_layernorm", lambda m: m.model.layers[1]),
        }[type(self.model).__name__]
        self.mlp, self.norm = block(self.model).mlp, getattr(block(self.model), name)

    @torch.no_grad()
    def run(self, tokens: Tensor, replace: Callable[[Tensor, Tensor], Tensor] | None = None) -> dict[str, Tensor]:
        """Log-probabilities, and x (before gain and bias) and y of MLP 1; `replace` gets both and gives its output."""
        seen: dict[str, Tensor] = {}

        def norm_hook(_: Any, __: Any, out: Tensor) -> None:
            bias = getattr(self.norm, "bias", None)
            seen["x"] = (out - (0 if bias is None else bias)) / self.norm.weight

        def mlp_hook(_: Any, __: Any, out: Tensor) -> Tensor:
            seen["y"] = out
            return out if replace is None else replace(seen["x"], out)

        handles = [self.norm.register_forward_hook(norm_hook), self.mlp.register_forward_hook(mlp_hook)]
        seen["log_p"] = self.model(tokens).logits.log_softmax(-1)
        for handle in handles:
            handle.remove()
        return seen


@pytest.mark.parametrize("kind", ["sae", "transcoder"])
@pytest.mark.parametrize("activation", ["topk", "relu"])
def test_metrics_equal_full_passes_of_the_hugging_face_model(model_folder: Path, kind: str, activation: str) -> None:
    rows = np.random.default_rng(1).integers(0, 300, (7, 20))
    made = dictionary(kind, activation, seed=3)
    (found,) = run(load(model_folder), rows, made)
    reference, tokens = Reference(model_folder), torch.from_numpy(rows)

    def encode(x: Tensor) -> Tensor:  # written anew, from the formulas
        pre = (x - (made.b_dec if made.spec.apply_b_dec_to_input else 0)) @ made.W_enc + made.b_enc
        if activation == "topk":
            pre = torch.where(pre >= pre.sort(-1).values[..., -5, None], pre, torch.zeros(()))
        return pre.clamp(min=0)

    def reconstruct(x: Tensor, y: Tensor) -> Tensor:
        return encode(x if kind == "transcoder" else y) @ made.W_dec + made.b_dec

    clean, replaced = reference.run(tokens), reference.run(tokens, reconstruct)
    zero = reference.run(tokens, lambda x, y: torch.zeros_like(y))
    mean = reference.run(tokens, lambda x, y: MEAN.expand_as(y))

    def ce(of: dict[str, Tensor], first: int = 0) -> float:
        return -of["log_p"][:, :-1].gather(2, tokens[:, 1:, None])[:, first:].double().mean().item()

    def kl(of: dict[str, Tensor]) -> float:
        p = clean["log_p"].double()
        return (p.exp() * (p - of["log_p"].double())).sum(-1)[:, :-1].mean().item()

    x, y = clean["x"].double(), clean["y"].double()
    latents = encode((x if kind == "transcoder" else y).float())
    output = reconstruct(clean["x"], clean["y"]).double()
    error = (y - output).square()
    wanted = {
        "n_tokens": 140,
        "n_predictions": 133,
        "l0": (latents > 0).sum(-1).double().mean().item(),
        "l0_without_bos": (latents > 0).sum(-1)[:, 1:].double().mean().item(),
        "ce_clean": ce(clean),
        "ce_replaced": ce(replaced),
        "ce_replaced_without_bos": ce(replaced, 1),
        "ce_zero": ce(zero),
        "ce_mean": ce(mean),
        "kl": kl(replaced),
        "kl_zero": kl(zero),
        "explained_variance": 1 - (error.sum() / (y - y.mean((0, 1))).square().sum()).item(),
        "fvu_without_bos": (error[:, 1:].sum() / (y[:, 1:] - y[:, 1:].mean((0, 1))).square().sum()).item(),
        "relative_error": (error.sum() / y.square().sum()).item(),
        "relative_reconstruction_bias": (output.square().sum() / (y * output).sum()).item(),
        "cosine": F.cosine_similarity(y, output, dim=-1).mean().item(),
        "dead_fraction": (~(latents > 0).flatten(0, 1).any(0)).double().mean().item(),
        "dense_fraction": ((latents > 0).flatten(0, 1).double().mean(0) > 0.1).double().mean().item(),
    }
    if (y * output).sum() <= 0:
        wanted["relative_reconstruction_bias"] = None
    for name, value in wanted.items():
        assert found.summary[name] == (None if value is None else pytest.approx(value, rel=2e-4, abs=2e-5)), name
    batches = [(y[i : i + 5], output[i : i + 5]) for i in (0, 5)]
    legacy = [1 - (a - b).square().sum(-1) / (a - a.mean((0, 1))).square().sum(-1) for a, b in batches]
    assert found.summary["explained_variance_legacy"] == pytest.approx(torch.cat(legacy).mean().item(), rel=2e-4)
    for name in ("zero", "mean"):
        ablated = wanted[f"ce_{name}"]
        if ablated - wanted["ce_clean"] > 1e-3:
            recovered = (ablated - wanted["ce_replaced"]) / (ablated - wanted["ce_clean"])
            assert found.summary[f"loss_recovered_{name}"] == pytest.approx(recovered, rel=1e-2)


def test_l0_and_loss_are_the_notebooks(model: Any, rows: np.ndarray) -> None:
    """Notebook 004's loops: means over equal batches of the mean L0 at all positions, and of the model's own loss."""
    sae, transcoder = dictionary(activation="relu"), dictionary("transcoder", "relu", seed=1)
    found = evaluate_all(model, [sae, transcoder], MEAN, rows, 4)
    for made, evaluation in zip((sae, transcoder), found, strict=True):
        l0s, losses = [], []
        for tokens in torch.from_numpy(rows).long().split(4):
            acts = []
            hook_in = made.spec.hook_name

            def read(x: Tensor, hook: Any, acts: list[Tensor] = acts, made: Dictionary = made) -> None:
                acts.append(torch.relu((x) @ made.W_enc + made.b_enc))

            def write(y: Tensor, hook: Any, acts: list[Tensor] = acts, made: Dictionary = made) -> Tensor:
                return acts[0] @ made.W_dec + made.b_dec

            loss = model.run_with_hooks(tokens, return_type="loss", fwd_hooks=[(hook_in, read), (OUT, write)])
            l0s.append((1.0 * (acts[0] > 0)).reshape(-1, N_LATENTS).sum(dim=1).mean().item())
            losses.append(loss.item())
        assert evaluation.summary["l0"] == pytest.approx(np.mean(l0s), rel=1e-6)
        assert evaluation.summary["ce_replaced"] == pytest.approx(np.mean(losses), rel=1e-6)


# -------------------------------------------------------------------- what must hold
@pytest.mark.parametrize("hook", [OUT, IN, "blocks.0.attn.hook_z", "blocks.0.hook_resid_post"])
def test_the_identity_loses_nothing(model: Any, rows: np.ndarray, hook: str) -> None:
    summary = run(model, rows, identity(hook))[0].summary
    assert summary["ce_zero"] > summary["ce_clean"] + 0.1
    assert summary["ce_replaced"] == pytest.approx(summary["ce_clean"], abs=1e-6)
    for name in (
        "loss_recovered_zero",
        "loss_recovered_mean",
        "explained_variance",
        "explained_variance_legacy",
        "cosine",
    ):
        assert summary[name] == pytest.approx(1, abs=1e-5), name
    assert summary["kl"] == pytest.approx(0, abs=1e-6) and summary["fvu"] == pytest.approx(0, abs=1e-9)


def test_constant_dictionaries_are_the_ablations(model: Any, rows: np.ndarray) -> None:
    zero, mean = (e.summary for e in run(model, rows, constant(torch.zeros(D)), constant(MEAN)))
    assert zero["ce_replaced"] == zero["ce_zero"] and mean["ce_replaced"] == mean["ce_mean"]
    assert zero["kl"] == zero["kl_zero"] and zero["kl"] > 0.01
    assert zero["loss_recovered_zero"] == mean["loss_recovered_mean"] == 0
    assert zero["l0"] == 0 and zero["dead_fraction"] == 1 and zero["relative_error"] == 1
    assert zero["cosine"] == 0 and zero["relative_reconstruction_bias"] is None
    assert "do not correlate" in zero["relative_reconstruction_bias_reason"]


def test_numbers_do_not_depend_on_the_other_dictionaries(model: Any, rows: np.ndarray) -> None:
    several = [
        dictionary("sae", "topk"),
        dictionary("transcoder", "relu", seed=1),
        dictionary(hook="blocks.0.attn.hook_z", seed=2),
        dictionary("sae", "relu", hook=IN, seed=3),
    ]
    together = run(model, rows, *several)
    backwards = run(model, rows, *several[::-1])[::-1]
    alone = [run(model, rows, one)[0] for one in several]
    for one, other, third in zip(together, backwards, alone, strict=True):
        assert same(one, other) and same(one, third)


def test_batches_add_up_to_the_summary(model: Any, rows: np.ndarray) -> None:
    (found,) = run(model, rows, dictionary())
    assert [(b["batch"], b["positions"], b["n_tokens"]) for b in found.batches] == [
        *((0, "bos", 5), (0, "rest", 115), (1, "bos", 5), (1, "rest", 115), (2, "bos", 2), (2, "rest", 46))
    ]
    rest = [b for b in found.batches if b["positions"] == "rest"]
    for part, suffix in ((found.batches, ""), (rest, "_without_bos")):
        ce = sum(b["ce_replaced"] for b in part) / sum(b["n_predictions"] for b in part)
        assert found.summary[f"ce_replaced{suffix}"] == pytest.approx(ce, rel=1e-12)
    assert found.summary["l0"] != found.summary["l0_without_bos"] or found.summary["l0"] == 5


def test_rows_without_bos_have_one_scope(model: Any, rows: np.ndarray) -> None:
    with_bos, without = (run(model, rows, dictionary(), prepend_bos=p)[0].summary for p in (True, False))
    for name in ("l0", "ce_replaced", "kl", "explained_variance"):
        assert without[f"{name}_without_bos"] == without[name] == pytest.approx(with_bos[name], rel=1e-9)
    assert with_bos["ce_replaced_without_bos"] != with_bos["ce_replaced"]


def test_a_ratio_without_meaning_is_none_with_the_reason() -> None:
    names = (
        "n_tokens",
        "n_predictions",
        "l0",
        "ce_clean",
        "ce_replaced",
        "ce_zero",
        "ce_mean",
        "kl",
        "kl_zero",
        "kl_mean",
    )
    sums: dict[str, Any] = dict.fromkeys(names, 10.0) | {"ce_zero": 9.0, "ce_mean": 10.0005, "centred": 0.0}
    for name in ("error", "norm", "centred", "output"):
        sums[f"squared_{name}"] = 0.0
    out = summarise(sums | {"dot": 0.0, "cosine": 0.0, "explained_legacy": -math.inf})
    assert out["loss_recovered_zero"] is None and out["loss_recovered_mean"] is None
    assert out["loss_recovered_zero_reason"] == "zero ablation does not raise the loss: 0.9 against 1.0 nats clean"
    assert out["explained_variance"] is None and out["fvu"] is None and out["explained_variance_legacy"] is None
    assert "same on every token" in out["explained_variance_reason"]
    json.dumps(out, allow_nan=False)


def test_firing_counts_give_dead_and_dense_latents() -> None:
    assert firing(np.array([0, 1, 10, 11, 100]), 100) == {"dead_fraction": 0.2, "dense_fraction": 0.4}


# -------------------------------------------------------------------- fit
def mutated(of: Dictionary, **changes: Any) -> Dictionary:

    return build(dataclasses.replace(of.spec, **changes), of.W_enc, of.b_enc, of.W_dec, of.b_dec)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"origin": Origin("other", "v", **PROCESSING)},
            "D was trained on the model other with weights v, but .* has weights w; .*model.path",
        ),
        (
            {"origin": Origin("tiny", "w", **PROCESSING | {"fold_ln": True})},
            "D was trained with model.fold_ln=true, but is used with model.fold_ln=false; .*train it again",
        ),
        (
            {"hook_name": "blocks.7.hook_mlp_out", "hook_name_out": "blocks.7.hook_mlp_out"},
            "D does not fit the model .* layer 7 is out of range",
        ),
        (
            {"hook_name": "blocks.1.mlp.hook_post", "hook_name_out": "blocks.1.mlp.hook_post"},
            "D has d_in=32 at blocks.1.mlp.hook_post, but the model .* is 64 wide there",
        ),
    ],
)
def test_a_dictionary_of_another_model_is_refused(changes: dict[str, Any], message: str, neox_folder: Path) -> None:
    model, geometry = {"weights": "w", **PROCESSING}, read_geometry(neox_folder)
    check_fit(dictionary(), Path("D"), neox_folder, model, geometry)
    with pytest.raises(FitError, match=message):
        check_fit(mutated(dictionary(), **changes), Path("D"), neox_folder, model, geometry)


def test_a_skip_transcoder_is_spliced_with_its_skip(model: Any, rows: np.ndarray) -> None:
    g = torch.Generator().manual_seed(4)
    spec = Spec("transcoder", "topk", D, D, N_LATENTS, IN, OUT, k=5, skip=True, origin=ORIGIN)
    shapes = ((D, N_LATENTS), (N_LATENTS,), (N_LATENTS, D), (D,), (D, D))
    made = build(spec, *(0.2 * torch.randn(shape, generator=g) for shape in shapes))
    seen: list[Tensor] = []

    def write(_: Tensor, hook: Any) -> Tensor:
        x = seen.pop()
        pre = torch.relu(x @ made.W_enc + made.b_enc)
        f = pre * (pre >= pre.sort(-1).values[..., -5, None])
        return f @ made.W_dec + made.b_dec + x @ made.W_skip.T  # type: ignore[union-attr]

    hooks = [(IN, lambda x, hook: seen.append(x)), (OUT, write)]
    loss = model.run_with_hooks(torch.from_numpy(rows).long(), return_type="loss", fwd_hooks=hooks)
    assert run(model, rows, made)[0].summary["ce_replaced"] == pytest.approx(loss.item(), rel=1e-6)


# -------------------------------------------------------------------- heads
def test_one_head_is_replaced_and_ablated_alone(model: Any, rows: np.ndarray) -> None:
    hook, head, d_head = "blocks.0.attn.hook_z", 2, 8
    g = torch.Generator().manual_seed(0)
    W_enc, W_dec = torch.randn(d_head, 20, generator=g), 0.3 * torch.randn(20, d_head, generator=g)
    spec = Spec("sae", "relu", d_head, d_head, 20, hook, hook, hook_head_index=head, origin=ORIGIN)
    made = build(spec, W_enc, torch.zeros(20), W_dec, torch.zeros(d_head))
    mean = torch.randn(d_head, generator=g)
    summary = evaluate_all(model, [made], mean, rows, 5)[0].summary

    def ce(change: Callable[[Tensor], Tensor]) -> float:
        def replace(z: Tensor, hook: Any) -> Tensor:
            z = z.clone()
            z[:, :, head] = change(z[:, :, head])
            return z

        tokens = torch.from_numpy(rows).long()
        return model.run_with_hooks(tokens, return_type="loss", fwd_hooks=[(hook, replace)]).item()

    assert summary["ce_zero"] == pytest.approx(ce(torch.zeros_like), rel=1e-5)
    assert summary["ce_mean"] == pytest.approx(ce(lambda z: mean.expand_as(z)), rel=1e-5)
    assert summary["ce_replaced"] == pytest.approx(ce(lambda z: torch.relu(z @ W_enc) @ W_dec), rel=1e-5)
    assert summary["ce_zero"] != summary["ce_clean"] != summary["ce_mean"]


# -------------------------------------------------------------------- jobs
FILES = ("batches.parquet", "documents.parquet", "latents.parquet", "resamples.parquet", "summary.json")


@pytest.fixture
def make_jobs(tmp_path: Path, neox_folder: Path, tokens_folder: Path) -> Callable[..., list[Job]]:
    """Evaluations of dictionaries, with the baselines of their output hooks (or of `hook`) measured."""
    from saeflow.activations.moments import Moments
    from saeflow.activations.store import Column, write_column

    (tmp_path / "tokens").mkdir()
    (tmp_path / "tokens" / "held").symlink_to(tokens_folder)

    def make(results: str, dictionaries: dict[str, Dictionary], hook: str | None = None) -> list[Job]:
        root = tmp_path / results
        root.mkdir(exist_ok=True)
        plan = Plan("tiny", {"evaluate": {}, "baseline": {}}, {}, results=str(root))
        (root / "tokens").symlink_to(tmp_path / "tokens")
        model = {"weights": weights_of(neox_folder), **PROCESSING}
        plan.stages["tokens"] = {"held": tokens_instance("held", neox_folder)}
        for name, made in dictionaries.items():
            (root / "train" / name).mkdir(parents=True)
            if made.spec.origin == ORIGIN:
                made = mutated(made, origin=dataclasses.replace(ORIGIN, model_weights=weights_of(neox_folder)))
            save_dictionary(made, root / "train" / name)
            write_receipt(root / "train" / name, "train")
            writes = hook or made.spec.hook_name_out
            column = root / "activations" / "store" / writes
            column.mkdir(parents=True, exist_ok=True)
            moments = Moments(D)
            moments.add(MEAN[None])
            write_column(Column(column, writes, 1, (D,), "float32"), moments.statistics())
            write_receipt(column, "activations")
            for stage, key, config, needs in (
                ("baseline", writes, {"batch_rows": 16}, {"activations": [f"store/{writes}"]}),
                ("evaluate", name, {"batch_rows": 16, "resamples": 50}, {"train": [name], "baseline": [writes]}),
            ):
                read = {"evaluation": config, "model": model} | ({"head": None} if stage == "baseline" else {})
                made_of = needs | {"tokens": ["held"]}
                plan.stages[stage][key] = Instance(stage, key, read, made_of, {"model": str(neox_folder)})
        measured = ("baseline", "evaluate")
        jobs = {s: [Job(instance, plan, "cpu") for instance in plan.stages[s].values()] for s in measured}
        baseline_jobs(jobs["baseline"])
        return jobs["evaluate"]

    return make


def test_alone_together_or_on_two_workers_gives_equal_bytes(make_jobs: Callable[..., list[Job]]) -> None:
    several = {
        "a": dictionary(),
        "b": dictionary("transcoder", "relu", seed=1),
        "c": dictionary(hook="blocks.0.attn.hook_z", seed=2),
    }
    together, alone = make_jobs("together", several), make_jobs("alone", several)
    evaluate_jobs(together[::-1])
    with ProcessPoolExecutor(2, get_context("fork")) as workers:
        list(workers.map(evaluate_jobs, [[job] for job in alone]))
    for one, other in zip(together, alone, strict=True):
        for name in FILES:
            assert (one.path / name).read_bytes() == (other.path / name).read_bytes()
    summary = json.loads((together[1].path / "summary.json").read_text())
    assert summary["n_tokens"] == 64 * 32 and summary["l1_coefficient"] == 1.0 and summary["train_key"] == "b"
    assert (summary["kind"], summary["hook_name"], summary["hook_name_out"]) == ("transcoder", IN, OUT)


def test_a_dictionary_evaluated_at_another_site_is_refused_before_any_pass(
    make_jobs: Callable[..., list[Job]], monkeypatch: pytest.MonkeyPatch
) -> None:
    def never(*_: Any) -> None:
        raise AssertionError("the model was loaded")

    site = make_jobs("site", {"a": dictionary()}, hook=IN)
    other = make_jobs("weights", {"b": mutated(dictionary(), origin=Origin("tiny", "other", **PROCESSING))})
    monkeypatch.setattr("saeflow.evaluation.evaluate.open_model", never)
    with pytest.raises(FitError, match=rf"train/a writes at {OUT}, but is compared with the baseline of {IN}"):
        evaluate_jobs(site)
    with pytest.raises(FitError, match="train/b was trained on the model tiny with weights other"):
        evaluate_jobs(other)
