"""Figures from small tables: they are drawn, their tables are saved, and two runs give identical bytes."""

from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from saeflow import jacobian_figures
from saeflow.figures import FIGURES, Tables, draw, sparsity_faithfulness


@pytest.fixture(scope="module")
def tables() -> Tables:
    rows = []
    for kind, activation, amounts in (
        ("sae", "topk", (4, 8, 16)),
        ("sae", "relu", (0.5, 2.0)),
        ("transcoder", "relu", (1.0,)),
        ("sae", "saelens", (0.5, 1.0)),
    ):
        for amount in amounts:
            topk = activation == "topk"
            rows.append(
                {
                    "train_key": f"{kind}-{activation}-{amount}",
                    "kind": kind,
                    "activation": activation,
                    "skip": False,
                    "saelens": "matching_pursuit" if activation == "saelens" else None,
                    "amount": amount,
                    "amount_name": "k" if topk else "l1_coefficient",
                    "hook_name": "blocks.2.hook_mlp_out" if kind == "sae" else "blocks.2.ln2.hook_normalized",
                    "hook_name_out": None if kind == "sae" else "blocks.2.hook_mlp_out",
                    "l0": 10.0 / amount,
                    "ce_replaced": 3.6 + 0.01 * amount,
                    "ce_clean": 3.5,
                    "ce_zero": 4.5,
                    "ce_mean": 4.2,
                }
            )
    evaluations = pd.DataFrame(rows)
    steps = pd.DataFrame({"tokens": [1000, 2000, 3000], "fvu": [0.9, 0.5, 0.3], "l0": [300.0, 100.0, 50.0]})
    identity = ["train_key", "kind", "activation", "skip", "saelens", "amount", "amount_name"]
    identity += ["hook_name", "hook_name_out"]
    training = evaluations[identity].merge(steps, how="cross")
    edges = np.linspace(0, 0.5, 51)
    count = 50 * np.exp(-20 * edges[:-1])
    jacobians = pd.DataFrame(
        {
            "bin_left": edges[:-1],
            "bin_right": edges[1:],
            "count_per_token": count,
            "above_per_token": count[::-1].cumsum()[::-1],
            "jacobian_key": "pair",
            "label": "layer 2, ln2.normalized → layer 2, mlp_out, k = 16, λ = 0",
        }
    )
    return Tables(evaluations, training, jacobians)


@pytest.mark.parametrize("name", sorted(FIGURES.keys() - jacobian_figures.FIGURES.keys()))
def test_figure_has_its_table_and_is_deterministic(name: str, tables: Tables, tmp_path: Path) -> None:
    for folder in (tmp_path / "a", tmp_path / "b"):
        folder.mkdir()
        draw(name, tables, folder)
    for kind in ("png", "pdf", "csv"):
        first, second = ((tmp_path / f / f"{name}.{kind}").read_bytes() for f in "ab")
        assert len(first) > 200 and first == second
    table = pd.read_csv(tmp_path / "a" / f"{name}.csv")
    assert len(table) == {"sparsity_faithfulness": 8, "training_curves": 24, "jacobian_histogram": 50}[name]


def test_every_dictionary_is_a_point_and_every_level_a_line(tables: Tables) -> None:
    figure, _ = sparsity_faithfulness(tables)
    (axis,) = figure.axes
    drawn = {line.get_label(): line for line in axis.get_lines()}
    assert sorted(drawn["TopK SAE"].get_xdata()) == [10 / 16, 10 / 8, 10 / 4]
    assert list(drawn["zero ablation"].get_ydata()) == [4.5, 4.5]
    assert {"ReLU + L1 SAE", "ReLU + L1 transcoder", "clean model", "mean ablation"} <= drawn.keys()


def test_unknown_figure_is_refused_by_name(tables: Tables, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no figure 'paretto'; there are: sparsity_faithfulness"):
        draw("paretto", tables, tmp_path)
