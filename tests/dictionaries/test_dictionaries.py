"""Dictionaries: what they compute, how training's units are folded away, and what is on disk."""

import json

import pytest
import torch

from saeflow.dictionaries import DictionaryError, Origin, Spec, load_dictionary, save_dictionary
from saeflow.dictionaries.sae import SAE, Transcoder, build

ORIGIN = Origin("tiny", "0123abcd", False, True, False, 64, True)


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


def random_dictionary(kind="sae", activation="topk", d=6, p=None, n=16, k=3, **fields):
    p = p or d
    g = torch.Generator().manual_seed(0)
    spec = Spec(
        kind=kind,
        activation=activation,
        d_in=d,
        d_out=p,
        d_sae=n,
        hook_name="blocks.0.ln2.hook_normalized",
        hook_name_out="blocks.0.hook_mlp_out" if kind == "transcoder" else "blocks.0.ln2.hook_normalized",
        k=k if activation == "topk" else None,
        apply_b_dec_to_input=kind == "sae",
        l1_coefficient=None if activation == "topk" else 0.5,
        squared_error="sum",
        sparsity="decoder_norm",
        normalize_activations="none",
        seed=3,
        origin=ORIGIN,
        **fields,
    )
    shapes = ((d, n), (n,), (n, p), (p,))
    return build(spec, *(torch.randn(*shape, generator=g) for shape in shapes))


KINDS = [("sae", "topk", 6), ("sae", "relu", 6), ("transcoder", "topk", 6), ("transcoder", "relu", 4)]


@pytest.mark.parametrize(("kind", "activation", "p"), KINDS)
def test_forward_is_decode_of_encode(kind, activation, p):
    dictionary = random_dictionary(kind, activation, p=p)
    x = torch.randn(20, 6)
    f = dictionary.encode(x)
    assert f.shape == (20, 16) and dictionary.forward(x).shape == (20, p)
    torch.testing.assert_close(dictionary.forward(x), dictionary.decode(f))
    c = dictionary.b_dec if kind == "sae" else 0
    pre = (x - c) @ dictionary.W_enc + dictionary.b_enc
    wanted = pre.relu()
    if activation == "topk":
        wanted = torch.where(pre >= pre.topk(3).values[:, -1:], wanted, 0)
    torch.testing.assert_close(f, wanted)
    torch.testing.assert_close(dictionary.decode(f), f @ dictionary.W_dec + dictionary.b_dec)


def test_top_latents_are_the_nonzeros_of_encode():
    dictionary = random_dictionary()
    x = torch.randn(20, 6)
    values, indices = dictionary.top_latents(x)
    assert values.shape == indices.shape == (20, 3) and (values >= 0).all()
    torch.testing.assert_close(torch.zeros(20, 16).scatter(1, indices, values), dictionary.encode(x))


def test_top_latents_of_relu_is_refused():
    with pytest.raises(DictionaryError, match="use encode"):
        random_dictionary(activation="relu").top_latents(torch.randn(2, 6))


@pytest.mark.parametrize(("kind", "activation", "p"), KINDS)
def test_folding_the_scaling_changes_no_activation_and_no_reconstruction(kind, activation, p):
    trained = random_dictionary(kind, activation, p=p)
    scale_in, scale_out = 0.37, 0.37 if kind == "sae" else 2.9
    folded = trained.with_scaling_folded(scale_in, scale_out)
    x = torch.randn(50, 6)
    torch.testing.assert_close(folded.encode(x), trained.encode(x * scale_in))
    torch.testing.assert_close(folded.forward(x), trained.forward(x * scale_in) / scale_out)


def test_an_sae_is_not_folded_with_two_scales():
    with pytest.raises(DictionaryError, match="one scale"):
        random_dictionary().with_scaling_folded(1.0, 2.0)


def test_unit_decoder_keeps_the_function_of_relu():
    dictionary = random_dictionary("transcoder", "relu", p=4)
    unit = dictionary.with_unit_decoder()
    x = torch.randn(50, 6)
    torch.testing.assert_close(unit.W_dec.norm(dim=1), torch.ones(16))
    torch.testing.assert_close(unit.forward(x), dictionary.forward(x))


def test_unit_decoder_makes_topk_rank_by_contribution():
    dictionary = random_dictionary()
    x = torch.randn(50, 6)
    pre = dictionary.pre_activations(x) * dictionary.W_dec.norm(dim=1)
    kept = torch.zeros_like(pre).scatter(1, pre.topk(3).indices, 1.0)
    torch.testing.assert_close(dictionary.with_unit_decoder().encode(x), pre.relu() * kept)


@pytest.mark.parametrize(("kind", "activation", "p"), [*KINDS, ("transcoder", "topk", 4)])
def test_what_is_saved_is_what_is_loaded(tmp_path, kind, activation, p):
    dictionary = random_dictionary(kind, activation, p=p)
    save_dictionary(dictionary, tmp_path)
    loaded = load_dictionary(tmp_path)
    assert type(loaded) is {"sae": SAE, "transcoder": Transcoder}[kind]
    assert loaded.spec == dictionary.spec
    x = torch.randn(9, 6)
    assert torch.equal(loaded.encode(x), dictionary.encode(x))
    assert torch.equal(loaded.forward(x), dictionary.forward(x))


def test_the_same_dictionary_is_the_same_bytes(tmp_path):
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        save_dictionary(random_dictionary(), tmp_path / name)
    for file in ("cfg.json", "sae_weights.safetensors"):
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes()


def test_config_names_no_device_but_cpu(tmp_path):
    save_dictionary(random_dictionary(), tmp_path)
    assert json.loads((tmp_path / "cfg.json").read_text())["device"] == "cpu"


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"k": 17}, "k=17 is out of range: it must be 1 to d_sae=16"),
        ({"k": 0}, "k=0 is out of range"),
        ({"p": 4}, "use kind=transcoder"),
    ],
)
def test_an_impossible_dictionary_is_refused(fields, message):
    with pytest.raises(DictionaryError, match=message):
        random_dictionary(**fields)


def test_weights_of_another_size_are_refused():
    d = random_dictionary()
    with pytest.raises(DictionaryError, match=r"W_enc has shape \(6, 15\), but the sizes say \(6, 16\)"):
        build(d.spec, d.W_enc[:, :15], d.b_enc, d.W_dec, d.b_dec)


def test_activations_of_another_width_are_refused():
    with pytest.raises(DictionaryError, match="takes activations 6 wide"):
        random_dictionary().encode(torch.randn(4, 7))


def test_a_folder_without_a_dictionary_is_refused(tmp_path):
    with pytest.raises(DictionaryError, match=r"it has no cfg\.json; train it first"):
        load_dictionary(tmp_path)


@pytest.mark.parametrize("file", ["cfg.json", "sae_weights.safetensors"])
def test_a_torn_file_is_refused(tmp_path, file):
    save_dictionary(random_dictionary(), tmp_path)
    path = tmp_path / file
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(DictionaryError, match=r"is damaged .* to train it again"):
        load_dictionary(tmp_path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"architecture": "temporal"}, "architecture 'temporal' is not supported"),
        ({"architecture": "gated"}, "SAELens cannot open the dictionary"),
        ({"metadata": {}}, "not a whole SAELens config: 'hook_name'"),
    ],
)
def test_a_config_that_means_something_else_is_refused(tmp_path, change, message):
    save_dictionary(random_dictionary(), tmp_path)
    config = json.loads((tmp_path / "cfg.json").read_text())
    (tmp_path / "cfg.json").write_text(json.dumps(config | change))
    with pytest.raises(DictionaryError, match=message):
        load_dictionary(tmp_path)
