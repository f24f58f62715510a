"""Language models of random weights: what changes, what stays, and that they are loaded as the trained ones are."""

from pathlib import Path

import pytest
import torch

from saeflow.config import ModelConfig
from saeflow.models.controls import randomise
from saeflow.models.loading import load_model
from saeflow.models.opening import model_config


def state_of(folder: Path, **model: object) -> dict[str, torch.Tensor]:
    return dict(load_model(folder, ModelConfig("tiny", path=str(folder), **model), "cpu").named_parameters())


def test_reinit_changes_what_transformer_lens_initialises(model_folder: Path) -> None:
    trained, other = state_of(model_folder), state_of(model_folder, randomise="reinit")
    hooked = load_model(model_folder, ModelConfig("tiny", path=str(model_folder)), "cpu")
    hooked.requires_grad_(True)
    hooked.init_weights()
    initialised = {name for name, p in hooked.named_parameters() if not torch.equal(p, trained[name])}
    changed = {name for name in trained if not torch.equal(trained[name], other[name])}
    assert changed == initialised and {"embed.W_E", "unembed.W_U", "blocks.0.mlp.W_in"} <= changed
    assert trained.keys() - changed  # biases and gains
    for name in changed:
        std = hooked.get_parameter(name).std().item()
        assert std == pytest.approx(0.8 / 32**0.5, rel=0.15)  # of d_model 32
        assert other[name].std().item() == pytest.approx(0.8 / 32**0.5, rel=0.15)


def test_permuted_matrices_keep_their_entries_and_singular_values(model_folder: Path) -> None:
    trained, other = state_of(model_folder), state_of(model_folder, randomise="permuted", randomise_seed=3)
    for name, weights in trained.items():
        if "W_" not in name:
            torch.testing.assert_close(other[name], weights, rtol=0, atol=0)
            continue
        assert not torch.equal(other[name], weights)
        torch.testing.assert_close(other[name].flatten().sort().values, weights.flatten().sort().values, rtol=0, atol=0)
        found, wanted = (torch.linalg.svdvals(w.double()).reshape(-1).sort().values for w in (other[name], weights))
        torch.testing.assert_close(found, wanted, rtol=1e-9, atol=1e-9)  # of all heads together: they may change places


def test_draws_depend_on_the_seed_and_the_names_alone() -> None:
    state = {"a.W_in": torch.zeros(3, 4), "b.W_out": torch.arange(12.0).view(3, 4), "b.b_out": torch.ones(4)}
    for kind in ("reinit", "permuted"):
        first, again = randomise(state, kind, 0, 0.5), randomise(dict(reversed(state.items())), kind, 0, 0.5)
        assert all(torch.equal(first[name], again[name]) for name in state)
        assert not torch.equal(first["b.W_out"], randomise(state, kind, 1, 0.5)["b.W_out"])
        assert torch.equal(first["b.b_out"], state["b.b_out"])
    assert torch.equal(state["b.W_out"], torch.arange(12.0).view(3, 4))


@pytest.mark.parametrize("kind", ["reinit", "permuted"])
def test_arms_are_processed_as_the_trained_model_is(neox_folder: Path, kind: str) -> None:
    """Folding the norm into the weights that were put in changes nothing that the model computes."""
    tokens = torch.arange(40)[None] % 300
    plain, folded = (
        load_model(neox_folder, ModelConfig("tiny", path=str(neox_folder), fold_ln=f, randomise=kind), "cpu")(tokens)
        for f in (False, True)
    )
    trained = load_model(neox_folder, ModelConfig("tiny", path=str(neox_folder)), "cpu")(tokens)
    torch.testing.assert_close(plain.log_softmax(-1), folded.log_softmax(-1), rtol=1e-3, atol=1e-3)
    assert (plain.log_softmax(-1) - trained.log_softmax(-1)).abs().mean() > 0.1


def test_a_job_opens_its_arm() -> None:
    flags = {"fold_ln": True, "center_writing_weights": False, "center_unembed": False}
    assert model_config(Path("m"), {"weights": "w", **flags}).randomise == "none"
    found = model_config(Path("m"), {"weights": "w", **flags, "randomise": "reinit", "randomise_seed": 2})
    assert (found.randomise, found.randomise_seed, found.fold_ln) == ("reinit", 2, True)
