"""Figures of evaluations from small tables: drawn, their tables saved and tidy, two runs give identical bytes."""

import json
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from matplotlib.figure import Figure
from matplotlib.text import Annotation
from measured import write_evaluations
from stores import write_receipt
from tests.dictionaries.test_series import plan_of
from tests.planning.test_plan import home  # noqa: F401 (a fixture)

from saeflow.dictionaries.series import with_names
from saeflow.evaluation.comparisons import NOTEBOOK_004, PAIRED
from saeflow.evaluation.figures import pairs
from saeflow.evaluation.figures.data import Evaluations, Stacks, read_evaluations, read_stacks
from saeflow.evaluation.figures.fronts import sparsity_faithfulness
from saeflow.evaluation.figures.measures import l0_histograms
from saeflow.figures.job import draw_figure
from saeflow.figures.registry import declared, find

IDENTITY = ["place", "hook_name", "hook_name_out", "series", "amount_name", "amount"]
INCREASE = ["ce_increase", "ce_increase_low", "ce_increase_high"]
LEVELS = ["ce_clean", "ce_mean", "ce_zero"]
MATCHED = ["place", "hook", "one", "other", "positions"]
ENDS = ["low", "high", "seeds_low", "seeds_high", "at_point_of"]
RANGES = [f"{name}{end}" for name in ("l0", "ce_replaced") for end in ("", "_least", "_most")]
FRONTS = [*IDENTITY, "seeds", "dictionary_keys", *RANGES, *INCREASE, *LEVELS]
COLUMNS = {
    "sparsity_faithfulness": FRONTS,
    "fronts_with_coefficients": FRONTS,
    "matched_l0": [*MATCHED, "l0", "difference", *ENDS],
    "matched_ce": [*MATCHED, "ce_increase", "ratio", *ENDS],
    "paired_differences": ["place", "one", "other", "metric", "difference", "low", "high"],
    "paired_differences_all": ["place", "one", "other", "metric", "difference", "low", "high"],
    "notebook_004": [
        "place", "series", "hook", "kind", "l1_coefficient", "seed", "dictionary_key", "l0", "ce_loss",
        "printed_l0", "printed_ce_loss", "l0_without_bos", "ce_replaced_without_bos",
        *(f"{n}_without_bos{end}" for n in ("ce_increase", "loss_recovered_zero") for end in ("", "_low", "_high")),
        "dead_fraction",
    ],
    "l0_histograms": [*IDENTITY, "seed", "dictionary_key", "l0", "tokens", "tokens_without_bos"],
    "stacks": [
        "place", "series", "amount_name", "amount", "seed", "group", "stack", "layers", "hooks",
        "ce_replaced", *LEVELS, *(f"{n}{end}" for n in ("loss_recovered_zero", "kl") for end in ("", "_low", "_high")),
    ],
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
    return Evaluations(with_names(evaluations), resamples, l0)


@pytest.fixture(scope="module")
def stacked() -> Stacks:
    stack = {"group": "g", "ce_clean": 3.5, "ce_replaced": 3.7, "ce_zero": 6.0, "ce_mean": 5.0, "train_keys": ["a"]}
    stack |= {"hooks": ["blocks.0.hook_mlp_out"], "kl": 0.1, "kl_low": 0.09, "kl_high": 0.12}
    stack |= {"loss_recovered_zero": 0.92, "loss_recovered_zero_low": 0.91, "loss_recovered_zero_high": 0.93}
    rows = [stack | {"stack": name, "layers": layers} for name, layers in (("all", [0, 1, 2]), ("inner", [1]))]
    table = pd.DataFrame(rows).assign(**dict.fromkeys(("place", "series"), "SAE"), amount_name="k", seed=0)
    return Stacks(table.assign(amount=4, point="4", repeat=""))


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
    lines = {"sparsity_faithfulness": 8, "fronts_with_coefficients": 8}
    lines |= {"matched_l0": len(table), "matched_ce": len(table)}
    lines |= dict.fromkeys(("paired_differences", "paired_differences_all"), 28 * len(PAIRED)) | {
        "notebook_004": 3 + 9,
        "stacks": 2,
        "l0_histograms": 40,
    }
    assert len(table) == lines[name] > 0
    assert list(table) == COLUMNS[name] and len(table.columns) <= 20


def test_each_point_has_its_amount_beside_it(evaluations: Evaluations) -> None:
    def beside(figure: Figure) -> list[tuple[float, float, str]]:
        notes = [text for axis in figure.axes for text in axis.texts if isinstance(text, Annotation)]
        return sorted((*note.xy, note.get_text()) for note in notes)

    plain, table = sparsity_faithfulness(evaluations)
    unknown = evaluations.table["amount"] == 16  # as of what was made elsewhere
    table_of_it = evaluations.table.assign(amount=evaluations.table["amount"].mask(unknown))
    figure, same = find("fronts_with_coefficients").draw(evaluations._replace(table=table_of_it))
    known = table[table["amount"] != 16]
    assert len(known) == 7 and len(same) == len(table) == 8 and beside(plain) == []
    expected = zip(known["l0"], known["ce_replaced"], known["amount"].map("{:g}".format), strict=True)
    assert beside(figure) == sorted(expected)


def test_stacks_are_drawn_as_what_they_recover_and_diverge_by(stacked: Stacks) -> None:
    """Each with its interval; what cannot be said, as where zero ablation costs nothing, is left out."""
    stacked = stacked._replace(table=stacked.table.head(1))
    figure, _ = find("stacks").draw(stacked)
    for axis, wanted in zip(figure.axes, ((92, [91, 93]), (0.1, [0.09, 0.12])), strict=True):
        point, ends = axis.get_lines()[:2]
        np.testing.assert_allclose(point.get_xdata(), wanted[0])
        np.testing.assert_allclose(ends.get_xdata(), wanted[1])
    unknown = dict.fromkeys(("loss_recovered_zero", "loss_recovered_zero_low", "loss_recovered_zero_high"), None)
    figure, _ = find("stacks").draw(stacked._replace(table=stacked.table.assign(**unknown)))
    assert all(np.isnan(line.get_xdata()).all() for line in figure.axes[0].get_lines())


def test_the_notebooks_nine_points_stand_beside_ours(evaluations: Evaluations) -> None:
    figure, table = find("notebook_004").draw(evaluations)
    ours, theirs = figure.axes[:2]
    drawn = {
        name: points
        for axis in (ours, theirs)
        for name, points in (
            (f"{axis.get_title()} {line.get_label()}", list(zip(*line.get_data(), strict=True))) for line in axis.lines
        )
    }
    assert sorted(drawn["as printed: layer 15, Pythia-410M ReLU + L1 SAE"]) == sorted(
        points for (kind, _), points in NOTEBOOK_004.items() if kind == "sae"
    )
    assert len(drawn["as printed: layer 15, Pythia-410M ReLU + L1 transcoder"]) == 5
    assert sorted(drawn["here ReLU + L1 SAE"]) == [(5.0, 3.62), (20.0, 3.605)]
    assert table["printed_l0"].notna().sum() == 9


def test_histograms_of_l0_are_shares_of_the_tokens(evaluations: Evaluations) -> None:
    figure, _ = l0_histograms(evaluations)
    panels = [axis for axis in figure.axes if axis.axison]
    assert len(panels) == 4  # kinds of dictionary
    for axis in panels:
        for patch in axis.patches:
            assert patch.get_data().values.sum() == pytest.approx(100) and patch.get_data().edges[0] == -0.5


def test_tokens_without_an_active_latent_do_not_rule_the_axis(evaluations: Evaluations) -> None:
    """Where they are most, as of a single head, their share is said instead."""
    many = {"l0": range(4), "tokens_without_bos": [170, 10, 15, 5]}
    silent = evaluations.table[["dictionary_key"]].merge(pd.DataFrame(many), how="cross").assign(tokens=1)
    figure, _ = l0_histograms(evaluations._replace(l0=silent))
    for axis in (axis for axis in figure.axes if axis.axison):
        assert axis.get_ylim()[1] == pytest.approx(1.25 * 7.5)
        assert [text.get_text() for text in axis.texts] == ["↑ none active: 85 %"]
    figure, _ = l0_histograms(evaluations)
    assert not any(axis.texts for axis in figure.axes)


def test_every_dictionary_is_a_point_and_every_level_a_line(evaluations: Evaluations) -> None:
    figure, _ = sparsity_faithfulness(evaluations)
    axis = figure.axes[0]
    drawn = {line.get_label(): line for line in axis.get_lines()}
    assert sorted(drawn["TopK SAE"].get_xdata()) == [10 / 16, 10 / 8, 10 / 4]
    assert {"ReLU + L1 SAE", "ReLU + L1 transcoder", "clean model"} <= drawn.keys()
    assert list(drawn["clean model"].get_ydata()) == [3.5, 3.5]
    (above,) = axis.texts  # the ablations would leave most of the panel empty
    assert above.get_text() == "↑ mean ablation at 4.200\n↑ zero ablation at 4.500"
    assert axis.get_ylim()[1] < 4.2
    (recovered,) = axis.child_axes
    figure.draw_without_rendering()
    np.testing.assert_allclose(recovered.get_ylim()[::-1], 100 * (1 - (np.array(axis.get_ylim()) - 3.5) / (4.5 - 3.5)))


def test_heads_have_panels_of_their_own_and_recipes_names(evaluations: Evaluations) -> None:
    """A head is compared with ablations of itself; what differs in the sparsity alone is said to."""
    rows = evaluations.table[evaluations.table["activation"] == "topk"]
    several = [rows.assign(hook_head_index=None, sparsity=s, kind=k) for s in ("decoder_norm", "unit_norm")
               for k in ("sae", "heads")]  # fmt: skip
    several += [rows.assign(hook_head_index=h, sparsity="decoder_norm") for h in (0, 1)]
    table = pd.concat(several, ignore_index=True)
    table = with_names(table.assign(dictionary_key=[f"d{n}" for n in range(len(table))]))
    figure, table = sparsity_faithfulness(evaluations._replace(table=table))
    titles = [axis.get_title() for axis in figure.axes if axis.get_title()]
    assert titles == ["layer 2, mlp_out", "layer 2, mlp_out, head 0", "layer 2, mlp_out, head 1"]
    names = [text.get_text() for text in figure.axes[2].get_legend().get_texts()]
    assert names == [
        "TopK SAE of one head", "TopK SAE, sparsity = decoder_norm", "TopK SAE, sparsity = unit_norm",
        "TopK SAEs by head, sparsity = decoder_norm", "TopK SAEs by head, sparsity = unit_norm", "clean model",
        "90 % interval over documents",
    ]  # fmt: skip
    assert len(table) == 18


# -------------------------------------------------------------------- of sweeps as they are planned
def test_seeds_widths_and_kinds_are_drawn_as_what_they_are(home: Path) -> None:  # noqa: F811
    """Means over seeds at equal amounts, their range, no line from one width to another, no look twice."""
    kinds = "sweep=[{dictionary:topk,dictionary.k:[4,16]},{dictionary:[relu,saelens/gated,saelens/standard]}]"
    plan = plan_of(home, "site=mlp_out", "site.layer=2", "seed=[0,1,2]", "dictionary.expansion=[2,8]", kinds)

    def values(s: dict[str, Any]) -> dict[str, float]:
        return {"l0": (s["k"] or 10.0) + (s["seed"] if s["k"] is None else 0), "ce_replaced": 3.6 + 0.01 * s["seed"]}

    data = read_evaluations(write_evaluations(plan, values))
    figure, table = sparsity_faithfulness(data)
    axis = figure.axes[0]
    drawn = {line.get_label(): line for line in axis.get_lines() if not line.get_label().startswith("_")}
    assert list(drawn)[:2] == ["TopK SAE, expansion 2", "TopK SAE, expansion 8"] and len(drawn) == 8 + 1
    line = drawn["TopK SAE, expansion 8"]
    assert list(line.get_xdata()) == [4, 16] and list(line.get_ydata()) == pytest.approx([3.61, 3.61])
    gated = table[table["series"] == "SAELens gated, expansion 2"].iloc[0]
    assert gated[["seeds", "l0", "l0_least", "l0_most"]].tolist() == [3, 11, 10, 12]
    assert gated[["ce_replaced_least", "ce_replaced_most"]].tolist() == pytest.approx([3.6, 3.62])
    del drawn["clean model"]
    looks = {(line.get_marker(), str(line._dash_pattern), line.get_markerfacecolor()) for line in drawn.values()}
    assert len(looks) == len(drawn) and len({line.get_marker() for line in drawn.values()}) == len(drawn)
    legend = [text.get_text() for text in axis.get_legend().get_texts()]
    assert legend[-2:] == ["95 % interval over documents", "range over 3 seeds"]
    for name in sorted(COLUMNS.keys() - {"stacks"}):
        figure, _ = find(name).draw(data)


def test_models_have_panels_and_levels_of_their_own(home: Path) -> None:  # noqa: F811
    plan = plan_of(home, "dictionary=topk", "site=mlp_out", "dictionary.k=[4,16]", "model.randomise=[none,reinit]")
    weights = {
        e.needs["train"][0]: e.config["model"].get("randomise", "none") for e in plan.stages["evaluate"].values()
    }

    def values(s: dict[str, Any]) -> dict[str, float]:
        clean = 3.46 if weights[s["train_key"]] == "none" else 8.35
        return {
            "l0": s["k"],
            "ce_clean": clean,
            "ce_replaced": clean + 0.05,
            "ce_zero": clean + 1,
            "ce_mean": clean + 1,
        }

    data = read_evaluations(write_evaluations(plan, values))
    figure, _ = sparsity_faithfulness(data)
    shown = {axis.get_title(): axis for axis in figure.axes if axis.get_title()}
    assert list(shown) == [
        "layer 2, mlp_out\ntrained model", "layer 2, mlp_out\nre-initialised model, seed 0 of it"
    ]  # fmt: skip
    levels = [next(n.get_ydata()[0] for n in a.get_lines() if n.get_label() == "clean model") for a in shown.values()]
    assert levels == [3.46, 8.35]
    _, differences = find("paired_differences").draw(data)
    assert len(differences) == 2 * len(PAIRED)  # one pair at each model, none between them


def test_what_was_evaluated_on_other_tokens_or_by_other_draws_is_not_paired(home: Path) -> None:  # noqa: F811
    """Draw r of other tokens is of other documents. Dictionaries are the same, so that keys alone would pair them."""
    for override in ("tokens.held_out_tokens=[2048,4096]", "evaluation.resamples=[30,40]"):
        plan = plan_of(home, "dictionary=topk", "site=mlp_out", "dictionary.k=[4,16]", override)
        assert len(plan.stages["train"]) == 2 and len(plan.stages["evaluate"]) == 4
        data = read_evaluations(write_evaluations(plan, lambda s: {"l0": s["k"], "ce_replaced": 3.6 + 0.1 / s["k"]}))
        _, table = find("paired_differences").draw(data)
        assert table.groupby("place").size().tolist() == [len(PAIRED)] * 2
        for name in sorted(COLUMNS.keys() - {"stacks"}):
            find(name).draw(data)


def test_what_is_never_active_is_marked_and_not_joined(home: Path) -> None:  # noqa: F811
    plan = plan_of(
        home, "dictionary=[topk,relu]", "site=mlp_out", "dictionary.l1_coefficient=[0.5,1,1000]", "seed=[0,1]"
    )
    l0 = {0.5: 40.0, 1: 12.0, 1000: 0.0, None: 20.0}
    data = read_evaluations(
        write_evaluations(
            plan, lambda s: {"l0": l0[s["l1_coefficient"]], "ce_replaced": 4.2 if not l0[s["l1_coefficient"]] else 3.6}
        )
    )
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        figure, table = sparsity_faithfulness(data)
        matched = [find(name).draw(data)[1] for name in ("matched_l0", "matched_ce")]
    lines = [line for line in figure.axes[0].get_lines() if line.get_label() == "ReLU + L1 SAE"]
    assert [list(line.get_xdata()) for line in lines] == [[12, 40]]
    (marked,) = [line for line in figure.axes[0].get_lines() if list(line.get_xdata()) == [0]]
    axis = figure.axes[0]  # its loss is far above that of all others, which the panel is for
    assert list(marked.get_ydata()) == [axis.get_ylim()[1]] and marked.get_marker() == lines[0].get_marker()
    assert axis.get_ylim()[1] < 3.8 and "↑ L0 = 0, at 4.200" in [text.get_text() for text in axis.texts]
    assert (table["l0"] == 0).sum() == 1 and all(
        np.isfinite(t.select_dtypes(float).dropna(axis=1)).all(axis=None) for t in matched
    )


def test_dictionaries_that_the_figure_leaves_out_are_counted_there(
    home: Path,  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(pairs, "MOST_PAIRED", 6)
    plan = plan_of(home, "dictionary=topk", "site=mlp_out", "dictionary.k=[1,2,3,4]", "site.layer=[1,2]")
    data = read_evaluations(write_evaluations(plan, lambda s: {"l0": s["k"], "ce_replaced": 3.6 + 0.1 / s["k"]}))
    figure, table = find("paired_differences").draw(data)
    (note,) = figure.texts
    assert note.get_text().startswith("shown: 6 of 8 dictionaries; all are in the table")
    assert [len(axis.get_yticks()) for axis in figure.axes if axis.get_title()] == [3, 1]
    everything, same = find("paired_differences_all").draw(data)
    assert [len(axis.get_yticks()) for axis in everything.axes if axis.get_title()] == [3, 3] and not everything.texts
    pd.testing.assert_frame_equal(table, same)
    assert len(table) == 2 * 6 * len(PAIRED)


def test_sets_of_layers_are_told_apart_by_what_their_dictionaries_are(home: Path) -> None:  # noqa: F811
    """Folders of several are called alike; seeds are one line, with their range."""
    plan = plan_of(
        home, "dictionary=transcoder", "site=mlp", "site.layer=[0,1,2]", "stacks=[all,inner]",
        "dictionary.expansion=[2,8]", "seed=[0,1]",
    )  # fmt: skip
    job = write_evaluations(plan, lambda s: {"l0": 9.0, "ce_replaced": 3.6})
    for n, (key, instance) in enumerate(plan.stages["stack"].items()):
        row = {name: instance.config[name] for name in ("group", "stack", "layers")}
        row |= {"train_keys": instance.needs["train"], "hooks": [f"blocks.{i}.hook_mlp_out" for i in row["layers"]]}
        row |= {"ce_clean": 3.5, "ce_zero": 6, "ce_mean": 5, "ce_replaced": 3.7 + n / 100}
        row |= {f"{m}{end}": 0.2 for m in ("kl", "loss_recovered_zero") for end in ("", "_low", "_high")}
        folder = plan.folder("stack", key)
        folder.mkdir(parents=True)
        (folder / "summary.json").write_text(json.dumps(row))
        write_receipt(folder, "stack")
    figure, table = find("stacks").draw(read_stacks(job))
    assert [text.get_text() for text in figure.axes[0].get_yticklabels()] == [
        f"layers {layers}, mlp_out: ReLU + L1 transcoder, expansion {width}, 2 seeds"
        for layers in ("0, 1, 2", "1") for width in (2, 8)
    ]  # fmt: skip
    assert len(table) == 8
