"""The dictionaries of heads as one: the same as the dense dictionary of their blocks, on disk and in use."""

import dataclasses

import numpy as np
import pytest
import torch

from saeflow.dictionaries import BlockDiagonal, DictionaryError, Origin, Spec, load_dictionary, save_dictionary
from saeflow.dictionaries.sae import build
from saeflow.evaluation.metrics import reconstruct, target

HOOK, H, D, N = "blocks.0.attn.hook_z", 3, 5, 11
ACTIVATIONS = ("relu", "jumprelu", "topk")


def head(h, activation="relu", centred=True, **fields):
    g = torch.Generator().manual_seed(h)
    k = 2 if activation == "topk" else None
    spec = Spec("sae", activation, D, D, N, HOOK, HOOK, hook_head_index=h, k=k, apply_b_dec_to_input=centred)
    shapes = [(D, N), (N,), (N, D), (D,)]
    tensors = [torch.randn(*shape, generator=g, dtype=torch.float64) for shape in shapes]
    threshold = torch.rand(N, generator=g, dtype=torch.float64) if activation == "jumprelu" else None
    return build(dataclasses.replace(spec, **fields), *tensors, threshold=threshold)


def whole(activation="relu", centred=True):
    return BlockDiagonal([head(h, activation, centred) for h in range(H)])


def dense(blocks):
    """The ordinary dictionary of the same matrices, made without looking at how heads are taken apart."""
    shapes = {"W_enc": (H * D, H * N), "W_dec": (H * N, H * D), "b_enc": (H * N,), "b_dec": (H * D,)}
    tensors = {name: torch.zeros(*shape, dtype=torch.float64) for name, shape in shapes.items()}
    for h, one in enumerate(blocks.heads):
        latents, entries = slice(h * N, (h + 1) * N), slice(h * D, (h + 1) * D)
        tensors["W_enc"][entries, latents], tensors["W_dec"][latents, entries] = one.W_enc, one.W_dec
        tensors["b_enc"][latents], tensors["b_dec"][entries] = one.b_enc, one.b_dec
    if blocks.spec.activation == "jumprelu":
        tensors["threshold"] = torch.cat([one.threshold for one in blocks.heads])
    return build(dataclasses.replace(blocks.spec, kind="sae"), **tensors)


@pytest.fixture
def z():
    return torch.randn(40, H * D, generator=torch.Generator().manual_seed(9), dtype=torch.float64)


@pytest.mark.parametrize("centred", [True, False])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_it_computes_what_the_dense_dictionary_computes(z, activation, centred):
    blocks = whole(activation, centred)
    matrices = dense(blocks)
    assert (blocks.d_in, blocks.d_out, blocks.d_sae) == (H * D, H * D, H * N)
    for name, tensor in matrices.tensors.items():
        assert torch.equal(getattr(blocks, name), tensor), name
    torch.testing.assert_close(blocks.pre_activations(z), matrices.pre_activations(z))
    f = blocks.encode(z)
    if activation == "topk":  # every head keeps its k, of which a dense dictionary knows nothing
        pre = matrices.pre_activations(z).relu().view(-1, H, N)
        kept = pre >= pre.topk(2, dim=2).values[..., -1:]
        wanted = (pre * kept).flatten(1)
        values, indices = blocks.top_latents(z)
        assert torch.equal(torch.zeros_like(f).scatter_(1, indices, values), f)
        torch.testing.assert_close(blocks.decode_top(values, indices), matrices.decode(wanted))
    else:
        wanted = matrices.encode(z)
    torch.testing.assert_close(f, wanted)
    assert 0 < (f > 0).double().mean() < 0.6
    torch.testing.assert_close(blocks.decode(f), matrices.decode(wanted))
    torch.testing.assert_close(blocks.forward(z), matrices.decode(wanted))


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_scaling_and_norms_fold_as_in_the_dense_dictionary(z, activation):
    blocks = whole(activation)
    scale = 0.5 + torch.rand(H, generator=torch.Generator().manual_seed(1)).repeat_interleave(D)
    torch.testing.assert_close(blocks.with_scaling_folded(scale, scale).forward(z), blocks.forward(z * scale) / scale)
    unit = blocks.with_unit_decoder()
    torch.testing.assert_close(unit.W_dec.norm(dim=1), torch.ones(H * N, dtype=torch.float64))
    if activation != "topk":
        torch.testing.assert_close(unit.forward(z), blocks.forward(z))


def test_matrices_are_made_only_when_asked_for(z):
    blocks = whole()
    blocks.decode(blocks.encode(z))
    assert "W_enc" not in vars(blocks) and "W_dec" not in vars(blocks)
    assert blocks.W_enc is blocks.W_enc


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_what_is_measured_adds_up_over_heads(z, activation):
    """L0, firing and squared error of the whole are the sums, or the rows, of those of the heads."""
    is_bos = torch.arange(len(z)) % 8 == 0
    blocks = whole(activation)
    made = reconstruct(blocks, z, target(z), is_bos)
    parts = [reconstruct(one, x, target(x), is_bos) for one, x in zip(blocks.heads, z.split(D, dim=1), strict=True)]
    assert torch.equal(made.output, torch.cat([part.output for part in parts], dim=1))
    assert torch.equal(made.fired, torch.cat([part.fired for part in parts], dim=1))
    for name in ("l0", "squared_error", "squared_output", "dot"):
        torch.testing.assert_close(made.per_token[name], sum(part.per_token[name] for part in parts))


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_it_is_a_folder_of_dictionaries(tmp_path, z, activation):
    many = BlockDiagonal([head(h % 3, activation, hook_head_index=h, origin=Origin("m")) for h in range(11)])
    save_dictionary(many, tmp_path)
    assert {p.name for p in tmp_path.iterdir()} == {f"head_{h}" for h in range(11)}
    loaded = load_dictionary(tmp_path)
    assert isinstance(loaded, BlockDiagonal) and loaded.spec == many.spec  # head_10 comes after head_9
    assert (loaded.spec.kind, loaded.spec.hook_head_index, loaded.heads[7].spec.hook_head_index) == ("heads", None, 7)
    x = torch.cat([z, z, z, z], dim=1)[:, : 11 * D].float()
    torch.testing.assert_close(loaded.forward(x).double(), many.forward(x.double()), rtol=1e-4, atol=1e-4)
    assert loaded.latent(7 * N + 3) == (7, 3)
    assert torch.equal(load_dictionary(tmp_path / "head_4").W_dec, loaded.heads[4].W_dec)


def test_what_is_no_dictionary_of_heads_is_refused(tmp_path):
    with pytest.raises(DictionaryError, match=r"needs those of head 0 to 1 in order, got \[0, 2\]"):
        BlockDiagonal([head(0), head(2)])
    with pytest.raises(DictionaryError, match=r"head 1 and head 0 of blocks.0.attn.hook_z are not alike"):
        BlockDiagonal([head(0), head(1, "topk")])
    with pytest.raises(DictionaryError, match="one SAE a head"):
        BlockDiagonal([])
    with pytest.raises(DictionaryError, match=r"3 heads of .* takes activations 15 wide, heads side by side, got"):
        whole().encode(torch.zeros(4, D, dtype=torch.float64))
    save_dictionary(whole(), tmp_path)
    (tmp_path / "head_1/cfg.json").rename(tmp_path / "cfg.json")
    with pytest.raises(DictionaryError, match=r"head_1 holds no dictionary: it has no cfg.json"):
        load_dictionary(tmp_path)


def test_latents_are_numbered_head_by_head(z):
    f = whole().encode(z)
    for h in range(H):
        own = whole().heads[h].encode(z[:, h * D : (h + 1) * D])
        assert np.array_equal(f[:, h * N : (h + 1) * N].numpy(), own.numpy())
