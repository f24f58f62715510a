"""A finished experiment on a tiny model: dictionaries of every kind, evaluated and looked up."""

import shutil
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from tests.models.test_architectures import TINY

from saeflow.export.run import export
from saeflow.jobs.job import Job
from saeflow.planning.expansion import compose
from saeflow.planning.graph import Plan
from saeflow.planning.stages import stages

ROOT = Path(__file__).resolve().parents[2]
SWEEP = (
    "sweep=[{dictionary:topk,site:mlp_out,site.layer:1,dictionary.k:4},"
    "{dictionary:relu,site:mlp_out,site.layer:1,dictionary.l1_coefficient:0.01},"
    "{dictionary:transcoder,site:mlp,dictionary.l1_coefficient:0.01,site.layer:[0,1]},"
    "{dictionary:transcoder_topk,site:mlp,dictionary.k:4,site.layer:[0,1]},"
    "{dictionary:skip_transcoder,site:mlp,dictionary.k:4,site.layer:[0,1]},"
    "{dictionary:transcoder_topk,site:mlp,dictionary.activation:batchtopk,dictionary.k:4,site.layer:[0,1]},"
    "{dictionary:heads_topk,site:attn_z,site.layer:1,dictionary.k:3},"
    "{dictionary:jacobian,site:mlp,site.layer:1,dictionary.k:4,dictionary.jacobian_coefficient:0.1}]"
)
FEATURES = [
    "features=all",
    "features.n_tokens=500",
    "features.top=5",
    "features.intervals=4",
    "features.bins=8",
    "features.per_interval=2",
    "features.before=6",
    "features.after=3",
    "features.effect_samples=1",
]


def make(plan: Plan, *wanted: str) -> None:
    for stage in wanted:
        for batch in plan.batches.get(stage) or [[key] for key in plan.stages[stage]]:
            stages()[stage].work([Job(plan.instance(stage, key), plan, "cpu") for key in batch])


@pytest.fixture(scope="session")
def compose_tiny(neox_folder: Path, corpus_file: Path) -> Callable[..., Plan]:
    """The plan of the experiment, with other overrides, below a folder."""

    def composed(results: Path, *overrides: str, features: list[str] = FEATURES, sweep: str = SWEEP) -> Plan:
        chosen = [f"model.path={neox_folder}", "corpus=local", f"corpus.path={corpus_file}"]
        chosen += ["model=local", "model.name=tiny-neox", "corpus.name=words", "experiment_name=tiny", "figures=[]"]
        chosen += [one for one in TINY if not one.startswith("site.")]
        return compose(ROOT / "conf", [*chosen, sweep, *features, *overrides], results=str(results))

    return composed


@pytest.fixture(scope="session")
def finished(compose_tiny: Callable[..., Plan], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Its `results/`: read it only."""
    results = tmp_path_factory.mktemp("experiment") / "results"
    make(compose_tiny(results), "tokens", "activations", "train", "jacobian", "baseline", "evaluate", "features")
    return results


@pytest.fixture
def plan(compose_tiny: Callable[..., Plan], finished: Path) -> Plan:
    return compose_tiny(finished)


@pytest.fixture
def copy(compose_tiny: Callable[..., Plan], finished: Path, tmp_path: Path) -> Plan:
    """Of a copy of the results, which a test may damage."""
    shutil.copytree(finished, tmp_path / "results")
    return compose_tiny(tmp_path / "results")


@pytest.fixture(scope="session")
def exported(
    compose_tiny: Callable[..., Plan], finished: Path, tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str], tuple[Path, dict[str, Any]]]:
    """The export of the experiment in a format, made once, and what it says of itself: read it only."""

    @cache
    def made(name: str) -> tuple[Path, dict[str, Any]]:
        return export(compose_tiny(finished), name, tmp_path_factory.mktemp("exports") / name, "cc-by-4.0")

    return made
