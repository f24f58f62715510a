"""A model with a pruned head, whose activations are 0: named, and everything else goes on, to the last figure."""

import json
import logging
import shutil
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file
from tests.heads.test_job import FIGURES, PER_HEAD, SIZES
from tests.models.test_architectures import TINY, run_all

from saeflow.planning.expansion import compose

ROOT = Path(__file__).resolve().parents[2]
H, HEAD, PRUNED = 4, 8, 1


@pytest.fixture(scope="module")
def pruned_folder(neox_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Head 1 of layer 1 has no values: its rows of the fused queries, keys and values are 0."""
    folder = tmp_path_factory.mktemp("pruned") / "model"
    shutil.copytree(neox_folder, folder)
    weights = load_file(folder / "model.safetensors")
    for name in ("weight", "bias"):
        fused = weights[f"gpt_neox.layers.1.attention.query_key_value.{name}"]
        fused.view(H, 3, HEAD, -1)[PRUNED, 2] = 0
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


@pytest.mark.slow
def test_a_pruned_head_goes_through_every_stage(
    pruned_folder: Path, corpus_file: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    kinds = "dictionary:[heads,heads_topk,concat,topk]"
    sweep = f"sweep={{site:attn_z,{kinds},site.layer:1,{PER_HEAD.replace('=', ':')}}}"
    chosen = ["model=local", f"model.path={pruned_folder}", "corpus=local", f"corpus.path={corpus_file}"]
    plan = compose(ROOT / "conf", [sweep, FIGURES, *chosen, *TINY, *SIZES], results=str(tmp_path))
    with caplog.at_level(logging.WARNING):
        run_all(plan)
    assert f"head {PRUNED} of blocks.1.attn.hook_z is 0 on every token" in caplog.text
    found = [json.loads((plan.folder("evaluate", k) / "summary.json").read_text()) for k in plan.stages["evaluate"]]
    assert len(found) == 2 * (1 + H) + 2
    for summary in found:
        silent = summary["hook_head_index"] == PRUNED
        assert (summary["l0"] == 0) is silent
        if silent:
            assert summary["ce_replaced"] == pytest.approx(summary["ce_clean"], abs=1e-9)
            assert summary["loss_recovered_zero"] is None and summary["loss_recovered_zero_reason"]
            assert summary["fvu"] is None and summary["relative_error"] is None
    (figures,) = plan.stages["figures"]
    assert (plan.folder("figures", figures) / "heads_decomposition.png").is_file()
