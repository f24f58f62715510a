"""Norms by layer, against transformers' own hidden states; and the script that prints them."""

import runpy
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch

from saeflow.activations.norms import PLACES, draw_norms, norms_by_layer
from saeflow.config import ModelConfig
from saeflow.models.loading import load_model

ROOT = Path(__file__).resolve().parents[2]
FOLDER = ROOT / "resources/model"


@pytest.fixture(scope="module")
def tokens() -> torch.Tensor:
    return torch.randint(5, 500, (6, 16), generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def table(tokens: torch.Tensor) -> pd.DataFrame:
    model = load_model(FOLDER, ModelConfig("embedded", path=str(FOLDER), fold_ln=False), "cpu")
    return norms_by_layer(model, tokens)


def test_norms_are_those_of_hidden_states(table: pd.DataFrame, tokens: torch.Tensor) -> None:
    from transformers import AutoModelForCausalLM

    with torch.no_grad():
        states = AutoModelForCausalLM.from_pretrained(FOLDER)(tokens, output_hidden_states=True).hidden_states
    mine = table[table["place"] == "hook_resid_post"].set_index("layer")
    for layer in range(3):  # the last state is after the final norm
        x = states[layer + 1].double().numpy()
        lengths = np.linalg.norm(x, axis=-1)
        first, others = lengths[:, 0], np.sort(lengths[:, 1:].ravel())
        median = others[(len(others) - 1) // 2]  # torch's, the lower of two
        squares = np.sort((x[:, 1:] ** 2).sum((0, 1)))[::-1] / (x[:, 1:] ** 2).sum()
        wanted = [median, first.mean() / median, others[-1] / median, squares[0], squares[:2].sum()]
        names = ["median", "first", "largest", "outlier", "two_outliers"]
        assert mine.loc[layer, names].astype(float).to_numpy() == pytest.approx(wanted, rel=1e-4)
        largest = [int(d) for d in mine.loc[layer, "dimensions"].split()]
        assert largest == list(np.argsort(-(x[:, 1:] ** 2).sum((0, 1)))[:2])


def test_all_layers_of_all_places_are_there_and_drawn(table: pd.DataFrame) -> None:
    assert list(zip(table["place"], table["layer"], strict=True)) == [(p, layer) for p in PLACES for layer in range(4)]
    left, right = draw_norms(table).axes
    assert len(left.lines) == len(PLACES) + 1 and len(right.lines) == len(PLACES)
    assert left.lines[0].get_ydata() == pytest.approx(table["first"][:4])
    assert right.lines[3].get_ydata() == pytest.approx(100 * table["two_outliers"][12:])


def test_the_script_prints_it_and_refuses_in_a_sentence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def run(*arguments: str) -> None:
        monkeypatch.setattr(sys, "argv", ["norms.py", *arguments])
        runpy.run_path(str(ROOT / "scripts/norms.py"), run_name="__main__")

    run("tokens.context_size=32", "--rows", "3", "--to", str(tmp_path / "to"))
    said = capsys.readouterr().out
    assert said.count("hook_mlp_out") == 4 and "two_outliers" in said
    assert len(pd.read_csv(tmp_path / "to/norms.csv")) == 16 and (tmp_path / "to/norms.png").stat().st_size
    with pytest.raises(SystemExit, match=r"norms: .*nothing"):
        run("model=nothing")
    with pytest.raises(SystemExit, match=r"norms: .*there is no text"):
        run("experiment=tracr_case3")
    with pytest.raises(SystemExit):
        run("--rows", "0")
    assert "--rows 0: it must be at least 1" in capsys.readouterr().err
