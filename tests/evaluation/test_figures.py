"""Figures of evaluations from small tables: drawn, their tables saved and tidy, two runs give identical bytes."""

from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from saeflow.evaluation.comparisons import PAIRED
from saeflow.evaluation.figures import Evaluations, Stacks, l0_histograms, sparsity_faithfulness
from saeflow.figures.job import draw_figure
from saeflow.figures.registry import declared

IDENTITY = ["place", "hook_name", "hook_name_out", "series", "amount_name", "amount", "seed", "dictionary_key"]
INCREASE = ["ce_increase", "ce_increase_low", "ce_increase_high"]
LEVELS = ["ce_clean", "ce_mean", "ce_zero"]
MATCHED = ["place", "hook", "one", "other", "positions"]
COLUMNS = {
    "sparsity_faithfulness": [*IDENTITY, "l0", "ce_replaced", *INCREASE, *LEVELS],
    "matched_l0": [*MATCHED, "l0", "difference", "low", "high", "at_point_of"],
    "matched_ce": [*MATCHED, "ce_increase", "ratio", "low", "high", "at_point_of"],
    "paired_differences": ["one", "other", "metric", "difference", "low", "high"],
    "notebook_004": [
        "hook", "kind", "l1_coefficient", "seed", "dictionary_key", "l0", "ce_loss", "printed_l0", "printed_ce_loss",
        "l0_without_bos", "ce_replaced_without_bos",
        *(f"{n}_without_bos{end}" for n in ("ce_increase", "loss_recovered_zero") for end in ("", "_low", "_high")),
        "dead_fraction",
    ],
    "l0_histograms": [*IDENTITY, "l0", "tokens", "tokens_without_bos"],
    "stacks": ["group", "stack", "layers", "hooks", "ce_replaced", *INCREASE, *LEVELS],
}  # fmt: skip


@pytest.fixture(scope="module")
def evaluations() -> Evaluations:
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
                    "hook_name_out": "blocks.2.hook_mlp_out",
                    "l0": 10.0 / amount,
                    "ce_replaced": 3.6 + 0.01 * amount,
                    "ce_clean": 3.5,
                    "ce_zero": 4.5,
                    "ce_mean": 4.2,
                }
            )
    evaluations = pd.DataFrame(rows).assign(
        tokens_key="held", dictionary_key=lambda t: t["train_key"], model_name="", source="", confidence=0.9, seed=0
    )
    evaluations["l1_coefficient"] = evaluations["amount"].where(evaluations["activation"] == "relu")
    evaluations["ce_increase"] = evaluations["ce_replaced"] - 3.5
    metrics = ["kl", "loss_recovered_zero", "loss_recovered_mean", "fvu", "cosine", "dead_fraction"]
    evaluations = evaluations.assign(**dict.fromkeys(metrics, 0.5))
    named = [*metrics, "l0", "ce_replaced", "ce_increase", "ce_clean"]
    evaluations = evaluations.assign(**{f"{name}_without_bos": evaluations[name] for name in named})
    for name in [end for metric in named for end in (metric, f"{metric}_without_bos")]:
        evaluations = evaluations.assign(
            **{f"{name}_low": evaluations[name] - 0.01, f"{name}_high": evaluations[name] + 0.01}
        )
    evaluations["part"] = ""
    noise = pd.DataFrame({"noise": np.random.default_rng(0).normal(scale=0.005, size=20)})
    resamples = evaluations[["dictionary_key", *PAIRED]].merge(noise, how="cross")
    resamples["ce_replaced"] += resamples["noise"] * evaluations["amount"].mean()
    resamples["ce_increase"] = resamples["ce_replaced"] - 3.5
    resamples["ce_increase_without_bos"] = resamples["ce_increase"]
    counts = pd.DataFrame({"l0": range(5), "tokens": [9, 20, 30, 20, 1], "tokens_without_bos": [0, 20, 30, 20, 1]})
    l0 = evaluations[["dictionary_key"]].merge(counts, how="cross")
    resamples = resamples.drop(columns="noise")
    return Evaluations(evaluations, resamples, l0, 0.9)


@pytest.fixture(scope="module")
def stacked() -> Stacks:
    stack = {"group": "g", "ce_clean": 3.5, "ce_replaced": 3.7, "ce_zero": 6.0, "ce_mean": 5.0, "train_keys": ["a"]}
    stack |= {"ce_increase": 0.2, "ce_increase_low": 0.19, "ce_increase_high": 0.22, "hooks": ["blocks.0.hook_mlp_out"]}
    rows = [stack | {"stack": name, "layers": layers} for name, layers in (("all", [0, 1, 2]), ("inner", [1]))]
    return Stacks(pd.DataFrame(rows))


def test_every_figure_of_the_package_is_tested_here() -> None:
    own = {name for name, one in declared().items() if one.module.startswith("saeflow.evaluation.")}
    assert own == COLUMNS.keys()


@pytest.mark.parametrize("name", COLUMNS)
def test_figure_has_its_table_and_is_deterministic(
    name: str, evaluations: Evaluations, stacked: Stacks, tmp_path: Path
) -> None:
    for folder in (tmp_path / "a", tmp_path / "b"):
        folder.mkdir()
        draw_figure(name, stacked if name == "stacks" else evaluations, folder)
    for kind in ("png", "pdf", "csv"):
        first, second = ((tmp_path / f / f"{name}.{kind}").read_bytes() for f in "ab")
        assert len(first) > 200 and first == second
    table = pd.read_csv(tmp_path / "a" / f"{name}.csv")
    lines = {"sparsity_faithfulness": 8, "matched_l0": len(table), "matched_ce": len(table)}
    lines |= {"paired_differences": 28 * len(PAIRED), "notebook_004": 3, "stacks": 2, "l0_histograms": 40}
    assert len(table) == lines[name] > 0
    assert list(table) == COLUMNS[name] and len(table.columns) <= 20


def test_histograms_of_l0_are_shares_of_the_tokens(evaluations: Evaluations) -> None:
    figure, _ = l0_histograms(evaluations)
    panels = [axis for axis in figure.axes if axis.axison]
    assert len(panels) == 4  # kinds of dictionary
    for axis in panels:
        for patch in axis.patches:
            assert patch.get_data().values.sum() == pytest.approx(100) and patch.get_data().edges[0] == -0.5


def test_every_dictionary_is_a_point_and_every_level_a_line(evaluations: Evaluations) -> None:
    figure, _ = sparsity_faithfulness(evaluations)
    (axis,) = figure.axes
    drawn = {line.get_label(): line for line in axis.get_lines()}
    assert sorted(drawn["TopK SAE"].get_xdata()) == [10 / 16, 10 / 8, 10 / 4]
    assert list(drawn["zero ablation"].get_ydata()) == [4.5, 4.5]
    assert {"ReLU + L1 SAE", "ReLU + L1 transcoder", "clean model", "mean ablation"} <= drawn.keys()


def test_heads_have_panels_of_their_own_and_recipes_names(evaluations: Evaluations) -> None:
    """A head is compared with ablations of itself; what differs in the sparsity alone is said to."""
    rows = evaluations.table[evaluations.table["activation"] == "topk"]
    several = [rows.assign(hook_head_index=None, sparsity=s, kind=k) for s in ("decoder_norm", "unit_norm")
               for k in ("sae", "heads")]  # fmt: skip
    several += [rows.assign(hook_head_index=h, sparsity="decoder_norm") for h in (0, 1)]
    figure, table = sparsity_faithfulness(evaluations._replace(table=pd.concat(several, ignore_index=True)))
    titles = [axis.get_title() for axis in figure.axes if axis.get_title()]
    assert titles == ["layer 2, mlp_out", "layer 2, mlp_out, head 0", "layer 2, mlp_out, head 1"]
    names = [text.get_text() for text in figure.axes[2].get_legend().get_texts()]
    assert names == [
        "TopK SAE", "TopK SAE, unit norm", "TopK SAEs by head", "TopK SAEs by head, unit norm", "TopK SAE of one head",
        "clean model", "mean ablation", "zero ablation",
    ]  # fmt: skip
    assert (
        len(table) == 18 and len({line.get_color() for line in figure.axes[0].get_lines()}) == 5
    )  # and the levels' grey
