"""The script that trained the embedded model, at a size of seconds; and what its model card states."""

import itertools
import json
import math
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import make_texts

from saeflow.models import pretraining as pretrain
from saeflow.text.corpus import is_held_out, read_documents
from saeflow.text.tokenizer import load_tokenizer

ROOT = Path(__file__).resolve().parents[2]
TINY = pretrain.PretrainConfig(
    vocab_size=300, d_model=16, n_layers=1, n_heads=2, d_mlp=32, context_size=16, n_steps=6, batch_rows=4, eval_every=2
)


def test_two_runs_give_the_same_weights_and_the_loss_falls() -> None:
    tokenizer = pretrain.train_tokenizer(make_texts(50), TINY.vocab_size)
    train, held_out = (pretrain.tokenise(tokenizer, make_texts(60, seed), TINY.context_size) for seed in (1, 2))
    curves: list[list[dict]] = [[], []]
    models = [pretrain.train_model(TINY, train, held_out, 0, curve.append) for curve in curves]
    first, second = (model.state_dict() for model in models)
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert curves[0] == curves[1] and [row["step"] for row in curves[0]] == [2, 4, 6]
    assert curves[0][-1]["held_out_loss"] == pytest.approx(pretrain.held_out_loss(models[0], held_out.rows))
    assert curves[0][-1]["held_out_loss"] < math.log(TINY.vocab_size)


def test_ngram_losses_are_those_of_their_formulas() -> None:
    rng = np.random.default_rng(0)
    train, rows = rng.integers(0, 5, 60), rng.integers(0, 6, (3, 7))  # token 5 is never seen in training
    counts, pairs = Counter(train.tolist()), Counter(zip(train[:-1].tolist(), train[1:].tolist(), strict=True))
    unigram = {b: (counts[b] + 1) / (60 + 6) for b in range(6)}
    losses: dict[str, list[float]] = {"unigram": [], "bigram": []}
    for row in rows.tolist():
        for a, b in itertools.pairwise(row):
            seen = sum(n for (first, _), n in pairs.items() if first == a)
            kinds = max(1, sum(first == a for first, _ in pairs))
            losses["unigram"].append(-math.log(unigram[b]))
            losses["bigram"].append(-math.log((pairs[a, b] + kinds * unigram[b]) / (seen + kinds)))
    found = pretrain.ngram_losses(train, rows, 6)
    assert found == pytest.approx({name: float(np.mean(values)) for name, values in losses.items()})


def test_card_of_the_embedded_model_states_its_loss() -> None:
    from transformers import GPTNeoXForCausalLM

    folder = ROOT / "resources/model"
    card = (folder / "README.md").read_text()
    stated = {name: float(x) for name, x in re.findall(r"\| (this model|bigram|unigram)[^|]*\| ([\d.]+) \|", card)}
    config = pretrain.PretrainConfig()
    tokenizer = load_tokenizer(folder).tokenizer
    documents = list(read_documents(ROOT / "resources/corpus.jsonl.gz"))
    train, held_out = pretrain.split_documents(documents, config.held_out_fraction)
    assert all(is_held_out(text, config.held_out_fraction) for text in held_out)
    ngrams = pretrain.ngram_losses(
        pretrain.tokenise(tokenizer, train, config.context_size).stream,
        pretrain.tokenise(tokenizer, held_out, config.context_size).rows,
        config.vocab_size,
    )
    assert (stated["bigram"], stated["unigram"]) == pytest.approx((ngrams["bigram"], ngrams["unigram"]), abs=5e-4)
    rows = pretrain.tokenise(tokenizer, held_out, config.context_size).rows[::10]
    loss = pretrain.held_out_loss(GPTNeoXForCausalLM.from_pretrained(folder), rows)
    assert loss == pytest.approx(stated["this model"], abs=0.05)  # a tenth of the rows
    assert stated["this model"] <= 3.75
    assert sum(p.stat().st_size for p in folder.iterdir()) <= 8_000_000
    assert json.loads((folder / "config.json").read_text())["architectures"] == ["GPTNeoXForCausalLM"]


def test_script_writes_a_whole_model_folder(tmp_path: Path) -> None:
    corpus = tmp_path / "corpus.jsonl"
    corpus.write_text("".join(json.dumps({"text": t}) + "\n" for t in make_texts(1500, words=(60, 90))))
    script = [sys.executable, str(ROOT / "scripts/pretrain.py"), "--corpus", str(corpus), "--steps", "2"]
    done = subprocess.run([*script, "--out", str(tmp_path / "model")], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert re.match(r"wrote a model of [\d.]+ nats per held-out token to ", done.stdout)
    files = {p.name for p in (tmp_path / "model").iterdir()}
    assert {"config.json", "model.safetensors", "tokenizer.json", "README.md", "training_curve.csv"} <= files
    assert not (tmp_path / "model.partial").exists()
