"""Tables of latents in the pipeline: which are planned, and what they have from other stages."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import zarr
from tests.models.test_architectures import TINY
from tests.planning.test_plan import changed, home, plan_of  # noqa: F401

from saeflow.activations.store import open_column
from saeflow.config import ConfigError
from saeflow.dictionaries import Spec, load_dictionary, save_dictionary
from saeflow.features import open_features
from saeflow.jobs.job import Job
from saeflow.planning.batches import resources
from saeflow.planning.expansion import compose
from saeflow.planning.graph import Plan
from saeflow.planning.stages import stages
from saeflow.text.tokens import open_tokens

ROOT = Path(__file__).resolve().parents[2]


def test_only_where_they_are_asked_for(home: Path) -> None:  # noqa: F811
    before, after = plan_of(home), plan_of(home, "features=all")
    assert not before.stages["features"] and changed(before, after) == {"features": 2}
    assert after.to_make["features"] == list(after.stages["features"]) and len(after.batches["features"]) == 1
    assert changed(after, plan_of(home, "features=all", "features.top=5")) == {"features": 2}
    assert not changed(after, plan_of(home, "features=all", "features.top=16", "evaluation.resamples=9")).get(
        "features"
    )


def test_what_is_in_another_table_has_none_of_its_own(home: Path) -> None:  # noqa: F811
    heads = plan_of(home, "sweep={dictionary:heads_topk,site:attn_z}", "dictionary.k=4", "features=all")
    assert len(heads.stages["evaluate"]) > 1 and len(heads.stages["features"]) == 1
    pair = plan_of(home, "sweep={dictionary:jacobian,site:mlp}", "dictionary.k=4",
                   "dictionary.jacobian_coefficient=1", "features=all")  # fmt: skip
    found = pair.stages["features"].values()
    assert sorted(instance.config["part"] for instance in found) == ["input", "output"]
    assert all(instance.needs["jacobian"] == list(pair.stages["jacobian"]) for instance in found)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["features=all", "features.top=0"], "features.top=0 is out of range: it must be 1 or more"),
        (["features.split=test"], "features.split='test' is not legal: use one of held_out, train"),
        (["features=some"], "no config features=some.*features can be: all, none"),
    ],
)
def test_what_cannot_be_is_refused(home: Path, overrides: list[str], message: str) -> None:  # noqa: F811
    with pytest.raises(ConfigError, match=message):
        plan_of(home, *overrides)


def test_a_foreign_transcoder_is_not_looked_up_where_nothing_is_cached(home: Path) -> None:  # noqa: F811
    (home / "foreign").mkdir()
    (home / "foreign/cfg.json").write_text('{"metadata": {}}')
    (home / "foreign/sae_weights.safetensors").touch()
    foreign = ["sweep={dictionary:foreign,site:mlp}", f"dictionary.path={home}/foreign", "features=all"]
    assert len(plan_of(home, *foreign).stages["features"]) == 1
    with pytest.raises(ConfigError, match=r"those at blocks\.2\.ln2\.hook_normalized are not cached"):
        plan_of(home, *foreign, "features.split=train")


def test_time_and_memory_follow_what_is_looked_at(home: Path) -> None:  # noqa: F811
    def asked(*overrides: str) -> float:
        plan = plan_of(home, "features=all", *overrides)
        instances = list(plan.stages["features"].values())
        found = resources(plan, "features", [i.key for i in instances])
        assert found["mem_mb"] > 6000 and found["runtime"] >= 60
        return stages()["features"].operations(plan, instances)

    usual, half = asked(), asked("features.n_tokens=32768")
    assert usual == pytest.approx(2 * half) and asked("features.n_tokens=10000000") == usual
    assert asked("features.effect_samples=0") < usual < asked("dictionary.expansion=16")


def run(plan: Plan, *wanted: str) -> None:
    for stage in wanted:
        for batch in plan.batches.get(stage) or [[key] for key in plan.stages[stage]]:
            stages()[stage].work([Job(plan.instance(stage, key), plan, "cpu") for key in batch])


def test_a_pair_and_a_dictionary_of_another_library(neox_folder: Path, corpus_file: Path, tmp_path: Path) -> None:
    """Partners by the Jacobian; and looked up on cached activations, without a pass of the model."""
    import torch

    from saeflow.dictionaries.sae import build

    spec = Spec("sae", "relu", 32, 32, 40, "blocks.1.hook_mlp_out", "blocks.1.hook_mlp_out")
    g = torch.Generator().manual_seed(0)
    tensors = (torch.randn(size, generator=g) for size in ((32, 40), (40,), (40, 32), (32,)))
    (tmp_path / "theirs").mkdir()
    save_dictionary(build(spec, *tensors), tmp_path / "theirs")
    config = json.loads((tmp_path / "theirs/cfg.json").read_text())
    del config["metadata"]["saeflow"]  # as SAELens writes it
    (tmp_path / "theirs/cfg.json").write_text(json.dumps(config))
    sweep = (
        f"sweep=[{{dictionary:pair,site:mlp,dictionary.k:4}},{{dictionary:foreign,dictionary.path:{tmp_path}/theirs}}]"
    )
    chosen = ["model=local", f"model.path={neox_folder}", "corpus=local", f"corpus.path={corpus_file}", *TINY]
    chosen += [sweep, "features=all", "features.split=train", "features.effect_samples=0", "features.neighbours=6"]
    chosen += ["features.n_tokens=1000", "activations.dtype=bfloat16"]
    plan = compose(ROOT / "conf", chosen, results=str(tmp_path / "results"))
    run(plan, "tokens", "activations", "train", "foreign", "jacobian")

    def no_pass(*_: Any, **__: Any) -> None:
        raise AssertionError("the model is run")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("saeflow.features.lookup.read_hooks", no_pass)
        run(plan, "features")
    found = {key: open_features(plan.folder("features", key)) for key in plan.stages["features"]}
    assert len(found) == 3
    tokens = plan.folder("tokens", next(iter(plan.stages["features"].values())).needs["tokens"][0])
    store = open_tokens(tokens)
    for key, features in found.items():
        instance = plan.stages["features"][key]
        row, _ = store.spread_rows(33, 0)  # of 31 tokens beside BOS
        assert features.index["n_rows"] == 33 and features.index["split"] == "train"
        job = Job(instance, plan, "cpu")
        dictionary = load_dictionary(job.dictionaries()[0])
        columns = {column.hook_name: column for column in map(open_column, job.inputs("activations"))}
        array = np.asarray(zarr.open_array(columns[dictionary.spec.hook_name].array, mode="r")[:])
        x = torch.from_numpy(array).view(torch.bfloat16).float().view(store.n_rows, 32, -1)[row, 1:]
        fires = (dictionary.encode(x.flatten(0, 1)) > 0).sum(0).numpy()
        np.testing.assert_array_equal(features.table["fired"], fires)
        assert features.index["left_out"]["effect"] == "features.effect_samples is 0"
    (study,) = (plan.folder("jacobian", key) for key in plan.stages["jacobian"])
    group = zarr.open_group(study / "global.zarr", mode="r")
    J = np.zeros((64, 64), np.float32)
    J[np.asarray(group["output"][:]), np.asarray(group["input"][:])] = group["mean_absolute_all"][:]
    sides = [(f, f.index["hook_name"].endswith("mlp_out")) for f in found.values() if f.index["jacobian_key"]]
    assert sorted(is_output for _, is_output in sides) == [False, True]
    for features, is_output in sides:
        assert features.index["jacobian_key"] == study.name
        for latent, mean in enumerate(J if is_output else J.T):
            wanted = [i for i in np.lexsort((np.arange(64), -mean)) if mean[i] > 0][:6]
            near = features.table.iloc[latent]
            assert near["near_jacobian"].tolist()[: len(wanted)] == wanted
            np.testing.assert_array_equal(near["near_jacobian_mean"][: len(wanted)], mean[wanted])
    (theirs,) = (features for features in found.values() if not features.index["jacobian_key"])
    assert len(theirs) == 40 and not any(map(len, theirs.table["near_jacobian"]))


def test_labels_of_a_model_whose_algorithm_is_known(tmp_path: Path) -> None:
    chosen = ["experiment=tracr_case3", "sweep={model.tracr.method:compiled,site.hook_name:[blocks.0.hook_mlp_out]}"]
    chosen += ["training.n_tokens=20_000", "features=all", "features.n_tokens=2000"]
    plan = compose(ROOT / "conf", chosen, results=str(tmp_path))
    run(plan, "groundtruth", "tokens", "activations", "train", "recover", "features")
    (recovered,) = (plan.folder("recover", key) for key in plan.stages["recover"])
    (features,) = (open_features(plan.folder("features", key)) for key in plan.stages["features"])
    labels = pd.read_parquet(recovered / "labels.parquet").set_index("latent")
    table = features.table.set_index("latent")
    assert features.index["n_rows"] == 320 and table["label"].notna().sum() == len(labels) > 0
    assert table.loc[labels.index, "label"].tolist() == labels["label"].tolist()
    np.testing.assert_allclose(table.loc[labels.index, "label_f1"], labels["f1"], rtol=1e-6)
    best = features[int(labels["f1"].idxmax())]
    assert set(features.index["left_out"]) == {"effect", "raised"}  # its outputs are no tokens
    assert set(best.top[0].tokens) <= {"BOS", "a", "b", "c", "x", "PAD"}
