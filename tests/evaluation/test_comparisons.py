"""Comparisons of dictionaries against the figures of notebook 004, and against resamples worked out by hand."""

import numpy as np
import pandas as pd
import pytest

from saeflow.evaluation.comparisons import NOTEBOOK_004, matched_ce, matched_l0, notebook_004, paired_differences
from saeflow.evaluation.intervals import interval


def front(kind: str) -> pd.DataFrame:
    rows = [(f"{kind}{l1}", *values) for (k, l1), values in NOTEBOOK_004.items() if k == kind]
    return pd.DataFrame(rows, columns=["dictionary_key", "l0", "ce_replaced"])


def test_matched_differences_are_those_of_the_reference() -> None:
    """At the SAEs' L0 of 31.5, 55 and 110 (not 505) the transcoders lie lower by 0.0034, 0.0067 and 0.0046 nats."""
    fronts = [front("sae"), front("transcoder")]
    table = matched_l0(*fronts, draws(fronts, np.zeros(8)), 0.9)
    at_sae = table[table["at_point_of"] == "one"]
    np.testing.assert_allclose(at_sae["l0"], [31.498, 55.069, 109.873], atol=1e-3)
    np.testing.assert_allclose(-at_sae["difference"], [0.0034, 0.0067, 0.0046], atol=6e-5)


def draws(fronts: list[pd.DataFrame], noise: np.ndarray) -> pd.DataFrame:
    """Every resample moves all losses alike, and those of the last front by a tenth of that again."""
    out = []
    for i, rows in enumerate(fronts):
        for row in rows.itertuples():
            own = noise * (0.1 if i == len(fronts) - 1 else 0.0)
            ce = {"ce_replaced": row.ce_replaced + noise + own, "ce_increase": row.ce_replaced - 3.3 + own}
            out.append(pd.DataFrame({"dictionary_key": row.dictionary_key, "l0": row.l0} | ce))
    return pd.concat(out)


def test_fronts_matched_in_ce_are_the_same_fronts_read_the_other_way() -> None:
    """Two lines CE = a - b log L0 with their slopes alike: where one lies lower by c, the other needs exp(c / b) of L0.
    The interval is paired: noise that both share moves nothing, one's own moves the ratio."""
    l0 = np.array([5.0, 20.0, 80.0])
    one = pd.DataFrame({"dictionary_key": list("abc"), "l0": l0, "ce_increase": 0.5 - 0.1 * np.log(l0)})
    other = pd.DataFrame({"dictionary_key": list("def"), "l0": 2 * l0, "ce_increase": 0.53 - 0.1 * np.log(2 * l0)})
    fronts = [rows.assign(ce_replaced=3.3 + rows["ce_increase"]) for rows in (one, other)]
    noise = np.random.default_rng(0).normal(scale=0.01, size=500)
    table = matched_ce(*fronts, draws(fronts, noise), 0.9)
    np.testing.assert_allclose(table["ratio"], np.exp(0.3), rtol=1e-9)
    wanted = np.exp(interval(0.3, 0.3 + noise, 0.9))  # a tenth of the noise, over the slope
    np.testing.assert_allclose(table["low"], wanted[0], rtol=1e-6)
    np.testing.assert_allclose(table["high"], wanted[1], rtol=1e-6)
    assert set(table["at_point_of"].dropna()) == {"one", "other"} and table["ce_increase"].is_monotonic_increasing
    names = {n: f"{n}_rest" for n in ("l0", "ce_replaced", "ce_increase")}
    rest = [rows.rename(columns=names) for rows in (*fronts, draws(fronts, noise))]
    pd.testing.assert_frame_equal(matched_ce(*rest, 0.9, positions="_rest"), table)
    by_l0 = matched_l0(*rest, 0.9, positions="_rest")
    np.testing.assert_allclose(by_l0["difference"], 0.03, rtol=1e-6)


def test_the_interval_of_a_matched_difference_is_paired() -> None:
    noise = np.random.default_rng(0).normal(scale=0.05, size=400)
    fronts = [front("sae"), front("transcoder")]
    table = matched_l0(*fronts, draws(fronts, noise), 0.9)
    assert table["l0"].between(31.4984, 203.7718).all() and table["l0"].is_monotonic_increasing
    assert list(table["at_point_of"].dropna()) == ["one", "other", "one", "other", "one", "other", "other"]
    wanted = interval(0.0, 0.1 * noise, 0.9)
    np.testing.assert_allclose(table["low"] - table["difference"], wanted[0], atol=1e-9)
    np.testing.assert_allclose(table["high"] - table["difference"], wanted[1], atol=1e-9)


def test_fronts_that_share_no_l0_are_not_compared() -> None:
    one, other = front("sae"), front("transcoder").assign(l0=lambda t: t["l0"] / 100)
    assert matched_l0(one, other, draws([one, other], np.zeros(8)), 0.9).empty


SEEDED = ["dictionary_key", "point", "repeat", "l0", "ce_replaced"]


def seeded(kind: str, shifts: dict[str, float], scale: float = 1.0) -> pd.DataFrame:
    """A front once for every seed; a seed moves its CE by its shift, and its L0 to `scale` times its number."""
    one = front(kind).assign(point=lambda t: t["dictionary_key"])
    return pd.concat(
        one.assign(
            dictionary_key=one["dictionary_key"] + seed, repeat=seed, ce_replaced=one["ce_replaced"] + shift,
            l0=one["l0"] * scale**n,
        )
        for n, (seed, shift) in enumerate(shifts.items())
    )[SEEDED]  # fmt: skip


def test_a_second_seed_that_is_alike_changes_nothing() -> None:
    one, other = front("sae"), front("transcoder")
    fronts = [seeded(kind, {"a": 0.0, "b": 0.0}) for kind in ("sae", "transcoder")]
    noise = np.random.default_rng(0).normal(scale=0.01, size=100)
    for compare in (matched_l0, matched_ce):
        extra = [f.assign(ce_increase=f["ce_replaced"] - 3.3) for f in (one, other, *fronts)]
        alone = compare(*extra[:2], draws(extra[:2], noise), 0.9)
        both = compare(*extra[2:], draws(extra[2:], noise), 0.9)
        assert both["low"].notna().all() and alone["seeds_low"].isna().all()
        value = "difference" if compare is matched_l0 else "ratio"
        for name in (value, "low", "high"):
            np.testing.assert_allclose(both[name].astype(float), alone[name].astype(float), rtol=1e-9, atol=1e-12)
        np.testing.assert_allclose(both["seeds_low"], both[value], rtol=1e-9)  # seeds that are alike have no range


def test_seeds_are_their_mean_within_the_range_of_their_pairs() -> None:
    """Seeds of one front lie 0.001 and 0.003 higher than the other's two, which differ by 0.002: by hand."""
    one, other = seeded("sae", {"a": 0.0, "b": 0.002}), seeded("sae", {"a": 0.003, "b": 0.005})
    other = other.assign(dictionary_key=other["dictionary_key"] + "-other")
    table = matched_l0(one, other, draws([one, other], np.zeros(8)), 0.9)
    np.testing.assert_allclose(table["difference"], 0.003, atol=1e-12)
    np.testing.assert_allclose(table["low"], 0.003, atol=1e-12)  # these draws have no spread
    np.testing.assert_allclose(table[["seeds_low", "seeds_high"]].drop_duplicates(), [[0.001, 0.005]], atol=1e-12)


def test_seeds_of_other_sparsity_are_averaged_in_both() -> None:
    one, other = seeded("sae", {"a": 0.0, "b": 0.001}, scale=1.01), front("transcoder")
    table = matched_l0(one, other, draws([one, other], np.zeros(8)), 0.9)
    mean = front("sae").assign(l0=lambda t: t["l0"] * 1.005, ce_replaced=lambda t: t["ce_replaced"] + 5e-4)
    wanted = matched_l0(mean, other, draws([mean, other], np.zeros(8)), 0.9)
    np.testing.assert_allclose(table["difference"], wanted["difference"], atol=1e-9)
    assert (table["seeds_low"] < table["difference"]).all() and (table["seeds_high"] > table["difference"]).all()


def test_what_never_fires_is_on_no_front() -> None:
    one, other = front("sae"), front("transcoder")
    dead = pd.concat([one, pd.DataFrame([{"dictionary_key": "dead", "l0": 0.0, "ce_replaced": 3.8}])])
    for compare in (matched_l0, matched_ce):
        with_increase = [f.assign(ce_increase=f["ce_replaced"] - 3.3) for f in (one, dead, other)]
        noise = np.zeros(8)
        tables = [compare(f, with_increase[2], draws([f, with_increase[2]], noise), 0.9) for f in with_increase[:2]]
        pd.testing.assert_frame_equal(*tables)


def test_fronts_of_other_tokens_are_refused() -> None:
    one = front("sae").assign(tokens_key=["t", "t", "t", "u"])
    with pytest.raises(ValueError, match="evaluated on t, u"):
        matched_l0(one, front("transcoder"), draws([one, front("transcoder")], np.zeros(8)), 0.9)


def test_pairs_are_of_the_same_tokens() -> None:
    from saeflow.evaluation.comparisons import PAIRED

    rows = pd.DataFrame({"dictionary_key": ["a", "b"], "tokens_key": ["t", "t"]})
    rows = rows.assign(**{name: [1.0, 1.5] for name in PAIRED})
    rows.loc[1, "loss_recovered_zero"] = None
    shared = np.random.default_rng(1).normal(size=100)
    resamples = pd.concat(
        [pd.DataFrame(dict.fromkeys(PAIRED, shared + v)).assign(dictionary_key=k) for k, v in (("a", 1.0), ("b", 1.5))]
    )
    table = paired_differences(rows, resamples, 0.95)
    assert set(zip(table["one"], table["other"], strict=True)) == {("a", "b")}
    assert len(table) == len(PAIRED) - 1 and "loss_recovered_zero" not in set(table["metric"])
    np.testing.assert_allclose(table[["difference", "low", "high"]].to_numpy(float), 0.5)
    with pytest.raises(ValueError, match="evaluated on other tokens: t, u"):
        paired_differences(rows.assign(tokens_key=["t", "u"]), resamples, 0.95)


@pytest.mark.parametrize(("model", "printed"), [("pythia-410m", 505.2548745727539), ("embedded", None)])
def test_the_notebooks_numbers_stand_beside_its_own_model_alone(model: str, printed: float | None) -> None:
    common = {"activation": "relu", "skip": False, "model_name": model, "hook_name_out": "blocks.15.hook_mlp_out"}
    rows = pd.DataFrame([common | {"kind": "sae", "l1_coefficient": 4e-5, "l0": 500.0, "ce_replaced": 3.3}])
    names = ["l0", "ce_replaced", "ce_increase", "ce_clean", "loss_recovered_zero", "kl", "fvu"]
    ends = ("", "_low", "_high")
    rows = rows.assign(
        place="here",
        series="SAE",
        seed=0,
        dictionary_key="a",
        dead_fraction=0.0,
        **{f"{n}_without_bos{end}": 1.0 for n in names for end in ends},
    )
    table = notebook_004(rows)
    assert (table["l0"][0], table["ce_loss"][0]) == (500.0, 3.3)
    assert table["printed_l0"][0] == printed or (printed is None and pd.isna(table["printed_l0"][0]))
