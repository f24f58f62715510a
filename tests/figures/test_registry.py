"""Figures are found by name, listed without drawing libraries, and drawn from what their own reader finds."""

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jinja2
import pandas as pd
import pytest
from docutils.core import publish_parts
from matplotlib.figure import Figure
from stores import write_receipt

from saeflow.figures import registry
from saeflow.figures.axes import subplots
from saeflow.figures.captions import about, as_html, caption
from saeflow.figures.job import draw
from saeflow.figures.registry import declared, figure, find
from saeflow.figures.style import look, track
from saeflow.jobs.job import Job
from saeflow.planning.graph import Instance, Plan

ROOT = Path(__file__).resolve().parents[2]
STAGES = {"evaluate", "stack", "train", "jacobian", "heads", "recover", "circuits", "greater_than"}
SUMMARY = {
    "train_key": "one",
    "part": None,
    "dictionary_key": "one",
    "kind": "sae",
    "activation": "topk",
    "skip": False,
}
SUMMARY |= {
    "saelens": None,
    "hook_name": "blocks.0.hook_mlp_out",
    "hook_name_out": "blocks.0.hook_mlp_out",
    "d_sae": 64,
}
SUMMARY |= {"amount_name": "k", "amount": 4, "seed": 0, "tokens_key": "held", "l0": 3.0, "ce_replaced": 3.5}


class Two(NamedTuple):
    table: pd.DataFrame

    @property
    def extra_tables(self) -> dict[str, pd.DataFrame]:
        return {"everything": self.table}


calls: list[str] = []


def read(job: Job) -> Two:
    calls.append(job.instance.key)
    (folder,) = job.inputs("evaluate")
    return Two(pd.DataFrame([json.loads((folder / "summary.json").read_text())]))


def draw_l0(data: Two) -> tuple[Figure, pd.DataFrame]:
    """L0 of one dictionary,
    as a point.

    What else there is to say.
    """
    made, axis = subplots()
    axis.plot(data.table["l0"], "o")
    return made, data.table[["l0"]]


@pytest.fixture
def own() -> Iterator[str]:
    """The name of a figure that this process registers."""
    figure("of_a_test", stage="evaluate", reads=read)(draw_l0)
    yield "of_a_test"
    del registry._registered["of_a_test"]


def figures_job(results: Path, figures: list[str]) -> Job:
    folder = results / "evaluate/one"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "summary.json").write_text(json.dumps(SUMMARY))
    write_receipt(folder, "evaluate")
    instance = Instance("figures", "drawn", {"figures": figures}, {"evaluate": ["one"]}, {})
    evaluated = Instance("evaluate", "one", {"evaluation": {"confidence": 0.95}}, {}, {})
    stages = {"figures": {"drawn": instance}, "evaluate": {"one": evaluated}}
    return Job(instance, Plan("test", stages, {}, results=str(results)), "cpu")


def test_all_figures_are_listed_without_drawing_libraries() -> None:
    """The plan lists them at every start."""
    code = (
        "import json, sys; from saeflow.figures.registry import declared; print(json.dumps(declared())); "
        "print(*({'matplotlib', 'pandas', 'torch', 'numpy'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    listed, heavy = done.stdout.splitlines()
    assert not heavy
    found = {name: registry.Declared(*fields) for name, fields in json.loads(listed).items()}
    assert found == declared() and len(found) == 49 and {one.stage for one in found.values()} == STAGES
    for name, one in found.items():
        known = find(name)
        assert known.declared == one and known.draw.__module__ == one.module and one.sentence.endswith(".")


def test_importing_and_drawing_figures_leaves_the_backend_alone(tmp_path: Path) -> None:
    """Of a notebook, say. A figure is an object that pyplot does not know."""
    modules = sorted({one.module for one in declared().values()} | {"saeflow.figures.job"})
    code = (
        "import importlib, sys, matplotlib; matplotlib.use('svg');"
        f"[importlib.import_module(name) for name in {modules}];"
        "from saeflow.figures.axes import subplots; subplots()[0].savefig(sys.argv[1]);"
        "print(matplotlib.get_backend(), 'matplotlib.pyplot' in sys.modules, matplotlib.rcParams['font.size'])"
    )
    command = [sys.executable, "-c", code, str(tmp_path / "figure.png")]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["svg", "False", "10.0"]


def test_series_of_a_figure_never_look_alike() -> None:
    looks = [look(i) for i in range(288)]
    assert len(set(looks)) == 288 and len({one[1:] for one in looks[:24]}) == 24  # without colours too
    lines = [tuple(track(n).values()) for n in range(48)]
    assert len(set(lines)) == 48
    for of, i in ((look, 288), (track, 48)):
        with pytest.raises(ValueError, match="apart"):
            of(i)


def test_make_figures_lists_them() -> None:
    done = subprocess.run([sys.executable, "-m", "saeflow.figures"], capture_output=True, text=True, check=True)
    lines = done.stdout.splitlines()
    assert [line.split()[0] for line in lines] == list(declared())
    assert any(line.split(maxsplit=2)[1:] == ["evaluate", declared()["matched_l0"].sentence] for line in lines)


def test_unknown_figure_is_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(
        ValueError,
        match="no figure 'paretto'; there are: circuits, circuits_overlap, greater_than, sparsity_faithfulness",
    ):
        find("paretto")
    with pytest.raises(
        ValueError,
        match="no figure 'paretto'; there are: circuits, circuits_overlap, greater_than, sparsity_faithfulness",
    ):
        draw([figures_job(tmp_path, ["paretto"])])
    assert not (tmp_path / "figures").exists()


def test_a_figure_that_is_registered_here_is_listed_found_and_drawn(own: str, tmp_path: Path) -> None:
    assert declared()[own][:3] == (own, "evaluate", "L0 of one dictionary, as a point.")
    assert find(own).draw is draw_l0
    figure("again", stage="evaluate", reads=read)(another())
    try:
        calls.clear()
        said = draw([figures_job(tmp_path, [own, "again"])])
    finally:
        del registry._registered["again"]
    folder = tmp_path / "figures/drawn"
    assert (
        said
        == f"wrote of_a_test, again (.png, .pdf, .csv) and table.csv and table.html and everything.csv to {folder}/"
    )
    assert calls == ["drawn"]  # read once for both
    assert pd.read_csv(folder / "of_a_test.csv").to_dict("list") == {"l0": [3.0]}
    assert pd.read_csv(folder / "everything.csv")["l0"].tolist() == [3.0]
    table = pd.read_csv(folder / "table.csv")
    assert table[["place", "series", "amount", "d_sae", "l0"]].values.tolist() == [
        ["layer 0, mlp_out", "TopK SAE", 4, 64, 3.0]
    ]  # fmt: skip
    assert {p.suffix for p in folder.glob("again.*")} == {".png", ".pdf", ".csv"}


def another() -> Any:
    def other(data: Two) -> tuple[Figure, pd.DataFrame]:
        """Another."""
        return draw_l0(data)

    return other


def test_a_figure_of_a_stage_that_the_experiment_has_not_is_refused_with_those_that_it_can_draw(tmp_path: Path) -> None:
    job = figures_job(tmp_path, ["recovery", "matched_l0", "stacks"])
    wanted = (
        r"this experiment has no artifacts of recover, stack for recovery, stacks; from what it has can be drawn: "
        r"sparsity_faithfulness, fronts_with_coefficients, matched_l0, .*"
    )
    with pytest.raises(ValueError, match=wanted) as refused:
        draw([job])
    possible = str(refused.value).split("drawn: ")[1].split(", ")
    assert possible == [name for name, one in declared().items() if one.stage == "evaluate"]
    assert not job.path.exists()


def test_a_taken_name_is_refused(own: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, module in ((own, __name__), ("matched_l0", "saeflow.evaluation.figures.fronts")):
        with pytest.raises(ValueError, match=f"two figures are called '{name}': of {module} and of {__name__}"):
            figure(name, stage="train", reads=read)(another())
    figure(own, stage="evaluate", reads=read)(draw_l0)  # the same again, as when a module is loaded anew
    source = '@figure("twice", stage="train", reads=read)\ndef one(data):\n    """One."""\n'
    sources(tmp_path, monkeypatch, {"a/figures.py": source, "b/figures/more.py": source})
    with pytest.raises(
        ValueError, match=r"two figures are called 'twice': of saeflow.a.figures and of .*b.figures.more"
    ):
        declared()


def sources(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, files: dict[str, str]) -> None:
    """Another tree of packages to find figures in."""
    for name, text in files.items():
        (tmp_path / "saeflow" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "saeflow" / name).write_text(text)
    monkeypatch.setattr(registry, "PACKAGES", tmp_path / "saeflow")
    registry._in_source.cache_clear()
    monkeypatch.setattr(registry, "_in_source", registry._in_source.__wrapped__)


@pytest.mark.parametrize(
    "source",
    [
        '@figure("name", stage="train", reads=read)\ndef one(data):\n    return 1\n\n\ndef two():\n    """Two."""\n',
        '@figure(NAME, stage="train", reads=read)\ndef one(data):\n    """One."""\n',
        '@figure("name", reads=read)\ndef one(data):\n    """One."""\n',
        '@figure("name", stage="train", reads=read)\ndef one(data):\n    return 1\n',
    ],
    ids=["another's docstring", "name no literal", "no stage", "no docstring"],
)
def test_a_declaration_that_cannot_be_read_is_refused(
    source: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sources(tmp_path, monkeypatch, {"a/figures.py": source})
    with pytest.raises(
        ValueError, match=r"saeflow\.a\.figures: @figure.* must be @figure|figure 'name' has no docstring"
    ):
        declared()


def test_a_figure_without_a_sentence_is_refused() -> None:
    with pytest.raises(ValueError, match="figure 'silent' has no docstring"):
        figure("silent", stage="train", reads=read)(lambda data: draw_l0(data))


def test_captions_are_written_by_hand_or_say_the_sentence(own: str, tmp_path: Path) -> None:
    by_hand = ROOT / "workflow/report"
    assert caption("matched_l0", by_hand, tmp_path) == str(by_hand / "matched_l0.rst")
    path = Path(caption(own, by_hand, tmp_path / "captions"))
    assert path == tmp_path / "captions/of_a_test.rst"
    assert path.read_text() == "L0 of one dictionary, as a point. The table behind it is ``of_a_test.csv``.\n"
    written = path.stat().st_mtime_ns
    assert caption(own, by_hand, tmp_path / "captions") == str(path) and path.stat().st_mtime_ns == written
    assert [p.name for p in path.parent.iterdir()] == ["of_a_test.rst"]


def test_every_caption_is_of_a_figure() -> None:
    assert {p.stem for p in (ROOT / "workflow/report").glob("*.rst")} - {"workflow", "table"} <= declared().keys()


def test_a_caption_says_of_what_data_as_reports_and_pages_read_it(own: str, tmp_path: Path) -> None:
    for number, seed in enumerate((0, 3)):
        folder = tmp_path / "results/evaluate" / f"e{number}"
        folder.mkdir(parents=True)
        summary = {"seed": seed, "model_name": "a_b <i>{{7*7}}</i>", "n_tokens": 65536, "n_documents": 47}
        (folder / "summary.json").write_text(json.dumps(summary | {"confidence": 0.95}))
    needs = {"evaluate": ["e0", "e1", "gone"], "train": ["t"]}
    data = about(tmp_path / "results", needs, "evaluate")
    assert data == (
        "Data: 3 evaluations; seeds 0, 3; model a_b <i>{{7*7}}</i>; 65,536 tokens of 47 held-out documents; "
        "intervals of 95 % over documents."
    )
    assert about(tmp_path / "results", needs, "train") == "Data: 1 training; seeds 0, 3; model a_b <i>{{7*7}}</i>."
    assert about(tmp_path / "results", needs, "jacobian") == ""
    written = Path(caption(own, ROOT / "workflow/report", tmp_path / "captions", data)).read_text()
    body = publish_parts(jinja2.Template(written).render(), writer="html")["body"]
    assert "model a_b &lt;i&gt;{{7*7}}&lt;/i&gt;; 65,536" in body and "system-message" not in body
    shown = as_html("the \\|J\\| of *Results* in ``a_b.csv``, k * k <b>")
    assert shown == "the |J| of <em>Results</em> in <code>a_b.csv</code>, k * k &lt;b&gt;"
