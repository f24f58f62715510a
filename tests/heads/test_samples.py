"""Which latents are looked at, and the intervals of their medians and means against scipy's."""

import itertools

import numpy as np
import pytest
from scipy.stats import quantile_test, ttest_1samp

from saeflow.config import ConfigError, HeadsConfig
from saeflow.config.checks import build
from saeflow.config.point import takes_list
from saeflow.heads.samples import choose_latents, mean_interval, median_interval


def test_one_more_live_latent_changes_one_of_the_sample() -> None:
    config = HeadsConfig(n_latents=20, min_active=5)
    active = np.where(np.random.default_rng(0).random(400) < 0.6, 9, 0)
    chosen = choose_latents(active, config)
    assert len(chosen) == 20 and (active[chosen] >= 5).all() and (np.diff(chosen) > 0).all()
    for latent in np.flatnonzero(active == 0):
        more = active.copy()
        more[latent] = 5
        assert len(set(chosen) - set(choose_latents(more, config))) <= 1
    assert set(choose_latents(active, HeadsConfig(n_latents=10, min_active=5))) < set(chosen)
    assert set(choose_latents(active, HeadsConfig(n_latents=20, min_active=5, seed=1))) != set(chosen)
    drawn = np.bincount(
        np.concatenate(
            [choose_latents(np.ones(10), HeadsConfig(n_latents=3, min_active=1, seed=s)) for s in range(999)]
        )
    )
    np.testing.assert_allclose(drawn, 300, atol=60)  # all alike: four standard deviations


def test_latents_are_named_or_all() -> None:
    active = np.array([9, 0, 9, 9, 0, 1])
    assert choose_latents(active, HeadsConfig(latents=(4, 0), min_active=2)).tolist() == [0, 4]  # fire or not
    assert choose_latents(active, HeadsConfig(latents="all", n_latents=1, min_active=2)).tolist() == [0, 2, 3]
    of_heads = HeadsConfig(latents=(2, 8, 11))  # of two heads of six latents
    assert choose_latents(active, of_heads, first=0).tolist() == [2]
    assert choose_latents(active, of_heads, first=6).tolist() == [2, 5]
    assert choose_latents(active, HeadsConfig(min_active=2), most=2).size == 2
    assert (
        build(HeadsConfig, {"latents": [99]}).latents == (99,)
        and build(HeadsConfig, {"latents": "all"}).latents == "all"
    )
    assert takes_list("heads.latents")
    for wrong, message in (("some", "must be a list"), ([-1], "numbers of latents"), ([1.5], "of type int")):
        with pytest.raises(ConfigError, match=message):
            build(HeadsConfig, {"latents": wrong})
    with pytest.raises(ConfigError, match=r"heads.latents=\[8, 11\] are not in one, which has latents 0 to 7"):
        of_heads.check_latents(8, "one")


@pytest.mark.parametrize("m", [6, 7, 20, 63, 64])
def test_intervals_are_scipys(m: int) -> None:
    values = np.random.default_rng(m).standard_normal(m)
    held = np.append(values, np.nan)
    wanted = quantile_test(values, q=np.median(values), p=0.5).confidence_interval(0.95)
    assert median_interval(held) == pytest.approx((wanted.low, wanted.high))
    by_t = ttest_1samp(values, 0).confidence_interval(0.95)
    assert mean_interval(held) == pytest.approx((by_t.low, by_t.high))


def test_few_values_have_no_interval() -> None:
    """The smallest and largest of five hold the median in 15 of 16 cases: fewer than 95 of 100."""
    for m in range(6):
        assert np.isnan(median_interval(np.arange(float(m)))).all()
    assert np.isnan(mean_interval(np.array([1.0]))).all()


def test_intervals_of_medians_hold_them() -> None:
    """Of a skewed distribution, in 95 of 100 studies or more: here, of 2,000 studies of 64 latents."""
    found = [median_interval(one) for one in np.random.default_rng(0).exponential(size=(2000, 64))]
    held = np.mean([low <= np.log(2) <= high for low, high in found])
    assert held + 0.01 >= 0.95 and held < 0.98
    assert all(low < high for low, high in itertools.islice(found, 5))
