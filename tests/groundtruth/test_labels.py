"""Labels, redundancy and recovery: as by hand, perfect for a dictionary that is the truth, at chance for noise."""

import itertools

import numpy as np
import pytest
import torch

from saeflow.groundtruth.cases import Case, get_case
from saeflow.groundtruth.labels import (
    correlation,
    label,
    match,
    page,
    predicates,
    states,
    top_contexts,
    two_states,
    without_leaks,
)
from saeflow.groundtruth.network import Network
from saeflow.groundtruth.record import state_names
from saeflow.groundtruth.recovery import all_duplicates, coverage, duplicates, pure, recovery, redundancy, stability

SITES = ["blocks.0.hook_resid_pre", "blocks.0.hook_mlp_out", "blocks.1.hook_attn_out", "blocks.1.hook_resid_pre"]


def compiled_values(case: Case, rows: np.ndarray, hook: str | None = None) -> np.ndarray:
    """(N P, d): of the compiled model at a hook, or after the last layer."""
    done = Network(case.compiled.config, case.compiled.weights, torch.float64)(torch.from_numpy(rows))
    value = done.residual[-1] if hook is None else done.at(hook)
    return without_leaks(value.flatten(0, 1).numpy())


@pytest.fixture(scope="module")
def case() -> Case:
    return get_case(3)


@pytest.fixture(scope="module")
def rows(case: Case) -> np.ndarray:
    return case.rows()


# -------------------------------------------------------------------- two words, two states
def test_predicates_of_the_word_before(case: Case, rows: np.ndarray) -> None:
    against = predicates(case, rows)
    words = np.array([str(word) for word in case.program.vocabulary])[rows]
    after_x = np.zeros(rows.shape, dtype=bool)
    after_x[:, 1:] = words[:, :-1] == "x"
    np.testing.assert_array_equal(against.masks[against.names.index("before=x")], after_x.ravel())
    twice = after_x & (words == "x")
    np.testing.assert_array_equal(against.masks[against.names.index("token=x before=x")], twice.ravel())
    found = label(twice.reshape(-1, 1).astype(np.float64), against)
    assert found["label"].item() == "token=x before=x" and found["f1"].item() == 1.0


def test_a_latent_of_two_states_says_which(case: Case, rows: np.ndarray) -> None:
    hook = "blocks.0.hook_resid_pre"
    state = states(case, rows, hook)
    names = state_names(case, rows, hook, state)
    x_2, x_4, a_1 = (names.index(name) for name in ("x@2", "x@4", "a@1"))
    latents = np.zeros((rows.size, 4))
    latents[np.isin(state, [x_2, x_4]), 0] = 1.0
    latents[state == a_1, 1] = 2.0
    latents[:, 3] = np.random.default_rng(0).random(rows.size) < 0.3
    found = two_states(latents, state, names).set_index("latent")
    assert list(found.index) == [0, 1, 3]  # one never fires
    assert found.loc[0, "states"] == "x@2 or x@4" and found.loc[1, "states"] == "a@1"
    assert found.loc[[0, 1], "f1_states"].tolist() == [1.0, 1.0]
    assert found.loc[3, "f1_states"] == pytest.approx(found.loc[3, "f1_states_chance"], abs=0.05)
    brute = max(
        2 * (latents[:, 3] * mask).sum() / (latents[:, 3].sum() + mask.sum())
        for s, t in itertools.product(range(len(names)), repeat=2)
        for mask in [np.isin(state, [s, t])]
    )
    assert found.loc[3, "f1_states"] == pytest.approx(brute)


# -------------------------------------------------------------------- a dictionary that is the truth
@pytest.mark.parametrize("number", [3, 12, 13, 14, 42, 60, 87])
def test_identity_dictionary_of_the_compiled_model_has_perfect_labels(number: int) -> None:
    """Each direction of the residual stream as a latent: its label holds exactly where it fires, and says its value."""
    case = get_case(number)
    rows = case.rows(200, seed=2)
    latents = compiled_values(case, rows)
    against = predicates(case, rows)
    found = label(latents, against)
    for name in ("precision", "recall", "f1"):
        np.testing.assert_array_equal(found[name], 1.0, err_msg=name)
    assert found["auroc"].dropna().min() > (0.99 if number == 14 else 1 - 1e-12)  # 14 fires by 1 / (width + 1) too
    for row in found.itertuples():
        variable, _, value = case.compiled.directions[row.latent].partition(":")
        if variable in ("tokens", "indices") and value not in ("BOS", "PAD"):
            assert row.label == (f"token={value}" if variable == "tokens" else f"position={int(value) + 1}")
        elif value in ("BOS", "PAD"):
            assert row.label == value
        elif variable == "one":
            assert row.label == "always"
        elif variable == case.program.output and value:
            same = against.masks[against.names.index(row.label)]
            code = [str(v) for v in case.program.output_variable.values or ()].index(value)
            np.testing.assert_array_equal(same, (case.labels(rows) == code).ravel())
    assert pure(case, rows, latents[:, found["latent"]]).all() or number == 14
    assert duplicates(np.eye(latents.shape[1]), latents) == []


def test_identity_dictionary_recovers_every_variable(case: Case, rows: np.ndarray) -> None:
    for hook in SITES:
        x = compiled_values(case, rows, hook)
        found = recovery(case, rows, (hook, hook), x, x, np.eye(13))
        assert found["recovery"] == pytest.approx(1.0, abs=1e-9) and found["mixtures"] == 0.0, hook
        assert found["decoder_cosine"] == pytest.approx(1.0, abs=1e-9), hook
    labels = label(compiled_values(case, rows), predicates(case, rows)).set_index("latent")
    numbers = {name: labels.loc[case.compiled.directions.index(name)] for name in ("is_x", "frac_prevs")}
    assert numbers["is_x"]["r2_is_x"] == pytest.approx(1) and numbers["is_x"]["label"] == "token=x"
    assert numbers["frac_prevs"]["r2_frac_prevs"] == pytest.approx(1) and numbers["frac_prevs"]["label"] == "some x"


def test_duplicates_of_the_truth_are_found_exactly(case: Case, rows: np.ndarray) -> None:
    """Copies of directions, of any scale: one group for each, with all copies and nothing else."""
    held = compiled_values(case, rows, SITES[0])
    copies = [12, 3, 12, 6, 12, 3]  # of tokens:x, an index and `one`
    W_dec = np.concatenate([np.eye(13), 2 * np.eye(13)[copies]])
    latents = np.concatenate([held, held[:, copies] * 0.5], axis=1)
    assert sorted(duplicates(W_dec, latents)) == [[3, 14, 18], [6, 16], [12, 13, 15, 17]]
    found = redundancy(all_duplicates(W_dec, latents), latents, states(case, rows, SITES[0]))
    live = 4 + 1 + 6
    assert (found["n_live"], found["n_distinct"]) == (live + 6, live)
    assert found["redundancy"] == pytest.approx(6 / (live + 6))
    assert stability([W_dec, W_dec[::-1]]) == pytest.approx(1.0)


def test_a_latent_a_state_covers_all_eighteen_states_and_is_all_mixtures(case: Case, rows: np.ndarray) -> None:
    """The notebook's finding in its pure form: conjunctions of token and position, of which there are 18."""
    state = states(case, rows, SITES[0])
    latents = (state[:, None] == np.arange(18)).astype(float)
    assert len(np.unique(state)) == 18
    assert coverage(latents, state) == (1.0, 1.0)
    labels = label(latents, predicates(case, rows))
    assert set(labels["f1"]) == {1.0}
    wanted = {f"token={t}@{p}" for t in "abcx" for p in range(1, 5)} | {"BOS", "PAD"}
    assert set(labels["label"]) == wanted
    found = recovery(case, rows, (SITES[0], SITES[0]), compiled_values(case, rows, SITES[0]), latents, None)
    assert found["mixtures"] == pytest.approx(16 / 18)
    assert found["recovery"] < 0.2
    assert coverage(latents[:, :9], state) == (0.5, 0.5)
    assert coverage(compiled_values(case, rows, SITES[0]), state)[0] == pytest.approx(2 / 18)  # BOS and PAD


def test_states_and_counts_are_those_of_the_reference(case: Case, rows: np.ndarray) -> None:
    names = predicates(case, rows).names
    assert {hook: len(np.unique(states(case, rows, hook))) for hook in SITES[:3]} == dict(
        zip(SITES, (18, 2, 7), strict=False)
    )
    at = [n for n in names if n.startswith("frac_prevs=")]
    assert len(at) == 7  # 0, too: unlike `no x` it holds at BOS
    x = get_case(3).program.token_id("x")
    pairs = {(p, int((row[: p + 1] == x).sum())) for row in rows for p in range(1, 5)}
    assert len(pairs) == 14


# -------------------------------------------------------------------- a dictionary that is not
def test_latents_that_know_nothing_are_at_chance(case: Case, rows: np.ndarray) -> None:
    rng = np.random.default_rng(0)
    noise = np.maximum(rng.standard_normal((rows.size, 40)), 0)
    against = predicates(case, rows)
    found = label(noise, against)
    np.testing.assert_allclose(found["f1"], found["f1_chance"], atol=0.02)
    assert np.abs(found["best_auroc"] - 0.5).mean() < 0.2  # the best of 150 predicates, some hold on 20 positions
    big = against.masks.sum(1) > 100
    assert np.nanmax(np.abs(match(noise, against).auroc[:, big & ~against.masks.all(1)] - 0.5)) < 0.12
    assert found[[c for c in found if c.startswith("r2_")]].to_numpy().max() < 0.02
    scores = recovery(case, rows, (SITES[3], SITES[3]), compiled_values(case, rows, SITES[3]), noise, None)
    assert scores["recovery"] < 0.05 and scores["mixtures"] == 1.0
    assert duplicates(rng.standard_normal((40, 13)), noise) == []
    assert coverage(noise, states(case, rows, SITES[0]))[0] == 0.0


def test_random_directions_score_nothing_and_are_no_duplicates(case: Case, rows: np.ndarray) -> None:
    """A dictionary of random weights sees the input, so it is not at the chance of noise: the level to beat."""
    x = compiled_values(case, rows, SITES[3])
    for seed in range(4):
        W = np.random.default_rng(seed).standard_normal((13, 52))
        latents = np.maximum((x - x.mean(0)) @ W - 1.0, 0)
        found = recovery(case, rows, (SITES[3], SITES[3]), x, latents, W.T)
        assert abs(found["recovery"]) < 0.1 and found["mixtures"] > 0.6
        assert duplicates(W.T, latents) == []


# -------------------------------------------------------------------- by hand
def test_matches_are_those_counted_by_hand(case: Case, rows: np.ndarray) -> None:
    rng = np.random.default_rng(3)
    some = rows[rng.permutation(320)[:6]]
    against = predicates(case, some)
    latents = np.round(np.maximum(rng.standard_normal((some.size, 4)), 0), 1)  # with ties
    latents[:, 2] = 0
    found = match(latents, against)
    assert found.live.tolist() == [0, 1, 3]
    for i, latent in enumerate(found.live):
        for j, mask in enumerate(against.masks):
            fires, f = latents[:, latent] > 0, latents[:, latent]
            true = int((fires & mask).sum())
            assert found.precision[i, j] == pytest.approx(true / fires.sum())
            assert found.recall[i, j] == pytest.approx(true / mask.sum())
            assert found.f1[i, j] == pytest.approx(2 * true / (fires.sum() + mask.sum()))
            if not mask.all():
                wins = [(a > b) + 0.5 * (a == b) for a, b in itertools.product(f[mask], f[~mask])]
                assert found.auroc[i, j] == pytest.approx(np.mean(wins))
    number = against.numbers["frac_prevs"]
    wanted = [np.corrcoef(latents[:, i], number)[0, 1] for i in (0, 1, 3)]
    np.testing.assert_allclose(correlation(latents[:, [0, 1, 3]], number), wanted, atol=1e-12)


def test_dead_dictionary_has_no_labels_and_no_score(case: Case, rows: np.ndarray) -> None:
    dead = np.zeros((rows.size, 5))
    assert len(label(dead, predicates(case, rows))) == 0
    found = recovery(case, rows, (SITES[0], SITES[0]), compiled_values(case, rows, SITES[0]), dead, np.ones((5, 13)))
    assert found["mixtures"] is None and found["recovery_raw"] == 0.0
    groups = all_duplicates(np.ones((5, 3)), dead)
    assert redundancy(groups, dead, states(case, rows, SITES[0]))["redundancy"] == 0.0
    assert len(top_contexts(case, rows, dead)) == 0


def test_top_contexts_are_the_largest_in_order_and_the_page_shows_them(case: Case, rows: np.ndarray) -> None:
    rng = np.random.default_rng(0)
    latents = np.maximum(rng.standard_normal((rows.size, 3)), 0)
    latents[:, 1] = 0
    latents[7:, 2] = 0
    table = top_contexts(case, rows, latents)
    assert table["latent"].unique().tolist() == [0, 2]
    mine = table[table["latent"] == 0]
    np.testing.assert_array_equal(mine["activation"], np.sort(latents[:, 0])[::-1][:20])
    assert len(table[table["latent"] == 2]) == int((latents[:7, 2] > 0).sum())
    first = mine.iloc[0]
    assert latents[first["row"] * 5 + first["position"], 0] == first["activation"]
    assert first["context"].split()[first["position"]] == first["token"]
    text = page("latents of <a> hook", label(latents, predicates(case, rows)), table)
    assert "latents of &lt;a&gt; hook" in text and "http" not in text and text.count("<h2") == 2
