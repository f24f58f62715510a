"""An export is whole or not there, and touches nothing that no export has written."""

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from stores import contents

from saeflow.config import ConfigError
from saeflow.export import run as run_module
from saeflow.export.formats import FORMATS
from saeflow.export.run import export
from saeflow.export.subjects import subjects
from saeflow.planning.graph import Plan
from saeflow.storage.receipts import RECEIPT, DamagedError

ROOT = Path(__file__).resolve().parents[2]


def state(folder: Path) -> dict[str, tuple[int, int]]:
    return {str(p): (p.stat().st_mtime_ns, p.stat().st_size) for p in folder.rglob("*") if p.name != ".lock"}


@pytest.mark.parametrize("name", FORMATS)
def test_two_exports_have_the_same_bytes_and_results_stay(plan: Plan, tmp_path: Path, name: str) -> None:
    before = state(Path(plan.results))
    one, about = export(plan, name, tmp_path / "one")
    other, _ = export(plan, name, tmp_path / "other")
    assert contents(one) == contents(other) and about["entries"]
    assert state(Path(plan.results)) == before
    assert json.loads((one / "export.json").read_text()) == about
    for entries in about["entries"].values():
        assert all((one / entry).exists() for entry in entries)
    assert not [path for path in tmp_path.iterdir() if path.name not in ("one", "other")]
    assert about["entries"].keys() | about["left_out"].keys() == {one.name for one in subjects(plan)}


def test_a_name_that_is_no_format_is_told_which_are(plan: Plan, tmp_path: Path) -> None:
    for name in ("saelense", ""):
        with pytest.raises(ConfigError, match=r"is no format; these are: saelens \(.*circuit-tracer.*delphi"):
            export(plan, name, tmp_path / "x")
    assert not (tmp_path / "x").exists()


def test_dictionaries_that_are_not_made_are_refused(copy: Plan, tmp_path: Path) -> None:
    key = next(iter(copy.stages["train"]))
    shutil.rmtree(copy.folder("train", key))
    with pytest.raises(ConfigError, match=rf"1 of the \d+ dictionaries of tiny are not made yet, such as .*{key}: run"):
        export(copy, "saelens", tmp_path / "x")
    assert not (tmp_path / "x").exists()


def test_damaged_dictionaries_are_refused(copy: Plan, tmp_path: Path) -> None:
    key = next(iter(copy.stages["train"]))
    weights = copy.folder("train", key) / "sae_weights.safetensors"
    held = bytearray(weights.read_bytes())
    held[-3] ^= 1
    weights.write_bytes(held)
    with pytest.raises(DamagedError, match=r"sae_weights.safetensors is damaged \(its checksum is another\)"):
        export(copy, "saelens", tmp_path / "x")
    weights.write_bytes(held[:-1])
    with pytest.raises(DamagedError, match=r"bytes instead of"):
        export(copy, "saelens", tmp_path / "x")
    assert not (tmp_path / "x").exists()


def test_a_folder_of_something_else_stays(plan: Plan, tmp_path: Path) -> None:
    mine = tmp_path / "mine"
    mine.mkdir()
    (mine / "thesis.tex").write_text("all of it")
    with pytest.raises(ConfigError, match=r"is there, and no export wrote it \(it has no export.json\)"):
        export(plan, "saelens", mine)
    assert contents(mine) == {"thesis.tex": b"all of it"}
    with pytest.raises(ConfigError, match="no export wrote it"):
        export(plan, "saelens", mine / "thesis.tex")
    for place in (plan.results, Path(plan.results) / "train/x", Path(plan.results).parent):
        with pytest.raises(ConfigError, match="which exports leave alone"):
            export(plan, "saelens", place)


def test_an_export_that_fails_leaves_the_earlier_one(
    plan: Plan, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, _ = export(plan, "saelens", tmp_path / "x")
    before = contents(folder)

    def full(*_: object) -> str:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(run_module, "model_card", full)
    with pytest.raises(OSError, match="No space left"):
        export(plan, "saelens", folder)
    assert contents(folder) == before and [path.name for path in tmp_path.iterdir()] == ["x"]
    monkeypatch.undo()
    (folder / "README.md").write_text("mine")
    export(plan, "saelens", folder)  # an export replaces an export
    assert contents(folder) == before


def test_without_tables_of_latents_it_says_how_to_get_them(compose_tiny: Any, copy: Plan, tmp_path: Path) -> None:
    without = compose_tiny(Path(copy.results), features=[])
    for name in ("neuronpedia", "saedashboard", "delphi"):
        with pytest.raises(ConfigError, match=r"looks no latents of .* up: add features=all"):
            export(without, name, tmp_path / "x")
    (copy.folder("features", next(iter(copy.stages["features"]))) / RECEIPT).unlink()
    for name in ("neuronpedia", "saedashboard"):
        with pytest.raises(ConfigError, match=r"is not made yet: run the experiment with features=all first"):
            export(copy, name, tmp_path / "x")


def test_a_licence_is_an_identifier(plan: Plan, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"LICENSE='MIT License\\nx' is no identifier as Hugging Face has them"):
        export(plan, "saelens", tmp_path / "x", "MIT License\nx")
    assert not (tmp_path / "x").exists()


def test_the_script_refuses_in_one_sentence(tmp_path: Path) -> None:
    command = [sys.executable, str(ROOT / "scripts/export.py"), "--directory", str(tmp_path)]
    done = subprocess.run([*command, "parquet", "experiment=demo"], capture_output=True, text=True)
    assert done.returncode and done.stderr.startswith("export: FORMAT=parquet is no format; these are: saelens (")
    assert done.stderr.count("\n") == 1
