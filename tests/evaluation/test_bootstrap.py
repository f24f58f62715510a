"""Intervals over documents against scipy's bootstrap, closed forms, and draws written out."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from evaluating import evaluate_all

from saeflow.config import ModelConfig
from saeflow.dictionaries import Dictionary, Spec
from saeflow.dictionaries.sae import build
from saeflow.evaluation.bootstrap import draws, interval, resample
from saeflow.evaluation.evaluate import write_evaluation
from saeflow.evaluation.metrics import summarise
from saeflow.evaluation.sums import SumAccumulator, token_batches
from saeflow.models.loading import load_model
from saeflow.text.tokens import TokenStore, open_tokens

D, OUT = 32, "blocks.1.hook_mlp_out"
MEAN = torch.zeros(D)


def random_dictionary(seed: int) -> Dictionary:
    g = torch.Generator().manual_seed(seed)
    spec = Spec("sae", "relu", D, D, 40, OUT, OUT)
    return build(spec, torch.randn(D, 40, generator=g), torch.zeros(40), torch.randn(40, D, generator=g), torch.ones(D))


def sums(n: int, seed: int = 0) -> dict[str, np.ndarray]:
    """Made-up sums of n documents of unequal length."""
    rng = np.random.default_rng(seed)
    n_tokens = rng.integers(5, 200, n).astype(float)
    names = ["l0", "ce_replaced", "ce_clean", "ce_zero", "ce_mean", "kl", "kl_zero", "kl_mean", "squared_error"]
    names += ["squared_centred", "squared_norm", "squared_output", "dot", "cosine", "explained_legacy"]
    held = {name: n_tokens * rng.uniform(0.5, 1.5, n) for name in names}
    held["ce_zero"] += n_tokens
    held["ce_mean"] += n_tokens
    return held | {"n_tokens": n_tokens, "n_predictions": n_tokens}


def test_resampled_metrics_are_the_metrics_of_the_drawn_documents() -> None:
    held, centred = sums(7), np.random.default_rng(1).normal(size=(7, 3))
    found = resample(held, centred, 20, seed=3)
    (counts,) = draws(7, 20, seed=3)
    for r, drawn in enumerate(counts):
        chosen = np.repeat(np.arange(7), drawn.astype(int))
        assert len(chosen) == 7
        total = {name: values[chosen].sum() for name, values in held.items()}
        wanted = summarise(total | {"centred": np.square(centred[chosen].sum(0)).sum()})
        for name, values in found.items():
            assert values[r] == pytest.approx(wanted[name], rel=1e-12), name


def test_draws_do_not_depend_on_how_they_are_split(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = np.concatenate(list(draws(9, 25, seed=1)))
    monkeypatch.setattr("saeflow.evaluation.bootstrap.BLOCK_ELEMENTS", 40)
    np.testing.assert_array_equal(np.concatenate(list(draws(9, 25, seed=1))), whole)
    assert whole.shape == (25, 9) and (whole.sum(1) == 9).all()


def test_the_interval_is_scipys_percentile_bootstrap() -> None:
    from scipy.stats import bootstrap

    held = sums(200)
    low, high = interval(resample(held, np.zeros((200, 1)), 4000, seed=0)["l0"], 0.9) or (0.0, 0.0)

    def ratio(l0: np.ndarray, n: np.ndarray, axis: int) -> np.ndarray:
        return l0.sum(axis) / n.sum(axis)

    pair = (held["l0"], held["n_tokens"])
    theirs = bootstrap(
        pair, ratio, paired=True, vectorized=True, method="percentile", confidence_level=0.9, n_resamples=4000, rng=0
    ).confidence_interval
    width = theirs.high - theirs.low
    assert abs(low - theirs.low) < 0.1 * width and abs(high - theirs.high) < 0.1 * width
    # and the closed form of a ratio estimator's standard error
    residual = held["l0"] - held["l0"].sum() / held["n_tokens"].sum() * held["n_tokens"]
    error = np.sqrt((residual**2).sum()) / held["n_tokens"].sum()
    assert (high - low) / (2 * 1.645) == pytest.approx(error, rel=0.1)


def test_a_metric_that_some_draw_leaves_undefined_has_no_interval() -> None:
    held = sums(3)
    held["ce_zero"] = held["ce_clean"] + np.array([1.0, 0.0, 0.0]) * held["n_tokens"]
    found = resample(held, np.zeros((3, 1)), 50, seed=0)
    assert np.isnan(found["loss_recovered_zero"]).any() and interval(found["loss_recovered_zero"], 0.95) is None
    assert interval(found["l0"], 0.95) is not None


def test_paired_intervals_are_narrower_than_the_intervals_of_both() -> None:
    """Two dictionaries whose losses share what the documents bring."""
    first = sums(100)
    second = dict(first) | {"ce_replaced": first["ce_replaced"] + 0.01 * first["n_tokens"]}
    a, b = (resample(s, np.zeros((100, 1)), 500, seed=0)["ce_replaced"] for s in (first, second))
    np.testing.assert_allclose(b - a, 0.01, rtol=1e-9)
    low, high = interval(a, 0.95) or (0.0, 0.0)
    assert high - low > 0.05


@pytest.fixture(scope="module")
def model(neox_folder: Path) -> Any:
    return load_model(neox_folder, ModelConfig("tiny", path=str(neox_folder)), "cpu")


def test_sums_by_document_are_those_of_the_token_store(model: Any, tokens_folder: Path) -> None:
    store: TokenStore = open_tokens(tokens_folder)
    (found,) = evaluate_all(model, [random_dictionary(0)], MEAN, store, 16)  # type: ignore[arg-type]
    _, document, _ = store.rows(0, store.n_rows)
    at_rest = {(int(d), "rest"): int(n) for d, n in zip(*np.unique(document[:, 1:], return_counts=True), strict=True)}
    assert {(d["document"], d["positions"]): d["n_tokens"] for d in found.documents if d["positions"] == "rest"} == (
        at_rest
    )
    assert sum(d["n_tokens"] for d in found.documents if d["positions"] == "bos") == store.n_rows
    for name in ("ce_replaced", "l0", "kl", "ce_mean"):
        by_document, by_batch = (sum(row[name] for row in rows) for rows in (found.documents, found.batches))
        assert by_document == pytest.approx(by_batch, rel=1e-12)
    assert found.summary["n_documents"] == len(np.unique(document[document >= 0]))
    for name in ("ce_replaced", "l0_without_bos", "fvu", "ce_increase"):
        assert found.summary[f"{name}_low"] < found.summary[name] < found.summary[f"{name}_high"]


def test_values_of_a_token_go_to_its_document_whatever_the_batches(tokens_folder: Path) -> None:
    store = open_tokens(tokens_folder)
    tables = []
    for batch_rows in (5, 64):
        accumulator = SumAccumulator(prepend_bos=True)
        for tokens, document in token_batches(store, True, batch_rows, "cpu", ""):
            accumulator.add(document, {"id": tokens.double()}, {"vector": torch.stack([tokens, 2 * tokens], dim=-1)})
        tables.append(accumulator.sums())
    assert tables[0].documents == tables[1].documents  # integers: exact
    tokens, document, _ = store.rows(0, store.n_rows)
    owner = np.where(document < 0, document[:, 1:2], document)
    for row, vector in zip(tables[0].documents, tables[0].vectors["vector"], strict=True):
        column = slice(0, 1) if row["positions"] == "bos" else slice(1, None)
        wanted = tokens[:, column][owner[:, column] == row["document"]].sum()
        assert row["id"] == wanted and list(vector) == [wanted, 2 * wanted]


def test_what_is_written_tells_why_a_number_is_missing(model: Any, tmp_path: Path) -> None:
    import pandas as pd

    rows = np.random.default_rng(0).integers(1, 300, (4, 16))
    (found,) = evaluate_all(model, [random_dictionary(1)], MEAN, rows[:1], 4)
    assert found.summary["l0_low"] is None and found.summary["l0_low_reason"] == "no interval: 1 document"
    (found,) = evaluate_all(model, [random_dictionary(1)], MEAN, rows, 4)
    write_evaluation(found, found.summary, tmp_path)
    latents = pd.read_parquet(tmp_path / "latents.parquet")
    assert latents["frequency"].sum() == pytest.approx(found.summary["l0"])
    assert (latents["frequency"] == 0).mean() == found.summary["dead_fraction"]
    assert latents["fired_without_bos"].sum() / 60 == pytest.approx(found.summary["l0_without_bos"])
    resamples = pd.read_parquet(tmp_path / "resamples.parquet")
    assert np.quantile(resamples["kl"], 0.025) == json.loads((tmp_path / "summary.json").read_text())["kl_low"]
