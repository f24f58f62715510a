"""GPT-NeoX, GPT-2 and Llama folders go through every stage unchanged, from tokens to figures.

The scripts' own functions are called, in one process, so that TransformerLens is imported once.
"""

import json
import math
from pathlib import Path

import pytest

from saeflow.jobs.job import Job
from saeflow.planning.expansion import compose
from saeflow.planning.graph import Plan
from saeflow.planning.stages import stages

ROOT = Path(__file__).resolve().parents[2]
TINY = [
    "tokens.context_size=32",
    "tokens.train_tokens=4096",
    "tokens.held_out_tokens=512",
    "tokens.held_out_fraction=0.3",
    "activations.chunk_tokens=256",
    "activations.shard_tokens=1024",
    "training.n_tokens=2048",
    "training.batch_size=256",
    "jacobian.n_tokens=64",
    "dictionary.expansion=2",
    "site.layer=1",
]
SWEEP = (
    "sweep=[{dictionary:relu,site:attn_z,dictionary.l1_coefficient:0.01},"
    "{dictionary:transcoder,site:mlp,dictionary.l1_coefficient:0.01},{dictionary:pair,site:mlp,dictionary.k:4}]"
)


def run_all(plan: Plan) -> None:
    for stage, table in plan.stages.items():
        for batch in plan.batches.get(stage) or [[key] for key in table]:
            stages()[stage].work([Job(plan.instance(stage, key), plan, "cpu") for key in batch])


def test_every_architecture_goes_through_every_stage(model_folder: Path, corpus_file: Path, tmp_path: Path) -> None:
    chosen = ["model=local", f"model.path={model_folder}", "corpus=local", f"corpus.path={corpus_file}"]
    plan = compose(ROOT / "conf", [SWEEP, *chosen, *TINY], results=str(tmp_path / "results"))
    run_all(plan)
    summaries = [json.loads((plan.folder("evaluate", k) / "summary.json").read_text()) for k in plan.stages["evaluate"]]
    assert len(summaries) == 4
    for summary in summaries:
        assert math.isfinite(summary["ce_replaced"]) and summary["l0"] > 0
        assert summary["ce_clean"] == pytest.approx(summaries[0]["ce_clean"], abs=1e-12)
    (figures,) = plan.stages["figures"]
    assert (plan.folder("figures", figures) / "jacobian_histogram.png").is_file()
