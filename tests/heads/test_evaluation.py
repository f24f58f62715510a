"""All heads replaced at once, each alone, and their ablations, against passes with hooks written by hand; in the
pipeline, on query heads that share keys and values too."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from tests.models.test_architectures import TINY, run_all
from torch import Tensor

from saeflow.config import ConfigError, EvaluationConfig, ModelConfig
from saeflow.dictionaries import BlockDiagonal, Spec, load_dictionary
from saeflow.dictionaries.sae import build
from saeflow.evaluation.baseline import AblationSite, measure_baselines
from saeflow.evaluation.evaluate import EvaluationTask, evaluate
from saeflow.evaluation.stack import Member, evaluate_stack
from saeflow.models.loading import load_model
from saeflow.planning.expansion import compose

ROOT = Path(__file__).resolve().parents[2]
HOOK, H, D, N = "blocks.1.attn.hook_z", 4, 8, 20
SETTINGS = EvaluationConfig(batch_rows=5, resamples=20)
ROWS = np.random.default_rng(0).integers(1, 300, (9, 16))
TOKENS = torch.from_numpy(ROWS)
MEAN = torch.randn(H * D, generator=torch.Generator().manual_seed(3))


def head(h: int) -> Any:
    g = torch.Generator().manual_seed(h)
    W_enc, W_dec = torch.randn(D, N, generator=g), 0.3 * torch.randn(N, D, generator=g)
    spec = Spec("sae", "relu", D, D, N, HOOK, HOOK, hook_head_index=h, apply_b_dec_to_input=True)
    return build(spec, W_enc, 0.1 * torch.randn(N, generator=g), W_dec, 0.1 * torch.randn(D, generator=g))


@torch.no_grad()
def ce(model: Any, change: dict[int, Any]) -> Tensor:
    """(rows, positions - 1), of a pass in which head h of z is what `change[h]` makes of it."""

    def replace(z: Tensor, hook: Any) -> Tensor:
        z = z.clone()
        for h, of in change.items():
            z[:, :, h] = of(z[:, :, h])
        return z

    logits = model.run_with_hooks(TOKENS, fwd_hooks=[(HOOK, replace)])
    return -logits.log_softmax(-1)[:, :-1].gather(2, TOKENS[:, 1:, None])[..., 0].double()


def by_hand(one: Any) -> Any:
    return lambda z: torch.relu((z - one.b_dec) @ one.W_enc + one.b_enc) @ one.W_dec + one.b_dec


def test_all_heads_and_each_alone_with_ablations_of_the_same_scope(model_folder: Path) -> None:
    model = load_model(model_folder, ModelConfig("tiny", path=str(model_folder)), "cpu")
    heads = [head(h) for h in range(H)]
    whole = BlockDiagonal(heads)
    means = MEAN.view(H, D)
    ablated = [AblationSite(HOOK, MEAN), *(AblationSite(HOOK, means[h], h) for h in range(H))]
    baselines = measure_baselines(model, ablated, ROWS, True, SETTINGS.batch_rows)
    tasks = [EvaluationTask(d, b) for d, b in zip([whole, *heads], baselines, strict=True)]
    summaries = [one.summary for one in evaluate(model, tasks, ROWS, True, SETTINGS)]
    scopes = [list(range(H)), *([h] for h in range(H))]
    for summary, scope in zip(summaries, scopes, strict=True):
        wanted = {
            "clean": ce(model, {}),
            "replaced": ce(model, {h: by_hand(heads[h]) for h in scope}),
            "zero": ce(model, dict.fromkeys(scope, torch.zeros_like)),
            "mean": ce(model, {h: lambda z, h=h: means[h].expand_as(z) for h in scope}),
        }
        for name, values in wanted.items():
            assert summary[f"ce_{name}"] == pytest.approx(values.mean().item(), rel=1e-5)
            assert summary[f"ce_{name}_without_bos"] == pytest.approx(values[:, 1:].mean().item(), rel=1e-5)
    for name in ("l0", "l0_without_bos"):
        assert summaries[0][name] == pytest.approx(sum(summary[name] for summary in summaries[1:]))
    _, cache = model.run_with_cache(TOKENS, names_filter=[HOOK])
    active = torch.cat([torch.relu((cache[HOOK][:, :, h] - d.b_dec) @ d.W_enc + d.b_enc) > 0 for h, d in
                        enumerate(heads)], dim=2).sum(2)  # fmt: skip
    assert summaries[0]["l0_without_bos"] == pytest.approx(active[:, 1:].double().mean().item())
    (counts,) = evaluate(model, tasks[:1], ROWS, True, SETTINGS)
    for part, l0 in zip(counts.by_l0, (active[:, :1], active[:, 1:]), strict=True):
        assert part.tolist() == torch.bincount(l0.flatten(), minlength=len(part)).tolist()
    stack = evaluate_stack(model, [Member(whole, MEAN)], ROWS, True, SETTINGS).summary
    for name in ("ce_replaced", "ce_zero", "ce_mean", "l0"):
        assert stack[name] == pytest.approx(summaries[0][name], rel=1e-6)


# -------------------------------------------------------------------- the pipeline
@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory, llama_folder: Path, corpus_file: Path) -> tuple[Path, Any]:
    """Heads and concatenated at two layers of a model whose query heads share keys and values, with a blind set."""
    home = tmp_path_factory.mktemp("heads")
    chosen = ["model=local", f"model.path={llama_folder}", "corpus=local", f"corpus.path={corpus_file}", *TINY]
    asked = ["site=attn_z", "dictionary=[heads_topk,topk]", "site.layer=[0,1]", "dictionary.k=2", "stacks=[all]"]
    asked += ["evaluation.resamples=5", "figures=[sparsity_faithfulness,matched_ce]"]
    asked += ["blind={n_features:3,min_frequency:0}"]
    plan = compose(ROOT / "conf", [*chosen, *asked], results=str(home))
    run_all(plan)
    return home, plan


@pytest.mark.slow
def test_heads_go_through_the_pipeline_like_any_other(done: tuple[Path, Any]) -> None:
    home, plan = done
    rows = [json.loads((p / "summary.json").read_text()) for p in (home / "evaluate").iterdir()]
    table = pd.DataFrame(rows).sort_values(["hook_name", "hook_head_index"], na_position="first")
    assert sorted(table["kind"]) == ["heads"] * 2 + ["sae"] * 10
    for key, group in table[table["train_key"].str.startswith("heads")].groupby("train_key"):
        assert list(group["part"].fillna("")) == ["", "head_0", "head_1", "head_2", "head_3"]
        assert list(group["dictionary_key"]) == [key, *(f"{key}/head_{h}" for h in range(4))]
        assert group["d_sae"].tolist() == [64, 16, 16, 16, 16]
        assert group["l0_without_bos"].iloc[0] == pytest.approx(group["l0_without_bos"].iloc[1:].sum())
        assert group["ce_zero"].nunique() == 5  # each against its own scope
    for folder in (home / "stack").iterdir():
        stack = json.loads((folder / "summary.json").read_text())
        assert stack["l0"] == pytest.approx(sum(stack[f"l0.blocks.{layer}.attn.hook_z"] for layer in (0, 1)))
    (blind,) = (home / "blind").iterdir()
    kinds = [entry["kind"] for entry in json.loads((blind / "secret/key.json").read_text()).values()]
    assert sorted(kinds) == ["heads"] * 6 + ["sae"] * 6
    figures = plan.folder("figures", next(iter(plan.stages["figures"])))
    assert set(pd.read_csv(figures / "sparsity_faithfulness.csv")["series"]) == {
        "TopK SAEs by head", "TopK SAE", "TopK SAE of one head",
    }  # fmt: skip


def test_query_heads_are_read_and_key_value_heads_are_their_own(
    done: tuple[Path, Any], llama_folder: Path, corpus_file: Path
) -> None:
    """hook_z has the 4 query heads; hook_v has its 2 heads."""
    home, plan = done
    for key in plan.stages["train"]:
        made = load_dictionary(home / "train" / key)
        assert (made.d_in, getattr(made, "heads", None) is not None) == (32, key.startswith("heads"))
    chosen = ["model=local", f"model.path={llama_folder}", "corpus=local", f"corpus.path={corpus_file}", *TINY]
    chosen += ["dictionary=heads_topk"]
    shared = compose(ROOT / "conf", [*chosen, "site=attn_z", "site.hook_name=blocks.1.attn.hook_v"])
    parts = [e.config.get("part") for e in shared.stages["evaluate"].values()]
    assert parts == [None, "head_0", "head_1"]
    with pytest.raises(ConfigError, match=r"hook_attn_out has none; these have: attn.hook_q, attn.hook_k, attn.hook_v"):
        compose(ROOT / "conf", [*chosen, "site=attn_out", "site.layer=1"])
