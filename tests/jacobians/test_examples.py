"""Top pairs against NumPy on a dense array, and windows against what the model's own activations say."""

from functools import partial
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from tests.jacobians.test_jacobian_sums import dense, random_blocks, summed
from tests.jacobians.test_study import IN, LAYER, OUT, make_job, topk_sae

from saeflow.config import JacobianConfig, ModelConfig
from saeflow.features.firings import Firings
from saeflow.features.text import Grid
from saeflow.jacobians import examples as jacobian_examples
from saeflow.jacobians.examples import TopWindows, top_inputs_table, top_pairs_table
from saeflow.jacobians.study import jacobian_job
from saeflow.models.blocks import read_mlp
from saeflow.models.loading import load_model
from saeflow.models.splicing import read_hooks
from saeflow.text.tokens import open_tokens, spread

CONFIG = JacobianConfig(top_pairs=5, top_inputs=3, min_count=4)


def test_top_pairs_equal_statistics_over_tokens_where_both_are_active() -> None:
    blocks = random_blocks(60, 4, 5, seed=0)
    full = dense(blocks)
    on_out, on_in = np.zeros((60, 9), bool), np.zeros((60, 11), bool)
    for t in range(60):
        on_out[t, blocks.outputs[t][blocks.values_out[t] > 0]] = True
        on_in[t, blocks.inputs[t][blocks.values_in[t] > 0]] = True
    table = top_pairs_table(summed(blocks), CONFIG).to_pandas()
    assert len(table) == 15
    scores = {"mean": [], "mean_absolute": [], "count": []}
    for i, j in np.ndindex(9, 11):
        J = full[on_out[:, i] & on_in[:, j], i, j]
        if len(J) >= 4:
            for name, value in (("mean", J.mean()), ("mean_absolute", np.abs(J).mean()), ("count", len(J))):
                scores[name].append(value)
    for statistic, rows in table.groupby("statistic"):
        assert rows["rank"].tolist() == [1, 2, 3, 4, 5]
        np.testing.assert_allclose(rows[statistic], sorted(scores[str(statistic)], reverse=True)[:5])
    for row in table.itertuples():
        J = full[on_out[:, row.output] & on_in[:, row.input], row.output, row.input]
        assert row.count == len(J)
        assert (row.mean, row.std) == pytest.approx((J.mean(), J.std()))
        assert (row.mean_absolute, row.std_absolute) == pytest.approx((np.abs(J).mean(), np.abs(J).std()))
        assert (row.active_output, row.active_input) == (on_out[:, row.output].sum(), on_in[:, row.input].sum())


def test_top_inputs_are_those_of_the_top_outputs() -> None:
    pairs = summed(random_blocks(60, 4, 5, seed=1))
    named = top_pairs_table(pairs, CONFIG).to_pandas().query("statistic == 'mean'")["output"]
    table = top_inputs_table(pairs, CONFIG).to_pandas()
    assert list(dict.fromkeys(table["output"])) == list(dict.fromkeys(named))
    for output, rows in table.groupby("output"):
        frequent = (pairs.output == output) & (pairs.count >= 4)
        means = pairs.sum[frequent] / pairs.count[frequent]
        np.testing.assert_allclose(rows["mean"], np.sort(means)[::-1][:3])
    nothing = top_inputs_table(pairs, JacobianConfig(min_count=1000))
    assert len(nothing) == 0 and nothing.schema == top_inputs_table(pairs, CONFIG).schema


@pytest.mark.parametrize("segment", [50, 10**6])
def test_top_windows_are_those_of_all_activations_sorted(
    segment: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(jacobian_examples, "Firings", partial(Firings, segment=segment))
    grid = Grid(context_size=21, window=8)  # windows of 8, 8 and 5
    g = torch.Generator().manual_seed(0)
    latents = torch.stack([torch.randperm(6, generator=g)[:3] for _ in range(100)])  # five rows without position 0
    values = ((torch.rand(100, 3, generator=g) - 0.1).relu() * 20).round() / 20  # some are equal
    top = TopWindows(7, grid, 4, tmp_path / "firings")
    for start in range(0, 100, 7):
        top.add(latents[start : start + 7], values[start : start + 7])
    assert (tmp_path / "firings").exists() == (segment < 100)
    found = top.windows()
    for latent in range(6):
        best: dict[int, float] = {}
        for t in range(100):
            value = values[t][latents[t] == latent].sum().item()
            window = t // 20 * 3 + (t % 20 + 1) // 8
            if value > 0:
                best[window] = max(best.get(window, 0), value)
        assert found[latent] == sorted(best, key=lambda w: (-best[w], w))[:4]
    assert 6 not in found
    top.remove()
    assert not list(tmp_path.iterdir())


def test_grid_spans_cover_each_row_once() -> None:
    grid = Grid(context_size=21, window=8)
    assert [grid.span(w) for w in range(4)] == [(0, 0, 8), (0, 8, 16), (0, 16, 21), (1, 0, 8)]
    row, position = grid.row_and_position(np.arange(40))
    assert (row[19], position[19], row[20], position[20]) == (0, 20, 1, 1)
    for token, window in enumerate(grid.windows(np.arange(40))):
        r, start, end = grid.span(window)
        assert r == row[token] and start <= position[token] < end


def test_contexts_show_what_the_model_does_there(tmp_path: Path, neox_folder: Path, tokens_folder: Path) -> None:
    input, output = topk_sae(IN, seed=1), topk_sae(OUT, seed=2)
    wanted = {"n_tokens": 31 * 20 + 5, "window": 10, "contexts": 3, "top_pairs": 4, "top_inputs": 2, "min_count": 2}
    job = make_job(tmp_path, neox_folder, tokens_folder, (input, output), **wanted)
    jacobian_job(job)
    model = load_model(neox_folder, ModelConfig("tiny", path=str(neox_folder)), "cpu")
    store = open_tokens(tokens_folder)
    sequence = spread(len(store), 21)
    assert sequence[-1] > 60 > len(sequence)  # of 64 rows, not the first 21
    rows = store[0 : len(store)][sequence].astype(np.int64)
    place_of = {int(number): i for i, number in enumerate(sequence)}
    x, y = (v[:, 1:].flatten(0, 1)[: wanted["n_tokens"]] for v in read_hooks(model, torch.from_numpy(rows), [IN, OUT]))
    sides = {"input": input.encode(x), "output": output.encode(y)}
    mlp = read_mlp(model, LAYER)

    contexts = pq.read_table(job.path / "contexts.parquet").to_pandas()
    pairs = pq.read_table(job.path / "pairs.parquet").to_pandas()
    tops = pq.read_table(job.path / "top_inputs.parquet").to_pandas()
    for side in ("input", "output"):
        named = {*pairs[side], *tops[side]}
        assert {*contexts.query("side == @side")["latent"]} == named
        for latent, found in contexts.query("side == @side").groupby("latent"):
            numbers = np.arange(wanted["n_tokens"])
            by_window = {}
            for window in np.unique(numbers // 31 * 4 + (numbers % 31 + 1) // 10):
                inside = numbers // 31 * 4 + (numbers % 31 + 1) // 10 == window
                by_window[window] = sides[side][inside, latent].max().item()
            best = sorted((v for v in by_window.values() if v > 0), reverse=True)[:3]
            np.testing.assert_allclose(found["max_activation"], best, rtol=1e-4)
    for row in contexts.itertuples():
        ids = rows[place_of[row.sequence], row.position : row.position + len(row.token_ids)]
        assert row.token_ids.tolist() == ids.tolist() and len(row.tokens) == len(row.activations) == len(ids)
        for place, value in enumerate(row.activations):
            number = place_of[row.sequence] * 31 + row.position + place - 1
            known = row.position + place > 0 and number < wanted["n_tokens"]
            assert value == pytest.approx(sides[row.side][number, row.latent].item() if known else 0, abs=1e-4)

    shown = pq.read_table(job.path / "pair_contexts.parquet").to_pandas()
    assert len(shown) > 10
    for row in shown.itertuples():
        place = int(np.argmax(np.abs(row.jacobian)))
        number = place_of[row.sequence] * 31 + row.position + place - 1
        J_f = torch.autograd.functional.jacobian(lambda v: mlp(v[None])[0], x[number])
        J = output.W_enc[:, row.output] @ J_f @ input.W_dec[row.input]
        assert row.largest_jacobian == row.jacobian[place] == pytest.approx(J.item(), rel=1e-3, abs=1e-5)
        assert (row.input_activations[place] > 0) and (row.output_activations[place] > 0)
    assert shown.groupby(["output", "input"])["rank"].max().max() == 3
