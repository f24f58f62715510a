"""How to add a kind, a stage, a metric and a figure, a site: each page of docs/, followed step by step in a copy of the
tree."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest
from tests.test_workflow import TINY, fill, finished  # noqa: F401 (finished is a fixture)

ROOT = Path(__file__).resolve().parents[1]
COPIED = ("src", "scripts", "workflow", "profiles", "Snakefile", "pyproject.toml", "environment.yml")


def follow(page: str, tree: Path) -> dict[str, str]:
    """Writes the files and makes the edits that a page of docs/ shows; returns what was done to each file."""
    done = {}
    for language, block in re.findall(r"^```(\w+)\n(.*?)^```$", (ROOT / "docs" / page).read_text(), re.M | re.S):
        if language == "diff":
            path = re.search(r"^\+\+\+ b/(.*)$", block, re.M)[1]
            old, new = (re.findall(rf"^\{sign}(?!\{sign}\{sign} )(.*)$", block, re.M) for sign in "-+")
            text = (tree / path).read_text()
            if old:
                assert text.count("\n".join(old)) == 1, f"{page}: {path} has not these lines, once:\n{old}"
                (tree / path).write_text(text.replace("\n".join(old), "\n".join(new)))
            else:  # at the end
                (tree / path).write_text(text + "\n".join([*new, ""]))
            done[path] = "changed"
        elif path := re.match(r"# (\S+/\S+)\n", block):
            assert not (tree / path[1]).exists(), f"{page}: {path[1]} is there already"
            (tree / path[1]).parent.mkdir(parents=True, exist_ok=True)
            (tree / path[1]).write_text(block[path.end() :])
            done[path[1]] = "new"
    return done


class Copy:
    """A copy of the tree, with a tiny model and corpus as its embedded ones, and what a run made of these before."""

    def __init__(self, tree: Path, model: Path, corpus: Path, run: Path) -> None:
        self.tree = tree
        for name in COPIED:
            # Compiled loops are copied with their files; not what another process is writing.
            ignored = shutil.ignore_patterns("*.egg-info", "*.tmp.*", "*.pyc.*")
            copy = shutil.copytree if (ROOT / name).is_dir() else shutil.copy
            copy(ROOT / name, tree / name, **({"ignore": ignored} if (ROOT / name).is_dir() else {}))
        shutil.copytree(ROOT / "tests", tree / "tests", ignore=shutil.ignore_patterns("__pycache__", "test_*"))
        fill(tree, model, corpus)
        for stage in ("tokens", "activations", "baseline"):
            shutil.copytree(run / "results" / stage, tree / "results" / stage)

    def call(self, *command: str) -> str:
        environment = os.environ | {"PYTHONPATH": f"{self.tree}/src", "HF_HUB_OFFLINE": "1"}
        command = (sys.executable, "-m", *command)
        done = subprocess.run(command, cwd=self.tree, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout + done.stderr

    def snakemake(self, hydra: str) -> str:
        return self.call("snakemake", "--cores", "2", "--config", f"hydra={hydra} {TINY}")

    def figure(self, name: str) -> pd.DataFrame:
        (table,) = self.tree.glob(f"results/figures/*/{name}.csv")
        assert table.with_suffix(".png").is_file() and table.with_suffix(".pdf").is_file()
        return pd.read_csv(table)


@pytest.fixture
def copy(tmp_path: Path, neox_folder: Path, corpus_file: Path, finished: Path) -> Copy:  # noqa: F811
    return Copy(tmp_path, neox_folder, corpus_file, finished)


@pytest.mark.slow
def test_a_kind_is_a_module_its_configuration_and_its_test(copy: Copy) -> None:
    done = follow("add_a_kind.md", copy.tree)
    assert sorted(done.values()) == ["new"] * 3 and sum(path.startswith("src/") for path in done) == 1
    assert "3 passed" in copy.call("pytest", "-q", "tests/dictionaries/test_random_subset.py")
    copy.snakemake("dictionary=random_subset dictionary.k=4 dictionary.competing=[0.5,1]")
    table = copy.figure("sparsity_faithfulness")
    assert len(table) == 2 and (table["l0"] <= 4).all()
    trained = sorted(path.name for path in copy.tree.glob("results/train/*"))
    assert len(trained) == 2 and all(name.startswith("random_subset-L1.mlp_out-k4-") for name in trained)


@pytest.mark.slow
def test_a_stage_is_a_package_and_its_test(copy: Copy) -> None:
    done = follow("add_a_stage.md", copy.tree)
    assert set(done.values()) == {"new"}
    assert {Path(path).parent.as_posix() for path in done} == {"src/saeflow/norms", "tests/norms"}
    assert "1 passed" in copy.call("pytest", "-q", "tests/norms/test_norms.py")
    hydra = "sweep={dictionary:topk,site:[mlp_in,mlp_out],dictionary.k:4}"
    plain = copy.call("snakemake", "-n", "--config", f"hydra={hydra} {TINY}")
    assert not re.search(r"^norms +", plain, re.M)  # a figure asks for it, or nobody does
    copy.snakemake(f"{hydra} figures=[norm_by_position]")
    table = copy.figure("norm_by_position")
    assert len(table) == 2 * 32 and (table["norm"] > 0).all()
    assert (copy.tree / "results/norms").is_dir()


@pytest.mark.slow
def test_a_metric_is_a_line_and_a_figure_a_function(copy: Copy) -> None:
    done = follow("add_a_metric.md", copy.tree)
    assert sorted(done.values()) == ["changed"] * 3 + ["new"]
    assert "1 passed" in copy.call("pytest", "-q", "tests/evaluation/test_relative_norm.py")
    assert "relative_norm" in copy.call("saeflow.figures")
    copy.snakemake("dictionary=topk dictionary.k=[2,4] figures=[relative_norm]")
    table = copy.figure("relative_norm")
    assert len(table) == 2 and table["relative_norm"].between(0, 10).all()
    summary = pd.read_csv(next(copy.tree.glob("results/figures/*/evaluations.csv")))
    assert {"relative_norm_low", "relative_norm_without_bos"} <= set(summary.columns)


@pytest.mark.slow
def test_a_site_is_a_file(copy: Copy) -> None:
    assert follow("add_a_site.md", copy.tree) == {"conf/site/block.yaml": "new"}
    page = (ROOT / "docs/add_a_site.md").read_text()
    by_hook, by_name = re.findall(r'^snakemake --config hydra="(.+)"$', page, re.MULTILINE)
    plan = copy.call("snakemake", "-n", "--config", f"hydra={by_hook.replace('blocks.2', 'blocks.1')} {TINY}")
    assert re.search(r"^train +1$", plan, re.MULTILINE)
    hydra = f"{by_name.replace('[1,2]', '[0,1]')} dictionary.k=4 {TINY.replace('site.layer=1', '')}"
    copy.call("snakemake", "--cores", "2", "--config", f"hydra={hydra}")
    trained = sorted(path.name for path in copy.tree.glob("results/train/*"))
    assert [name.split("_to_")[0] for name in trained] == ["transcoder-L0.resid_pre", "transcoder-L1.resid_pre"]
    assert len(copy.figure("sparsity_faithfulness")) == 2
