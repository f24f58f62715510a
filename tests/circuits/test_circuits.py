"""Identities of circuit analysis, in float64: what is split up adds up to what was split, in blocks of every kind."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from saeflow.circuits.attribution import CircuitRun, Node, Target
from saeflow.circuits.paths import graph, greedy_paths
from saeflow.circuits.weights import connections, de_embedding, logit_weights, ov, ov_norms
from saeflow.config import ModelConfig
from saeflow.dictionaries import Dictionary, DictionaryError, Spec
from saeflow.dictionaries.sae import build
from saeflow.models.loading import load_model

D, N_LATENTS = 32, 40
TOKENS = torch.from_numpy(np.random.default_rng(0).integers(1, 300, 12))


@pytest.fixture
def model(model_folder: Path) -> Any:
    loaded = load_model(model_folder, ModelConfig("tiny", path=str(model_folder), fold_ln=True), "cpu")
    return loaded.to(torch.float64)


def transcoder(layer: int, skip: bool = False, activation: str = "relu") -> Dictionary:
    g = torch.Generator().manual_seed(layer)
    hooks = (f"blocks.{layer}.ln2.hook_normalized", f"blocks.{layer}.hook_mlp_out")
    spec = Spec("transcoder", activation, D, D, N_LATENTS, *hooks, k=6 if activation == "topk" else None, skip=skip)  # type: ignore[arg-type]
    shapes = ((D, N_LATENTS), (N_LATENTS,), (N_LATENTS, D), (D,))
    tensors = [0.4 * torch.randn(shape, generator=g, dtype=torch.float64) for shape in shapes]
    return build(spec, *tensors, torch.randn(D, D, generator=g, dtype=torch.float64) / 9 if skip else None)


def run(model: Any, skip: bool = False, activation: str = "relu", layers: tuple[int, ...] = (0, 1)) -> CircuitRun:
    return CircuitRun(model, {layer: transcoder(layer, skip, activation) for layer in layers}, TOKENS)


@pytest.mark.parametrize(
    ("skip", "activation", "layers"), [(False, "relu", (0, 1)), (True, "topk", (0, 1)), (False, "relu", (1,))]
)
def test_attributions_add_up_to_the_pre_activation(model: Any, skip: bool, activation: str, layers: Any) -> None:
    """Pre-activation = features + heads + embedding + biases + errors + b_enc."""
    held = run(model, skip, activation, layers)
    made = held.transcoders[1]
    pre = made.pre_activations(held.read(1, "mlp"))
    for token, feature in ((0, 3), (5, 7), (11, 0)):
        table = held.attribute(held.of_feature(1, feature, token))
        assert table["contribution"].sum() == pytest.approx(
            (pre[token, feature] - made.b_enc[feature]).item(), abs=1e-9
        )
        kinds = {"embedding", "head", "bias"} | ({"feature", "error"} if 0 in layers else {"mlp"})
        assert set(table["kind"]) == kinds | ({"skip"} if skip and 0 in layers else set())
        n_attention = 1 if held.parallel else 2  # a parallel block's MLP does not see its own attention
        assert set(table.loc[table["kind"] == "head", "layer"]) == set(range(n_attention))
        assert table.loc[table["kind"] == "head", "token"].max() == token


def test_attributions_of_a_logit_difference_add_up(model: Any) -> None:
    held = run(model)
    direction = model.unembed.W_U[:, 3] - model.unembed.W_U[:, 8]
    logits = model(TOKENS[None])[0]
    bias = model.unembed.b_U[3] - model.unembed.b_U[8]
    table = held.attribute(held.of_logit(direction, 9))
    assert table["contribution"].sum() == pytest.approx((logits[9, 3] - logits[9, 8] - bias).item(), abs=1e-9)


def test_a_features_contribution_is_its_gradient_times_itself(model: Any) -> None:
    """With the norm's scale held, by autograd through the layer above."""
    held = run(model)
    target = held.of_feature(1, 4, 6)
    f = held.features[0][6].clone().requires_grad_()
    others = held._at("blocks.1.hook_resid_pre")[6]
    stream = others - held.features[0][6] @ held.transcoders[0].W_dec + f @ held.transcoders[0].W_dec
    scale = held._at("blocks.1.ln2.hook_scale")[6]
    centred = stream - stream.mean() if model.cfg.normalization_type == "LNPre" else stream
    (centred / scale @ target.direction).backward()
    table = held.attribute(target)
    features = table[table["kind"] == "feature"]
    assert f.grad is not None and len(features) == int((f > 0).sum())
    wanted = (f * f.grad)[features["unit"].tolist()].detach()
    np.testing.assert_allclose(features["contribution"], wanted, atol=1e-10)


def test_a_node_is_explained_by_what_it_reads(model: Any) -> None:
    """A feature's contribution is its bias and everything that its own target sums up; so is a head's."""
    held = run(model)
    root = held.of_feature(1, 4, 6)
    table = held.attribute(root)
    for kind in ("feature", "head"):
        for row in table[table["kind"] == kind].nlargest(3, "contribution").to_dict("records"):
            node = Node(kind, row["layer"], row["unit"], row["token"])  # type: ignore[arg-type]
            inside = held.attribute(held.step(root, node))["contribution"].sum() + held.bias(root, node)
            assert inside == pytest.approx(row["contribution"], abs=1e-9)


def test_input_invariant_connections_are_products_of_weights(model: Any) -> None:
    earlier, later = transcoder(0), transcoder(1)
    v = later.W_enc[:, 5]
    through = ov(model, 0, 2)
    assert torch.equal(connections(earlier, v), earlier.W_dec @ v)
    torch.testing.assert_close(connections(earlier, v, through)[3], earlier.W_dec[3] @ through @ v)
    torch.testing.assert_close(logit_weights(earlier.W_dec, model)[7], earlier.W_dec[7] @ model.unembed.W_U)
    torch.testing.assert_close(de_embedding(model, v)[9], model.embed.W_E[9] @ v)
    torch.testing.assert_close(de_embedding(model, v, through)[9], model.embed.W_E[9] @ through @ v)
    norms = ov_norms(model, v, 1)
    assert norms.shape == (1 if model.cfg.parallel_attn_mlp else 2, 4)
    torch.testing.assert_close(norms[0, 2], (through @ v).norm())
    x = torch.randn(5, D, dtype=torch.float64)  # the head writes what it does in the model
    attention = model.blocks[0].attn
    wanted = torch.einsum("pd,dh,he->pe", x, attention.W_V[2], attention.W_O[2])
    torch.testing.assert_close(x @ through, wanted)


def test_greedy_paths_are_the_best_of_all(model: Any) -> None:
    """With room for every branch, the first iteration holds the largest contributions, the second every way down."""
    held = run(model)
    root = held.of_feature(1, 4, 6)
    table = held.attribute(root)
    table = table[table["kind"].isin(["feature", "head", "embedding"]) & (table["contribution"] > 0)]
    table = table[(table["kind"] != "head") | (table["token"] > 0)]
    first = greedy_paths(held, root, n_iterations=1, n_branches=4, top_k=100)
    assert first[0].nodes == (Node("target", 1, -1, 6),)
    np.testing.assert_allclose(
        [path.contributions[-1] for path in first[1:]], table["contribution"].nlargest(4), rtol=1e-12
    )
    every = greedy_paths(held, root, n_iterations=2, n_branches=10**6, top_k=10**6)
    assert sum(len(path.nodes) == 2 for path in every) == len(table)
    longer = [path for path in every if len(path.nodes) == 3]
    assert longer and all(path.nodes[-1].layer < path.nodes[-2].layer or held.parallel is False for path in longer)
    for path in longer[:20]:
        last = path.nodes[-1]
        inside = held.attribute(held.step(root, path.nodes[1]))
        row = inside[(inside["kind"] == last.kind) & (inside["layer"] == last.layer) & (inside["unit"] == last.unit)]
        assert path.contributions[-1] == pytest.approx(row.loc[row["token"] == last.token, "contribution"].item())


def test_a_graphs_nodes_are_made_up_of_children_bias_error_and_what_was_pruned(model: Any) -> None:
    held = run(model)
    root = held.of_feature(1, 4, 6)
    paths = greedy_paths(held, root, n_iterations=3, n_branches=8)
    found = graph(held, root, paths)
    json.dumps(found)
    for node in found["nodes"]:
        made_of = sum(node[name] for name in ("children", "bias", "error", "pruned"))
        assert made_of == pytest.approx(node["contribution"], abs=1e-9)
    edges = sum(edge["contribution"] for edge in found["edges"])
    assert edges == pytest.approx(sum(path.contributions[-1] for path in paths[1:]))
    whole = greedy_paths(held, root, n_iterations=1, n_branches=10**6, top_k=10**6)
    (top,) = (n for n in graph(held, root, whole)["nodes"] if n["kind"] == "target")
    table = held.attribute(root)
    positive = table["kind"].isin(["feature", "head", "embedding"]) & (table["contribution"] > 0)
    positive &= (table["kind"] != "head") | (table["token"] > 0)
    assert top["children"] == pytest.approx(table.loc[positive, "contribution"].sum())
    assert top["pruned"] == pytest.approx(table.loc[~positive & (table["kind"] != "error"), "contribution"].sum())


def test_what_circuits_cannot_read_is_refused(model_folder: Path) -> None:
    plain = load_model(model_folder, ModelConfig("tiny", path=str(model_folder)), "cpu")
    with pytest.raises(ValueError, match=r"set model.fold_ln=true"):
        CircuitRun(plain, {}, TOKENS)
    folded = load_model(model_folder, ModelConfig("tiny", path=str(model_folder), fold_ln=True), "cpu")
    with pytest.raises(DictionaryError, match=r"a transcoder of layer 0 from blocks.0.ln2.hook_normalized"):
        CircuitRun(folded, {0: transcoder(1)}, TOKENS)
    assert Target(1, "mlp", 0, torch.zeros(D)).part == "mlp"
