"""The figure of training: its curves, its table, and what names the dictionaries."""

import json
from pathlib import Path

import pandas as pd
import pytest
from stores import write_receipt

from saeflow.figures.job import draw_figure
from saeflow.jobs.job import Job
from saeflow.planning.graph import Instance, Plan
from saeflow.training.figures import read_curves, training_curves

COLUMNS = ["place", "hook_name", "hook_name_out", "series", "amount_name", "amount", "seed", "train_key", "part"]
COLUMNS += ["step", "tokens", "fvu", "l0"]
HOOK = "blocks.2.hook_mlp_out"


def figures_job(results: Path, judged_by: str) -> Job:
    """An SAE with two values of k, and a pair; the last of them was not judged."""
    spec = {"kind": "sae", "activation": "topk", "skip": False, "saelens": None, "source": "", "seed": 0}
    spec |= {"hook_name": HOOK, "hook_name_out": HOOK, "amount_name": "k"}
    trained = {"four": [("", 4)], "eight": [("", 8)], "pair": [("input", 16), ("output", 32)], "unknown": [("", 4)]}
    judged = []
    for key, parts in trained.items():
        for part, k in parts:
            folder = results / "train" / key / part
            folder.mkdir(parents=True)
            steps = pd.DataFrame({"step": [1, 2, 3], "tokens": [1000, 2000, 3000], "fvu": [0.9, 0.5, 0.3], "lr": 1.0})
            steps.assign(l0=float(k)).to_parquet(folder / "metrics.parquet")
            if key != "unknown":
                judged.append(f"{key}-{part}")
                folder = results / judged_by / judged[-1]
                folder.mkdir(parents=True)
                if judged_by == "recover":  # says less
                    spec.pop("source", None)
                summary = spec | {"train_key": key, "part": part or None, "amount": k}
                (folder / "summary.json").write_text(json.dumps(summary))
                write_receipt(folder, judged_by)
        write_receipt(results / "train" / key, "train")
    needs = {"train": list(trained), judged_by: judged}
    instance = Instance("figures", "drawn", {"figures": ["training_curves"]}, needs, {})
    stages = {"figures": {"drawn": instance}, judged_by: {key: Instance(judged_by, key, {}, {}, {}) for key in judged}}
    return Job(instance, Plan("test", stages, {}, results=str(results)), "cpu")


@pytest.mark.parametrize("judged_by", ["evaluate", "recover"])
def test_curves_are_those_of_what_was_judged_and_drawn_alike_twice(tmp_path: Path, judged_by: str) -> None:
    data = read_curves(figures_job(tmp_path, judged_by))
    for folder in (tmp_path / "a", tmp_path / "b"):
        folder.mkdir()
        draw_figure("training_curves", data, folder)
    for kind in ("png", "pdf", "csv"):
        first, second = ((tmp_path / f / f"training_curves.{kind}").read_bytes() for f in "ab")
        assert len(first) > 200 and first == second
    table = pd.read_csv(tmp_path / "a/training_curves.csv")
    assert list(table) == COLUMNS and len(table) == 4 * 3
    assert table.groupby("train_key").size().to_dict() == {"four": 3, "eight": 3, "pair": 6}
    assert set(table["part"].dropna()) == {"input", "output"} and set(table["place"]) == {"layer 2, mlp_out"}
    figure, _ = training_curves(data)
    (title,) = {axis.get_title() for axis in figure.axes} - {""}
    assert title == "TopK SAE\nlayer 2, mlp_out"
    assert [text.get_text() for text in figure.axes[2].get_legend().get_texts()] == [
        "k = 4",
        "k = 8",
        "k = 16",
        "k = 32",
    ]
