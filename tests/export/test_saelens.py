"""A release opens in the installed SAELens and computes what ours does; its model card says what is in it."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from huggingface_hub import ModelCard
from safetensors.torch import load_file

from saeflow.config import ConfigError
from saeflow.dictionaries import load_dictionary
from saeflow.export.card import code, fenced, model_card
from saeflow.export.formats import format_named
from saeflow.export.run import export
from saeflow.export.subjects import subjects
from saeflow.export.upload import check_upload, upload
from saeflow.planning.graph import Plan

HOSTILE = 'x"\n---\nlicense: mit\n---\n| a | `b` | <script>alert(1)</script> ``` ![i](j) \u202e: #'


@pytest.fixture
def release(exported: Any) -> tuple[Path, dict[str, Any]]:
    return exported("saelens")


def test_saelens_opens_every_dictionary_and_computes_the_same(release: tuple[Path, dict[str, Any]]) -> None:
    from sae_lens import SAE

    folder, about = release
    ids = [one for several in about["entries"].values() for one in several]
    assert len(ids) == len(set(ids)) == 2 + 2 + 2 + 2 + 4 + 2  # of heads and pairs, each
    for one in ids:
        theirs, ours = SAE.load_from_disk(folder / one), load_dictionary(folder / one)
        x = torch.randn(50, ours.d_in, generator=torch.Generator().manual_seed(0))
        with torch.no_grad():
            torch.testing.assert_close(theirs.encode(x), ours.encode(x))
            torch.testing.assert_close(theirs(x), ours.forward(x))


def test_what_saelens_has_no_class_for_is_left_out_by_name(release: tuple[Path, dict[str, Any]], plan: Plan) -> None:
    folder, about = release
    assert sorted(about["left_out"]) == sorted(
        key for key, one in plan.stages["train"].items() if one.config["dictionary"].get("skip")
    )
    for name, why in about["left_out"].items():
        assert "SAELens has no class for a TopK transcoder from 32 to 32 entries with a linear map beside it" in why
        assert not (folder / name).exists() and name in (folder / "README.md").read_text()
    assert load_dictionary(plan.folder("train", next(iter(about["left_out"])))).spec.skip


def test_sparsity_is_how_often_latents_fire(release: tuple[Path, dict[str, Any]], plan: Plan) -> None:
    import pyarrow.parquet as pq

    folder, about = release
    for subject in (one for one in subjects(plan) if one.name in about["entries"]):
        assert subject.evaluation is not None
        table = pq.read_table(subject.evaluation / "latents.parquet").to_pandas()
        found = [load_file(folder / one / "sparsity.safetensors")["sparsity"] for one in about["entries"][subject.name]]
        frequency = torch.tensor(table["fired"].to_numpy() / subject.metrics["n_tokens"])
        torch.testing.assert_close(torch.cat(found), (frequency + 1e-10).log10().float())


# -------------------------------------------------------------------- the model card
def test_the_card_says_what_how_good_and_made_of_what(release: tuple[Path, dict[str, Any]], plan: Plan) -> None:
    folder, about = release
    card = ModelCard.load(folder / "README.md")
    assert card.data.license == "cc-by-4.0" and card.data.library_name == "saelens"
    assert {"sparse-autoencoder", "saelens", "saeflow"} <= set(card.data.tags)
    text = card.text
    for subject in (one for one in subjects(plan) if one.name in about["entries"]):
        (row,) = (line for line in text.splitlines() if line.startswith(f"| `{about['entries'][subject.name][0]}`"))
        metrics = subject.metrics
        for name in ("l0", "explained_variance", "ce_increase", "loss_recovered_mean"):
            value, low, high = (metrics[f"{name}{end}"] for end in ("", "_low", "_high"))
            assert ("–" if value is None else f"{value:.4g} ({low:.4g} to {high:.4g})") in row
        spec = subject.dictionary.spec
        assert f"`{spec.hook_name}` | `{spec.hook_name_out}` | {spec.d_sae}" in row
    assert f"Measured on {metrics['n_tokens']:,} held-out tokens of {metrics['n_documents']:,} documents" in text
    assert (
        "95% intervals" in text
        and "trained on 2,048 tokens" in text
        and spec.origin.model_weights in text
        and "`tiny-neox`" in text
        and "`words`" in text
    )
    assert f'SAE.load_from_disk("{next(iter(about["entries"].values()))[0]}")' in text
    block = text.split("```yaml\n")[1].split("\n```")[0]
    common = yaml.safe_load(block)
    assert common["training.n_tokens"] == 2048 and common["tokens.context_size"] == 32
    assert "dictionary.kind" not in common and "`dictionary.kind`" in text  # they differ in it
    for name in about["entries"]:
        held = json.loads((folder / name / "settings.json").read_text())
        assert held["training.n_tokens"] == 2048 and held["dictionary.kind"]


def test_without_a_licence_and_evaluations_the_card_says_so(compose_tiny: Any, copy: Plan, tmp_path: Path) -> None:
    import shutil

    shutil.rmtree(Path(copy.results) / "evaluate")
    folder, _ = export(compose_tiny(Path(copy.results)), "saelens", tmp_path / "x")
    card = ModelCard.load(folder / "README.md")
    assert card.data.license is None and "LICENSE=…" in card.text and "They have not been evaluated." in card.text
    assert not [*folder.rglob("sparsity.safetensors")]


def test_every_model_of_an_experiment_is_named(plan: Plan) -> None:
    found = subjects(plan)[:2]
    found[1].settings["model.name"] = "another"
    about = {"experiment": "tiny", "entries": {one.name: [one.name] for one in found}, "left_out": {}}
    text = model_card(format_named("saelens"), found, about, None)
    lines = [line for line in text.splitlines() if line.startswith("- Model: ")]
    assert [line.split(",")[0] for line in lines] == ["- Model: `tiny-neox`", "- Model: `another`"]
    assert len([line for line in text.splitlines() if line.startswith("- Text: ")]) == 1
    assert text.count("# Dictionaries of `tiny-neox, another`") == 1


def test_hostile_names_stay_names(plan: Plan, monkeypatch: pytest.MonkeyPatch) -> None:
    found = subjects(plan)[:2]
    for subject in found:
        subject.settings["model.name"] = HOSTILE
        subject.settings["dictionary.note"] = "```\n# a heading\n````"
        spec = dataclasses.replace(subject.dictionary.spec)
        spec = dataclasses.replace(spec, origin=dataclasses.replace(spec.origin, source=HOSTILE))
        monkeypatch.setattr(subject.dictionary, "spec", spec)
    about = {"experiment": "tiny", "entries": {one.name: [one.name] for one in found}, "left_out": {HOSTILE: HOSTILE}}
    text = model_card(format_named("saelens"), found, about, "mit")
    card = ModelCard(text)
    assert card.data.license == "mit" and card.data.to_dict().keys() == {"license", "library_name", "tags"}
    body, inside = [], False
    for line in card.text.splitlines():
        fence = line.startswith("```")
        inside = inside != fence if fence and line.strip("`") in ("", "python", "yaml") else inside
        if not inside and not fence:
            body.append(line)
    headings = [line for line in body if line.startswith("#")]
    assert headings == [line for line in headings if line.startswith(("# Dictionaries of `", "## "))]
    assert "---" not in body and not any(line == "license: mit" for line in body) and "\u202e" not in card.text
    table = [line for line in body if line.startswith("|")]
    assert len({line.replace("\\|", "").count("|") for line in table}) == 1


@pytest.mark.parametrize(
    ("text", "wanted"),
    [("a", "`a`"), ("a|b", "`a\\|b`"), ("`a`", "`` `a` ``"), ("a``b", "```a``b```"), ("", "`  `"), ("a\nb", "`a\\nb`")],
)
def test_code_spans_hold_what_they_are_given(text: str, wanted: str) -> None:
    assert code(text) == wanted


def test_fences_are_longer_than_what_they_hold() -> None:
    assert fenced("a\n````\nb", "yaml") == "`````yaml\na\n````\nb\n`````"


# -------------------------------------------------------------------- uploading
class Hub:
    """Stands in for Hugging Face's API, and remembers what it was asked."""

    def __init__(self) -> None:
        self.asked: list[tuple[str, dict[str, Any]]] = []

    def create_repo(self, repo_id: str, **options: Any) -> None:
        self.asked.append(("create", {"repo_id": repo_id, **options}))

    def upload_folder(self, **options: Any) -> None:
        files = sorted(p.relative_to(options["folder_path"]).as_posix() for p in options["folder_path"].rglob("*"))
        self.asked.append(("upload", options | {"files": files}))


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Hub:
    import huggingface_hub

    hub = Hub()
    monkeypatch.setattr(huggingface_hub, "HfApi", lambda: hub)
    monkeypatch.setattr(huggingface_hub, "get_token", lambda: "hf_token")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    return hub


def test_an_upload_is_one_commit_of_the_whole_folder(release: tuple[Path, dict[str, Any]], hub: Hub) -> None:
    folder, _ = release
    check_upload("someone/saes", "mit")
    assert not hub.asked
    assert upload(folder, "someone/saes", "saelens of tiny") == "https://huggingface.co/someone/saes"
    (create, made), (sent, commit) = hub.asked
    assert (create, sent) == ("create", "upload")
    assert made == {"repo_id": "someone/saes", "private": True, "exist_ok": True}
    assert commit["repo_id"] == "someone/saes" and commit["commit_message"] == "saelens of tiny"
    assert {"README.md", "export.json"} < set(commit["files"])


def test_what_could_not_be_uploaded_is_refused_first(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub

    for repo, licence, message in [
        ("a/b/c", "mit", "UPLOAD=a/b/c is no name of a repository"),
        ("saes", "mit", "UPLOAD=saes lacks its owner: it must be user/name"),
        ("a/b", None, "an upload needs LICENSE="),
    ]:
        with pytest.raises(ConfigError, match=message):
            check_upload(repo, licence)
    monkeypatch.setattr(huggingface_hub, "get_token", lambda: None)
    with pytest.raises(ConfigError, match="nobody is logged in to Hugging Face here: run `hf auth login`"):
        check_upload("a/b", "mit")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(ConfigError, match="HF_HUB_OFFLINE is set: nothing can be uploaded"):
        check_upload("a/b", "mit")
    assert not hub.asked


def test_a_hub_that_refuses_is_told_in_a_sentence(
    release: tuple[Path, dict[str, Any]], hub: Hub, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise OSError("403 Forbidden")

    monkeypatch.setattr(hub, "create_repo", refuse)
    with pytest.raises(ConfigError, match=r"is whole, but was not uploaded to a/b: 403 Forbidden"):
        upload(release[0], "a/b", "x")
