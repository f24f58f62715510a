"""What a notebook sees of a real run: the tiny experiment, with tables of latents; against the files themselves."""

import json
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
import xarray as xr
from safetensors.torch import load_file
from tests.results.pages import Page
from tests.test_workflow import CORPUS, Workflow, finished, moved  # noqa: F401 (finished is a fixture)

import saeflow
from saeflow.results import Results, ResultsError
from saeflow.storage.receipts import DamagedError

ROOT = Path(__file__).resolve().parents[2]
HEAVY = ("torch", "pandas", "matplotlib", "zarr", "xarray", "pyarrow", "transformer_lens", "hydra")


@pytest.fixture(scope="module")
def results(finished: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:  # noqa: F811
    """The results of the tiny experiment, and tables of the latents of its dictionaries; never written to by a test."""
    home = tmp_path_factory.mktemp("opened")
    shutil.copytree(finished, home, dirs_exist_ok=True)
    moved(home, finished, CORPUS)
    Workflow(home).run(hydra="features=all features.n_tokens=512")
    return home / "results"


@pytest.fixture(scope="module")
def run(results: Path) -> Results:
    return saeflow.open_results(results)


@pytest.fixture
def copied(results: Path, tmp_path: Path) -> Path:
    """To damage."""
    shutil.copytree(results, tmp_path / "results")
    return tmp_path / "results"


def test_importing_saeflow_imports_nothing_else() -> None:
    code = "import sys; before = set(sys.modules); import saeflow; print(*sorted(set(sys.modules) - before))"
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert [name for name in said if name.partition(".")[0] not in sys.stdlib_module_names] == ["saeflow"]


@pytest.mark.slow
def test_opening_a_folder_reads_no_array_and_needs_no_torch(results: Path) -> None:
    code = (
        "import sys, saeflow\n"
        f"run = saeflow.open_results({str(results)!r})\n"
        "run.experiments, run.keys('train'), repr(run), run._repr_html_()\n"
        f"print(*[name for name in {HEAVY} if name in sys.modules])"
    )
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert said.split() == []


def test_it_says_what_there_is(run: Results) -> None:
    assert run.experiments == ["default"] and run.left_out == []
    assert len(run.keys("train")) == 4 and run.keys("train", "default") == run.keys("train")
    assert "4 trainings" in repr(run) and "default" in repr(run)
    assert "run.evaluations()" in run._repr_html_()


# -------------------------------------------------------------------- tables
def test_evaluations_are_the_summaries_with_what_a_row_is_of_first(run: Results, results: Path) -> None:
    table = run.evaluations()
    assert list(table)[:4] == ["place", "series", "amount_name", "amount"]
    at = list(table).index("dictionary_key")
    assert list(table)[at - 2 : at] == ["seed", "d_sae"] and list(table)[at + 1] == "l0"
    of_metrics = list(table)[at + 1 : list(table).index("confidence")]
    ends = [name for name in of_metrics if name.endswith(("_low", "_high"))]
    assert all(of_metrics[of_metrics.index(name) - 1].startswith(name.rsplit("_", 1)[0]) for name in ends) and ends
    assert not [name for name in table if "without_bos" in name]
    summaries = [json.loads(file.read_text()) for file in results.glob("evaluate/*/summary.json")]
    assert len(table) == len(summaries) == 4
    for summary in summaries:
        (row,) = table[table["dictionary_key"] == summary["dictionary_key"]].to_dict("records")
        for name in ("l0", "ce_replaced", "ce_increase_low", "ce_increase_high", "explained_variance", "dead_fraction"):
            assert row[name] == summary[name], name
        assert row["n_tokens"] == summary["n_tokens"] and row["evaluate_key"] in run.keys("evaluate")
    without = run.evaluations(without_bos=True)
    for summary in summaries:
        (row,) = without[without["dictionary_key"] == summary["dictionary_key"]].to_dict("records")
        assert (
            row["ce_replaced"] == summary["ce_replaced_without_bos"]
            and row["n_tokens"] == summary["n_tokens_without_bos"]
        )
    assert "explained_variance_legacy" not in without and set(without) < set(table)


def test_rows_are_those_of_the_experiments_own_tables(run: Results) -> None:
    mine, drawn = run.evaluations("default"), run.table("table")
    assert list(mine["series"]) == list(drawn["series"]) and list(mine["place"]) == list(drawn["place"])
    np.testing.assert_allclose(mine["ce_replaced"], drawn["ce_replaced"], rtol=1e-5)
    assert {"dictionary.sparsity", "dictionary.normalize_activations"} <= set(mine)


def test_curves_are_those_on_disk_chosen_by_key_or_by_what_they_are_of(run: Results, results: Path) -> None:
    key = run.keys("train")[0]
    curve = run.metrics(key)
    on_disk = pd.read_parquet(results / "train" / key / "metrics.parquet")
    pd.testing.assert_frame_equal(curve[list(on_disk)], on_disk)
    assert set(curve["train_key"]) == {key} and curve["place"].notna().all()
    everything = run.metrics()
    assert everything["dictionary_key"].nunique() == 4
    relu = run.metrics(series="ReLU + L1 SAE", amount=[0.003])
    assert relu["dictionary_key"].nunique() == 1 and set(relu["amount"]) == {0.003}
    with pytest.raises(KeyError, match="no column 'kk' to choose by; there are: place, series"):
        run.metrics(kk=3)


def test_studies_have_a_row_each(run: Results, results: Path) -> None:
    (file,) = results.glob("jacobian/*/summary.json")
    table = run.summaries("jacobian")
    assert table["key"].tolist() == [file.parent.name]
    assert table["mean_absolute"].item() == json.loads(file.read_text())["mean_absolute"]
    assert run.summary(file.parent.name) == json.loads(file.read_text())
    with pytest.raises(ResultsError, match=r"no train has a summary\.json here; those that do: jacobian, eval"):
        run.summaries("train")


# -------------------------------------------------------------------- one artifact
def test_a_dictionary_is_the_one_on_disk_by_any_part_of_its_key_that_is_enough(run: Results, results: Path) -> None:
    key = next(key for key in run.keys("train") if "l1_0.001" in key)
    tensors = load_file(results / "train" / key / "sae_weights.safetensors")
    for name in (key, key[: key.index("l1_0.001") + 8], key[-8:]):
        found = run.dictionary(name)
        assert found.tensors.keys() == tensors.keys()
        assert all(torch.equal(found.tensors[n], tensors[n]) for n in tensors)
    assert repr(found) == "<SAE (relu, l1_coefficient = 0.001) of blocks.1.hook_mlp_out, 32 to 64 latents to 32>"
    with pytest.raises(ResultsError, match=r"'sae' may be train sae-.*, train sae-.*: give more of the key"):
        run.dictionary("sae")
    with pytest.raises(ResultsError, match=r"there is no train or foreign 'sea-1' in .*; there are: train sae-"):
        run.dictionary("sea-1")
    with pytest.raises(ResultsError, match="has no part 'input'; parts: none"):
        run.dictionary(f"{key}/input")


def test_activations_are_the_column_and_read_when_asked(run: Results, results: Path) -> None:
    (column,) = [key for key in run.keys("activations") if "mlp_out" in key]
    store = results / "activations" / column.split("/")[0] / "activations.zarr"
    found = run.activations("mlp_out")
    assert found.name == "blocks.1.hook_mlp_out" and found.dims == ("token", "d") and found.shape == (4096, 32)
    assert not found.variable._in_memory
    stored = xr.open_zarr(store, consolidated=False)[found.name]
    np.testing.assert_array_equal(found[100:110].values, stored[100:110].values)
    assert {"token_id", "document", "position"} <= set(found.coords) and found["position"].values[:3].tolist() == [
        0,
        1,
        2,
    ]
    assert run.activations(column).equals(found)
    with pytest.raises(ResultsError, match=r"activations\(''\): give more of the key; "):
        run.activations()
    with pytest.raises(ResultsError, match=r"activations\('resid'\): no such column; .*mlp_out"):
        run.activations("resid")


def test_latents_are_found_by_their_dictionary(run: Results) -> None:
    key = run.evaluations()["dictionary_key"][0]
    features = run.features(key)
    assert features.index["dictionary_key"] == key and len(features) == features.index["n_latents"]
    assert run.features(features.folder.name).folder == features.folder
    live = int(features.table["fired"].idxmax())
    page = Page(features[live]._repr_html_())
    assert f"latent {live}" in page.text and not page.tags & {"script", "link", "img"}
    assert str(features.index["n_live"]) in Page(features._repr_html_()).text
    assert len(repr(features[live])) < 1000


def test_a_chain_ends_in_the_hashes_of_what_is_from_outside(run: Results, results: Path) -> None:
    key = run.keys("evaluate")[0]
    chain = run.provenance(key, "evaluate")
    assert {step.stage for step in chain} == {"evaluate", "train", "baseline", "activations", "tokens"}
    (tokens, *_) = [json.loads(json.dumps(run.config(k)))["config"] for k in run.keys("tokens")]
    assert chain.contents["corpus"] == [tokens["corpus"]["content"]] and len(chain.contents["model"]) == 1
    receipt = json.loads((results / "evaluate" / key / "provenance.json").read_text())
    assert chain.steps[0].key == key and set(chain.steps[0].needs) == {
        (stage, k) for stage, keys in receipt["needs"].items() for k in keys
    }
    made = [json.loads(line) for line in (results / "made.jsonl").read_text().splitlines()]
    (line,) = [m for m in made if (m["stage"], m["key"]) == ("evaluate", key)]
    assert chain.steps[0].time.wall_s == line["seconds"] and chain.steps[0].time.cpu_s == line["cpu_s"]
    assert tokens["corpus"]["content"] in Page(chain._repr_html_()).text and "evaluation" in repr(chain)


# -------------------------------------------------------------------- figures
def test_a_figure_is_drawn_of_what_is_on_disk_to_be_changed(run: Results, tmp_path: Path) -> None:
    figure = run.figure("sparsity_faithfulness")
    table = run.table("sparsity_faithfulness")
    drawn = {tuple(np.round(p, 4)) for axis in figure.axes for line in axis.lines for p in line.get_xydata()}
    several = table[table.groupby("place")["l0"].transform("size") > 1]  # a place of one has no front
    assert len(several) == 3
    for l0, ce in zip(several["l0"], several["ce_replaced"], strict=True):
        assert any(abs(x - l0) < 1e-3 and abs(y - ce) < 1e-3 for x, y in drawn), (l0, ce)
    figure.axes[0].set_title("mine")
    figure.savefig(tmp_path / "mine.png")
    assert (tmp_path / "mine.png").stat().st_size > 5000
    with pytest.raises(
        ResultsError, match=r"no figure 'stacks' can be drawn of this; these can: .*sparsity_faithfulness"
    ):
        run.figure("stacks")
    with pytest.raises(ResultsError, match="no experiment 'demo' has figures; there are: default"):
        run.figure("sparsity_faithfulness", "demo")


# -------------------------------------------------------------------- what is not whole
def test_what_is_damaged_is_named_and_not_shown(copied: Path) -> None:
    run = saeflow.open_results(copied)
    key = run.keys("train")[0]
    weights = copied / "train" / key / "sae_weights.safetensors"
    held = bytearray(weights.read_bytes())
    held[-1] ^= 1
    weights.write_bytes(held)
    with pytest.raises(DamagedError, match="its checksum is another"):
        run.dictionary(key)
    weights.write_bytes(held[:-1])
    lost = next((copied / "evaluate").iterdir())
    (lost / "summary.json").unlink()
    (copied / "evaluate" / f"{lost.name}x.vm-1.partial").mkdir()
    run = saeflow.open_results(copied)
    assert {(one.stage, one.key) for one in run.left_out} == {("train", key), ("evaluate", lost.name)}
    assert "not whole: 2 (run.left_out)" in repr(run) and lost.name not in run.keys("evaluate")
    with pytest.raises(ResultsError, match=r"is not whole \(sae_weights.safetensors: .* bytes instead of"):
        run.dictionary(key)
    with pytest.warns(
        UserWarning, match=rf"left out of evaluate: 1 that are not whole, such as {re.escape(lost.name)}"
    ):
        assert len(run.evaluations()) == 3
    with pytest.raises(DamagedError, match=r"summary\.json is damaged"):
        run.evaluations("default")


def test_without_its_activations_and_elsewhere_everything_else_is_shown(copied: Path, run: Results) -> None:
    shutil.rmtree(copied / "activations")
    moved = saeflow.open_results(copied)  # plans of runs, which know of what is gone, stayed behind
    pd.testing.assert_frame_equal(moved.evaluations(), run.evaluations())
    assert "deleted" not in repr(moved.provenance(moved.keys("evaluate")[0], "evaluate"))


def test_a_folder_without_results_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ResultsError, match="holds no results of saeflow"):
        saeflow.open_results(tmp_path)


# -------------------------------------------------------------------- documentation
def test_the_examples_of_the_documentation_run(
    results: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "results").symlink_to(results)
    blocks = re.findall(r"^```python\n(.*?)^```$", (ROOT / "docs/results.md").read_text(), re.M | re.S)
    assert len(blocks) == 2
    names: dict[str, Any] = {}
    for block in blocks:
        exec(compile(block, "docs/results.md", "exec"), names)
    assert (tmp_path / "mine.svg").is_file() and names["dictionary"].d_in == names["x"].shape[1]


# -------------------------------------------------------------------- the front page of this run
def links(page: Page) -> Iterator[str]:
    yield from (href for href in page.links if not href.startswith("#"))


def test_every_link_of_the_front_page_leads_somewhere(results: Path) -> None:
    page = Page((results / "index.html").read_text())
    assert len(list(links(page))) > 30
    for href in links(page):
        assert (results / href).is_file(), href
    assert {href[1:] for href in page.links if href.startswith("#")} <= page.anchors
    assert page.anchors and "http" not in {href.partition(":")[0] for href in page.links}
    assert not page.tags & {"script", "link", "iframe"}


def test_from_each_number_a_chain_leads_to_the_corpus(results: Path, run: Results) -> None:
    page = Page((results / "index.html").read_text())
    content = run.config(run.keys("tokens")[0])["config"]["corpus"]["content"]
    assert f"corpus/{content}" in page.anchors
    assert len(page.rows) >= 2
    for row in page.rows:
        assert row["links"][-1] == f"#corpus/{content}"
        assert next(href for href in row["links"] if href.startswith("#")).startswith("#evaluate/")
    drawn = pd.read_csv(next(results.glob("figures/*/table.csv")), dtype=str, keep_default_na=False)
    shown = {value for row in page.rows for value in row["numbers"]}
    assert shown <= set(drawn.to_numpy().ravel()) and shown


def test_of_several_tables_of_a_dictionary_the_largest_is_taken_then_one_with_partners(
    results: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = saeflow.open_results(results)
    tables = {"a": (100, None), "b": (200, None), "d": (200, "pair"), "c": (200, "pair"), "e": (50, "pair")}
    monkeypatch.setitem(run._disk.whole, "features", {key: {} for key in tables})

    def index(file: Path) -> dict[str, object]:
        n_tokens, partners = tables[file.parent.name]
        return {"dictionary_key": "sae", "n_tokens": n_tokens, "jacobian_key": partners}

    monkeypatch.setattr("saeflow.results.run.read_json", index)
    assert run._of_dictionary == {"sae": "c"}
