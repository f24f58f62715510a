"""An export is whole or not there, and touches nothing that no export has written."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from stores import contents
from tests.export.conftest import SWEEP, make

from saeflow.config import ConfigError
from saeflow.dictionaries import Spec, load_dictionary, save_dictionary
from saeflow.dictionaries.sae import build
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
def test_two_exports_have_the_same_bytes_and_results_stay(plan: Plan, exported: Any, tmp_path: Path, name: str) -> None:
    one, about = exported(name)
    before = state(Path(plan.results))
    other, _ = export(plan, name, tmp_path / "other", "cc-by-4.0")
    assert contents(one) == contents(other) and about["entries"]
    assert state(Path(plan.results)) == before
    assert json.loads((one / "export.json").read_text()) == about
    for entries in about["entries"].values():
        assert all((one / entry).exists() for entry in entries)
    assert [path.name for path in tmp_path.iterdir()] == ["other"]
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


def test_what_another_library_made_is_exported_too(compose_tiny: Any, finished: Path, tmp_path: Path) -> None:
    spec = Spec("transcoder", "relu", 32, 32, 40, "blocks.0.ln2.hook_normalized", "blocks.0.hook_mlp_out")
    g = torch.Generator().manual_seed(0)
    theirs = build(spec, *(torch.randn(size, generator=g) for size in ((32, 40), (40,), (40, 32), (32,))))
    for layer in (0, 1):
        (tmp_path / f"theirs{layer}").mkdir()
        save_dictionary(theirs, tmp_path / f"theirs{layer}")
        config = tmp_path / f"theirs{layer}/cfg.json"
        text = json.loads(config.read_text().replace("blocks.0", f"blocks.{layer}"))
        del text["metadata"]["saeflow"]  # as SAELens writes it
        config.write_text(json.dumps(text))
    blocks = [f"{{dictionary:foreign,site:mlp,site.layer:{i},dictionary.path:{tmp_path}/theirs{i}}}" for i in (0, 1)]
    shutil.copytree(finished, tmp_path / "results")
    for _ in range(2):  # the second plan finds what the first had made
        plan = compose_tiny(tmp_path / "results", features=[], sweep=f"{SWEEP[:-1]},{','.join(blocks)}]")
        make(plan, *(["foreign"] if plan.to_make["foreign"] else []))
    names = set(plan.stages["foreign"])
    folder, about = export(plan, "saelens", tmp_path / "saelens")
    x = torch.randn(20, 32, generator=g)
    assert len(names) == 2 and names < about["entries"].keys()
    for name in names:
        (entry,) = about["entries"][name]
        assert torch.equal(load_dictionary(folder / entry).forward(x), theirs.forward(x))
        assert not (folder / entry / "sparsity.safetensors").exists()  # nobody has evaluated it
        assert f"| `{entry}` |" in (folder / "README.md").read_text()
    _, about = export(plan, "circuit-tracer", tmp_path / "sets")
    assert len({about["entries"][name][0] for name in names}) == 1


def test_a_licence_is_an_identifier(plan: Plan, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"LICENSE='MIT License\\nx' is no identifier as Hugging Face has them"):
        export(plan, "saelens", tmp_path / "x", "MIT License\nx")
    assert not (tmp_path / "x").exists()


def test_make_uploads_by_its_command_line_alone() -> None:
    """A variable of the environment is not meant; a $ or a quote in a name is nobody's but the script's."""
    command = ["make", "-n", "export", "FORMAT=saelens", "TO=a '$(touch x)' b"]
    environment = os.environ | {"UPLOAD": "someone/else", "LICENSE": "mit"}
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=environment, check=True)
    assert '--to="$TO"' in done.stdout and "--upload" not in done.stdout and "--license" not in done.stdout
    done = subprocess.run([*command, "UPLOAD=me/saes"], cwd=ROOT, capture_output=True, text=True, check=True)
    assert '--upload="$UPLOAD"' in done.stdout and "touch" not in done.stdout


def test_the_script_refuses_in_one_sentence(tmp_path: Path) -> None:
    command = [sys.executable, str(ROOT / "scripts/export.py"), "--directory", str(tmp_path)]
    done = subprocess.run([*command, "parquet", "experiment=demo"], capture_output=True, text=True)
    assert done.returncode and done.stderr.startswith("export: FORMAT=parquet is no format; these are: saelens (")
    assert done.stderr.count("\n") == 1
