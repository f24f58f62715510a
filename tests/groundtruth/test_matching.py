"""The score of a dictionary whose truth is known: 1 for the truth, low for everything that only looks like it."""

import itertools

import numpy as np
import pytest
import torch

from saeflow.groundtruth.cases import Case, get_case
from saeflow.groundtruth.labels import without_leaks
from saeflow.groundtruth.matching import agreement, cosines, matched, true_features
from saeflow.groundtruth.network import Network
from saeflow.groundtruth.recovery import duplicates, recovery

PRE, MLP, ATTENTION = "blocks.0.hook_resid_pre", "blocks.0.hook_mlp_out", "blocks.1.hook_attn_out"
PLACES = [
    (3, PRE),
    (3, MLP),
    (3, ATTENTION),
    (3, "blocks.1.hook_resid_pre"),
    (12, PRE),
    (12, MLP),
    (13, PRE),
    (42, PRE),
]


def held(number: int, hook: str) -> tuple[Case, np.ndarray, np.ndarray]:
    """Case, rows, and the compiled model's values (N P, d) at a hook."""
    case = get_case(number)
    rows = case.rows(300, seed=2)
    done = Network(case.compiled.config, case.compiled.weights, torch.float64)(torch.from_numpy(rows))
    return case, rows, without_leaks(done.at(hook).flatten(0, 1).numpy())


def score(number: int, hook: str, encoder: np.ndarray, W_dec: np.ndarray, known: bool = True) -> float:
    case, rows, x = held(number, hook)
    found = recovery(case, rows, (hook, hook), x, np.maximum(x @ encoder, 0), W_dec if known else None)
    return float(found["recovery"])


def rotation(d: int, seed: int = 0) -> np.ndarray:
    return np.linalg.qr(np.random.default_rng(seed).standard_normal((d, d)))[0]


# -------------------------------------------------------------------- what must score 1
@pytest.mark.parametrize(("number", "hook"), PLACES)
def test_the_truth_in_any_order_scale_and_company_scores_one(number: int, hook: str) -> None:
    d = held(number, hook)[2].shape[1]
    rng = np.random.default_rng(1)
    order, scale = rng.permutation(d), rng.uniform(0.1, 5, d)
    encoder, W_dec = np.eye(d)[:, order] * scale, np.eye(d)[order] / scale[:, None]
    assert score(number, hook, encoder, W_dec) == pytest.approx(1, abs=1e-9)
    more = rng.standard_normal((d, 2 * d))  # latents beside it take nothing away
    with_more = score(number, hook, np.concatenate([encoder, more], 1), np.concatenate([W_dec, more.T]))
    assert with_more == pytest.approx(1, abs=1e-9)


# -------------------------------------------------------------------- what must score low
@pytest.mark.parametrize(("number", "hook"), PLACES)
def test_a_rotated_truth_scores_low(number: int, hook: str) -> None:
    """It explains all variance, and of one number every latent follows it, so nothing but its decoder tells."""
    d = held(number, hook)[2].shape[1]
    found = []
    for seed in range(8):
        both = np.concatenate([rotation(d, seed), -rotation(d, seed)], axis=1)
        found.append(score(number, hook, both, both.T))
    assert np.mean(found) < 0.15, found


@pytest.mark.parametrize(("number", "hook"), PLACES)
def test_a_permuted_decoder_scores_nothing(number: int, hook: str) -> None:
    """It fires as the truth does, and writes something else."""
    d = held(number, hook)[2].shape[1]
    assert score(number, hook, np.eye(d), np.roll(np.eye(d), 1, axis=0)) <= 0.05


@pytest.mark.parametrize(("number", "hook"), [(3, PRE), (12, PRE), (13, PRE), (42, PRE)])
def test_without_known_directions_a_rotated_truth_is_still_low(number: int, hook: str) -> None:
    d = held(number, hook)[2].shape[1]
    assert score(number, hook, rotation(d), rotation(d).T, known=False) < 0.3
    assert score(number, hook, np.eye(d), np.eye(d), known=False) == pytest.approx(1, abs=1e-9)


def test_a_barely_trained_dictionary_scores_low_and_training_helps() -> None:
    """An L1 SAE of the truth's own width, from first weights of chance: after 5 steps it has found next to nothing."""
    case, rows, x = held(3, PRE)
    data = torch.from_numpy(x).float()
    torch.manual_seed(0)
    W_dec = torch.nn.functional.normalize(torch.randn(52, 13), dim=1)
    encoder, b_enc = W_dec.T.clone().mul_(0.1), torch.zeros(52)
    parameters = [p.requires_grad_() for p in (encoder, b_enc, W_dec)]
    optimiser = torch.optim.Adam(parameters, lr=3e-3)
    found = {}
    for step in range(1, 3001):
        f = torch.relu(data @ encoder + b_enc)
        loss = (f @ W_dec - data).square().sum(1).mean() + 0.01 * f.sum(1).mean()
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        with torch.no_grad():
            W_dec.copy_(torch.nn.functional.normalize(W_dec, dim=1))
        if step in (5, 3000):
            latents = without_leaks(f.detach().double().numpy())
            row = recovery(case, rows, (PRE, PRE), x, latents, W_dec.detach().double().numpy())
            found[step] = row["recovery"]
    assert found[5] < 0.15, found
    assert found[3000] > found[5] + 0.1, found


def test_one_latent_is_matched_with_one_feature() -> None:
    """A latent that fires everywhere has some F1 with every value, and may answer for one alone."""
    case, rows, _ = held(3, PRE)
    truth = true_features(case, rows, PRE)
    everywhere = np.ones((rows.size, 1))
    agrees, cosine = matched(truth, everywhere, None)
    assert (agrees > 0).sum() == 1 and np.isnan(cosine).all()
    assert agrees.max() == pytest.approx(agreement(truth, everywhere).max())


# -------------------------------------------------------------------- by hand
def test_the_match_is_the_best_of_all_and_its_parts_are_counted_by_hand() -> None:
    case, rows, _ = held(3, PRE)
    names = true_features(case, rows, PRE).names
    assert len(names) == 8 and names[0].startswith("tokens=")
    truth = true_features(case, rows, "blocks.1.hook_resid_pre")
    assert truth.names[-1] == "is_x" and len(truth.numbers) == 1
    rng = np.random.default_rng(0)
    f, W_dec = np.maximum(rng.standard_normal((rows.size, 6)) - 0.5, 0), rng.standard_normal((6, 13))
    f[:, 4] = 0
    found, toward = agreement(truth, f), cosines(truth, W_dec)
    assert not found[4].any()
    for i, j in itertools.product(range(6), range(8)):
        fires, mask = f[:, i] > 0, truth.masks[j]
        if fires.any():
            assert found[i, j] == pytest.approx(2 * (fires & mask).sum() / (fires.sum() + mask.sum()))
        direction = np.eye(13)[truth.columns[j]]
        assert toward[i, j] == pytest.approx(W_dec[i] @ direction / np.linalg.norm(W_dec[i]))
    assert found[0, 8] == pytest.approx(abs(np.corrcoef(f[:, 0], truth.numbers[0])[0, 1]))
    for columns, rows_of in ((None, found), (W_dec, found * toward.clip(0))):
        agrees, _ = matched(truth, f, columns)
        best = max(rows_of[range(6), p].sum() for p in itertools.permutations(range(9), 6))
        assert agrees.sum() == pytest.approx(best)


def test_duplicates_by_activation_alone_are_found_where_decoders_differ() -> None:
    """Fifteen latents for one number: each writes elsewhere, all fire alike."""
    _, _, x = held(3, MLP)
    rng = np.random.default_rng(0)
    W = np.abs(rng.standard_normal((13, 15)))
    f = np.maximum(x @ W, 0)
    assert sum(len(g) for g in duplicates(W.T, f)) < 15
    assert duplicates(None, f) == [list(range(15))]
