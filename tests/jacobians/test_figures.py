"""Figures of small studies as the stage writes them: series, panels, tables; two runs give identical bytes."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow.parquet as pq
import pytest
from matplotlib.figure import Figure
from stores import write_receipt
from tests.jacobians.test_study import IN, OUT, make_job, topk_sae
from tests.training.test_jacobian_pair import CONFIG, job_of

from saeflow.dictionaries import Dictionary
from saeflow.dictionaries.sae import build
from saeflow.figures.job import draw_figure
from saeflow.figures.registry import declared, find
from saeflow.jacobians.figures.distributions import (
    jacobian_examples,
    jacobian_linearity,
    jacobian_signed,
    jacobian_thresholds,
)
from saeflow.jacobians.figures.latents import jacobian_functions, jacobian_graph
from saeflow.jacobians.figures.measures import (
    jacobian_layers,
    jacobian_pareto,
    jacobian_price,
    jacobian_reproduction,
    jacobian_sweep,
)
from saeflow.jacobians.figures.studies import Studies, control, read_histograms, read_studies
from saeflow.jacobians.figures.training import (
    jacobian_training,
    jacobian_training_histogram,
    read_training,
    read_training_histograms,
)
from saeflow.jacobians.study import jacobian_job
from saeflow.jobs.job import Job
from saeflow.planning.graph import Instance
from saeflow.training.jacobian_histogram import EDGES

FIGURES = [name for name, one in declared().items() if one.stage == "jacobian" and name != "jacobian_histogram"]
IDENTITY = ["panel", "jacobian_coefficient", "seed", "jacobian_key"]
COEFFICIENTS = {"baseline": 0.0, "sparse": 0.25}


def scaled(dictionary: Dictionary, scale: float, coefficient: float) -> Dictionary:
    """Of the same latents, with decoder rows that many times as long."""
    spec = replace(dictionary.spec, options={"jacobian_coefficient": coefficient})
    return build(spec, **dictionary.tensors | {"W_dec": dictionary.W_dec * scale})


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory, neox_folder: Path, tokens_folder: Path) -> list[Path]:
    """Two studies: a baseline, and one whose J is a quarter of it."""
    made = []
    for name, coefficient in COEFFICIENTS.items():
        folder = tmp_path_factory.mktemp(name)
        input = scaled(topk_sae(IN, seed=1), 1.0 if coefficient == 0 else 0.25, coefficient)
        job = make_job(folder, neox_folder, tokens_folder, (input, topk_sae(OUT, seed=2)), n_tokens=310, min_count=4)
        jacobian_job(job)
        made.append(job.path.rename(job.path.with_name(name)))
    return made


@pytest.fixture(scope="module")
def evaluations() -> pd.DataFrame:
    scores = {"explained_variance": 0.9, "loss_recovered_zero": 0.8}
    return pd.DataFrame([{"train_key": "in", "part": None} | scores, {"train_key": "out", "part": None} | scores])


@pytest.fixture(scope="module")
def studies(folders: list[Path], evaluations: pd.DataFrame) -> Studies:
    return read_studies(folders, evaluations)


@pytest.mark.parametrize("name", FIGURES)
def test_figure_has_its_table_and_is_deterministic(name: str, studies: Studies, tmp_path: Path) -> None:
    for folder in (tmp_path / "a", tmp_path / "b"):
        folder.mkdir()
        draw_figure(name, studies, folder)
    for kind in ("png", "pdf", "csv"):
        first, second = ((tmp_path / f / f"{name}.{kind}").read_bytes() for f in "ab")
        assert len(first) > 200 and first == second
    table = pd.read_csv(tmp_path / "a" / f"{name}.csv")
    if name == "jacobian_reproduction":
        assert {"ours, layer 1, λ = 0", "ours, layer 1, λ = 0.25"} < set(table["study"])
        assert list(table)[:3] == ["source", "control", "study"]
        ours = table[table["source"] == "ours"]
        held = [name for name in table if f"{name}_low" in table]
        assert len(held) == 6 and len(table.columns) == 3 + 4 + 8 + 2 * 6  # of the paper's thresholds it has two
        for name in held:
            assert (ours[f"{name}_low"] <= ours[name]).all() and (ours[name] <= ours[f"{name}_high"]).all()
        return
    assert set(table["jacobian_coefficient"]) == {0.0, 0.25}
    first = ["layer", *IDENTITY] if name in ("jacobian_sweep", "jacobian_layers") else IDENTITY
    assert list(table)[: len(first)] == first and len(table.columns) <= len(first) + 6 * 3  # measures with intervals


def test_bars_are_the_stages_own_numbers(studies: Studies, folders: list[Path]) -> None:
    figure, _ = jacobian_thresholds(studies)
    axis = figure.axes[0]
    heights = [[bar.get_height() for bar in series] for series in axis.containers if hasattr(series, "patches")]
    for folder, drawn in zip(folders, heights, strict=True):
        table = pq.read_table(folder / "thresholds.parquet").to_pandas()
        np.testing.assert_allclose(drawn, 100 * table[table["normalisation"] == "none"]["fraction"])
    assert legend(figure) == ["λ = 0 (baseline)", "λ = 0.25"]


def test_examples_are_of_the_largest_coefficient_and_say_which_token(studies: Studies) -> None:
    found, _ = jacobian_linearity(studies)
    drawn = [axis for axis in found.axes if axis.get_title().startswith("examples: ")]
    table = studies.of("linearity")
    mine = table[table["jacobian_coefficient"] == 0.25]
    assert len(drawn) == mine["class_relative"].nunique() and all("λ = 0.25" in axis.get_title() for axis in drawn)
    for axis in drawn:
        for line in axis.lines:
            assert any(np.array_equal(line.get_ydata(), curve) for curve in mine["curve"])
    found, table = jacobian_examples(studies)
    said = list(dict.fromkeys(axis.get_title() for axis in found.axes if axis.get_title()))
    named = table[["sequence", "position"]].drop_duplicates().to_numpy()
    assert said == [f"row {row},\ntoken {position}" for row, position in named] and len(said) == 3


def legend(figure: Figure) -> list[str]:
    return [text.get_text() for text in figure.legends[0].get_texts()]


def test_norm_matching_takes_away_what_scaling_did(studies: Studies) -> None:
    summaries = studies.summaries.set_index("jacobian_coefficient")
    assert summaries.loc[0.25, "rms"] == pytest.approx(summaries.loc[0.0, "rms"] / 4, rel=1e-5)
    _, table = jacobian_sweep(studies)
    assert np.ptp(table["gini"]) < 1e-6 < np.ptp(table["mean_absolute"])
    thresholds = studies.of("thresholds").set_index(["normalisation", "jacobian_coefficient"])["fraction"]
    np.testing.assert_allclose(thresholds["rms", 0.0], thresholds["rms", 0.25], atol=1e-4)
    assert (thresholds["none", 0.0].to_numpy() > thresholds["none", 0.25].to_numpy()).all()


def test_layers_are_compared_in_units_that_do_not_move_with_the_gain(studies: Studies) -> None:
    """Decoder rows a quarter as long are a norm with a quarter of the gain: as the MLP sees it, nothing has changed."""
    one, other = studies.summaries["mean_absolute_unit"]
    assert one == pytest.approx(other, rel=1e-4)
    assert studies.summaries["mean_absolute"].max() > 3 * studies.summaries["mean_absolute"].min()
    _, table = jacobian_layers(studies._replace(summaries=studies.summaries.assign(layer=[0, 1])))
    assert "mean_absolute" not in table and np.ptp(table["mean_absolute_unit"]) < 1e-4 * one
    shares = {"fraction_above_0.01": [0.1, 0.2], "fraction_above_0.01_unit": [0.3, 0.4], "absolute_linear": 0.5}
    shares["absolute_linear_or_flat"] = 0.75
    _, table = jacobian_reproduction(studies._replace(summaries=studies.summaries.assign(**shares)))
    ours = table[table["source"] == "ours"]
    assert ours["fraction_above_0.01"].tolist() == [30, 40] and set(ours["absolute_linear_or_flat"]) == {75}

    draws = studies.summaries.assign(**shares, jacobian_coefficient=0.25, seed=[0, 1])  # of several: mean and range
    _, table = jacobian_reproduction(studies._replace(summaries=draws))
    (ours,) = table[table["source"] == "ours"].to_dict("records")
    told = [ours[f"fraction_above_0.01{end}"] for end in ("", "_low", "_high")]
    assert told == pytest.approx([35, 30, 40])


def test_what_differs_besides_the_coefficient_makes_panels(folders: list[Path], tmp_path: Path) -> None:
    copies = []
    for folder in folders:
        for layer, randomise in ((1, "none"), (1, "reinit"), (2, "none")):
            copy = tmp_path / f"{folder.name}-{layer}-{randomise}"
            copy.mkdir()
            for file in folder.iterdir():
                (copy / file.name).symlink_to(file)
            summary = json.loads((copy / "summary.json").read_text())
            (copy / "summary.json").unlink()
            hooks = {n: summary[n].replace("blocks.1.", f"blocks.{layer}.") for n in ("hook_name", "hook_name_out")}
            summary |= {"layer": layer, "randomise": randomise, "randomise_seed": 0} | hooks
            (copy / "summary.json").write_text(json.dumps(summary))
            copies.append(copy)
    nothing, panels = pd.DataFrame({"train_key": []}), []
    for trained in ("of all", "of layer 2"):  # weights: a control has others than the model that it is made of
        held = {
            copy: {"model.weights": "drawn" if "reinit" in copy.name else trained if "-2-" in copy.name else "of all"}
            for copy in copies
        }
        panels.append(list(dict.fromkeys(read_studies(copies, nothing, held).summaries["panel"])))
    assert panels[0] == ["layer 1, trained model", "layer 1, re-initialised model", "layer 2, trained model"]
    assert [panel.rpartition(", ")[2] for panel in panels[1]] == [
        "weights = of all",
        "re-initialised model",
        "weights = of layer 2",
    ]
    studies = read_studies(copies, nothing)
    assert list(dict.fromkeys(studies.summaries["panel"])) == panels[0]
    figure, _ = jacobian_thresholds(studies)
    assert [axis.get_title() for axis in figure.axes[:3]] == list(dict.fromkeys(studies.summaries["panel"]))
    for name in FIGURES:
        find(name).draw(studies)


def test_pareto_takes_each_sides_evaluation(folders: list[Path]) -> None:
    rows = [
        {"train_key": key, "part": part, "explained_variance": value, "loss_recovered_zero": value / 2}
        for key, part, value in (("in", "input", 0.5), ("in", "output", 0.6), ("out", "output", 0.7))
    ]
    _, table = jacobian_pareto(read_studies(folders, pd.DataFrame(rows)))
    assert table["explained_variance_input"].tolist() == [0.5, 0.5]
    assert table["loss_recovered_zero_output"].tolist() == [0.35, 0.35]


def test_price_is_that_of_each_sides_evaluation(folders: list[Path]) -> None:
    rows = [
        {"train_key": key, "part": None} | {f"{name}{end}": value + more for name, value in values.items()
                                            for end, more in (("", 0), ("_low", -0.01), ("_high", 0.02))}
        for key, values in (("in", {"ce_increase": 0.5, "cosine": 0.8}), ("out", {"ce_increase": 0.3, "cosine": 0.9}))
    ]  # fmt: skip
    drawn, table = jacobian_price(read_studies(folders, pd.DataFrame(rows)))
    found = table.set_index(["measure", "side", "jacobian_coefficient"])
    assert found["value"]["ce_increase", "input", 0.25] == 0.5 and found["value"]["ce_increase", "output", 0.0] == 0.3
    assert found["value_high"]["cosine", "output", 0.25] == pytest.approx(0.92)
    assert found["value"].loc["dead_fraction"].isna().all()  # which no evaluation says here
    axis = next(a for a in drawn.axes if a.get_ylabel() == "CE over clean (nats)")
    lines = [container.lines[0].get_ydata().tolist() for container in axis.containers]
    assert lines == [[0.5, 0.5], [0.3, 0.3]]


def test_evaluations_are_those_on_the_tokens_of_the_study(folders: list[Path]) -> None:
    """Of a pair that is evaluated on two corpora, each study has its own."""
    rows = [{"train_key": key, "part": None, "tokens_key": tokens, "ce_increase": value}
            for tokens, value in (("pile", 0.1), ("c4", 0.7)) for key in ("in", "out")]  # fmt: skip
    tokens = dict(zip(folders, ("c4", "pile"), strict=True))
    summaries = read_studies(folders, pd.DataFrame(rows), tokens=tokens).summaries.set_index("tokens_key")
    for side in ("input", "output"):
        assert summaries[f"ce_increase_{side}"].to_dict() == {"c4": 0.7, "pile": 0.1}
    other = read_studies(folders, pd.DataFrame(rows), tokens=dict.fromkeys(folders, "owt")).summaries
    assert other["ce_increase_input"].isna().all()


def test_signed_entries_are_the_stored_ones(studies: Studies, folders: list[Path]) -> None:
    import zarr

    _, table = jacobian_signed(studies)
    for folder in folders:
        J = zarr.open_group(folder / "tokens.zarr", mode="r")["jacobian"][:]
        mine = table[table["jacobian_key"] == folder.name]
        for sign, within in ((-1, mine["bin_right"] <= 0), (1, mine["bin_left"] >= 0)):
            wanted = int(((np.sign(J) == sign) & (np.abs(J) <= 0.5)).sum())
            assert wanted > 100
            assert (mine["count_per_token"] * mine["stored_tokens"])[within].sum() == pytest.approx(wanted)


def test_graph_is_of_the_inputs_of_the_first_output(studies: Studies, folders: list[Path]) -> None:
    key = folders[1].name
    rows = [{"output_rank": 1, "rank": r, "output": 7, "input": 10 + r, "count": 20, "mean": m, "std": 0.1,
             "mean_absolute": abs(m), "jacobian_key": key} for r, m in ((1, 0.5), (2, -0.25))]  # fmt: skip
    words = [("input", 11, ["a", " sea"]), ("input", 12, [" moon", "b"]), ("output", 7, ["x", " ship"])]
    shown = [{"side": side, "latent": n, "tokens": tokens, "jacobian_key": key,
              "activations": [2.0, 1.0] if n == 12 else [0.0, 3.0]} for side, n, tokens in words]  # fmt: skip
    of_tables = {"top_inputs": pd.DataFrame(rows), "contexts": pd.DataFrame(shown)}
    drawn, table = jacobian_graph(studies._replace(tables=studies.tables | of_tables))
    texts = [text.get_text() for text in drawn.axes[0].texts]
    assert texts[:4] == ["11  “sea”", "0.50", "12  “moon”", "-0.25"] and "7  “ship”" in texts
    first, second = (line for line in drawn.axes[0].lines if len(line.get_xdata()) == 2)
    assert (first.get_linewidth() - 0.4) == pytest.approx(2 * (second.get_linewidth() - 0.4))
    assert first.get_linestyle() == "-" != second.get_linestyle()  # so that signs differ in print
    assert table["input_token"].tolist() == ["sea", "moon"]
    none = {"top_inputs": pd.DataFrame(rows)[:0]}
    drawn, _ = jacobian_graph(studies._replace(tables=studies.tables | of_tables | none))
    assert "no pair of latents is active together" in drawn.axes[0].texts[0].get_text()


def test_functions_are_drawn_as_they_are_and_their_curvature_is_the_second_derivative(studies: Studies) -> None:
    x = np.linspace(0, 5, 100)
    table = studies.tables["linearity"].copy()
    curves = [1 + 3 * x**2, np.maximum(x - 2, 0), 0 * x]  # but for where it starts, the second is a line
    table["curve"] = [curves[n % 3] for n in range(len(table))]
    table["sweep_end"], table["class_relative"] = 5.0, "other"
    drawn, found = jacobian_functions(studies._replace(tables=studies.tables | {"linearity": table}))
    np.testing.assert_allclose(found["curvature"][0::3], 6, rtol=1e-6)
    np.testing.assert_allclose(found["curvature"][1::3], 0, atol=1e-9)
    assert found["curvature"][2::3].isna().all()
    key = studies.summaries.set_index("jacobian_coefficient")["jacobian_key"][0.25]
    mine = table[table["jacobian_key"] == key]
    for axis, curve in zip(drawn.subfigs[0].axes[5:10], mine["curve"], strict=False):
        np.testing.assert_array_equal(axis.lines[0].get_ydata(), curve)


def test_training_curves_of_j_are_the_logged_ones(tmp_path: Path, neox_folder: Path) -> None:
    job = job_of(tmp_path, neox_folder)
    trained, plan = job.instance, job.plan
    of_text = {"split": "train", "n_rows": 8, "corpus": {}, "tokens": {"context_size": 32}}
    plan.stages["tokens"]["text-train"].config.update(of_text)
    for key, scale in (("pair", 1.0), ("other", 0.5)):
        made = replace(
            trained, key=key, config=trained.config | {"dictionary": CONFIG | {"jacobian_coefficient": scale}}
        )
        plan.stages["train"][key] = made
        folder = tmp_path / "train" / key
        folder.mkdir(parents=True)
        logged = {"step": [1, 2], "tokens": [128, 256]}
        logged |= {f"jacobian_{n}{at}": [0.4 * scale, 0.2 * scale] for n in ("l1", "above_0.01")
                   for at in ("", "_at_reconstruction")}  # fmt: skip
        pd.DataFrame(logged).to_parquet(folder / "jacobian.parquet")
        write_receipt(folder, "train")
    figures = Instance("figures", "f", {}, {"train": ["pair", "other"]}, {})
    data = read_training(Job(figures, plan, "cpu"))
    assert data.groupby("jacobian_coefficient")["jacobian_l1"].max().to_dict() == {0.5: 0.2, 1.0: 0.4}
    drawn, table = jacobian_training(data)
    assert [line.get_ydata().tolist() for line in drawn.axes[0].lines] == 2 * [[0.2, 0.1]] + 2 * [[0.4, 0.2]]
    np.testing.assert_allclose(drawn.axes[1].lines[2].get_ydata(), [40, 20])
    assert legend(drawn) == ["λ = 0.5", "λ = 1", "at the input", "at its reconstruction"]
    assert list(table)[:4] == ["panel", "jacobian_coefficient", "seed", "train_key"]
    with pytest.raises(ValueError, match="needs pairs that are trained as one: use dictionary=jacobian"):
        read_training(Job(replace(figures, needs={}), plan, "cpu"))
    drawn, table = jacobian_training_histogram(read_training_histograms(Job(figures, plan, "cpu")))
    assert table.empty and "release that logged no histogram" in drawn.axes[0].texts[0].get_text()
    for key, n in (("pair", 4), ("other", 8)):  # of one of four tokens, and of two
        rows = [(256, "input", 0.1, n), (256, "input", -0.05, 1), (128, "input", 0.2, n), (256, "reconstruction", 0, 8)]
        edges = {round(edge, 4): edge for edge in EDGES}
        logged = [{"step": tokens // 128, "tokens": tokens, "at": at, "bin_left": edges[left],
                   "bin_right": edges[round(left + 0.0025, 4)], "count": count, "of_tokens": 4}
                  for tokens, at, left, count in rows]  # fmt: skip
        pd.DataFrame(logged).to_parquet(tmp_path / "train" / key / "jacobian_histogram.parquet")
    drawn, table = jacobian_training_histogram(read_training_histograms(Job(figures, plan, "cpu")))
    assert list(table)[:4] == ["panel", "jacobian_coefficient", "seed", "train_key"] and len(table) == 8
    (linear, logarithmic, exceeding), maps = drawn.axes[:3], drawn.axes[3:5]
    signed = {c: linear.patches[2 * n].get_data() for n, c in enumerate((0.5, 1.0))}  # as drawn: input, reconstruction
    for c, n in ((0.5, 2.0), (1.0, 1.0)):
        values, edges = signed[c].values, signed[c].edges
        assert values[np.isclose(edges[:-1], 0.1)] == n and values[np.isclose(edges[:-1], -0.05)] == 0.25
        assert values.sum() == n + 0.25
    x, above = exceeding.lines[0].get_data()
    assert above[0] == 2.25 and above[np.isclose(x, 0.06)] == 2.0 and np.isnan(above[-1])
    assert logarithmic.get_yscale() == "log" and maps[1].get_title() == "λ = 1, at the input"
    assert drawn.axes[1].get_xlim() == pytest.approx((-0.1025, 0.1025))
    (image,) = maps[0].collections
    assert image.get_array().compressed().tolist() == [0.25, 2.0, 2.0]


def test_histograms_are_labelled(folders: list[Path], tmp_path: Path) -> None:
    table = read_histograms(folders)
    draw_figure("jacobian_histogram", table, tmp_path)
    counts = ["count_per_token", "count_low", "count_high", "above_per_token", "above_low", "above_high"]
    drawn = pd.read_csv(tmp_path / "jacobian_histogram.csv")
    assert list(drawn) == ["label", "jacobian_key", "bin_left", "bin_right", *counts] and len(drawn) == 400
    assert table.groupby("jacobian_key").size().tolist() == [200, 200]
    assert table.set_index("jacobian_key")["label"]["sparse"].unique().tolist() == [
        "layer 1, ln2.normalized → mlp_out, k = 6, λ = 0.25, trained model"
    ]
    assert read_histograms([]).empty


def test_controls_are_named() -> None:
    assert control({}) == "trained model"
    assert control({"randomise": "permuted", "randomise_seed": 4}) == "permuted model"
