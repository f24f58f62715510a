"""Intervals over documents against closed forms, scipy's Student, and documents left out one at a time."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from evaluating import evaluate_all
from scipy.stats import sem, t

from saeflow.config import ConfigError, EvaluationConfig, ModelConfig
from saeflow.dictionaries import Dictionary, Spec
from saeflow.dictionaries.sae import build
from saeflow.evaluation.evaluate import write_evaluation
from saeflow.evaluation.intervals import entry, interval, ratio, resample, resampled_sums
from saeflow.evaluation.metrics import limits, summarise
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


def no_centre(n: int) -> np.ndarray:
    return np.zeros((n, 1))


def test_resampled_metrics_are_the_metrics_of_the_other_documents() -> None:
    held, centred = sums(7), np.random.default_rng(1).normal(size=(7, 3))
    found = resample(held, centred, 1000)
    for i in range(7):
        rest = np.arange(7) != i
        total = {name: values[rest].sum() for name, values in held.items()}
        wanted = summarise(total | {"centred": np.square(centred[rest].sum(0)).sum()})
        for name, values in found.items():
            assert values.shape == (7,) and values[i] == pytest.approx(wanted[name], rel=1e-12), name


def test_of_more_documents_than_resamples_groups_are_left_out() -> None:
    values = np.random.default_rng(0).normal(size=(23, 2))
    found = resampled_sums(values, 5)
    assert found.shape == (5, 2)
    for i in range(5):
        np.testing.assert_allclose(found[i], values[np.arange(23) % 5 != i].sum(0))


def test_what_is_zero_without_a_document_is_exactly_zero() -> None:
    values = np.array([0.0, 0.0, 0.1 + 0.2, 0.0, 0.0, 0.0])
    assert resampled_sums(values, 10)[2] == 0
    assert (
        np.isnan(ratio(resampled_sums(np.ones(6), 10), resampled_sums(values, 10))).tolist()
        == [False] * 2 + [True] + [False] * 3
    )


def test_the_interval_of_a_mean_is_students_with_fewer_degrees_of_freedom() -> None:
    """The jackknife of a mean has its standard error exactly; scipy has the quantiles."""
    values = np.random.default_rng(3).gamma(2.0, size=30)
    low, high = interval(values.mean(), resampled_sums(values, 1000) / 29, 0.9)
    d = values - values.mean()
    freedom = (d**2).sum() ** 2 / (d**4).sum() - 1
    wanted = t.interval(0.9, freedom, loc=values.mean(), scale=sem(values))
    np.testing.assert_allclose((low, high), wanted, rtol=1e-12)
    assert freedom < 25


@pytest.mark.parametrize(("n", "freedom"), [(5, 1), (6, 1), (7, 1), (8, 2)])
def test_of_few_documents_the_degrees_of_freedom_are_bounded(n: int, freedom: float) -> None:
    values = np.tile([-1.0, 1.0], n)[:n] + 3  # whose squares are as equal as they can be
    low, high = interval(values.mean(), resampled_sums(values, 1000) / (n - 1))
    np.testing.assert_allclose((low, high), t.interval(0.95, freedom, loc=values.mean(), scale=sem(values)), rtol=1e-9)


def test_the_interval_of_a_ratio_is_that_of_its_linearisation_where_documents_are_many() -> None:
    held = sums(2000)
    low, high = interval(held["l0"].sum() / held["n_tokens"].sum(), resample(held, no_centre(2000), 5000)["l0"], 0.9)
    residual = held["l0"] - held["l0"].sum() / held["n_tokens"].sum() * held["n_tokens"]
    error = np.sqrt((residual**2).sum()) / held["n_tokens"].sum()
    assert (high - low) / (2 * 1.6449) == pytest.approx(error, rel=0.01)


def test_groups_of_documents_give_the_same_interval_but_for_chance() -> None:
    held = sums(4000)
    value = held["l0"].sum() / held["n_tokens"].sum()
    widths = [np.subtract(*interval(value, resample(held, no_centre(4000), m)["l0"])) for m in (4000, 1000)]
    assert widths[0] == pytest.approx(widths[1], rel=0.06)


def test_fewer_than_five_documents_have_no_interval_and_it_is_said_why() -> None:
    for n in (1, 2, 3, 4):
        low, high = interval(2.0, np.linspace(1.9, 2.1, n))
        assert np.isnan(low) and np.isnan(high)
        found = entry("l0", 2.0, low, high, n)
        assert found["l0"] == 2.0 and found["l0_low"] is None and found["l0_high"] is None
        assert f"{n} document" in found["l0_low_reason"] and "fewer than 5" in found["l0_low_reason"]
    assert np.isfinite(interval(2.0, np.linspace(1.9, 2.1, 5))).all()
    with pytest.raises(ConfigError, match="resamples=4 is out of range"):
        EvaluationConfig(resamples=4)


def test_a_metric_that_has_no_meaning_without_a_document_has_no_interval() -> None:
    held = sums(6)
    held["ce_zero"] = held["ce_clean"] + np.array([1.0, 0, 0, 0, 0, 0]) * held["n_tokens"]
    found = resample(held, no_centre(6), 50)
    assert np.isnan(found["loss_recovered_zero"]).tolist() == [True] + [False] * 5
    low, high = interval(0.9, found["loss_recovered_zero"])
    assert np.isnan(low) and np.isnan(high)
    assert (
        "without some of the documents"
        in entry("loss_recovered_zero", 0.9, low, high, 6)["loss_recovered_zero_low_reason"]
    )
    assert entry("loss_recovered_zero", np.nan, low, high, 6) == dict.fromkeys(
        ("loss_recovered_zero", "loss_recovered_zero_low", "loss_recovered_zero_high")
    )
    assert np.isfinite(interval(held["l0"].sum() / held["n_tokens"].sum(), found["l0"])).all()


def test_ends_stay_where_the_truth_can_be() -> None:
    resampled = np.array([0.0, 0.0, 0.0, 0.0, 0.3])
    low, high = interval(0.05, resampled, least=0.0, most=0.5)
    assert low == 0 and high == 0.5
    assert limits("cosine_without_bos") == (-1, 1) and limits("explained_variance")[1] == 1
    assert limits("ce_increase") == (-np.inf, np.inf) and limits("kl_without_bos") == (0, np.inf)


def test_what_is_the_same_in_all_documents_is_known_exactly() -> None:
    assert np.array(interval(16.0, np.full(9, 16.0))).tolist() == [16.0, 16.0]


def test_paired_intervals_are_narrower_than_the_intervals_of_both() -> None:
    """Two dictionaries whose losses share what the documents bring."""
    first = sums(100)
    second = dict(first) | {"ce_replaced": first["ce_replaced"] + 0.01 * first["n_tokens"]}
    a, b = (resample(s, no_centre(100), 500)["ce_replaced"] for s in (first, second))
    np.testing.assert_allclose(b - a, 0.01, rtol=1e-9)
    low, high = interval(first["ce_replaced"].sum() / first["n_tokens"].sum(), a)
    assert high - low > 0.05
    low, high = interval(0.01, b - a)
    assert high - low < 1e-6


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

    rows = np.random.default_rng(0).integers(1, 300, (6, 16))
    (found,) = evaluate_all(model, [random_dictionary(1)], MEAN, rows[:1], 4)
    assert found.summary["l0_low"] is None and found.summary["l0_low_reason"].startswith("no interval: 1 document, ")
    assert found.summary["n_documents"] == found.summary["n_documents_without_bos"] == 1
    (found,) = evaluate_all(model, [random_dictionary(1)], MEAN, rows, 4)
    write_evaluation(found, found.summary, tmp_path)
    latents = pd.read_parquet(tmp_path / "latents.parquet")
    assert latents["frequency"].sum() == pytest.approx(found.summary["l0"])
    assert (latents["frequency"] == 0).mean() == found.summary["dead_fraction"]
    assert latents["fired_without_bos"].sum() / 90 == pytest.approx(found.summary["l0_without_bos"])
    resamples = pd.read_parquet(tmp_path / "resamples.parquet")
    written = json.loads((tmp_path / "summary.json").read_text())
    assert interval(written["kl"], resamples["kl"].to_numpy())[0] == written["kl_low"] and written["n_documents"] == 6
