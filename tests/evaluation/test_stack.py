"""Several dictionaries at once, against the model with its MLP modules swapped, as the transcoder paper does it."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from evaluating import evaluate_all
from torch import Tensor, nn

from saeflow.config import EvaluationConfig, ModelConfig
from saeflow.dictionaries import Dictionary, Spec
from saeflow.dictionaries.fitting import FitError
from saeflow.dictionaries.sae import build
from saeflow.evaluation.stack import Member, StackEvaluation, evaluate_stack
from saeflow.models.loading import load_model

D, N_LATENTS = 32, 40
MEAN = torch.randn(D, generator=torch.Generator().manual_seed(5))


def dictionary(layer: int, kind: str = "transcoder") -> Dictionary:
    g = torch.Generator().manual_seed(layer)
    out = f"blocks.{layer}.hook_mlp_out"
    hook = f"blocks.{layer}.ln2.hook_normalized" if kind == "transcoder" else out
    spec = Spec(kind, "relu", D, D, N_LATENTS, hook, out)  # type: ignore[arg-type]
    W_enc, W_dec = torch.randn(D, N_LATENTS, generator=g) / 5, 0.2 * torch.randn(N_LATENTS, D, generator=g)
    return build(spec, W_enc, -0.5 * torch.ones(N_LATENTS), W_dec, 0.1 * torch.randn(D, generator=g))


class Swapped(nn.Module):
    """Stands for `block.mlp`."""

    def __init__(self, output: Any) -> None:
        super().__init__()
        self.output = output

    def forward(self, x: Tensor) -> Tensor:
        return self.output(x.flatten(0, 1)).view(x.shape)


@pytest.fixture
def model(model_folder: Path) -> Any:
    """With folded norms, so that an MLP's input is what the hook after the norm holds."""
    return load_model(model_folder, ModelConfig("tiny", path=str(model_folder), fold_ln=True), "cpu")


ROWS = np.random.default_rng(0).integers(1, 300, (9, 20))
TOKENS = torch.from_numpy(ROWS)


def run(model: Any, members: list[Member]) -> StackEvaluation:
    return evaluate_stack(model, members, ROWS, True, EvaluationConfig(batch_rows=4, resamples=40))


def log_p(model: Any, swapped: dict[int, Any]) -> Tensor:
    held = {layer: model.blocks[layer].mlp for layer in swapped}
    for layer, output in swapped.items():
        model.blocks[layer].mlp = Swapped(output)
    out = model(TOKENS).log_softmax(-1)[:, :-1].double()
    for layer, mlp in held.items():
        model.blocks[layer].mlp = mlp
    return out


@torch.no_grad()
def test_a_stack_is_the_model_with_its_mlps_swapped(model: Any) -> None:
    made = {layer: dictionary(layer) for layer in (0, 1)}
    latents: dict[int, Tensor] = {}

    def transcode(layer: int) -> Any:
        def output(x: Tensor) -> Tensor:
            latents[layer] = torch.relu(x @ made[layer].W_enc + made[layer].b_enc)
            return latents[layer] @ made[layer].W_dec + made[layer].b_dec

        return output

    found = run(model, [Member(one, MEAN) for one in made.values()]).summary
    clean = log_p(model, {})
    for name, output in (
        ("replaced", transcode),
        ("zero", lambda _: torch.zeros_like),
        ("mean", lambda _: lambda x: MEAN.expand_as(x)),
    ):
        changed = log_p(model, {layer: output(layer) for layer in made})
        ce = -changed.gather(2, TOKENS[:, 1:, None])[..., 0]
        kl = (clean.exp() * (clean - changed)).sum(-1)
        assert found[f"ce_{name}"] == pytest.approx(ce.mean().item(), rel=1e-5)
        assert found["kl" if name == "replaced" else f"kl_{name}"] == pytest.approx(kl.mean().item(), rel=1e-4)
        assert found[f"ce_{name}_without_bos"] == pytest.approx(ce[:, 1:].mean().item(), rel=1e-5)
    l0 = {layer: (f > 0).sum(-1).double().mean().item() for layer, f in latents.items()}
    for layer, value in l0.items():
        assert found[f"l0.blocks.{layer}.hook_mlp_out"] == pytest.approx(value, rel=1e-6)
    assert found["l0"] == pytest.approx(sum(l0.values()), rel=1e-6)
    assert found["ce_replaced_low"] < found["ce_replaced"] < found["ce_replaced_high"]


@pytest.mark.parametrize("kind", ["sae", "transcoder"])
def test_a_stack_of_one_is_an_evaluation(model: Any, kind: str) -> None:
    one = dictionary(1, kind)
    found = run(model, [Member(one, MEAN)]).summary
    alone = evaluate_all(model, [one], MEAN, ROWS, 4)[0].summary
    for name in ("ce_replaced", "ce_zero", "ce_mean", "kl", "l0", "ce_clean", "ce_replaced_without_bos"):
        assert found[name] == pytest.approx(alone[name], rel=1e-6, abs=1e-7), name


def test_a_dictionary_reads_what_the_ones_below_leave(model: Any) -> None:
    above = "l0.blocks.1.hook_mlp_out"
    together = run(model, [Member(dictionary(0), MEAN), Member(dictionary(1), MEAN)]).summary
    alone = run(model, [Member(dictionary(1), MEAN)]).summary
    assert together[above] != alone[above]


def test_what_has_no_meaning_says_why(model: Any) -> None:
    """Two rows of one prediction each, from BOS: without it there is none."""
    found = evaluate_stack(model, [Member(dictionary(1), MEAN)], ROWS[:2, :2], True, EvaluationConfig(2, 5)).summary
    assert found["ce_replaced"] is not None and found["ce_replaced_without_bos"] is None
    assert found["ce_replaced_without_bos_reason"] == "no predictions"


def test_two_dictionaries_cannot_write_at_one_hook(model: Any) -> None:
    with pytest.raises(FitError, match=r"write at one hook: blocks.1.hook_mlp_out, blocks.1.hook_mlp_out"):
        run(model, [Member(dictionary(1), MEAN), Member(dictionary(1, "sae"), MEAN)])
