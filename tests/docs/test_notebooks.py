"""The notebooks of docs/notebooks/: their code at reduced size, and what is saved of the runs at full size.

Cells are executed here, in this process, with what IPython does at their ends; `docs/notebooks/execute.py` gives each
notebook a kernel of its own, which would cost seconds apiece.
"""

import ast
import re
import runpy
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import nbformat
import pytest
from matplotlib.figure import Figure
from tests.models.test_architectures import run_all

from saeflow.planning.expansion import compose
from saeflow.planning.overrides import split

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "docs/notebooks/execute.py"
EXECUTE = runpy.run_path(str(SCRIPT))
NOTEBOOKS = {path.stem: nbformat.read(path, as_version=4) for path in EXECUTE["notebooks"]()}


def code(notebook: Any) -> Iterator[tuple[str, bool]]:
    """What Python sees of each code cell, magics left out; and whether it is the one with the parameters."""
    for cell in notebook.cells:
        if cell.cell_type == "code":
            lines = [line for line in cell.source.splitlines() if not line.startswith("%")]
            yield "\n".join(lines), "parameters" in cell.metadata.get("tags", [])


def parameters(notebook: Any) -> dict[str, Any]:
    (source,) = (source for source, is_parameters in code(notebook) if is_parameters)
    found: dict[str, Any] = {}
    exec(source, found)
    return {name: value for name, value in found.items() if name.isupper()}


def show(value: Any) -> str:
    """As a notebook shows the last expression of a cell."""
    if isinstance(value, Figure):
        value.canvas.draw()
        return repr(value)
    return value._repr_html_() if hasattr(value, "_repr_html_") else repr(value)


def run_cells(notebook: Any, changed: dict[str, Any]) -> list[str]:
    """Runs its code with other parameters, and returns what the cells show."""
    namespace: dict[str, Any] = {"__name__": "__main__"}
    shown = []
    for source, is_parameters in code(notebook):
        body = ast.parse(source).body
        last = body.pop() if body and isinstance(body[-1], ast.Expr) else None
        exec(compile(ast.Module(body, []), "<cell>", "exec"), namespace)
        if is_parameters:
            namespace |= changed
        if last is not None:
            value = eval(compile(ast.Expression(last.value), "<cell>", "eval"), namespace)  # type: ignore[attr-defined]
            shown += [] if value is None else [show(value)]
    return shown


OF_RESULTS = [name for name, notebook in NOTEBOOKS.items() if "HYDRA" in parameters(notebook)]


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the notebooks' commands make, at the reduced sizes that they name, in one folder."""
    folder = tmp_path_factory.mktemp("notebooks") / "results"
    wanted = {name: parameters(NOTEBOOKS[name]) for name in OF_RESULTS}
    for overrides in sorted({f"{one['HYDRA']} {one['REDUCED']}" for one in wanted.values()}):
        run_all(compose(ROOT / "conf", split(overrides), results=str(folder)))
    return folder


@pytest.mark.parametrize("name", OF_RESULTS)
@pytest.mark.slow
def test_its_code_runs_at_reduced_size(
    name: str, results: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import pandas as pd

    monkeypatch.chdir(SCRIPT.parent)
    with warnings.catch_warnings(), pd.option_context("display.precision", 6):
        warnings.simplefilter("error", UserWarning)
        shown = run_cells(NOTEBOOKS[name], {"RESULTS": str(results)})
    assert len(shown) >= 4
    assert "make run" in capsys.readouterr().out


@pytest.mark.slow
def test_your_own_model_goes_from_a_folder_and_a_file_to_latents(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """As it stands: it is small, and runs Snakemake."""
    monkeypatch.chdir(SCRIPT.parent)
    monkeypatch.setenv("PYTHONPATH", str(ROOT / "src"))
    of = {"FOLDER": tmp_path, "MODEL": tmp_path / "model", "TEXT": tmp_path / "text.jsonl"}
    shown = "\n".join(run_cells(NOTEBOOKS["your_own_model_and_text"], of))
    printed = capsys.readouterr().out
    assert "1 training, 1 evaluation" in shown and "largest activations" in shown
    assert "layer 2 is out of range" in printed and "figures: results/figures/mine-" in printed


def test_there_is_one_for_each_notebook_that_the_project_began_from() -> None:
    assert [name[:3] for name in OF_RESULTS] == ["000", "001", "002", "003", "004"]
    assert set(NOTEBOOKS) - set(OF_RESULTS) == {"your_own_model_and_text"}
    listed = (ROOT / "docs/results.md").read_text()
    assert [name for name in NOTEBOOKS if f"(notebooks/{name}.ipynb)" not in listed] == []


# -------------------------------------------------------------------- what is saved
@pytest.mark.parametrize("name", NOTEBOOKS)
def test_what_is_saved_was_executed_to_its_end_and_shows_nothing_of_where(name: str) -> None:
    assert EXECUTE["problems"](NOTEBOOKS[name]) == []
    assert EXECUTE["tidy"](NOTEBOOKS[name].copy()) == NOTEBOOKS[name]
    shown = [output for cell in NOTEBOOKS[name].cells for output in cell.get("outputs", [])]
    assert any("image/png" in output.get("data", {}) for output in shown)


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_its_words_state_no_number_that_a_rerun_could_change(name: str) -> None:
    """Numbers with decimals are printed by cells, not written beside them."""
    words = [cell.source for cell in NOTEBOOKS[name].cells if cell.cell_type == "markdown"]
    assert re.findall(r"[-+]?\d+\.\d+|\d+ ?%", "\n".join(re.sub("`[^`]*`", "", text) for text in words)) == []


def saved(*outputs: dict[str, Any], count: int = 1) -> Any:
    """A notebook of one cell with these outputs."""
    cell = nbformat.v4.new_code_cell("run", execution_count=count, outputs=[nbformat.from_dict(one) for one in outputs])
    return nbformat.v4.new_notebook(cells=[cell])


@pytest.mark.parametrize(
    ("output", "said"),
    [
        ({"output_type": "error", "ename": "KeyError", "evalue": "'l0'", "traceback": []}, "ends with KeyError: 'l0'"),
        ({"output_type": "stream", "name": "stderr", "text": "UserWarning: no"}, "cell 0 warns: UserWarning: no"),
        ({"output_type": "stream", "name": "stdout", "text": "in /home/me/results"}, "cell 0 shows /home/me/results"),
        (
            {"output_type": "display_data", "metadata": {}, "data": {"text/html": "<a href='file:///tmp/x'>"}},
            "cell 0 shows file:///tmp/x",
        ),
        (
            {"output_type": "display_data", "metadata": {}, "data": {"application/vnd.jupyter.widget-view+json": {}}},
            "cell 0 shows a widget",
        ),
        ({"output_type": "stream", "name": "stdout", "text": "a" * 300_001}, "bytes, more than 300,000"),
    ],
)
def test_what_may_not_be_saved_is_said(output: dict[str, Any], said: str) -> None:
    (problem,) = EXECUTE["problems"](saved(output))
    assert said in problem


def test_a_notebook_that_was_not_executed_may_not_be_saved() -> None:
    assert EXECUTE["problems"](saved(count=3)) == [
        "its cells were not executed in order, in a fresh kernel",
        "it has no outputs",
    ]
    fine = {"output_type": "stream", "name": "stdout", "text": "results/train and 3/4"}
    assert EXECUTE["problems"](saved(fine)) == []
