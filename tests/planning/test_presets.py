"""Every preset that has to be fetched first is a plan, over stand-ins in the layout that they have on the hub."""

from pathlib import Path

import pytest
from tests.presets.stand_ins import EXPERIMENTS, Preset, overrides, presets

from saeflow.planning.expansion import compose
from saeflow.text.corpus import open_corpus

CONF = EXPERIMENTS.parent


@pytest.fixture(scope="module")
def hub(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("hub")


def test_presets_that_need_the_hub_are_found() -> None:
    found = {preset.experiment for preset in presets()}
    assert {
        "jsae_paper",
        "notebook_001",
        "notebook_004",
        "blind_pythia-410m",
        "smollm2_jsae",
    } <= found and not found & {
        "demo",
        "jsae",
        "tracr_case3",
    }


@pytest.mark.parametrize("preset", presets(), ids=lambda preset: preset.name)
def test_a_preset_is_a_plan(hub: Path, preset: Preset) -> None:
    plan = compose(CONF, overrides(preset, hub), results=str(hub / "results"))
    made = {stage: len(keys) for stage, keys in plan.to_make.items() if keys}
    assert made["tokens"] == 2 and made["train"] >= 2 and made["evaluate"] >= made["train"] and made["figures"] == 1


@pytest.mark.parametrize(
    "preset", {p.corpus: p for p in presets() if p.corpus != "embedded"}.values(), ids=lambda preset: preset.corpus
)
def test_a_data_set_streams_from_its_layout(hub: Path, preset: Preset) -> None:
    """By the names and the fields that `conf/corpus/` has."""
    plan = compose(CONF, overrides(preset, hub), results=str(hub / "results"))
    corpus = next(iter(plan.stages["tokens"].values())).config["corpus"]
    documents = [document.text for document in open_corpus(corpus)]
    assert len(documents) == 400 and len(set(documents)) > 390 and all(documents)
