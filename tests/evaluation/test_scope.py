"""`evaluation.replace_first=false`: the first token of a row keeps the model's own activations, and counts nowhere."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from evaluating import evaluate_all
from tests.evaluation.test_evaluate import MEAN, D, Reference, constant, dictionary, load
from tests.planning.test_plan import changed, home, plan_of  # noqa: F401 (home is a fixture)
from torch import Tensor

from saeflow.config import EvaluationConfig
from saeflow.dictionaries.sae import build
from saeflow.evaluation.scope import warn_of_untrained_first
from saeflow.evaluation.stack import Member, evaluate_stack
from saeflow.planning.expansion import compose

ROWS = np.random.default_rng(1).integers(1, 300, (7, 20))
TOKENS = torch.from_numpy(ROWS)


def run(model: Any, made: Any, mean: Tensor = MEAN, prepend_bos: bool = True) -> Any:
    return evaluate_all(model, [made], mean, ROWS, 5, prepend_bos, replace_first=False)[0]


@pytest.mark.parametrize("prepend_bos", [True, False])
@pytest.mark.parametrize(("kind", "activation"), [("sae", "topk"), ("transcoder", "relu")])
def test_metrics_equal_full_passes_with_the_first_tokens_left_alone(
    neox_folder: Path, kind: str, activation: str, prepend_bos: bool
) -> None:
    made = dictionary(kind, activation, seed=3)
    evaluation = run(load(neox_folder), made, prepend_bos=prepend_bos)
    found, reference = evaluation.summary, Reference(neox_folder)
    others = (torch.arange(20) > 0)[None, :, None]

    def reconstruct(x: Tensor, y: Tensor) -> Tensor:
        return made.forward((x if kind == "transcoder" else y).flatten(0, 1)).view(y.shape)

    def kept(new: Any) -> Any:
        return lambda x, y: torch.where(others, new(x, y), y)

    runs = {"clean": None, "replaced": kept(reconstruct)}
    runs |= {"zero": kept(lambda x, y: torch.zeros_like(y)), "mean": kept(lambda x, y: MEAN.expand_as(y))}
    runs = {name: reference.run(TOKENS, replace) for name, replace in runs.items()}
    clean = runs["clean"]["log_p"].double()
    for name, of in runs.items():
        log_p = of["log_p"].double()[:, :-1]
        ce = -log_p.gather(2, TOKENS[:, 1:, None])[:, 1:].mean().item()
        assert found[f"ce_{name}"] == pytest.approx(ce, rel=2e-5)
        kl = (clean.exp()[:, :-1] * (clean[:, :-1] - log_p)).sum(-1)[:, 1:].mean().item()
        if name != "clean":
            assert found["kl" if name == "replaced" else f"kl_{name}"] == pytest.approx(kl, rel=2e-4)
    x, y = (runs["clean"][side][:, 1:].flatten(0, 1) for side in ("x", "y"))
    latents, output = made.encode(x if kind == "transcoder" else y), made.forward(x if kind == "transcoder" else y)
    unexplained = (y - output).square().sum() / (y - y.mean(0)).square().sum()
    wanted = {"n_tokens": 7 * 19, "n_predictions": 7 * 18, "l0": (latents != 0).sum(1).double().mean().item()}
    wanted |= {"fvu": unexplained.item(), "dead_fraction": (~(latents != 0).any(0)).double().mean().item()}
    legacy = [(y[part] - output[part], y[part] - y[part].mean(0)) for part in (slice(5 * 19), slice(5 * 19, None))]
    ratios = [1 - error.square().sum(1) / centred.square().sum(1) for error, centred in legacy]
    wanted["explained_variance_legacy"] = torch.cat(ratios).mean().item()
    for name, value in wanted.items():
        assert found[name] == pytest.approx(value, rel=2e-4), name
    for name in ("ce_replaced", "fvu", "l0", "kl"):
        assert found[f"{name}_without_bos"] == found[name]
        assert found[f"{name}_without_bos_low"] == found[f"{name}_low"]
    assert evaluation.by_l0.sum() == 7 * 19 and evaluation.fired[0].sum() == 0


def test_a_dictionary_that_is_awful_at_the_first_token_is_judged_by_the_others(neox_folder: Path) -> None:
    """As one is that was not trained there. Below another layer, what the first token is matters to the others."""
    model, hook = load(neox_folder), "blocks.0.hook_mlp_out"
    made = dictionary(hook=hook)

    def write(y: Tensor, hook: Any) -> Tensor:
        return torch.cat([y[:, :1], made.forward(y[:, 1:].flatten(0, 1)).view(y[:, 1:].shape)], dim=1)

    log_p = model.run_with_hooks(TOKENS, fwd_hooks=[(hook, write)]).log_softmax(-1).double()
    ce = -log_p[:, :-1].gather(2, TOKENS[:, 1:, None])[:, 1:].mean().item()
    plain, found = evaluate_all(model, [made], MEAN, ROWS, 5)[0].summary, run(model, made).summary
    assert found["ce_replaced"] == pytest.approx(ce, rel=1e-6)
    assert found["ce_clean"] == plain["ce_clean_without_bos"]
    assert abs(found["ce_replaced"] - plain["ce_replaced_without_bos"]) > 1e-3
    config = EvaluationConfig(batch_rows=5, resamples=10, replace_first=False)
    assert evaluate_stack(model, [Member(made, MEAN)], ROWS, True, config).summary["ce_replaced"] == pytest.approx(ce)
    assert found["fvu"] == pytest.approx(plain["fvu_without_bos"], rel=1e-9)


def test_a_stack_of_one_is_an_evaluation_and_constants_are_the_ablations(neox_folder: Path) -> None:
    model = load(neox_folder)
    for made in (dictionary(), dictionary("transcoder", "relu"), constant(MEAN)):
        alone = run(model, made).summary
        config = EvaluationConfig(batch_rows=5, resamples=10, replace_first=False)
        stack = evaluate_stack(model, [Member(made, MEAN)], ROWS, True, config).summary
        for name in ("n_tokens", "n_predictions", "ce_clean", "ce_replaced", "ce_zero", "ce_mean", "kl", "kl_mean"):
            assert stack[name] == pytest.approx(alone[name], rel=1e-6, abs=1e-9), name
        assert stack["l0"] == pytest.approx(alone["l0"])
    assert alone["ce_replaced"] == alone["ce_mean"]


def test_one_head_keeps_its_first_token(neox_folder: Path) -> None:
    model, head = load(neox_folder), 2
    hook, size = "blocks.0.attn.hook_z", D // 4
    mean = MEAN[:size]
    spec = dataclasses.replace(constant(MEAN).spec, hook_name=hook, hook_name_out=hook, d_in=size, d_out=size)
    spec = dataclasses.replace(spec, hook_head_index=head)
    made = build(spec, torch.zeros(size, 3), torch.zeros(3), torch.zeros(3, size), mean)

    def write(z: Tensor, hook: Any) -> Tensor:
        z = z.clone()
        z[:, 1:, head] = mean
        return z

    log_p = model.run_with_hooks(TOKENS, fwd_hooks=[(hook, write)]).log_softmax(-1).double()
    ce = -log_p[:, :-1].gather(2, TOKENS[:, 1:, None])[:, 1:].mean().item()
    found = run(model, made, mean).summary
    assert found["ce_replaced"] == found["ce_mean"] == pytest.approx(ce, rel=1e-5)


def test_dictionaries_that_stand_for_what_they_were_not_trained_on_are_named(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for name, share in (("trained", None), ("some", 0.1), ("none", 1.0)):
        (tmp_path / name).mkdir()
        if share is not None:
            (tmp_path / name / "left_out.json").write_text(json.dumps({"first_of_rows": share}))
    folders = [tmp_path / name for name in ("trained", "some", "none", "none")]
    warn_of_untrained_first(folders, False)
    assert not caplog.messages
    warn_of_untrained_first(folders, True)
    (said,) = caplog.messages
    assert said.startswith(f"{tmp_path / 'none'} was not trained") and "set evaluation.replace_first=false" in said


# -------------------------------------------------------------------- the plan
def test_the_scope_is_in_keys_only_where_it_is_not_the_default(home: Path) -> None:  # noqa: F811
    plain, kept = plan_of(home), plan_of(home, "evaluation.replace_first=false")
    assert plan_of(home, "evaluation.replace_first=true").stages["evaluate"].keys() == plain.stages["evaluate"].keys()
    assert changed(plain, kept) == {"baseline": 1, "evaluate": 2, "figures": 1}
    both = plan_of(home, "evaluation.replace_first=[true,false]")
    for stage in ("baseline", "evaluate"):
        scopes = [{both.stages[stage][k].config.get("replace_first") for k in b} for b in both.batches[stage]]
        assert len(scopes) == 2 and {None} in scopes and {False} in scopes
    for key in both.stages["evaluate"].values():
        (baseline,) = key.needs["baseline"]
        of_baseline = both.stages["baseline"][baseline].config
        assert of_baseline.get("replace_first") == key.config.get("replace_first")


def test_stacks_of_both_scopes_are_two(home: Path) -> None:  # noqa: F811
    sweep = "sweep={dictionary:topk,site.layer:[0,1],evaluation.replace_first:[true,false]}"
    plan = compose(home / "conf", [sweep, "stacks=[all]"], digests=home / "digests.json")
    assert sorted(s.config.get("replace_first", True) for s in plan.stages["stack"].values()) == [False, True]
