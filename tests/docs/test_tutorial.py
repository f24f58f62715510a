"""The tutorial, followed word by word in a copy of the tree with a tiny model and text."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from conftest import save_model
from tests.test_workflow import fill

ROOT = Path(__file__).resolve().parents[2]
COPIED = ("src", "scripts", "workflow", "profiles", "Snakefile", "Makefile", "pyproject.toml", "environment.yml")
BLOCKS = re.findall(r"^```(\w+)\n(.*?)^```$", (ROOT / "docs/tutorial.md").read_text(), re.MULTILINE | re.DOTALL)
SMALL: dict[str, dict[str, Any]] = {
    "config.yaml": {
        "tokens": {"context_size": 32, "train_tokens": 4096, "held_out_tokens": 1024, "held_out_fraction": 0.3},
        "activations": {"batch_rows": 8, "chunk_tokens": 256, "shard_tokens": 1024},
    },
    "training/default.yaml": {"n_tokens": 4096, "batch_size": 256, "lr_warm_up_steps": 2, "lr_decay_steps": 2}
    | {"l1_warm_up_steps": 2, "log_every": 4},
    "features/none.yaml": {"n_tokens": 512, "neighbour_tokens": 256, "effect_samples": 2},
    "experiment/demo.yaml": {
        "figures": ["sparsity_faithfulness"],
        "sweep": [
            {"dictionary": "topk", "site": "mlp_out", "dictionary.k": [8, 16]},
            {"dictionary": "relu", "site": "mlp_out", "dictionary.l1_coefficient": [0.6, 1.0]},
            {"dictionary": "transcoder", "site": "mlp", "dictionary.l1_coefficient": [0.3]},
        ],
    },
}
"""What the copy's `conf/` says, so that a study takes seconds."""


@pytest.fixture
def clone(tmp_path: Path, tokenizer_folder: Path, corpus_file: Path) -> Path:
    from transformers import GPTNeoXConfig, GPTNeoXForCausalLM

    sizes = {"vocab_size": 300, "hidden_size": 32, "num_hidden_layers": 4, "num_attention_heads": 4}
    config = GPTNeoXConfig(**sizes, intermediate_size=64, max_position_embeddings=64, bos_token_id=0, eos_token_id=0)
    config.use_parallel_residual = False
    model = save_model(GPTNeoXForCausalLM(config), tmp_path / "model", tokenizer_folder)
    tree = tmp_path / "saeflow"
    tree.mkdir()
    for name in COPIED:
        copy = shutil.copytree if (ROOT / name).is_dir() else shutil.copy
        copy(ROOT / name, tree / name)
    fill(tree, model, corpus_file)
    for name, settings in SMALL.items():
        file = tree / "conf" / name
        text = file.read_text()
        said = yaml.safe_load(text)
        for key, value in settings.items():
            said[key] = said[key] | value if isinstance(value, dict) else value
        package = "# @package _global_\n" if text.startswith("# @package") else ""
        file.write_text(package + yaml.safe_dump(said, sort_keys=False))
    (tree / ".venv").symlink_to(sys.prefix)
    return tree


def follow(language: str, block: str, tree: Path) -> str:
    """Does what one block says, and returns what it showed."""
    if language == "yaml":
        name, text = re.fullmatch(r"# (\S+)\n(.*)", block, re.DOTALL).groups()  # type: ignore[union-attr]
        assert not (tree / name).exists()
        (tree / name).write_text(text)
        return ""
    assert language in ("sh", "python"), language
    make = 'make() { command make -o .venv/.installed "$@"; }\n'  # the environment is set up already
    command = ["bash", "-euc", make + block] if language == "sh" else [".venv/bin/python", "-c", block]
    environment = os.environ | {"PYTHONPATH": f"{tree}/src", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, cwd=tree, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, f"{block}\n{done.stdout[-3000:]}{done.stderr[-3000:]}"
    return done.stdout + done.stderr


@pytest.mark.slow
def test_the_tutorial_does_what_it_says(clone: Path) -> None:
    (first, clone_it), *rest = BLOCKS
    assert first == "sh" and clone_it.startswith("git clone")
    shown = [(block, follow(language, block, clone)) for language, block in rest]
    said = [text for block, text in shown if block == "make demo\n"]
    assert "results/index.html" in said[0]
    assert "Nothing to be done" in said[1], said[1]
    plans = {block: text for block, text in shown if block.startswith("make plan")}
    one, other = plans.values()
    assert re.search(r"^1 training, 1 evaluation, 1 table of latents, 1 dashboard, 1 comparison", one, re.MULTILINE), (
        one
    )
    assert "4 trainings" in other, other
    tables = [text for block, text in shown if "evaluations(" in block]
    assert len(re.findall(r"\d\.\d+", tables[0])) >= 12  # L0 and loss of six dictionaries
    (latent,) = [text for block, text in shown if "run.features" in block]
    assert "effect" in latent
    assert (clone / "mine.svg").is_file() and list((clone / "results/figures").glob("middle-*/*.png"))
