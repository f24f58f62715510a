"""Neuronpedia's and SAEDashboard's files say what the tables of latents say, in the fields that the tools have."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from tests.export.peers import ask, fits

from saeflow.config import ConfigError, ModelConfig
from saeflow.export.run import export
from saeflow.export.subjects import Subject, subjects
from saeflow.features import open_features
from saeflow.features.reader import Features
from saeflow.models.loading import load_model
from saeflow.models.splicing import flattened, read_hooks
from saeflow.planning.graph import Plan
from saeflow.text.tokens import open_tokens

SCHEMAS = json.loads((Path(__file__).parent / "schemas.json").read_text())
PROCESSING = {"fold_ln": False, "center_writing_weights": False, "center_unembed": False}


class Made:
    """Both exports of the experiment."""

    def __init__(self, plan: Plan, pages: Path, vis: Path) -> None:
        self.subjects, self.pages, self.vis = subjects(plan), pages, vis

    def batches(self, subject: Subject) -> list[dict[str, Any]]:
        files = sorted((self.pages / subject.name).glob("batch-*.json"), key=lambda f: int(f.stem[6:]))
        return [json.loads(file.read_text()) for file in files]

    def features(self, subject: Subject) -> list[dict[str, Any]]:
        return [feature for batch in self.batches(subject) for feature in batch["features"]]

    def file(self, subject: Subject) -> Path:
        return self.vis / subject.name / "sae_vis_data.json"

    def data(self, subject: Subject) -> dict[str, Any]:
        return json.loads(self.file(subject).read_text())


@pytest.fixture
def made(plan: Plan, exported: Any) -> Made:
    return Made(plan, exported("neuronpedia")[0], exported("saedashboard")[0])


@pytest.fixture(scope="module")
def model(neox_folder: Path) -> Any:
    return load_model(neox_folder, ModelConfig("tiny", path=str(neox_folder), **PROCESSING), "cpu")


def table(subject: Subject) -> Features:
    return open_features(subject.features().path)


def examples(features: Features) -> pd.DataFrame:
    return pd.read_parquet(features.folder / "examples.parquet")


# -------------------------------------------------------------------- Neuronpedia
@pytest.mark.slow
def test_fields_are_those_that_neuronpedia_has(made: Made) -> None:
    schema = SCHEMAS["neuronpedia"]
    for subject in made.subjects:
        for i, batch in enumerate(made.batches(subject)):
            assert batch.keys() == schema["Batch"].keys() and fits(batch, "Batch", schema)
            assert (batch["model_id"], batch["sae_set"]) == ("tiny-neox", subject.name)
            assert batch["layer"] == int(subject.dictionary.spec.hook_name_out.split(".")[1])
            first = [feature["feature_index"] for feature in batch["features"]]
            assert first == [*range(128 * i, min(128 * (i + 1), subject.dictionary.d_sae))]
            for feature in batch["features"]:
                assert feature.keys() == schema["Feature"].keys() and fits(feature, "Feature", schema)
                for activation in feature["activations"]:
                    assert fits(activation, "Activation", schema)
                    optional = {name for name in schema["Activation"] if name.startswith("dfa")}
                    assert activation.keys() == schema["Activation"].keys() - optional
        settings = json.loads((made.pages / subject.name / "run_settings.json").read_text())
        assert fits(settings, "run_settings", schema)


def test_numbers_are_those_of_the_tables(made: Made) -> None:
    for subject in made.subjects:
        features = table(subject)
        for latent, found in zip(features, made.features(subject), strict=True):
            row = latent.row
            assert found["frac_nonzero"] == row["frequency"]
            assert found["pos_str"] == [text for text, _ in latent.raised]
            np.testing.assert_allclose(found["pos_values"], [value for _, value in latent.raised], atol=5.1e-4)
            assert found["neg_str"] == [text for text, _ in latent.lowered]
            np.testing.assert_allclose(found["neg_values"], [value for _, value in latent.lowered], atol=5.1e-4)
            assert found["n_prompts_total"] == features.index["n_rows"] and found["n_tokens_in_prompt"] == 32
            assert found["dataset"] == "words"
            shown = [*latent.top, *(one for some in reversed(latent.intervals) for one in some)]
            assert [one["tokens"] for one in found["activations"]] == [one.tokens for one in shown]
            for ours, theirs in zip(shown, found["activations"], strict=True):
                np.testing.assert_allclose(theirs["values"], ours.activations, atol=5.1e-4)
                assert theirs["qualifying_token_index"] == ours.at
                assert theirs["values"][ours.at] == pytest.approx(ours.value, abs=5.1e-4)
                if ours.interval is None:
                    assert (theirs["bin_min"], theirs["bin_max"], theirs["bin_contains"]) == (-1, row["max"], -1)
                else:
                    assert theirs["bin_min"] - 1e-6 <= ours.value <= theirs["bin_max"] + 1e-6
            if row["fired"]:
                assert sum(found["freq_hist_data_bar_heights"]) == row["fired"]
                width = row["max"] / features.index["bins"]
                centres = width * (np.arange(features.index["bins"]) + 0.5)
                np.testing.assert_allclose(found["freq_hist_data_bar_values"], centres, atol=5.1e-4)
            else:
                assert found["activations"] == found["freq_hist_data_bar_heights"] == []


def activations(model: Any, subject: Subject) -> tuple[np.ndarray, np.ndarray]:
    """Of all tokens looked at but the BOS in front of rows, by running the model and the dictionary: of all latents
    (N, n), and the tokens (R, P)."""
    store = open_tokens(subject.features().input("tokens"))
    _, rows = store.spread_rows(table(subject).index["n_rows"], 0)
    tokens = torch.from_numpy(rows.tokens.astype(np.int64))
    with torch.no_grad():
        (value,) = read_hooks(model, tokens, [subject.dictionary.spec.hook_name])
    return subject.dictionary.encode(flattened(value[:, 1:], None)).numpy(), tokens.numpy()


def test_intervals_contain_what_the_tokens_say(made: Made, model: Any) -> None:
    subject = next(one for one in made.subjects if one.dictionary.spec.kind == "sae")
    f, _ = activations(model, subject)
    checked = 0
    for found in made.features(subject):
        of_one, contains = f[:, found["feature_index"]], {}
        for one in found["activations"]:
            if one["bin_contains"] >= 0:
                contains[one["bin_min"], one["bin_max"]] = one["bin_contains"]
        for (low, high), share in contains.items():
            inside = (of_one >= low) & (of_one < high) if high < of_one.max() - 1e-6 else of_one >= low
            assert share == pytest.approx(inside.mean(), abs=2.1 / len(of_one))  # a value on an edge
            checked += 1
    assert checked > 20


# -------------------------------------------------------------------- SAEDashboard
def test_fields_are_those_that_saedashboard_has(made: Made) -> None:
    schema = SCHEMAS["saedashboard"]
    for subject in made.subjects:
        data = made.data(subject)
        assert data.keys() == {"feature_data_dict", "feature_stats"}
        assert [*data["feature_data_dict"]] == [str(i) for i in range(subject.dictionary.d_sae)]
        assert data["feature_stats"].keys() == schema["FeatureStatistics"].keys()
        assert fits(data["feature_stats"], "FeatureStatistics", schema)
        for one in data["feature_data_dict"].values():
            assert one.keys() == schema["FeatureData"].keys() and fits(one, "FeatureData", schema)
            for name, kind in schema["FeatureData"].items():
                assert kind not in schema or one[name].keys() == schema[kind].keys()


def test_sequences_are_the_examples_of_the_tables(made: Made) -> None:
    for subject in made.subjects:
        features = table(subject)
        frame, data = examples(features), made.data(subject)
        n = features.index["intervals"]
        for latent in range(len(features)):
            one = data["feature_data_dict"][str(latent)]
            groups = one["sequence_data"]["seq_group_data"]
            own = frame[frame["latent"] == latent]
            row = features.table.iloc[latent]
            if not row["fired"]:
                assert groups == [] and one["acts_histogram_data"]["title"] is None
                continue
            assert one["acts_histogram_data"]["title"] == f"ACTIVATIONS<br>DENSITY = {row['frequency']:.3%}"
            assert groups[0]["title"] == f"TOP ACTIVATIONS<br>MAX = {row['max']:.3f}" and len(groups) == n + 1
            wanted = [own[own["interval"].isna()], *(own[own["interval"] == i] for i in reversed(range(n)))]
            for group, some in zip(groups, wanted, strict=True):
                assert [s["token_ids"] for s in group["seq_data"]] == [ids.tolist() for ids in some["token_ids"]]
                for sequence, (_, example) in zip(group["seq_data"], some.iterrows(), strict=True):
                    np.testing.assert_allclose(sequence["feat_acts"], example["activations"], atol=5.1e-5)
                    assert sequence["original_index"] == example["row"]
                    at = sequence["qualifying_token_index"]
                    assert sequence["feat_acts"][at] == pytest.approx(example["value"], abs=5.1e-5)
        np.testing.assert_allclose(data["feature_stats"]["max"], features.table["max"].fillna(0), rtol=1e-6)
        np.testing.assert_array_equal(data["feature_stats"]["frac_nonzero"], features.table["frequency"])


def test_logits_are_those_of_the_decoder_row(made: Made, model: Any) -> None:
    """Against the decoder row through the last norm's gain and the unembedding, in numpy."""
    from saeflow.features.logits import direct_path

    for subject in made.subjects:
        spec, data = subject.dictionary.spec, made.data(subject)
        path = direct_path(model, spec.hook_name_out, spec.hook_head_index)
        if path is None:
            assert all(one["logits_histogram_data"]["bar_heights"] == [] for one in data["feature_data_dict"].values())
            continue
        D = subject.dictionary.W_dec.detach().numpy() @ path.detach().numpy()
        D = (D - D.mean(1, keepdims=True)) * model.ln_final.w.detach().numpy()
        logits = D @ model.unembed.W_U.detach().numpy()
        logits -= logits.mean(1, keepdims=True)
        for latent in range(0, len(logits), 7):
            one = data["feature_data_dict"][str(latent)]
            counts, edges = np.histogram(logits[latent], 50)
            histogram = one["logits_histogram_data"]
            np.testing.assert_allclose(histogram["bar_values"], (edges[1:] + edges[:-1]) / 2, atol=2e-5)
            assert np.abs(np.array(histogram["bar_heights"]) - counts).sum() <= 4  # values on edges
            for group in one["sequence_data"]["seq_group_data"]:
                for sequence in group["seq_data"]:
                    np.testing.assert_allclose(
                        sequence["token_logits"], logits[latent][sequence["token_ids"]], atol=6e-5
                    )
            row = subject.dictionary.W_dec[latent].detach().numpy()
            places = np.argsort(-row, kind="stable")[:3]
            tables = one["feature_tables_data"]
            assert tables["neuron_alignment_indices"] == places.tolist()
            np.testing.assert_allclose(tables["neuron_alignment_values"], row[places], rtol=1e-6)
            shares = np.abs(row[places]) / np.abs(row).sum()
            np.testing.assert_allclose(tables["neuron_alignment_l1"], shares, rtol=1e-5)


def test_heads_have_their_shares(made: Made) -> None:
    (heads,) = (one for one in made.subjects if one.dictionary.spec.kind == "heads")
    for one in made.data(heads)["feature_data_dict"].values():
        assert one["decoder_weights_data"]["n_heads"] == 4
        assert sum(one["decoder_weights_data"]["allocation_by_head"]) == pytest.approx(1)
    assert all(sum(one["decoder_weights_dist"]) == pytest.approx(1) for one in made.features(heads))


def test_bins_that_are_no_part_of_an_interval_are_refused(
    plan: Plan, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened = open_features

    def with_seven(folder: Path) -> Features:
        found = opened(folder)
        found.index["bins"] = 7
        return found

    monkeypatch.setattr("saeflow.export.dashboard.open_features", with_seven)
    with pytest.raises(ConfigError, match=r"has 7 bins and 4 intervals: .* set features.bins to a multiple"):
        export(plan, "saedashboard", tmp_path / "x")


# -------------------------------------------------------------------- the tools themselves
def test_neuronpedias_classes_read_what_they_would_have_written(made: Made) -> None:
    read = ask("neuronpedia", *(made.pages / subject.name for subject in made.subjects))
    for subject, batches in zip(made.subjects, read, strict=True):
        assert batches == made.batches(subject)


def test_saedashboard_reads_it_and_makes_a_page(made: Made, neox_folder: Path, tmp_path: Path) -> None:
    subject = next(one for one in made.subjects if one.dictionary.spec.kind == "sae")
    file = tmp_path / "data.json"
    file.write_bytes(made.file(subject).read_bytes())
    found = ask("saedashboard", file, neox_folder)
    assert found["again"] == made.data(subject)
    data = made.data(subject)["feature_data_dict"]
    for latent in found["live"]:
        title = data[str(latent)]["sequence_data"]["seq_group_data"][0]["title"]
        assert title in found["page"]


def test_saedashboard_finds_the_same_itself(made: Made, model: Any, neox_folder: Path, tmp_path: Path) -> None:
    """Its own run of model and SAE on the same tokens. It leaves out a BOS wherever it stands, which here is the EOS
    between documents too."""
    subject = next(one for one in made.subjects if one.dictionary.spec.activation == "relu")
    assert subject.dictionary.spec.kind == "sae"
    f, tokens = activations(model, subject)
    np.save(tmp_path / "tokens.npy", tokens)
    found = ask("saedashboard-runs", subject.folder, tmp_path / "tokens.npy", neox_folder, tokens[0, 0])
    data = made.data(subject)["feature_data_dict"]
    between = (tokens[:, 1:] == tokens[0, 0]).ravel()
    assert between.any()
    for latent, (fired, aligned, shares) in enumerate(zip(*found.values(), strict=True)):
        own = data[str(latent)]["feature_tables_data"]
        assert own["neuron_alignment_indices"] == aligned
        np.testing.assert_allclose(own["neuron_alignment_l1"], shares, rtol=1e-4)
        ours = sum(data[str(latent)]["acts_histogram_data"]["bar_heights"])
        assert abs(ours - (f[between, latent] > 0).sum() - fired) <= 1


def test_the_schemas_are_those_of_the_tools() -> None:
    asked = ask("schemas")
    for tool, kinds in asked.items():
        for kind, fields in kinds.items():
            assert fields.items() <= SCHEMAS[tool][kind].items() and SCHEMAS[tool][kind].keys() - fields.keys() <= {
                "model_name"  # which delphi adds as it writes
            }
