"""Notebook 004's two loops, written again from its text, on the embedded model; and its settings as a plan."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import write_plain_model
from evaluating import evaluate_all
from torch import Tensor, nn

from saeflow.config import ModelConfig
from saeflow.dictionaries import Spec
from saeflow.dictionaries.sae import build
from saeflow.evaluation.comparisons import NOTEBOOK_004
from saeflow.models.loading import load_model
from saeflow.planning.expansion import compose
from saeflow.text.corpus import read_documents
from saeflow.text.tokenizer import load_tokenizer
from saeflow.text.tokens import open_tokens, write_tokens

ROOT = Path(__file__).resolve().parents[2]
LAYER, N_LATENTS, ROWS, BATCH = 2, 512, 48, 16


class SparseAutoencoder(nn.Module):
    """Its forward pass in the authors' repository: (output, activations, ...) of an SAE or a transcoder."""

    def __init__(self, seed: int, is_transcoder: bool) -> None:
        super().__init__()
        g = torch.Generator().manual_seed(seed)
        self.W_enc = nn.Parameter(torch.randn(128, N_LATENTS, generator=g) / 128**0.5)
        self.b_enc = nn.Parameter(torch.randn(N_LATENTS, generator=g) * 0.3 - 1)
        self.W_dec = nn.Parameter(torch.randn(N_LATENTS, 128, generator=g) * 0.05)
        self.b_dec = nn.Parameter(torch.randn(128, generator=g) * 0.1)
        self.b_dec_out = nn.Parameter(torch.randn(128, generator=g) * 0.1) if is_transcoder else self.b_dec

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        feature_acts = torch.relu((x - self.b_dec) @ self.W_enc + self.b_enc)
        return feature_acts @ self.W_dec + self.b_dec_out, feature_acts


class TranscoderWrapper(nn.Module):
    """What stands for `block.mlp` inside its replacement context."""

    def __init__(self, transcoder: SparseAutoencoder) -> None:
        super().__init__()
        self.transcoder = transcoder

    def forward(self, x: Tensor) -> Tensor:
        return self.transcoder(x)[0]


@torch.no_grad()
def eval_sae(model: Any, tokens: Tensor, sae: SparseAutoencoder) -> tuple[float, float]:
    l0s, losses = [], []
    for cur_tokens in tokens.split(BATCH):
        sae_acts = []

        def replacement_hook(acts: Tensor, hook: Any, sae_acts: list[Tensor] = sae_acts) -> Tensor:
            out = sae(acts)
            sae_acts.append(out[1])
            return out[0]

        hooks = [(f"blocks.{LAYER}.hook_mlp_out", replacement_hook)]
        loss = model.run_with_hooks(cur_tokens, return_type="loss", fwd_hooks=hooks)
        binarized = 1.0 * (sae_acts[0] > 0)
        l0s.append(binarized.reshape(-1, N_LATENTS).sum(dim=1).mean().item())
        losses.append(loss.item())
    return float(np.mean(l0s)), float(np.mean(losses))


@torch.no_grad()
def eval_transcoder(model: Any, tokens: Tensor, transcoder: SparseAutoencoder) -> tuple[float, float]:
    l0s, losses = [], []
    hook_point, mlp = f"blocks.{LAYER}.ln2.hook_normalized", model.blocks[LAYER].mlp
    for cur_tokens in tokens.split(BATCH):
        model.blocks[LAYER].mlp = TranscoderWrapper(transcoder)
        loss, cache = model.run_with_cache(cur_tokens, return_type="loss", names_filter=[hook_point])
        model.blocks[LAYER].mlp = mlp
        binarized = 1.0 * (transcoder(cache[hook_point])[1] > 0)
        l0s.append(binarized.reshape(-1, N_LATENTS).sum(dim=1).mean().item())
        losses.append(loss.item())
    return float(np.mean(l0s)), float(np.mean(losses))


@pytest.fixture(scope="module")
def model() -> Any:
    folder = ROOT / "resources/model"
    processing = {"fold_ln": True, "center_writing_weights": True, "center_unembed": True}
    return load_model(folder, ModelConfig("embedded", path=str(folder), **processing), "cpu")


@pytest.mark.parametrize(("dtype", "l0_tolerance"), [(torch.float32, 5e-6), (torch.float64, 1e-12)])
def test_l0_and_ce_loss_are_the_notebooks(model: Any, tmp_path: Path, dtype: torch.dtype, l0_tolerance: float) -> None:
    """In float32 the order of a sum decides whether a pre-activation within rounding of 0 counts: some in 100,000."""
    model = model.to(dtype)
    write_tokens(
        tmp_path,
        read_documents(ROOT / "resources/corpus.jsonl.gz"),
        load_tokenizer(ROOT / "resources/model"),
        split="held_out",
        n_rows=ROWS,
        context_size=128,
        prepend_bos=True,
        held_out_fraction=0.1,
        tokenizer_digest="",
    )
    store = open_tokens(tmp_path)
    tokens = torch.from_numpy(store[:]).long()
    theirs = [SparseAutoencoder(seed, seed > 1).to(dtype) for seed in range(4)]
    hook_in, hook_out = f"blocks.{LAYER}.ln2.hook_normalized", f"blocks.{LAYER}.hook_mlp_out"
    ours = []
    for i, one in enumerate(theirs):
        kind, hook = ("transcoder", hook_in) if i > 1 else ("sae", hook_out)
        spec = Spec(kind, "relu", 128, 128, N_LATENTS, hook, hook_out, apply_b_dec_to_input=kind == "sae")  # type: ignore[arg-type]
        b_enc = one.b_enc - one.b_dec @ one.W_enc if kind == "transcoder" else one.b_enc
        tensors = (one.W_enc, b_enc, one.W_dec, one.b_dec_out)
        ours.append(build(spec, *(t.detach() for t in tensors)))
    found = evaluate_all(model, ours, torch.zeros(128, dtype=dtype), store, BATCH)  # type: ignore[arg-type]
    for i, (one, evaluation) in enumerate(zip(theirs, found, strict=True)):
        l0, ce_loss = (eval_transcoder if i > 1 else eval_sae)(model, tokens, one)
        assert evaluation.summary["l0"] == pytest.approx(l0, rel=l0_tolerance)
        assert evaluation.summary["ce_replaced"] == pytest.approx(ce_loss, rel=1e-6)
        assert evaluation.summary["ce_replaced"] > evaluation.summary["ce_clean"] + 1e-3


def neox(d_model: int) -> dict[str, Any]:
    """`config.json` of Pythia-410M, or of 1.4B, which is as deep."""
    sizes = {"num_hidden_layers": 24, "hidden_size": d_model, "num_attention_heads": 16}
    sizes |= {"intermediate_size": 4 * d_model, "max_position_embeddings": 2048}
    return {"architectures": ["GPTNeoXForCausalLM"], **sizes}


def test_the_notebooks_settings_are_a_plan(tmp_path: Path) -> None:
    write_plain_model(tmp_path, neox(1024))
    settings = ["experiment=notebook_004", f"model.path={tmp_path}"]
    plan = compose(ROOT / "conf", settings, results=str(tmp_path / "results"))
    trained = [instance.config for instance in plan.stages["train"].values()]
    assert {(c["dictionary"]["kind"], c["dictionary"]["l1_coefficient"]) for c in trained} == NOTEBOOK_004.keys()
    for config in trained:
        assert config["dictionary"]["d_sae"] == 32_768 and config["dictionary"]["squared_error"] == "target_norm"
        assert config["dictionary"]["sparsity"] == "unit_norm"
        assert config["training"]["n_tokens"] == 60_000_000
    held_out = next(i for i in plan.stages["tokens"].values() if i.config["split"] == "held_out")
    assert held_out.config["n_rows"] == 200 * 128 and held_out.config["tokens"]["context_size"] == 128
    for evaluation in plan.stages["evaluate"].values():
        assert evaluation.config["evaluation"]["batch_rows"] == 128
        processing = ("fold_ln", "center_writing_weights", "center_unembed")
        assert all(evaluation.config["model"][name] for name in processing)
    hooks = {i.config["hook_name"] for i in plan.stages["activations"].values()}
    assert hooks == {"blocks.15.hook_mlp_out", "blocks.15.ln2.hook_normalized"}


GPT2: dict[str, Any] = {"architectures": ["GPT2LMHeadModel"], "n_layer": 12, "n_embd": 768, "n_head": 12}
GPT2 |= {"n_positions": 1024, "n_ctx": 1024}


@pytest.mark.parametrize(
    ("experiment", "config", "layer", "d_sae", "stages"),
    [
        ("transcoders_gpt2-small", GPT2, 8, 24_576, {"train": 8, "evaluate": 8}),
        ("transcoders_pythia-1.4b", neox(2048), 15, 65_536, {"train": 9, "evaluate": 9}),
        ("blind_pythia-410m", neox(1024), 15, 32_768, {"train": 2, "blind": 1}),
    ],
)
def test_the_papers_other_studies_are_plans(
    experiment: str, config: Any, layer: int, d_sae: int, stages: dict[str, int], tmp_path: Path
) -> None:
    """Against a folder of the model's true sizes."""
    write_plain_model(tmp_path / "model", config)
    settings = [f"experiment={experiment}", f"model.path={tmp_path}/model"]
    plan = compose(ROOT / "conf", settings, results=str(tmp_path / "results"))
    assert {name: len(plan.stages[name]) for name in stages} == stages
    for trained in (instance.config for instance in plan.stages["train"].values()):
        assert trained["dictionary"]["d_sae"] == d_sae and f"blocks.{layer}." in trained["hook_name"]
        loss = [trained["dictionary"][name] for name in ("squared_error", "sparsity", "normalize_activations")]
        assert loss == ["target_norm", "unit_norm", "none"] and trained["training"]["n_tokens"] == 60_000_000
