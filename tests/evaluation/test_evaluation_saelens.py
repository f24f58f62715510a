"""The same numbers as SAELens's own evaluation of the same dictionary on the same tokens. Its import takes seconds."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from evaluating import evaluate_all

from saeflow.config import ModelConfig
from saeflow.dictionaries import Spec, save_dictionary
from saeflow.dictionaries.sae import build
from saeflow.models.loading import load_model

D, N_LATENTS = 32, 64


@pytest.mark.parametrize("activation", ["topk", "relu"])
@pytest.mark.parametrize("hook", ["blocks.1.hook_mlp_out", "blocks.0.attn.hook_z"])
def test_metrics_equal_saelens(tmp_path: Path, neox_folder: Path, hook: str, activation: str) -> None:
    from sae_lens import SAE
    from sae_lens.evals import get_recons_loss, get_sparsity_and_variance_metrics

    g = torch.Generator().manual_seed(0)
    W = torch.randn(D, N_LATENTS, generator=g) / D**0.5
    k = 6 if activation == "topk" else None
    spec = Spec("sae", activation, D, D, N_LATENTS, hook, hook, k=k, apply_b_dec_to_input=True)  # type: ignore[arg-type]
    made = build(spec, W, torch.zeros(N_LATENTS), W.T.contiguous(), 0.1 * torch.randn(D, generator=g))
    save_dictionary(made, tmp_path)
    sae = SAE.load_from_disk(tmp_path, device="cpu")
    if hook.endswith("hook_z"):
        sae.turn_off_forward_pass_hook_z_reshaping()  # its evaluation reshapes

    model = load_model(neox_folder, ModelConfig("tiny", path=str(neox_folder)), "cpu")
    rows = np.random.default_rng(0).integers(0, 300, (10, 16))
    ours = evaluate_all(model, [made], torch.zeros(D), rows, batch_rows=5)[0].summary

    batches = iter(torch.from_numpy(rows).split(5))
    scaler = SimpleNamespace(scale=lambda x: x, unscale=lambda x: x)
    theirs, features = get_sparsity_and_variance_metrics(
        sae=sae,
        model=model,
        activation_store=SimpleNamespace(get_batch_tokens=lambda _: next(batches)),  # type: ignore[arg-type]
        activation_scaler=scaler,  # type: ignore[arg-type]
        n_batches=2,
        compute_l2_norms=True,
        compute_sparsity_metrics=True,
        compute_variance_metrics=True,
        compute_featurewise_density_statistics=True,
        eval_batch_size_prompts=5,
        model_kwargs={},
    )
    tokens = torch.from_numpy(rows)
    losses: dict[str, Any] = get_recons_loss(sae, model, scaler, tokens, compute_kl=True, compute_ce_loss=True)  # type: ignore[arg-type]

    approx = {"rel": 1e-4, "abs": 1e-6}
    assert ours["l0"] == pytest.approx(theirs["l0"], **approx)
    assert ours["explained_variance"] == pytest.approx(theirs["explained_variance"], **approx)
    assert ours["explained_variance_legacy"] == pytest.approx(theirs["explained_variance_legacy"], **approx)
    assert ours["explained_variance_legacy"] != pytest.approx(ours["explained_variance"], rel=1e-3)
    assert ours["cosine"] == pytest.approx(theirs["cossim"], **approx)
    fired = np.rint(np.array(features["feature_density"]) * rows.size)
    assert ours["dead_fraction"] == (fired == 0).mean()
    assert ours["dense_fraction"] == (fired > rows.size // 10).mean()
    assert ours["ce_clean"] == pytest.approx(losses["ce_loss_without_sae"].mean().item(), **approx)
    assert ours["ce_replaced"] == pytest.approx(losses["ce_loss_with_sae"].mean().item(), **approx)
    assert ours["ce_zero"] == pytest.approx(losses["ce_loss_with_ablation"].mean().item(), **approx)
    # SAELens also counts the last position, which predicts no token that is there
    assert ours["kl"] == pytest.approx(losses["kl_div_with_sae"][:, :-1].mean().item(), **approx)
    assert ours["kl_zero"] == pytest.approx(losses["kl_div_with_ablation"][:, :-1].mean().item(), **approx)
