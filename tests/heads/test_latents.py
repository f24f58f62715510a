"""Latents of heads against dense formulas: interference, shares, agreement of firing, decomposition."""

import itertools

import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp
import torch
from scipy.linalg import block_diag
from scipy.optimize import nnls
from scipy.stats import pearsonr, spearmanr

from saeflow.config import HeadsConfig
from saeflow.dictionaries import Dictionary, Spec
from saeflow.dictionaries.heads import BlockDiagonal
from saeflow.dictionaries.sae import build
from saeflow.heads import interference as module
from saeflow.heads.decomposition import (
    ALL,
    METHODS,
    Agreement,
    agreement,
    coefficients,
    curves,
    decompose,
    decompose_latents,
    decomposition_table,
    expected_best_cosine,
    pseudo_inverse,
    random_atoms,
    unit,
)
from saeflow.heads.interference import EDGES, interference, interference_dataset, lifted_medians, lifted_table
from saeflow.heads.shares import AGREEING, MEASURES, ActiveSums, compare_measures, ranks, shares
from saeflow.heads.weights import random_rotations

N, D = 300, 24


def activations(n: int, seed: int, density: float = 0.2) -> sp.csc_array:
    generator = np.random.default_rng(seed)
    f = generator.random((N, n)) * (generator.random((N, n)) < density)
    f[:, 1] = 0  # a dead latent
    return sp.csc_array(f)


# -------------------------------------------------------------------- interference
def test_interference_is_the_dense_formula(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "CHUNK", 7)  # several chunks
    generator = np.random.default_rng(0)
    f, g = activations(20, 1), activations(15, 2)
    a, b = generator.standard_normal((20, D)), generator.standard_normal((15, D))
    (found,) = interference(f, g, [(a, b)], top=10)
    F, G = f.toarray(), g.toarray()
    w = F.T @ G / N * (a @ b.T)
    assert found.total == pytest.approx(w.sum(), rel=1e-12)
    assert found.absolute == pytest.approx(np.abs(w).sum(), rel=1e-12)
    o, p = F @ a, G @ b
    assert found.total == pytest.approx((o * p).sum(1).mean(), rel=1e-12)  # E[<o_g, o_h>]
    assert found.from_means == pytest.approx(o.mean(0) @ p.mean(0), rel=1e-12)
    live = np.ix_(np.arange(20) != 1, np.arange(15) != 1)
    cosines = (unit(a) @ unit(b).T)[live]
    assert found.mean_square == pytest.approx(np.square(cosines).mean(), rel=1e-12)
    assert found.plain.tolist() == np.histogram(cosines, EDGES)[0].tolist() and found.plain.sum() == 19 * 14
    weights = (F.T @ G / N * np.linalg.norm(a, axis=1)[:, None] * np.linalg.norm(b, axis=1))[live]
    np.testing.assert_allclose(found.weighted, np.histogram(cosines, EDGES, weights=weights)[0], rtol=1e-12)
    assert found.weight == pytest.approx(weights.sum(), rel=1e-12)
    order = np.argsort(-np.abs(w), axis=None)[:10]
    i, j = np.unravel_index(order, w.shape)
    assert found.top["latent"].tolist() == i.tolist() and found.top["other_latent"].tolist() == j.tolist()
    np.testing.assert_allclose(found.top["interference"], w[i, j], rtol=1e-12)
    assert found.top["tokens_together"].tolist() == [
        int(((F[:, x] > 0) & (G[:, y] > 0)).sum()) for x, y in zip(i, j, strict=True)
    ]


def test_every_pair_of_heads_stands_beside_its_null(monkeypatch: pytest.MonkeyPatch) -> None:
    generator = np.random.default_rng(0)
    latents = [activations(12, seed) for seed in range(3)]
    shared = generator.standard_normal((12, D))
    atoms = [shared + 0.1 * generator.standard_normal((12, D)) for _ in range(3)]
    monkeypatch.setattr(module, "CHUNK", 5)  # several chunks
    rotations = random_rotations(3 * 400, D, seed=0).view(400, 3, D, D).numpy()
    dataset, table = interference_dataset(latents, atoms, rotations, top=4)
    assert dataset.sizes == {"pair": 3, "bin": len(EDGES) - 1, "rotation": 400} and len(table) == 12
    for i, (g, h) in enumerate(((0, 1), (0, 2), (1, 2))):
        (one,) = interference(latents[g], latents[h], [(atoms[g], atoms[h])])
        assert dataset["total"][i].item() == one.total
        for r in (0, 3):  # as if every pair of rotated atoms were gone through
            R = rotations[r]
            (null,) = interference(latents[g], latents[h], [(atoms[g] @ R[g], atoms[h] @ R[h])])
            for name in ("total", "from_means", "mean_square"):
                found = dataset[f"{name}_rotated"].isel(rotation=r, pair=i).item()
                assert found == pytest.approx(getattr(null, name), rel=1e-9, abs=1e-9)
            assert null.weight == pytest.approx(one.weight)  # norms stay
        (plain,) = interference(latents[g], latents[h], [(atoms[g] @ rotations[0, g], atoms[h] @ rotations[0, h])])
        assert dataset["plain_rotated"].isel(pair=i).values.tolist() == plain.plain.tolist()
        F, G = latents[g].toarray() @ atoms[g], latents[h].toarray() @ atoms[h]
        null = dataset["total_rotated"].isel(pair=i).values
        spread = np.linalg.norm(F.T @ G / N) / np.sqrt(D)  # of uniform rotations
        assert null.std() == pytest.approx(spread, rel=0.15) and abs(null.mean()) < 4 * spread / 20
    assert (dataset["mean_square"] > 1.5 * dataset["mean_square_rotated"].mean("rotation")).all()
    assert set(zip(table["head"], table["other_head"], strict=True)) == {(0, 1), (0, 2), (1, 2)}
    assert "units" in dataset["total"].attrs


# -------------------------------------------------------------------- shares
def test_measures_are_means_over_active_tokens() -> None:
    H, d, n = 3, 4, 10
    generator = np.random.default_rng(0)
    W_enc, W_dec = generator.standard_normal((H, d, n)), generator.standard_normal((n, H, d))
    W_O, z = generator.standard_normal((H, d, D)), generator.standard_normal((N, H, d)) + 1
    f = activations(n, 3)
    sums = ActiveSums(W_enc)
    for start in range(0, N, 77):
        sums.add(f[start : start + 77].tocsr(), z[start : start + 77])
    held = sums.dataset(W_dec, W_O)
    value = held["value"].transpose("measure", "latent", "head")
    given = np.einsum("thd,hdi->tih", z, W_enc)
    centred = np.einsum("thd,hdi->tih", z - z.mean(0), W_enc)
    for i in (0, 4, 9):
        on = f[:, [i]].toarray()[:, 0] > 0
        np.testing.assert_allclose(value.sel(measure="dfa", latent=i), given[on, i].mean(0), rtol=1e-10)
        np.testing.assert_allclose(value.sel(measure="dfa_centred", latent=i), centred[on, i].mean(0), rtol=1e-10)
        wanted = [np.linalg.norm(W_dec[i, h] @ W_O[h]) for h in range(H)]
        np.testing.assert_allclose(value.sel(measure="lifted", latent=i), wanted)
        np.testing.assert_allclose(value.sel(measure="encoder", latent=i), np.linalg.norm(W_enc[:, :, i], axis=1))
        assert value.sel(measure="decoder_squared", latent=i).sum().item() == pytest.approx(np.square(W_dec[i]).sum())
    assert np.isnan(value.sel(measure="dfa", latent=1)).all() and held["active"].values[1] == 0
    assert held["active"].values.tolist() == (f.toarray() > 0).sum(0).tolist()
    np.testing.assert_allclose(np.abs(held["share"]).sum("head").values[[0, 2]], 1)


def test_measures_are_compared_by_rank_and_by_top_head() -> None:
    values = np.random.default_rng(0).standard_normal((50, 5, len(MEASURES)))
    held = _dataset(values, np.where(np.arange(50) < 3, 0, 9))
    found = compare_measures(held)
    a, b = (values[3:, :, MEASURES.index(name)] for name in ("decoder", "dfa"))
    wanted = np.mean([spearmanr(x, y).statistic for x, y in zip(a, b, strict=True)])
    between = {"measure_a": "decoder", "measure_b": "dfa"}
    assert found["rank_correlation"].sel(between).item() == pytest.approx(wanted)
    assert found["top_agreement"].sel(between).item() == pytest.approx((a.argmax(1) == b.argmax(1)).mean())
    np.testing.assert_allclose(np.diag(found["rank_correlation"]), 1)
    np.testing.assert_allclose(found["top_share"].sum("head"), 1)
    assert found.attrs["n_latents"] == 47 and found.attrs["chance_of_top"] == 0.2
    assert set(AGREEING) < set(MEASURES)
    assert ranks(np.array([[3.0, 1.0, 2.0]])).tolist() == [[2, 0, 1]]


def test_a_head_that_is_there_at_every_token_has_a_large_dfa_and_a_small_decoder() -> None:
    """The "head 5" question in the small: the mean of one head's z feeds every latent, and tells no two apart."""
    H, d, n = 4, 6, 20
    generator = np.random.default_rng(0)
    W_enc, W_dec = generator.standard_normal((H, d, n)) / 3, generator.standard_normal((n, H, d))
    z = generator.standard_normal((N, H, d))
    z[:, 2] += 30 * W_enc[2].mean(1) / np.linalg.norm(W_enc[2].mean(1))
    W_enc[2] = np.abs(W_enc[2].mean(1))[:, None] * np.sign(W_enc[2].mean(1))[:, None]
    W_dec[:, 2] *= 0.01
    pre = np.einsum("thd,hdi->ti", z, W_enc)
    sums = ActiveSums(W_enc)
    sums.add(sp.csr_array(np.maximum(pre - np.median(pre, axis=0), 0)), z)
    found = compare_measures(sums.dataset(W_dec, generator.standard_normal((H, d, D))))
    top = found["top_share"].sel(head=2)
    assert top.sel(measure="dfa") == 1 and top.sel(measure="decoder") == 0 and top.sel(measure="dfa_centred") < 0.6


def _dataset(values: np.ndarray, active: np.ndarray) -> "object":
    import xarray as xr

    dims = ("latent", "head", "measure")
    coordinates = {"head": np.arange(values.shape[1]), "measure": list(MEASURES)}
    return xr.Dataset(
        {"value": (dims, values), "share": (dims, shares(values)), "active": ("latent", active)}, coordinates
    )


# -------------------------------------------------------------------- lifted latents
def test_a_lifted_latent_is_found_in_another_heads_atoms() -> None:
    """Head 1's atoms span head 0's, head 2 writes elsewhere; rotated, head 1 is any other."""
    generator = np.random.default_rng(0)
    W_O = generator.standard_normal((3, 4, D))
    W_O[1] = generator.standard_normal((4, 4)) @ W_O[0]
    W_O[2] -= W_O[2] @ np.linalg.pinv(W_O[0]) @ W_O[0]
    atoms = [unit(generator.standard_normal((20, 4))) @ W for W in W_O]
    atoms[1][7] = 3 * atoms[0][2]
    rotations = np.linalg.qr(generator.standard_normal((3, D, D)))[0]
    chosen = [np.array([2, 5]), np.array([0]), np.array([], dtype=np.int64)]
    names = ["head", "latent", "other_head", "rotated", "n_atoms"]
    table = lifted_table(chosen, atoms, W_O, rotations, (1, 3)).set_index(names)
    assert len(table) == 3 * 2 * 2 * 2
    assert table.loc[(0, 2, 1, False, 1), "residual"] == pytest.approx(0, abs=1e-9)
    inside = table["in_row_space"].xs(False, level="rotated").xs(1, level="n_atoms")
    np.testing.assert_allclose(inside.loc[[(0, 2, 1), (0, 5, 1), (1, 0, 0)]], 1, atol=1e-9)
    np.testing.assert_allclose(inside.loc[[(0, 2, 2), (0, 5, 2)]], 0, atol=1e-9)
    assert table.loc[(0, 5, 2, False, 3), "residual"] == pytest.approx(1)
    v = unit(atoms[0])[5]
    basis = np.linalg.qr((W_O[1] @ rotations[1]).T)[0]
    found = table.loc[(0, 5, 1, True, 3)]
    assert found["in_row_space"] == pytest.approx(np.linalg.norm(basis.T @ v))
    assert found["residual"] >= np.sqrt(1 - found["in_row_space"] ** 2) - 1e-9
    medians = lifted_medians(table.reset_index()).set_index(["rotated", "n_atoms"])
    held = table.reset_index()
    for m, column in ((0, "in_row_space"), (3, "residual")):
        some = held[~held["rotated"] & (held["n_atoms"] == max(m, 1))]
        by_latent = some.groupby(["head", "latent"])[column].mean()
        assert medians.loc[(False, m), "median"] == pytest.approx(np.median(by_latent))
    wanted = decompose(v, unit(atoms[1]) @ rotations[1], "nn_omp", 3)
    assert found["residual"] == pytest.approx(min(one.residual for one in wanted.values()))


# -------------------------------------------------------------------- agreement
def test_agreement_is_jaccard_and_pearson() -> None:
    f, g = activations(5, 1), activations(8, 2)
    found = agreement(f, g)
    F, G = f.toarray(), g.toarray()
    for i, j in ((0, 0), (2, 3), (4, 7)):
        both, either = ((F[:, i] > 0) & (G[:, j] > 0)).sum(), ((F[:, i] > 0) | (G[:, j] > 0)).sum()
        assert found.together[i, j] == both and found.jaccard[i, j] == pytest.approx(both / either)
        assert found.correlation[i, j] == pytest.approx(pearsonr(F[:, i], G[:, j]).statistic)
    assert np.isnan(found.jaccard[1]).all() and np.isnan(found.correlation[:, 1]).all()
    same = agreement(f, f)
    np.testing.assert_allclose(np.diag(same.jaccard)[[0, 2, 3]], 1)
    np.testing.assert_allclose(np.diag(same.correlation)[[0, 2, 3]], 1)


# -------------------------------------------------------------------- decomposition
ATOMS = random_atoms((60, 12), seed=0)


def test_the_pseudo_inverse_is_the_notebooks() -> None:
    v = np.random.default_rng(1).standard_normal(12)
    c = pseudo_inverse(v, ATOMS)
    np.testing.assert_allclose(c, v @ np.linalg.pinv(ATOMS), atol=1e-12)
    np.testing.assert_allclose(c @ ATOMS, v, atol=1e-12)  # exact, and dense
    assert (np.abs(c) > 1e-6).all()
    path = decompose(v, ATOMS, "pseudo_inverse", 5)
    assert sorted(path) == [1, 2, 3, 4, 5] and path[3].atoms.tolist() == np.argsort(-np.abs(c))[:3].tolist()


def test_all_coefficients_are_those_of_raw_rows() -> None:
    """As in the notebook: of a latent's part on a head, by the pseudo-inverse of that head's decoder rows."""
    H, d, n = 3, 4, 30

    def made(kind: str, d_in: int, n_latents: int, seed: int, head: int | None = None) -> Dictionary:
        G = torch.Generator().manual_seed(seed)
        shapes = ((d_in, n_latents), (n_latents,), (n_latents, d_in), (d_in,))
        hook = "blocks.1.attn.hook_z"
        spec = Spec("sae", "relu", d_in, d_in, n_latents, hook, hook, hook_head_index=head)
        return build(spec, *(torch.randn(s, generator=G, dtype=torch.float64) for s in shapes))

    concat, heads = made("sae", H * d, 20, 0), BlockDiagonal([made("sae", d, n, h + 1, h) for h in range(H)])
    chosen = np.array([3, 11])
    found = coefficients(concat, heads, chosen)
    assert found["latent"].values.tolist() == [3, 11] and found["residual"].max() < 1e-12
    for i, h in itertools.product((3, 11), range(H)):
        v, D_h = concat.W_dec[i, h * d : (h + 1) * d], heads.heads[h].W_dec
        C = v @ torch.linalg.pinv(D_h)
        np.testing.assert_allclose(found["coefficient"].sel(latent=i, head=h), C, rtol=1e-5, atol=1e-7)
        assert torch.allclose(C @ D_h, v)
        of_units = v @ torch.linalg.pinv(D_h / D_h.norm(dim=1, keepdim=True))  # another of the exact solutions
        assert (of_units / D_h.norm(dim=1) - C).abs().max() > 0.01
        assert found["size"].sel(latent=i, head=h).item() == pytest.approx(v.norm().item())
    all_at_once = concat.W_dec[3] @ torch.linalg.pinv(heads.W_dec)
    np.testing.assert_allclose(found["coefficient"].sel(latent=3).values.ravel(), all_at_once, rtol=1e-5, atol=1e-7)
    firing = Agreement(*np.zeros((3, 2, H * n)))
    config = HeadsConfig(max_atoms=3)
    table = decompose_latents(concat, heads, chosen, firing, config).table
    row = table[(table["latent"] == 11) & (table["head"] == 1) & (table["n_atoms"] == 3)].set_index(
        ["method", "dictionary"]
    )
    one = row.loc[("pseudo_inverse", "own")]
    C = found["coefficient"].sel(latent=11, head=1).values
    assert one["atoms"] == np.argsort(-np.abs(C))[:3].tolist()
    v, rows = concat.W_dec[11, d : 2 * d].numpy(), heads.heads[1].W_dec.numpy()[one["atoms"]]
    left = v - np.array(one["coefficients"]) @ rows
    assert one["residual"] == pytest.approx(np.linalg.norm(left) / np.linalg.norm(v))
    sparse = row.loc[("omp", "own")]  # of atoms of norm 1
    units = unit(heads.heads[1].W_dec.numpy())[sparse["atoms"]]
    left = v - np.array(sparse["coefficients"]) @ units
    assert sparse["residual"] == pytest.approx(np.linalg.norm(left) / np.linalg.norm(v))


@pytest.mark.parametrize("method", METHODS)
def test_a_residual_is_that_of_its_atoms(method: str) -> None:
    v = np.random.default_rng(1).standard_normal(12)
    for m, one in decompose(v, ATOMS, method, 8).items():
        assert len(one.atoms) == len(set(one.atoms.tolist())) == m == len(one.coefficients)
        wanted = np.linalg.norm(v - one.coefficients @ ATOMS[one.atoms]) / np.linalg.norm(v)
        assert one.residual == pytest.approx(wanted, abs=1e-12)
        if method.startswith("nn"):
            assert (one.coefficients > 0).all()
            assert one.residual >= nnls(ATOMS.T, v)[1] / np.linalg.norm(v) - 1e-9


@pytest.mark.parametrize("method", ["omp", "nn_omp", "nn_lasso"])
def test_what_was_made_of_three_atoms_is_found(method: str) -> None:
    atoms = random_atoms((60, 40), seed=3)
    v = 2.0 * atoms[7] + 1.0 * atoms[19] + 0.5 * atoms[33]
    path = decompose(v, atoms, method, 6)
    assert sorted(path[3].atoms.tolist()) == [7, 19, 33] and path[3].residual < 1e-6
    found = dict(zip(path[3].atoms.tolist(), path[3].coefficients, strict=True))
    assert found == pytest.approx({7: 2.0, 19: 1.0, 33: 0.5})
    assert path[1].atoms.tolist() == [7]


def test_one_atom_is_the_one_of_largest_cosine() -> None:
    v = np.random.default_rng(2).standard_normal(12)
    cosines = ATOMS @ v / np.linalg.norm(v)
    by_omp, by_nn = decompose(v, ATOMS, "omp", 1)[1], decompose(v, ATOMS, "nn_omp", 1)[1]
    assert by_omp.atoms.tolist() == [np.abs(cosines).argmax()]
    assert by_omp.residual == pytest.approx(np.sqrt(1 - np.abs(cosines).max() ** 2))
    assert by_nn.atoms.tolist() == [cosines.argmax()]
    assert by_nn.residual == pytest.approx(np.sqrt(1 - cosines.max() ** 2))


def test_more_atoms_never_leave_more() -> None:
    v = np.random.default_rng(5).standard_normal(12)
    for method in ("omp", "nn_omp"):
        residuals = [one.residual for _, one in sorted(decompose(v, ATOMS, method, 12).items())]
        assert all(b <= a + 1e-12 for a, b in itertools.pairwise(residuals))
    assert decompose(v, ATOMS, "omp", 12)[12].residual < 1e-6  # as many as dimensions


def test_nothing_points_backwards() -> None:
    """With coefficients of any sign one atom is enough; of those >= 0 none helps."""
    atoms, v = np.eye(3)[:2], np.array([-1.0, 0, 0])
    assert decompose(v, atoms, "omp", 2)[1].residual == pytest.approx(0)
    assert decompose(v, atoms, "nn_omp", 2) == {} and decompose(v, atoms, "nn_lasso", 2) == {}


def test_what_cannot_be_decomposed_is_refused() -> None:
    with pytest.raises(ValueError, match="no method 'ompp'; there are: pseudo_inverse, omp"):
        decompose(np.ones(12), ATOMS, "ompp", 3)
    with pytest.raises(ValueError, match="norm 0"):
        decompose(np.zeros(12), ATOMS, "omp", 3)


def test_random_atoms_have_the_cosine_that_is_expected() -> None:
    atoms = random_atoms((2048, 64), seed=0)
    np.testing.assert_allclose(np.linalg.norm(atoms, axis=1), 1)
    best = np.mean([(atoms @ v).max() for v in random_atoms((200, 64), seed=1)])
    assert expected_best_cosine(2048, 64) == pytest.approx(0.49, abs=0.005)
    assert best == pytest.approx(0.49, abs=0.08)
    assert np.array_equal(atoms, random_atoms((2048, 64), seed=0))


def test_tables_hold_every_curve_and_curves_carry_on() -> None:
    generator = np.random.default_rng(0)
    own, random = ({h: random_atoms((30, 6), seed=10 * s + h) for h in range(2)} for s in range(2))
    for held in (own, random):
        held[ALL] = block_diag(held[0], held[1])
    assert own[ALL].shape == (60, 12) and not own[ALL][:30, 6:].any()
    directions = {(i, h): generator.standard_normal(6) for i in (3, 5, 8) for h in range(2)}
    directions[3, 1] = own[1][4] * 2.5
    directions[3, ALL] = np.concatenate([directions[3, 0], directions[3, 1]])
    table = decomposition_table(directions, {"own": own, "random": random}, max_atoms=4)
    keys = ["latent", "head", "dictionary", "method"]
    assert len(table.groupby(keys)) == 7 * 2 * len(METHODS) and table["n_atoms"].max() == 4
    one = table[
        (table["latent"] == 3) & (table["head"] == 1) & (table["dictionary"] == "own") & (table["method"] == "nn_omp")
    ]
    assert one["atoms"].iloc[0] == [4] and one["coefficients"].iloc[0] == pytest.approx([2.5])
    found = curves(table[table["head"] >= 0], 4)
    assert isinstance(found, pd.DataFrame) and len(found) == 2 * len(METHODS) * 4
    assert (found["low"] <= found["median"]).all() and (found["median"] <= found["high"]).all()
    for _, line in found[found["method"] != "pseudo_inverse"].groupby(["dictionary", "method"]):
        assert line["median"].is_monotonic_decreasing
