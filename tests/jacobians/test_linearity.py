"""Classes of functions by construction, every value against the model itself, summaries against the tables."""

from dataclasses import replace

import numpy as np
import pyarrow as pa
import pytest
import torch
from tests.jacobians.test_study import IN, OUT, rows_of_tokens, topk_sae

from saeflow.config import ModelConfig
from saeflow.dictionaries import Dictionary
from saeflow.dictionaries.sae import build
from saeflow.jacobians.linearity import (
    POINTS,
    Samples,
    choose_tokens,
    classify,
    linearity_table,
    summarise_linearity,
)
from saeflow.jacobians.maps import Pair
from saeflow.models.blocks import MLP, Block, read_block
from saeflow.models.loading import load_model
from saeflow.models.splicing import read_hooks

S = np.linspace(0, 5, POINTS)


@pytest.mark.parametrize(
    ("g", "absolute", "relative"),
    [
        (2 * S + 1, "linear", "linear"),
        (0 * S + 3, "flat", "flat"),
        (0.001 * S, "linear", "linear"),
        (0.001 * S**2, "linear", "other"),  # so small that any curve passes an absolute tolerance
        (100 * S + 0.5 * np.sin(3 * S), "other", "linear"),  # so large that a relative tolerance forgives it
        (np.where(S > 2, S, 0), "jumprelu", "jumprelu"),
        (np.where(S < 2, 3 - S, 0), "jumprelu", "jumprelu"),
        (np.where((S > 1) & (S < 2), S, 0), "other", "other"),  # zeros at both ends
        (np.where((S > 1) & (S < 2), 0, S + 1), "other", "other"),  # zeros in the middle
        (np.where(S > 2, S**2, 0), "other", "other"),
        (np.where(S > 4.99, 1.0, 0.0), "other", "other"),  # a single point is no line
    ],
)
def test_classes(g: np.ndarray, absolute: str, relative: str) -> None:
    found = classify(S, g)
    assert (found["class_absolute"], found["class_relative"]) == (absolute, relative)
    assert found["range"] == pytest.approx(np.ptp(g))
    fitted = np.polyval(np.polyfit(S, g, 1), S)
    assert found["residual"] == pytest.approx(np.abs(g - fitted).max(), abs=1e-9)


def test_residual_is_that_of_numpy_for_any_points() -> None:
    rng = np.random.default_rng(0)
    s, g = np.sort(rng.random(20)), rng.random(20)
    assert classify(s, g)["residual"] == pytest.approx(np.abs(g - np.polyval(np.polyfit(s, g, 1), s)).max())


def linear_pair() -> tuple[Pair, Samples]:
    """Around an MLP that is a matrix: ReLU units with so large a bias that all are always on."""
    g = torch.Generator().manual_seed(0)
    W_in, W_out = torch.randn(32, 48, generator=g), torch.randn(48, 32, generator=g) / 50
    mlp = MLP("relu", W_in, torch.full((48,), 1e3), W_out, -1e3 * W_out.sum(0))
    input, output = topk_sae(IN, seed=1), topk_sae(OUT, seed=2)
    relu = build(replace(output.spec, activation="relu", k=None), **output.tensors)
    x = torch.randn(60, 32, generator=g)
    return Pair(Block(mlp), input, relu), Samples(np.arange(60), np.arange(60) // 10, x, mlp(x))


def test_of_a_linear_map_j_is_the_slope_and_predicts_every_ablation() -> None:
    pair, samples = linear_pair()
    table = linearity_table(pair, samples)
    rows = table.to_pandas()
    assert len(rows) > 50
    for row in rows.itertuples():
        slopes = np.diff(row.curve) / np.diff(np.linspace(0, row.sweep_end, POINTS))
        inside = (row.curve[1:] > 0) & (row.curve[:-1] > 0)
        np.testing.assert_allclose(slopes[inside], row.jacobian, atol=0.02)
        assert row.sweep_end == max(5, row.activation + 1)
        if row.value + row.delta_ablation > 0:  # the ReLU cuts nothing off
            assert row.delta_ablation == pytest.approx(-row.jacobian * row.activation, abs=1e-2)
    summary = summarise_linearity(table, 100)
    assert summary["absolute_linear"] + summary["absolute_jumprelu"] + summary["absolute_flat"] == 1
    assert summary["absolute_linear_low"] <= summary["absolute_linear"] <= summary["absolute_linear_high"]


def small_pair(folder: str) -> tuple[Pair, Samples, torch.Tensor]:
    model = load_model(folder, ModelConfig("tiny", path=str(folder)), "cpu")
    hooks = torch.from_numpy(rows_of_tokens(2)).long()
    x, y = (v[:, 1:].flatten(0, 1) for v in read_hooks(model, hooks, [IN, OUT]))
    pair = Pair(read_block(model, IN, OUT), topk_sae(IN, seed=1), topk_sae(OUT, seed=2))
    token = choose_tokens(len(x), 20)
    return pair, Samples(token, token // 31, x[token], y[token]), x


def latent(output: Dictionary, y: torch.Tensor, i: int) -> float:
    return output.encode(y[None])[0, i].item()


def test_every_value_is_the_models_own(neox_folder: str) -> None:
    """Re-run one by one: encode, move the latent, the MLP, TopK of the output SAE."""
    pair, samples, x = small_pair(neox_folder)
    rows = linearity_table(pair, samples).to_pandas()
    assert len(rows) == 20
    for row in rows.itertuples():
        x_t, D_j = x[row.token], pair.input.W_dec[row.input]
        s = latent(pair.input, x_t, row.input)
        assert row.activation == pytest.approx(s, rel=1e-5) and s > 0
        now = latent(pair.output, pair.f(x_t[None])[0], row.output)
        assert row.value == pytest.approx(now, abs=1e-4) and now > 0
        for change, moved in ((row.delta_unit, x_t - D_j), (row.delta_ablation, x_t - s * D_j)):
            assert change == pytest.approx(latent(pair.output, pair.f(moved[None])[0], row.output) - now, abs=1e-3)
        for place in (0, 37, POINTS - 1):
            at = np.linspace(0, max(5, s + 1), POINTS)[place]
            moved = x_t + (at - s) * D_j
            assert row.curve[place] == pytest.approx(latent(pair.output, pair.f(moved[None])[0], row.output), abs=1e-3)
        J_f = torch.autograd.functional.jacobian(lambda v: pair.f(v[None])[0], x_t)
        J = pair.output.W_enc[:, row.output] @ J_f @ D_j
        assert row.jacobian == pytest.approx(J.item(), abs=1e-4)


def test_summary_counts_what_the_table_says(neox_folder: str) -> None:
    pair, samples, _ = small_pair(neox_folder)
    table = linearity_table(pair, samples)
    rows, summary = table.to_pandas(), summarise_linearity(table, 50)
    for kind in ("absolute", "relative"):
        shares = rows[f"class_{kind}"].value_counts(normalize=True)
        for name in ("linear", "jumprelu", "other", "flat"):
            assert summary[f"{kind}_{name}"] == pytest.approx(shares.get(name, 0.0))
    assert summary["on_line"] == ((rows["jacobian"] + rows["delta_unit"]).abs() < 0.1).mean()
    predicted, delta = -rows["jacobian"] * rows["activation"], rows["delta_ablation"]
    assert summary["ablation_slope"] == pytest.approx(np.linalg.lstsq(predicted.to_numpy()[:, None], delta)[0][0])
    assert summary["ablation_r2"] == pytest.approx(1 - ((delta - predicted) ** 2).sum() / (delta**2).sum())


def test_two_runs_are_equal(neox_folder: str) -> None:
    pair, samples, _ = small_pair(neox_folder)
    assert linearity_table(pair, samples).equals(linearity_table(pair, samples))
    assert choose_tokens(50, 10).tolist() == sorted(set(choose_tokens(50, 10).tolist()))
    assert len(choose_tokens(5, 10)) == 10


def test_tokens_without_active_latents_are_left_out() -> None:
    pair, samples = linear_pair()
    pair.input.b_enc.fill_(-1e6)
    table = linearity_table(pair, samples)
    assert len(table) == 0 and table.schema == linearity_table(*linear_pair()).schema
    assert summarise_linearity(table, 10) == {}


def test_the_papers_share_of_linear_functions_counts_flat_ones() -> None:
    rows = []
    for document, of_token in enumerate(["linear", "linear", "flat", "jumprelu", "other", "flat"]):
        numbers = dict.fromkeys(("input", "output", "token"), document) | {"document": document}
        numbers |= dict.fromkeys(("activation", "jacobian", "value", "delta_unit", "delta_ablation", "sweep_end"), 1.0)
        numbers |= {
            "residual": 0.0,
            "range": 1.0,
            "class_absolute": of_token,
            "class_relative": of_token,
            "curve": [0.0],
        }
        rows.append(numbers)
    found = summarise_linearity(pa.Table.from_pylist(rows), 100)
    assert found["absolute_linear"] == pytest.approx(2 / 6) and found["absolute_flat"] == pytest.approx(2 / 6)
    assert found["absolute_linear_or_flat"] == pytest.approx(4 / 6) and found["linearity_documents"] == 6
    assert found["absolute_linear_or_flat_low"] < 4 / 6 < found["absolute_linear_or_flat_high"] <= 1
