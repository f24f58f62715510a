"""What dictionaries of an experiment are called: by what differs between them, and never two alike."""

from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from measured import write_evaluations
from tests.planning.test_plan import home  # noqa: F401 (a fixture)

from saeflow.dictionaries.series import ordered_series, with_names
from saeflow.dictionaries.settings import MOST_SAID, differing, phrase, read_summaries, settings, tell_apart
from saeflow.planning.expansion import compose
from saeflow.planning.graph import Plan

TOPK = ["dictionary=topk", "site=mlp_out", "site.layer=2"]
SHORT = ["tokens.train_tokens=8192", "tokens.held_out_tokens=2048"]


def plan_of(home: Path, *overrides: str) -> Plan:  # noqa: F811
    return compose(home / "conf", [*SHORT, *overrides], results=str(home / "results"), digests=home / "digests.json")


def named(home: Path, *overrides: str) -> pd.DataFrame:  # noqa: F811
    job = write_evaluations(plan_of(home, *overrides), lambda s: {"l0": s["amount"] or 9.0, "ce_replaced": 3.6})
    return with_names(read_summaries(job, "evaluate"))


def joined(table: pd.DataFrame) -> dict[tuple[str, str], list[int]]:
    """By place and series: how many dictionaries each of its points is of."""
    groups = table.groupby(["place", "series"], sort=False)
    return {at: rows.groupby("point", sort=False).size().tolist() for at, rows in groups}  # type: ignore[misc]


def test_one_sweep_of_k_is_one_series_without_a_word_of_settings(home: Path) -> None:  # noqa: F811
    table = named(home, *TOPK, "dictionary.k=[32,4,16]")
    assert joined(table) == {("layer 2, mlp_out", "TopK SAE"): [1, 1, 1]}
    assert table["label"].tolist() == ["TopK SAE, k = 4", "TopK SAE, k = 16", "TopK SAE, k = 32"]


def test_seeds_are_one_point_and_are_in_the_label(home: Path) -> None:  # noqa: F811
    table = named(home, *TOPK, "dictionary.k=[4,16]", "seed=[0,1,2]")
    assert joined(table) == {("layer 2, mlp_out", "TopK SAE"): [3, 3]}
    assert table["label"].tolist()[:3] == [f"TopK SAE, k = 4, seed {n}" for n in range(3)]
    shuffled = named(home, *TOPK, "dictionary.k=4", "training.shuffle_seed=[0,1]")
    assert joined(shuffled) == {("layer 2, mlp_out", "TopK SAE"): [2]}
    assert shuffled["label"].is_unique and shuffled["repeat"].is_unique


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("dictionary.expansion=[2,16]", ["expansion 2", "expansion 16"]),
        ("training.lr=[0.001,0.003]", ["lr = 0.001", "lr = 0.003"]),
        ("dictionary.normalize_activations=[none,expected_average_only_in]",
         ["normalize_activations = expected_average_only_in", "normalize_activations = none"]),
        ("dictionary.sparsity=[unit_norm,decoder_norm]", ["sparsity = decoder_norm", "sparsity = unit_norm"]),
        ("training.clip_grad_norm=[null,1.0]", ["clip_grad_norm = 1", "clip_grad_norm = none"]),
        ("tokens.train_tokens=[8192,16384]", ["8,192 training tokens", "16,384 training tokens"]),
        ("activations.dtype=[float32,bfloat16]", ["dtype = bfloat16", "dtype = float32"]),
    ],
)  # fmt: skip
def test_what_else_varies_makes_series_at_one_place(home: Path, override: str, said: list[str]) -> None:  # noqa: F811
    table = named(home, *TOPK, "dictionary.k=[4,16]", "seed=[0,1]", override)
    found = joined(table)
    assert len(found) == 2 and {place for place, _ in found} == {"layer 2, mlp_out"}
    assert all(points == [2, 2] for points in found.values())
    assert [name for _, name in found] == [f"TopK SAE, {one}" for one in said]


def test_widths_given_in_two_ways_are_compared_by_what_they_come_to(home: Path) -> None:  # noqa: F811
    sweep = "sweep=[{dictionary.expansion:2},{dictionary.expansion:null,dictionary.d_sae:512}]"
    table = named(home, *TOPK, "dictionary.k=4", sweep)
    assert sorted(table["series"]) == ["TopK SAE, 256 latents", "TopK SAE, 512 latents"]


@pytest.mark.parametrize(
    ("overrides", "places"),
    [
        (["site.layer=[2,3]"], ["layer 2, mlp_out", "layer 3, mlp_out"]),
        (["site=resid_pre,mlp_out"], ["layer 2, mlp_out", "layer 2, resid_pre"]),
        (["model.randomise=[none,reinit]"],
         ["layer 2, mlp_out, trained model", "layer 2, mlp_out, re-initialised model, seed 0 of it"]),
        (["model.fold_ln=[false,true]"], ["layer 2, mlp_out, fold_ln = false", "layer 2, mlp_out, fold_ln = true"]),
        (["tokens.held_out_tokens=[2048,4096]"],
         ["layer 2, mlp_out, 2,048 held-out tokens", "layer 2, mlp_out, 4,096 held-out tokens"]),
        (["tokens.context_size=[64,128]"], ["layer 2, mlp_out, context of 64", "layer 2, mlp_out, context of 128"]),
        (["evaluation.confidence=[0.9,0.95]"],
         ["layer 2, mlp_out, confidence = 0.9", "layer 2, mlp_out, confidence = 0.95"]),
        (["evaluation.replace_first=[true,false]"], ["layer 2, mlp_out", "layer 2, mlp_out, first tokens kept"]),
    ],
)  # fmt: skip
def test_models_tokens_and_hooks_make_places(home: Path, overrides: list[str], places: list[str]) -> None:  # noqa: F811
    given = [one for one in TOPK if one.split("=")[0] not in overrides[0].split("=")[0]]
    table = named(home, *given, "dictionary.k=[4,16]", "seed=[0,1]", *overrides)
    assert joined(table) == {(place, "TopK SAE"): [2, 2] for place in places}


def test_two_models_and_two_corpora_are_named(home: Path) -> None:  # noqa: F811
    """Content tells them apart, and people's names say which; where those are alike, a hash does."""
    plan = plan_of(home, *TOPK, "model.randomise=[none,reinit]", "model.randomise_seed=[0,1]")
    job = write_evaluations(plan, lambda s: {"l0": 8.0, "ce_replaced": 3.6})
    table = with_names(read_summaries(job, "evaluate"))
    assert table["place"].tolist() == ["layer 2, mlp_out, trained model"] + [
        f"layer 2, mlp_out, re-initialised model, seed {n} of it" for n in (0, 1)
    ]
    rows = read_summaries(job, "evaluate").head(2).assign(tokens_key=["held_out-1a", "held_out-2b"])
    held = {"model.weights": "w", "model.name": "pythia", "corpus.content": "c", "corpus.name": "books"}

    def places(**other: str) -> list[str]:
        rows["settings"] = pd.Series([held, held | {p.replace("_", "."): v for p, v in other.items()}], dtype=object)
        return sorted(with_names(rows)["place"])

    assert places(corpus_content="d", corpus_name="news") == ["layer 2, mlp_out, on books", "layer 2, mlp_out, on news"]
    alike = places(corpus_content="d")
    assert len(set(alike)) == 2 and all(place.startswith("layer 2, mlp_out, ") for place in alike)
    rows["tokens_key"] = "held_out-1a"
    assert set(places(corpus_name="renamed")) == {"layer 2, mlp_out"}
    assert places(model_weights="v", model_name="gelu") == ["layer 2, mlp_out, gelu", "layer 2, mlp_out, pythia"]


def test_kinds_of_saelens_and_pairs_and_transcoders_are_series(home: Path) -> None:  # noqa: F811
    sweep = (
        "sweep=[{dictionary:[topk,relu,saelens/gated,saelens/topk],site:mlp_out},{dictionary:transcoder,site:mlp},"
        "{dictionary:jacobian,site:mlp,dictionary.jacobian_coefficient:[0,1]}]"
    )
    table = named(home, "site.layer=2", "jacobian.n_tokens=100", sweep)
    at_output = table[table["place"] == "layer 2, mlp_out"]
    assert at_output["series"].tolist() == [
        "TopK SAE", "TopK SAE of a Jacobian pair, λ = 0", "TopK SAE of a Jacobian pair, λ = 1", "ReLU + L1 SAE",
        "ReLU + L1 transcoder", "SAELens gated", "SAELens topk",
    ]  # fmt: skip
    assert ordered_series(at_output) == at_output["series"].tolist()


def test_transcoders_that_read_elsewhere_are_another_series(home: Path) -> None:  # noqa: F811
    hooks = "site.hook_name=[blocks.2.ln2.hook_normalized,blocks.2.hook_resid_pre,blocks.1.hook_resid_post]"
    table = named(home, "dictionary=transcoder", "site=mlp", "site.hook_name_out=blocks.2.hook_mlp_out", hooks)
    assert sorted(table["series"]) == [
        f"ReLU + L1 transcoder, reads {of}" for of in ("layer 1, resid_post", "ln2.normalized", "resid_pre")
    ]


def test_heads_have_places_of_their_own_and_recipes_are_told_apart(home: Path) -> None:  # noqa: F811
    sweep = "sweep=[{dictionary:[heads,concat],training:april},{dictionary:kissane/heads,training:kissane}]"
    table = named(home, "site=attn_z", "site.layer=1", sweep)
    assert table["place"].unique().tolist() == ["layer 1, attn.z", *(f"layer 1, attn.z, head {h}" for h in range(4))]
    whole = table[table["head"] == -1]["series"].tolist()
    assert whole[0] == "ReLU + L1 SAE" and len(set(whole)) == 3
    assert all(name.startswith("ReLU + L1 SAEs by head, ") and name.endswith(", …") for name in whole[1:])


def test_what_was_made_elsewhere_is_a_point_each_unless_the_user_gives_one_label(home: Path) -> None:  # noqa: F811
    """Their L1 coefficients are unknown, so nothing says that they are seeds of each other, or one sweep."""
    paths = []
    for name in ("a", "b"):
        folder = home / "saes" / name
        folder.mkdir(parents=True)
        for file in ("cfg.json", "sae_weights.safetensors"):
            (folder / file).write_text(f'{{"{name}": 1}}')
        paths.append(str(folder))
    foreign = ["dictionary=foreign", "site=mlp_out", "site.layer=2", f"dictionary.path=[{','.join(paths)}]"]
    apart = named(home, *foreign)
    assert joined(apart) == {("layer 2, mlp_out", f"{name} (ReLU + L1 SAE)"): [1] for name in ("a", "b")}
    one = named(home, *foreign, "dictionary.label=mine")
    assert joined(one) == {("layer 2, mlp_out", "mine (ReLU + L1 SAE)"): [1, 1]}


def test_dictionaries_that_nothing_tells_apart_are_not_joined() -> None:
    row = {
        "kind": "sae",
        "activation": "topk",
        "skip": False,
        "saelens": None,
        "amount_name": "k",
        "amount": 4,
        "seed": 0,
    }
    row |= {"hook_name": "blocks.0.hook_mlp_out", "hook_name_out": "blocks.0.hook_mlp_out"}
    table = with_names(pd.DataFrame([row | {"dictionary_key": key} for key in ("a", "b")]))
    assert table["series"].tolist() == ["TopK SAE, a", "TopK SAE, b"]


def test_a_table_says_norms_only_where_they_tell_two_apart() -> None:
    """Of summaries alone, without settings."""
    row = {"kind": "sae", "activation": "topk", "skip": False, "saelens": None, "source": "", "amount_name": "k"}
    row |= {"hook_name": "blocks.0.hook_mlp_out", "hook_name_out": "blocks.0.hook_mlp_out", "sparsity": "unit_norm"}
    one = with_names(pd.DataFrame([row | {"amount": 4}]))
    assert one[["head", "place", "series"]].iloc[0].tolist() == [-1, "layer 0, mlp_out", "TopK SAE"]
    two = with_names(pd.DataFrame([row | {"sparsity": s, "amount": 4} for s in ("unit_norm", "decoder_norm")]))
    assert two["series"].tolist() == ["TopK SAE, sparsity = decoder_norm", "TopK SAE, sparsity = unit_norm"]


def test_the_amount_can_make_series_and_the_width_points(home: Path) -> None:  # noqa: F811
    plan = plan_of(home, *TOPK, "dictionary.k=[4,16]", "dictionary.expansion=[2,8]", "seed=[0,1]")
    job = write_evaluations(plan, lambda s: {"l0": 8.0, "ce_replaced": 3.6})
    table = with_names(read_summaries(job, "evaluate"), along="d_sae")
    assert joined(table) == {("layer 2, mlp_out", f"TopK SAE, k = {k}"): [2, 2] for k in (4, 16)}


def test_layers_are_ordered_by_number() -> None:
    row = {"kind": "sae", "activation": "topk", "skip": False, "saelens": None, "amount_name": "k", "amount": 4}
    hooks = [f"blocks.{n}.hook_mlp_out" for n in (10, 9, 2)]
    table = with_names(pd.DataFrame([row | {"hook_name": h, "hook_name_out": h} for h in hooks]))
    assert table["where"].tolist() == ["layer 2, mlp_out", "layer 9, mlp_out", "layer 10, mlp_out"]


# -------------------------------------------------------------------- settings
def test_settings_are_those_of_all_that_an_artifact_is_made_from(home: Path) -> None:  # noqa: F811
    plan = plan_of(home, *TOPK, "dictionary.k=4")
    (key,) = plan.stages["evaluate"]
    held = settings(plan, "evaluate", key)
    wanted = {
        "dictionary.k": 4, "dictionary.expansion": 8, "seed": 0, "training.batch_size": 1024,
        "evaluation.resamples": 1000, "tokens.context_size": 256, "tokens.train_tokens": 8192,
        "tokens.held_out_tokens": 2048, "model.fold_ln": False,
        "activations.dtype": "float32",
    }  # fmt: skip
    assert {name: held[name] for name in wanted} == wanted
    assert not {"hook_name", "n_rows", "split", "size"} & held.keys()


def test_differences_are_said_up_to_three_then_the_fewest_that_tell_apart() -> None:
    assert tell_apart([{"a.x": 1, "b": 2}, {"a.x": 1, "b": 2}]) == [[], []]
    assert tell_apart([{"a.x": 1, "b": 2}, {"a.x": 3, "c": None}]) == [["x = 1", "b = 2"], ["x = 3", "c = none"]]
    rows: list[dict[str, Any]] = [dict.fromkeys("abcd", n) | {"e": n // 2} for n in range(4)]
    assert len(differing(rows)) > MOST_SAID
    assert tell_apart(rows) == [[f"a = {n}", "…"] for n in range(4)]
    product = [{"a": i, "b": j, "c": i, "d": i} for i in (0, 1) for j in (0, 1)]
    assert tell_apart(product)[1] == ["a = 0", "b = 1", "…"]


def test_settings_are_said_in_words() -> None:
    assert phrase("dictionary.expansion", 8) == "expansion 8" and phrase("training.lr", 3e-4) == "lr = 0.0003"
    assert phrase("dictionary.jacobian_coefficient", 0.5) == "λ = 0.5"
    assert phrase("training.exclude.positions", [0]) == "trained without positions [0]"
    assert phrase("training.resample_steps", [0, 200]) == "resample_steps = [0, 200]"
    assert phrase("model.fold_ln", True) == "fold_ln = true" and phrase("training.clip_grad_norm", None).endswith(
        "none"
    )
