"""Statistics of Jacobians against NumPy and SciPy on all entries at once, and their intervals over documents."""

from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from saeflow.config import ConfigError, JacobianConfig
from saeflow.jacobians.statistics import (
    LOG_EDGES,
    Tally,
    histogram_table,
    log_histogram_table,
    summarise,
    survival_table,
    thresholds_table,
)

SMALL = JacobianConfig(n_tokens=1, bins=10, thresholds=(0.05, 0.13), relative_thresholds=(0.5, 2.0), resamples=20)


def tallied(J: torch.Tensor, config: JacobianConfig = SMALL, document: np.ndarray | None = None) -> Tally:
    document = np.zeros(len(J), dtype=np.int64) if document is None else document
    tally = Tally(config, int(document.max()) + 1)
    tally.add(J, document)
    return tally


# -------------------------------------------------------------------- counting
@given(seed=st.integers(0, 2**31), n=st.integers(1, 6), k=st.integers(1, 5), split=st.integers(0, 6))
@settings(deadline=None, max_examples=40)
def test_tables_equal_counting_by_hand(seed: int, n: int, k: int, split: int) -> None:
    g = torch.Generator().manual_seed(seed)
    J = torch.randn(n, k, k, generator=g) * 0.3
    J[J.abs() < 0.03] = 0
    document = np.arange(n) // 2
    tally = Tally(SMALL, int(document.max()) + 1)
    for part in (slice(0, split), slice(split, None)):
        if len(J[part]):
            tally.add(J[part], document[part])

    size = J.abs().double().numpy()
    histogram = histogram_table(tally).to_pydict()
    edges = np.float32(np.linspace(0, 0.5, 11)).astype(float)
    wanted = [((size > a) & (size <= b)).sum() / n for a, b in pairwise(edges)]
    wanted[0] += (size == 0).sum() / n
    np.testing.assert_allclose(histogram["count_per_token"], wanted, atol=1e-12)
    np.testing.assert_allclose(histogram["above_per_token"], [(size > a).sum() / n for a in edges[:-1]], atol=1e-12)

    survival = survival_table(tally).to_pydict()
    assert survival["threshold"] == pytest.approx([0.05, 0.1, 0.13, *np.arange(0.15, 0.51, 0.05)])
    above = np.array([(size > np.float32(t)).sum() / n for t in survival["threshold"]])
    np.testing.assert_allclose(survival["values_above_per_token"], above, atol=1e-12)
    np.testing.assert_allclose(survival["fraction"], above / k**2, atol=1e-12)
    np.testing.assert_allclose(survival["cdf"], 1 - above / k**2, atol=1e-12)

    summary = summarise(tally)
    assert summary["rms"] == pytest.approx(np.sqrt((size**2).mean()))
    assert summary["fraction_above_0.13"] == pytest.approx((size > 0.13).mean())
    assert summary["overflow_per_token"] == pytest.approx((size > 0.5).sum() / n)
    assert sum(histogram["count_per_token"]) + summary["overflow_per_token"] == pytest.approx(k * k)


@given(seed=st.integers(0, 2**31), n=st.integers(1, 6), k_in=st.integers(2, 6), k_out=st.integers(1, 6))
@settings(deadline=None, max_examples=40)
def test_scale_free_measures_equal_their_definitions(seed: int, n: int, k_in: int, k_out: int) -> None:
    rng = np.random.default_rng(seed)
    J = rng.standard_normal((n, k_out, k_in)) * (rng.random((n, k_out, k_in)) < 0.7)
    summary = summarise(tallied(torch.from_numpy(J)))
    tokens = [np.abs(t).flatten() for t in J if t.any()]
    if not tokens:
        assert summary["gini"] is None
        return
    N = k_in * k_out

    def gini(x: np.ndarray) -> float:
        """Half the mean absolute difference over the mean."""
        return float(np.abs(x[:, None] - x[None]).mean() / (2 * x.mean()))

    ratio = np.array([t.sum() / np.linalg.norm(t) for t in tokens])
    wanted = {
        "l1_over_l2": ratio.mean(),
        "kurtosis": np.mean([stats.moment(np.append(t, -t), 4) / np.mean(t**2) ** 2 for t in tokens]),
        "hoyer": ((np.sqrt(N) - ratio) / (np.sqrt(N) - 1)).mean(),
        "gini": np.mean([gini(t) for t in tokens]),
        "effective_inputs": np.mean([r.sum() ** 2 / (r**2).sum() for t in np.abs(J) for r in t if r.any()]),
    }
    assert {name: summary[name] for name in wanted} == pytest.approx(wanted, rel=1e-9)


def test_scaling_j_changes_no_scale_free_measure_and_no_norm_matched_count() -> None:
    J = torch.randn(4, 5, 5, generator=torch.Generator().manual_seed(0))
    (one, table), (other, scaled) = (
        (summarise(t), thresholds_table(t).to_pandas()) for t in (tallied(J), tallied(J / 128))
    )
    for name in ("l1_over_l2", "kurtosis", "hoyer", "gini", "effective_inputs"):
        assert one[name] == pytest.approx(other[name], rel=1e-9)
    assert one["rms"] == pytest.approx(128 * other["rms"])
    matched = table["normalisation"].isin(["l1", "l2", "rms"])
    np.testing.assert_array_equal(table["fraction"][matched], scaled["fraction"][matched])
    assert not np.array_equal(table["fraction"][~matched], scaled["fraction"][~matched])


def test_norm_matched_counts_equal_dividing_by_the_norm() -> None:
    g = torch.Generator().manual_seed(1)
    J = torch.randn(60, 4, 6, generator=g) * torch.rand(60, 1, 1, generator=g).exp()
    J[7] = 0  # has no norm, so it counts in none of the normalised tables
    table = thresholds_table(tallied(J)).to_pandas().set_index(["normalisation", "threshold"])["fraction"]
    size = np.abs(J.numpy().astype(np.float64)).reshape(60, -1)
    live = size[size.any(1)]
    norms = {"l1": live.sum(1), "l2": np.linalg.norm(live, axis=1), "rms": np.sqrt((live**2).mean(1))}
    for name, norm in norms.items():
        for t in SMALL.relative_thresholds if name == "rms" else SMALL.thresholds:
            assert table[name, t] == pytest.approx((live / norm[:, None] > t).mean(), abs=1e-9)
    for t in SMALL.thresholds:
        assert table["none", t] == pytest.approx((size > np.float32(t)).mean())


def test_counts_above_the_rms_of_all_are_close_to_exact() -> None:
    J = torch.randn(2000, 8, 8, generator=torch.Generator().manual_seed(2)) * 0.37
    J[::2] *= 0.1
    table = thresholds_table(tallied(J)).to_pandas()
    size = np.abs(J.numpy().astype(np.float64))
    rms = np.sqrt((size**2).mean())
    for t in SMALL.relative_thresholds:
        row = table[(table["normalisation"] == "rms_all") & (table["threshold"] == t)].iloc[0]
        assert row["fraction"] == pytest.approx((size > t * rms).mean(), rel=3e-3)
        assert row["values_above_per_token"] == pytest.approx(64 * row["fraction"])


def test_log_histogram_holds_every_entry_once() -> None:
    J = torch.randn(50, 3, 4, generator=torch.Generator().manual_seed(3))
    table = log_histogram_table(tallied(J)).to_pandas()
    size = np.abs(J.numpy().astype(np.float64)).reshape(50, -1)
    norms = {"none": 1, "l1": size.sum(1), "l2": np.linalg.norm(size, axis=1), "rms": np.sqrt((size**2).mean(1))}
    for name, norm in norms.items():
        rows = table[table["normalisation"] == name]
        counts, _ = np.histogram(size.T / norm, LOG_EDGES)
        np.testing.assert_allclose(rows["fraction"], counts / size.size, atol=1e-3)  # one may lie across an edge
        assert rows["fraction"].sum() == pytest.approx(1)
        np.testing.assert_allclose(rows["cdf"], rows["fraction"].cumsum(), atol=1e-12)


def test_padding_counts_for_nothing() -> None:
    g = torch.Generator().manual_seed(4)
    J = torch.randn(12, 3, 4, generator=g)
    padded = torch.zeros(12, 6, 7)
    padded[:, 1:4, 2:6] = J
    document = np.arange(12) // 2
    tally = Tally(SMALL, 6)
    tally.add(padded, document, torch.full((12,), 12))
    one, other = summarise(tally), summarise(tallied(J, document=document))
    assert one == pytest.approx(other)
    for table in (histogram_table, survival_table, log_histogram_table, thresholds_table):
        assert table(tally).equals(table(tallied(J, document=document)))


# -------------------------------------------------------------------- intervals
def test_interval_of_a_mean_is_that_of_its_standard_error() -> None:
    """One entry a document."""
    values = np.random.default_rng(0).gamma(2.0, size=400)
    tally = tallied(torch.from_numpy(values)[:, None, None], JacobianConfig(), np.arange(400))
    summary = summarise(tally)
    half = 1.96 * values.std() / np.sqrt(400)
    assert summary["mean_absolute_low"] == pytest.approx(values.mean() - half, abs=0.03 * half)
    assert summary["mean_absolute_high"] == pytest.approx(values.mean() + half, abs=0.03 * half)


def test_documents_are_resampled_whole() -> None:
    """Tokens that repeat within their document add nothing: the interval is as wide as with one of each."""
    values = torch.rand(30, 2, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    once = summarise(tallied(values, document=np.arange(30)))
    often = summarise(tallied(values.repeat_interleave(50, 0), document=np.arange(30).repeat(50)))
    for name in ("gini", "rms", "fraction_above_0.13", "effective_inputs"):
        for suffix in ("", "_low", "_high"):
            assert once[name + suffix] == pytest.approx(often[name + suffix])
        assert once[f"{name}_low"] <= once[name] <= once[f"{name}_high"]


def test_few_documents_have_no_interval() -> None:
    for n in (1, 4):
        tally = tallied(torch.ones(4, 2, 2), document=np.arange(4) % n)
        summary = summarise(tally)
        assert summary["rms"] == 1 and summary["rms_low"] is None and summary["n_documents"] == n
        assert summary["rms_low_reason"].startswith(f"no interval: {n} document")
        assert np.isnan(histogram_table(tally)["count_low"].to_numpy()).all()
        assert np.isnan(thresholds_table(tally)["fraction_low"].to_numpy()).all()


def test_ends_of_shares_lie_between_0_and_1() -> None:
    values = torch.zeros(6, 2, 2)
    values[0] = 0.14
    values[1:, 0, 0] = 0.12
    table = survival_table(tallied(values, document=np.arange(6))).to_pandas()
    assert table["fraction_low"].min() == 0 and table["fraction_high"].max() == 1


def test_thresholds_must_be_above_zero() -> None:
    with pytest.raises(ConfigError, match=r"jacobian.relative_thresholds=\[0.5, 0\] is out of range"):
        JacobianConfig(relative_thresholds=(0.5, 0))
