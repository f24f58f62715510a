"""Heads of an attention layer: what they write, how they lie to one another, and the loss without their cross terms."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from saeflow.config import ModelConfig
from saeflow.dictionaries import Dictionary, DictionaryError, Spec
from saeflow.dictionaries.sae import build
from saeflow.heads.cross_terms import changes, orthogonal, others, removals, row_spaces
from saeflow.heads.geometry import (
    BIN,
    HeadCosines,
    decoder_norms,
    ov_spectra,
    pair_cosines,
    pairs_of,
    participation,
    principal_angles,
    rank,
    spectra,
)
from saeflow.heads.weights import (
    decoder_by_head,
    encoder_by_head,
    head_outputs,
    lifted,
    random_rotations,
    read_attention,
)
from saeflow.models.loading import load_model

H, HEAD = 4, 8
HOOK = "blocks.1.attn.hook_z"
TOKENS = torch.from_numpy(np.random.default_rng(0).integers(1, 300, (3, 12)))


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def sae(d: int, n: int, seed: int = 0, head: int | None = None, activation: str = "relu", **more: Any) -> Dictionary:
    spec = Spec(
        "sae", activation, d, d, n, HOOK, HOOK, hook_head_index=head, k=3 if activation == "topk" else None, **more
    )  # type: ignore[arg-type]
    threshold = random(n, seed=seed + 4).abs() if activation == "jumprelu" else None
    W_enc, b_enc, W_dec, b_dec = (
        random(d, n, seed=seed),
        random(n, seed=seed + 1),
        random(n, d, seed=seed + 2),
        random(d),
    )
    return build(spec, W_enc, b_enc, W_dec, b_dec, None, threshold)


@pytest.fixture(params=[True, False], ids=["folded", "plain"])
def model(request: pytest.FixtureRequest, model_folder: Path) -> Any:
    config = ModelConfig("tiny", path=str(model_folder), fold_ln=request.param)
    return load_model(model_folder, config, "cpu").to(torch.float64)


# -------------------------------------------------------------------- weights
def test_a_layers_output_is_the_sum_of_its_heads(model: Any) -> None:
    _, cache = model.run_with_cache(TOKENS)
    for layer in (0, 1):
        attention = read_attention(model, layer)
        z = cache[f"blocks.{layer}.attn.hook_z"].flatten(0, 1)
        written = head_outputs(z, attention.W_O)
        assert written.shape == (36, H, 32)
        wanted = cache[f"blocks.{layer}.hook_attn_out"].flatten(0, 1)
        torch.testing.assert_close(written.sum(1) + attention.b_O, wanted, rtol=0, atol=1e-10)
        flat = z.flatten(1) @ attention.W_O.flatten(0, 1) + attention.b_O  # the notebook's flat form
        torch.testing.assert_close(flat, wanted, rtol=0, atol=1e-10)


def test_a_compiled_models_output_is_the_sum_of_its_heads() -> None:
    """It has no norms, and several heads only in some layers."""
    from saeflow.groundtruth.cases import get_case
    from saeflow.groundtruth.compiler import hooked_transformer

    case = get_case(3)
    compiled = hooked_transformer(case.compiled.config, case.compiled.weights).to(torch.float64)
    _, cache = compiled.run_with_cache(torch.from_numpy(case.rows(20, 0)))
    for layer in range(compiled.cfg.n_layers):
        attention = read_attention(compiled, layer)
        assert not attention.centred
        written = head_outputs(cache[f"blocks.{layer}.attn.hook_z"].flatten(0, 1), attention.W_O).sum(1) + attention.b_O
        wanted = cache[f"blocks.{layer}.hook_attn_out"].flatten(0, 1)
        torch.testing.assert_close(written, wanted, rtol=0, atol=1e-10)


def test_values_are_read_from_the_normalised_stream(model: Any) -> None:
    """W_V by query head with the norm's gain and bias folded in, whatever the model was loaded with."""
    _, cache = model.run_with_cache(TOKENS)
    for layer in (0, 1):
        attention = read_attention(model, layer)
        stream = cache[f"blocks.{layer}.hook_resid_pre"]
        centred = stream - stream.mean(-1, keepdim=True) if attention.centred else stream
        x = centred / cache[f"blocks.{layer}.ln1.hook_scale"]
        values = torch.einsum("bpe,hed->bphd", x, attention.W_V) + attention.b_V
        v = cache[f"blocks.{layer}.attn.hook_v"]
        wanted = v[:, :, [h // (H // v.shape[2]) for h in range(H)]]
        torch.testing.assert_close(values, wanted, rtol=0, atol=1e-10)


def test_weights_are_cut_by_head() -> None:
    made = sae(H * HEAD, 40)
    z = random(5, H, HEAD)
    w, d = encoder_by_head(made, H), decoder_by_head(made, H)
    torch.testing.assert_close(torch.einsum("nhd,hdi->ni", z, w), z.flatten(1) @ made.W_enc)
    torch.testing.assert_close(d.flatten(1), made.W_dec)
    assert torch.equal(d[:, 2], made.W_dec[:, 2 * HEAD : 3 * HEAD])
    with pytest.raises(DictionaryError, match=r"all 4 heads of a layer.* of head 2"):
        encoder_by_head(sae(HEAD, 12, head=2), H)


def test_rotations_are_rotations_and_seeded() -> None:
    R = random_rotations(3, 16, seed=0)
    torch.testing.assert_close(R @ R.transpose(1, 2), torch.eye(16, dtype=torch.float64).expand(3, 16, 16))
    assert torch.equal(R, random_rotations(3, 16, seed=0)) and not torch.equal(R, random_rotations(3, 16, seed=1))
    many = random_rotations(4000, 2, seed=0)  # uniform: no direction is preferred, which QR alone does not give
    assert many.mean(0).abs().max() < 0.05


# -------------------------------------------------------------------- geometry
def test_spectra_are_those_of_the_products() -> None:
    heads = [sae(HEAD, 20, seed=h, head=h) for h in range(3)]
    W_O = random(3, HEAD, 32)
    W_O[1, 5:] = 0  # a head of rank 5
    heads[2].W_dec[:, 0] = 0
    found = spectra(heads, W_O)
    assert found["rank"].sel(matrix="D").values.tolist() == [8, 8, 7]
    assert found["rank"].sel(matrix="W_O").values.tolist() == [8, 5, 8]
    assert found["rank"].sel(matrix="D_W_O").values.tolist() == [8, 5, 7]
    for h, one in enumerate(heads):
        for name, matrix in (("D", one.W_dec), ("W_O", W_O[h]), ("D_W_O", one.W_dec @ W_O[h])):
            wanted = np.linalg.svd(matrix.numpy(), compute_uv=False)[:HEAD]
            np.testing.assert_allclose(found["singular_value"].sel(head=h, matrix=name), wanted, atol=1e-12)
            assert rank(wanted, matrix.shape) == np.linalg.matrix_rank(matrix.float().numpy())
    assert participation(np.ones(7)) == pytest.approx(7) and participation(np.array([5.0, 0, 0])) == 1
    assert participation(np.zeros(3)) == 0  # of a pruned head


@pytest.mark.parametrize("activation", ["relu", "topk", "jumprelu"])
def test_folding_decoder_norms_changes_no_output(activation: str) -> None:
    """TopK must rank by value times norm for that: so it is folded before it is stored."""
    made = sae(HEAD, 20, activation=activation, apply_b_dec_to_input=True)
    if activation == "topk":
        made = made.with_unit_decoder()
        made.W_dec *= 3.0  # one norm for all: ranks stay
    x = random(50, HEAD, seed=9)
    folded = made.with_unit_decoder()
    torch.testing.assert_close(folded.forward(x), made.forward(x), rtol=0, atol=1e-10)
    norms = made.W_dec.norm(dim=1)
    torch.testing.assert_close(folded.encode(x), made.encode(x) * norms, rtol=0, atol=1e-10)
    found = decoder_norms([made])
    np.testing.assert_allclose(found["decoder_norm"][0], norms, rtol=1e-12)
    np.testing.assert_allclose(found["decoder_norm_folded"][0], 1, rtol=1e-12)
    np.testing.assert_allclose(found["encoder_norm"][0], made.W_enc.norm(dim=0), rtol=1e-12)


def test_principal_angles_are_the_cosines_of_orthonormal_bases() -> None:
    W_O = random(3, 4, 16)
    W_O[1] = random(4, 4, seed=3) @ W_O[0]  # the same space
    W_O[2, 0] = W_O[0, 1]  # one direction shared
    found = principal_angles(W_O)["angle"]
    np.testing.assert_allclose(found.isel(pair=0), 0, atol=1e-7)
    bases = [np.linalg.qr(W.T.numpy())[0] for W in W_O]
    cosines = np.linalg.svd(bases[0].T @ bases[2], compute_uv=False)
    np.testing.assert_allclose(np.cos(found.isel(pair=1)), cosines[::-1], atol=1e-10)
    assert found.isel(pair=1).values.min() < 1e-7 < 0.1 < np.sort(found.isel(pair=1).values)[1]


# -------------------------------------------------------------------- cosines
def test_cosines_are_those_of_head_outputs() -> None:
    z, W_O = random(6, 10, H, HEAD), random(H, HEAD, 32, seed=1)
    held = HeadCosines(W_O, random_rotations(H, 32, seed=0)[None], first=1)
    held.add(z[:4])
    held.add(z[4:])
    found = held.dataset()
    outputs = head_outputs(z.flatten(0, 1), W_O).view(6, 10, H, 32)
    for i, (g, h) in enumerate(pairs_of(H)):
        wanted = torch.cosine_similarity(outputs[:, :, g], outputs[:, :, h], dim=2)
        torch.testing.assert_close(pair_cosines(outputs.flatten(0, 1))[:, i], wanted.flatten())
        median = found["cosine"].isel(pair=i).sel(quantile=0.5).item()
        assert median == pytest.approx(np.median(wanted[:, 1:].numpy()), abs=1e-6)
        at_3 = found["cosine_by_position"].isel(pair=i).sel(position=3, quantile=0.95).item()
        assert at_3 == pytest.approx(np.quantile(wanted[:, 3].numpy(), 0.95), abs=1e-6)
        np.testing.assert_allclose(found["cosine_in_row"].isel(pair=i), wanted[:4], atol=1e-6)
        assert (found["head"][i].item(), found["other_head"][i].item()) == (g, h)
    assert found.attrs["n_rows"] == 6


def test_the_null_keeps_each_head_and_loses_how_they_lie_to_each_other() -> None:
    """Heads that write the same vector have cosine 1; rotated, what two random directions have."""
    W_O = random(1, HEAD, 32).expand(3, HEAD, 32)
    z = random(40, 5, 1, HEAD).expand(40, 5, 3, HEAD)
    rotations = random_rotations(3 * 50, 32, seed=0).view(50, 3, 32, 32)
    held = HeadCosines(W_O, rotations, first=2)
    norms = [head_outputs(z.flatten(0, 1), W).norm(dim=2) for W in (W_O, held.rotated[0])]
    torch.testing.assert_close(norms[0], norms[1])
    held.add(z[:30])
    held.add(z[30:])
    found = held.dataset()
    np.testing.assert_allclose(found["mean_cosine"], 1, atol=1e-6)
    null = found["mean_cosine_rotated"]
    assert null.dims == ("rotation", "pair") and np.abs(null.mean("rotation")).max() < 0.05
    outputs = head_outputs(z[:, 2:].flatten(0, 1), W_O @ rotations[7])
    cosines = torch.cosine_similarity(outputs[:, 0], outputs[:, 2], dim=1).numpy()
    assert null[7, 1].item() == pytest.approx(cosines.mean(), abs=1e-12)
    of_draw = found["cosine_rotated"].isel(rotation=7, pair=1)
    ordered = np.sort(cosines)  # a quantile from bins lies where as many are below
    for quantile, value in zip(found["quantile"].values, of_draw.values, strict=True):
        assert abs(np.searchsorted(ordered, value - BIN) - quantile * len(ordered)) <= 2
    np.testing.assert_allclose(of_draw[[0, -1]], ordered[[0, -1]], atol=BIN)


def test_spectra_of_what_heads_move() -> None:
    W_V, W_O = random(3, 32, HEAD), random(3, HEAD, 32, seed=1)
    W_V[1, :, 5:] = 0
    found = ov_spectra(W_V, W_O)
    assert found["rank"].values.tolist() == [HEAD, 5, HEAD]
    for h in range(3):
        wanted = np.linalg.svd((W_V[h] @ W_O[h]).numpy(), compute_uv=False)[:HEAD]
        np.testing.assert_allclose(found["singular_value"].sel(head=h), wanted, atol=1e-10)
        shared = np.square(wanted).sum() ** 2 / (wanted**4).sum()
        assert found["participation"].sel(head=h).item() == pytest.approx(shared)


# -------------------------------------------------------------------- cross terms
def test_orthogonal_removes_all_cross_terms_and_keeps_norms() -> None:
    o = random(20, H, 32) + random(20, 1, 32, seed=1)
    found = orthogonal(o)
    products = found @ found.transpose(1, 2)
    off = products - torch.diag_embed(products.diagonal(dim1=1, dim2=2))
    assert off.abs().max() < 1e-9
    torch.testing.assert_close(found.norm(dim=2), o.norm(dim=2))
    torch.testing.assert_close(found.sum(1).square().sum(1), o.square().sum((1, 2)))


def test_orthogonal_is_the_nearest() -> None:
    """No small rotation of it, heads' norms kept, is nearer; nor is Gram-Schmidt."""
    o = random(1, 3, 6)
    best = (orthogonal(o) - o).square().sum()
    for seed in range(40):
        A = 0.05 * random(6, 6, seed=seed)
        moved = orthogonal(o)[0] @ torch.linalg.matrix_exp(A - A.T)
        assert (moved - o[0]).square().sum() >= best
    Q, R = torch.linalg.qr(o[0].T)
    schmidt = (Q * R.diagonal().sign()).T * o[0].norm(dim=1, keepdim=True)
    assert (schmidt - o[0]).square().sum() > best


def test_heads_that_write_nothing_or_the_same_do_no_harm() -> None:
    o = random(3, H, 32)
    o[0, 1] = 0
    o[1, 2] = 2 * o[1, 0]
    for remove in removals(random(H, HEAD, 32)).values():
        assert remove(o).isfinite().all()
    assert orthogonal(o)[0, 1].abs().max() < 1e-12
    o[2, 3] *= 1e-5
    torch.testing.assert_close(orthogonal(o)[2, 3], o[2, 3], rtol=1e-3, atol=1e-8)


def test_others_takes_out_what_lies_along_the_sum_of_the_others() -> None:
    o = random(20, H, 32)
    found = others(o)
    for h in range(H):
        rest = o.sum(1) - o[:, h]
        torch.testing.assert_close(torch.linalg.vecdot(found[:, h], rest), torch.zeros(20, dtype=torch.float64))
        wanted = o[:, h] - (o[:, h] * rest).sum(1, keepdim=True) / rest.square().sum(1, keepdim=True) * rest
        torch.testing.assert_close(found[:, h], wanted)


def test_row_spaces_leaves_what_no_other_head_can_write() -> None:
    W_O = random(3, HEAD, 32)
    P = row_spaces(W_O)
    for h in range(3):
        assert (W_O[[g for g in range(3) if g != h]] @ P[h]).abs().max() < 1e-9
        torch.testing.assert_close(P[h] @ P[h], P[h])
        assert P[h].trace().item() == pytest.approx(32 - 2 * HEAD)
    o = head_outputs(random(5, 3, HEAD), W_O)
    found = removals(W_O)["row_spaces"](o)
    torch.testing.assert_close(found[:, 1], o[:, 1] @ P[1])


def test_controls_are_of_the_same_size_and_seeded() -> None:
    o, rest = random(30, H, 32), random(32)
    ways = removals(random(H, HEAD, 32))
    first, second = (list(changes(o, rest, ways, torch.Generator().manual_seed(0))) for _ in range(2))
    assert [c.way for c in first] == ["orthogonal", "orthogonal", "others", "others", "row_spaces", "row_spaces"]
    whole = o.sum(1) + rest
    for one, again in zip(first, second, strict=True):
        assert torch.equal(one.output, again.output)
    for removed, control in zip(first[::2], first[1::2], strict=True):
        assert not removed.control and control.control
        sizes = [(c.output - whole).norm(dim=1) for c in (removed, control)]
        torch.testing.assert_close(*sizes, rtol=1e-6, atol=1e-9)
        torch.testing.assert_close(removed.output, ways[removed.way](o).sum(1) + rest)


def test_lifted_atoms_are_what_a_latent_adds(model: Any) -> None:
    attention = read_attention(model, 1)
    heads = [sae(HEAD, 12, seed=h, head=h) for h in range(H)]
    atoms = lifted(heads, attention.W_O)
    f = random(H, 5, 12).relu()
    z = torch.stack([f[h] @ heads[h].W_dec for h in range(H)], dim=1)
    wanted = head_outputs(z, attention.W_O)
    for h in range(H):
        torch.testing.assert_close(f[h] @ atoms[h], wanted[:, h])
