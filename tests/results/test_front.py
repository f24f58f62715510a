"""The front page of experiments that were never run: what it shows of hostile names, of what is stale or missing, and
that it is the same for the same results."""

import csv
import dataclasses
import json
import os
import shutil
import threading
import time
from pathlib import Path
from typing import Any

import pytest
from measured import write_evaluations
from stores import write_receipt
from tests.planning.test_plan import finish, home  # noqa: F401 (a fixture)
from tests.results.pages import Page

from saeflow.figures.job import draw
from saeflow.planning import frozen
from saeflow.planning.expansion import compose
from saeflow.planning.graph import Plan
from saeflow.planning.stages import stages
from saeflow.results.asked import experiments_of
from saeflow.results.disk import Disk
from saeflow.results.front import png_size, write_front_page
from saeflow.results.points import best_points
from saeflow.storage.receipts import RECEIPT, SET_ASIDE

SHORT = ["tokens.train_tokens=8192", "tokens.held_out_tokens=2048", "figures=[sparsity_faithfulness,matched_l0]"]
SWEEP = "sweep={dictionary:topk,dictionary.k:[4,8,16,32]}"
HOSTILE = "<img src=x onerror=alert(1)>\"'&{{7*7}}\u202e"


@pytest.fixture
def here(home: Path, monkeypatch: pytest.MonkeyPatch) -> Path:  # noqa: F811
    monkeypatch.chdir(home)
    return home


def plan_of(*overrides: str) -> Plan:
    return compose(Path("conf"), [*SHORT, *overrides], results="results", digests="digests.json")


def loss(summary: dict[str, Any]) -> dict[str, float]:
    """That of k = 16 is worse than that of k = 8; on more tokens it is a little more."""
    amount, more = float(summary["amount"]), 0.001 * summary["tokens_key"].startswith("held_out-16rows")
    return {"l0": amount, "ce_replaced": (3.95 if amount == 16 else 4.0 - 0.01 * amount) + more}


def run(*overrides: str) -> Plan:
    """Makes all of an experiment, without its arrays; its figures are drawn."""
    plan = plan_of(*overrides)
    frozen.freeze_run(plan)
    for stage in plan.stages:
        if stage not in ("evaluate", "figures"):
            finish(plan, stage, plan.to_make[stage])
    job = write_evaluations(plan, loss)
    for key, instance in plan.stages["evaluate"].items():
        instance.write_config(plan.folder("evaluate", key) / "config.yaml")
        write_receipt_of(plan, "evaluate", key)
    draw([job])
    return plan


def write_receipt_of(plan: Plan, stage: str, key: str) -> None:
    folder, config = plan.folder(stage, key), (plan.folder(stage, key) / "config.yaml").read_bytes()
    write_receipt(folder, stage, plan.instance(stage, key).needs)
    assert (folder / "config.yaml").read_bytes() == config


def rows_of(file: Path) -> dict[str, dict[str, str]]:
    """Rows of a table by the amount."""
    with open(file, newline="") as lines:
        return {row["amount"]: row for row in csv.DictReader(lines)}


def page_of() -> Page:
    file = write_front_page("results", "conf")
    assert file == Path("results/index.html")
    page = Page(file.read_text())
    assert page.unclosed == ["html"] or page.unclosed == []
    for href in page.links:
        if href.startswith("#"):
            assert href[1:].replace("%40", "@") in page.anchors or href.startswith("#experiment/"), href
        else:
            assert (Path("results") / href.partition("#")[0].replace("%2B", "+")).is_file(), href
    return page


def test_it_shows_the_front_with_the_numbers_of_the_csv(here: Path) -> None:
    plan = run(SWEEP, "experiment_name=mine")
    page = page_of()
    (folder,) = Path("results/figures").iterdir()
    table = rows_of(folder / "table.csv")
    front = [table[k] for k in ("4", "8", "32")]  # at k = 16 the loss is higher than at 8
    assert [row["numbers"][:3] for row in page.rows] == [[r["l0"], r["ce_replaced"], r["ce_increase"]] for r in front]
    for row in front:
        low, high = float(row["ce_increase_low"]), float(row["ce_increase_high"])
        assert f"[{low:.4f}, {high:.4f}]" in page.text
    assert (
        "TopK SAE" in page.text and "k = 4, 8, 16, 32" in page.text and "3 of 3 points of the front of 4" in page.text
    )
    content = plan.stages["tokens"][next(iter(plan.stages["tokens"]))].config["corpus"]["content"]
    assert all(row["links"][-1] == f"#corpus/{content}" for row in page.rows)
    assert f"make run HYDRA='{' '.join(plan.overrides)}'" in page.text
    assert "missing:" not in page.text and "stale:" not in page.text and "damaged:" not in page.text


def test_of_several_seeds_it_shows_their_means_as_the_figure_has_them(here: Path) -> None:
    run(SWEEP, "seed=[0,1,2]")
    page = page_of()
    (file,) = Path("results").glob("figures/*/sparsity_faithfulness.csv")
    table = rows_of(file)
    front = [table[k] for k in ("4", "8", "32")]
    assert [row["numbers"][:2] for row in page.rows] == [[r["l0"], r["ce_replaced"]] for r in front]
    assert "3 seeds" in page.text and "over seeds" in page.text
    assert [len([h for h in row["links"] if h.startswith("#evaluate/")]) for row in page.rows] == [3, 3, 3]


def test_text_from_the_configuration_does_nothing(here: Path) -> None:
    name = HOSTILE.replace("'", "\\'")
    file = here / "conf/experiment/hostile.yaml"
    file.write_text(f"# @package _global_\n# {HOSTILE} asks\nexperiment_name: hostile+1\n")
    run("experiment=hostile", SWEEP, f"model.name='{name}'", f"corpus.name='{name}'", "model.randomise=[none,permuted]")
    page = page_of()
    assert not page.tags & {"script", "iframe"} and not [a for a in page.attributes if a.startswith("on")]
    assert {href for href in page.links if href == "x"} == set() and "onerror=alert(1)" in page.text
    assert "{{7*7}}" in page.text and "49" not in page.text.partition("asks")[0][-40:]
    assert "\u202e" not in page.text and "\\u202e" in page.text


def test_what_is_missing_stale_damaged_or_gone_is_said(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run(SWEEP)
    plan = plan_of(SWEEP.replace("32", "32,64"))
    frozen.freeze_run(plan)
    text = page_of().text
    assert "missing: 1 training, 1 evaluation, 1 set of figures that the last run was to make" in text
    assert "stale: the figures below are of an earlier state of this experiment, default-" in text
    key = plan.found["train"][0]
    (plan.folder("train", key) / RECEIPT).rename(plan.folder("train", key) / SET_ASIDE)
    shutil.rmtree("results/activations")
    text = page_of().text
    assert f"damaged: 1 training not whole, such as train {key} (it was found to be damaged)" in text
    assert "deleted: 1 activation column not here; what was made from them stays valid" in text
    newer = dataclasses.replace(stages()["evaluate"], version=99, version_of=lambda config: None)
    monkeypatch.setattr("saeflow.results.state.stages", lambda: stages() | {"evaluate": newer})
    text = page_of().text
    assert (
        "stale: 4 evaluations computed otherwise since (evaluate is at version 99, CHANGELOG.md); a run makes" in text
    )


def test_what_is_not_as_it_was_written_is_not_shown(here: Path) -> None:
    run(SWEEP)
    assert len(page_of().rows) == 3
    summary = next(Path("results/evaluate").glob("*k4*/summary.json"))
    text = summary.read_text()
    summary.write_text(text.replace("4", "5", 1))
    page = page_of()
    assert f"damaged: {summary} is damaged (its checksum is another)" in page.text
    assert [bool(row["links"]) for row in page.rows] == [False, True, True]
    (table,) = Path("results").glob("figures/*/table.csv")
    table.write_text(table.read_text().replace("3.96", "2.96"))
    page = page_of()
    assert f"damaged: {table} is damaged" in page.text and not page.rows and "2.96" not in page.text


def test_of_a_dictionary_that_was_measured_twice_each_number_has_its_own_chain(here: Path) -> None:
    plan = run(SWEEP, "tokens.held_out_tokens=[2048,4096]")
    page = page_of()
    evaluated = [[href for href in row["links"] if href.startswith("#evaluate/")] for row in page.rows]
    assert len(plan.stages["evaluate"]) == 8 and [len(found) for found in evaluated] == [1] * 6
    for (href,), row in zip(evaluated, page.rows, strict=True):
        summary = json.loads(Path("results", href[1:], "summary.json").read_text())
        assert f"{summary['ce_replaced']:.6g}" == row["numbers"][1]


def test_an_experiment_without_figures_is_there_and_of_several_states_the_last_that_was_asked_for(here: Path) -> None:
    first = run(SWEEP, "experiment_name=flips")
    run(SWEEP.replace("4,", ""), "experiment_name=flips")
    (key,) = first.stages["figures"]
    newer = [k for k in Disk("results").experiments["flips"] if k != key]
    assert Disk("results").experiments["flips"] == [*newer, key]
    future = time.time() + 60
    os.utime(frozen.plan_file(first), (future, future))  # asked for again, with nothing to do
    assert Disk("results").experiments["flips"] == [key, *newer]
    frozen.freeze_run(plan_of(SWEEP, "experiment_name=begun", "dictionary.expansion=2"))
    assert (
        "begun" in page_of().text and "4 trainings, 4 evaluations, 1 set of figures that the last run" in page_of().text
    )


def test_the_same_results_give_the_same_bytes_and_it_is_whole_whoever_writes(here: Path) -> None:
    run(SWEEP)
    write_front_page("results", "conf")
    file = Path("results/index.html")
    text, written = file.read_bytes(), file.stat().st_mtime_ns
    write_front_page("results", "conf")
    assert file.read_bytes() == text and file.stat().st_mtime_ns == written
    seen, done = list[bytes](), threading.Event()

    def read() -> None:
        while not done.is_set():
            seen.append(file.read_bytes())

    reader = threading.Thread(target=read)
    reader.start()
    for n in range(6):  # two runs that end at once, of which one has another file of conf/
        about = Path("conf/experiment/mine.yaml")
        about.write_text(f"# {'x' * 50_000 if n % 2 else 'short'}\nexperiment_name: default\n")
        write_front_page("results", "conf")
    about.unlink()
    write_front_page("results", "conf")
    done.set()
    reader.join()
    assert len(set(seen)) > 1 and all(held.endswith(b"</html>\n") for held in seen) and file.read_bytes() == text
    assert not list(Path("results").glob("*.partial"))


def test_dashboards_and_tables_are_linked_where_they_are(here: Path) -> None:
    plan = run(SWEEP)
    train, other = list(plan.stages["train"])[:2]
    for stage, key, needs, files in (
        ("features", "of-01234567", {"train": [train]}, ["index.json", "latents.parquet"]),
        ("dashboards", "of-12345678", {"features": ["of-01234567"], "train": [train]}, ["index.html"]),
        ("comparisons", "place-4567890a", {"dashboards": ["of-12345678"], "train": [train, other]}, ["index.html"]),
        ("jacobian", "pair-23456789", {"train": [train, other]}, ["pairs.html"]),
        ("circuits", "L3-of-56789abc", {"train": [train, other]}, ["circuits.html"]),
        ("jacobian", "elsewhere-3456789a", {"train": [train, "of-another-experiment"]}, ["pairs.html"]),
    ):
        folder = Path("results") / stage / key
        folder.mkdir(parents=True)
        for name in files:
            (folder / name).write_text(json.dumps({"dictionary_key": train}))
        write_receipt(folder, stage, needs)
    page = page_of()
    linked = [row["links"] for row in page.rows if "features/of-01234567/latents.parquet" in row["links"]]
    assert len(linked) == 1 and "dashboards/of-12345678/index.html#among=place-4567890a" in linked[0]
    assert page.links.count("dashboards/of-12345678/index.html") == 1  # among the pages
    assert page.links.count("comparisons/place-4567890a/index.html") == 1
    assert "jacobian/pair-23456789/pairs.html" in page.links
    assert "circuits/L3-of-56789abc/circuits.html" in page.links
    assert not [href for href in page.links if "elsewhere" in href]


def test_nothing_is_written_where_there_is_nothing(tmp_path: Path) -> None:
    assert write_front_page(tmp_path) is None and not list(tmp_path.iterdir())


def test_experiments_say_what_they_are_about() -> None:
    told = experiments_of(Path(__file__).resolve().parents[2] / "conf")
    assert told["demo"].startswith("The sparsity-faithfulness study of the last MLP of the embedded model")
    assert {"jsae", "stack", "notebook_004"} <= told.keys() and "@package" not in " ".join(told.values())


def test_a_table_without_a_front_has_no_points(tmp_path: Path) -> None:
    assert best_points(tmp_path) == []
    (tmp_path / "table.csv").write_text("place,series,amount_name,amount,seed,l0\na,b,k,1,0,1\n")
    assert best_points(tmp_path) == []


def test_dead_and_diverged_dictionaries_are_on_no_front(tmp_path: Path) -> None:
    rows = ["here,SAE,k,1,0,a,0,3.1", "here,SAE,k,2,0,b,2,3.4", "here,SAE,k,3,0,c,3,", "here,SAE,k,4,0,d,4,3.4"]
    head = "place,series,amount_name,amount,seed,dictionary_key,l0,ce_replaced"
    (tmp_path / "table.csv").write_text("\n".join([head, *rows]) + "\n")
    (place,) = best_points(tmp_path)
    assert [point.keys for point in place.points] == [("b",)] and place.n_rows == 4


def test_the_size_of_a_picture_is_read_from_its_head(tmp_path: Path) -> None:
    from matplotlib.figure import Figure

    Figure(figsize=(3, 2)).savefig(tmp_path / "a.png", dpi=100)
    assert png_size(tmp_path / "a.png") == (300, 200)
