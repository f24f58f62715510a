"""The study of heads as the workflow makes it: what it writes, and its numbers against the model and the evaluation."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp
import torch
import xarray as xr
from stores import contents, write_receipt
from tests.models.test_architectures import TINY, run_all
from tests.planning.test_plan import home  # noqa: F401 (a fixture)

from saeflow.config import ConfigError, ModelConfig
from saeflow.dictionaries import load_dictionary, save_dictionary
from saeflow.dictionaries.foreign import foreign_job
from saeflow.dictionaries.heads import BlockDiagonal
from saeflow.figures.job import draw_figure
from saeflow.figures.registry import declared
from saeflow.heads.attribution import bias
from saeflow.heads.cross_terms import removals
from saeflow.heads.dashboards import in_row, seen, top_contexts
from saeflow.heads.decomposition import METHODS
from saeflow.heads.folder import read_head_studies
from saeflow.heads.job import heads_job
from saeflow.heads.stage import SHOWN
from saeflow.heads.study import HeadMeasurements
from saeflow.heads.weights import head_outputs, read_attention
from saeflow.jobs.job import Job
from saeflow.models.loading import load_model
from saeflow.planning.expansion import compose
from saeflow.planning.graph import Plan
from saeflow.text.tokens import open_tokens

ROOT = Path(__file__).resolve().parents[2]
SWEEP = (
    "sweep=[{dictionary:heads,site:attn_z,dictionary.l1_coefficient:[0.01,0.1]},"
    "{dictionary:concat,site:attn_z,dictionary.l1_coefficient:0.03}]"
)
SIZES = [
    "heads.n_latents=5",
    "heads.max_atoms=4",
    "heads.dashboards=2",
    "heads.min_active=2",
    "heads.resamples=20",
    "evaluation.resamples=5",
]
DRAWN = ("norms", "spectra", "cosines", "cross_terms", "angles", "interference", "shares", "measures", "decomposition")
DRAWN += ("agreement", "attribution", "ov", "top_pairs", "lifted", "coefficients")
FIGURES = f"figures=[l0_histograms,{','.join(f'heads_{name}' for name in DRAWN)}]"
PER_HEAD = "dictionary.normalize_activations=per_head"
H, HEAD = 4, 8


@pytest.fixture(scope="module")
def plan(llama_folder: Path, tmp_path_factory: pytest.TempPathFactory, corpus_file: Path) -> Plan:
    """Everything, on a model whose query heads share keys and values."""
    chosen = ["model=local", f"model.path={llama_folder}", "corpus=local", f"corpus.path={corpus_file}"]
    results = tmp_path_factory.mktemp("heads")
    plan = compose(ROOT / "conf", [SWEEP, FIGURES, *chosen, *TINY, *SIZES], results=str(results))
    run_all(plan)
    return plan


@pytest.fixture(scope="module")
def study(plan: Plan) -> Path:
    (key,) = plan.stages["heads"]
    return plan.folder("heads", key)


@pytest.fixture(scope="module")
def model(plan: Plan) -> Any:
    (instance,) = plan.stages["heads"].values()
    folder = instance.sources["model"]
    return load_model(Path(folder), ModelConfig("tiny", path=folder), "cpu")


@pytest.fixture(scope="module")
def rows(plan: Plan) -> torch.Tensor:
    (instance,) = plan.stages["heads"].values()
    return torch.from_numpy(open_tokens(plan.folder("tokens", instance.needs["tokens"][0]))[:].astype(np.int64))


@pytest.mark.slow
def test_one_study_has_all_dictionaries_of_the_layer(plan: Plan, study: Path) -> None:
    (instance,) = plan.stages["heads"].values()
    assert sorted(instance.needs["train"]) == sorted(plan.stages["train"]) and instance.config["hook_name"]
    summary = json.loads((study / "summary.json").read_text())
    kinds = {key: held["kind"] for key, held in summary["dictionaries"].items()}
    assert sorted(kinds.values()) == ["concat", "heads", "heads"]
    (concat,) = (held for held in summary["dictionaries"].values() if held["kind"] == "concat")
    heads = {key: held["l0"] for key, held in summary["dictionaries"].items() if held["kind"] == "heads"}
    assert concat["decomposed_in"] == min(heads, key=lambda key: abs(np.log(heads[key] / concat["l0"])))
    assert concat["decomposed_latents"] == 5
    for held in summary["dictionaries"].values():
        if held["kind"] == "heads":
            assert held["rank_W_O"] == [HEAD] * H and max(held["rank_D_W_O"]) <= HEAD


def test_datasets_have_names_coordinates_and_units(study: Path) -> None:
    found = {p.relative_to(study).as_posix(): xr.open_zarr(p) for p in sorted(study.rglob("*.zarr"))}
    names = {Path(name).name for name in found}
    assert names == {
        f"{n}.zarr"
        for n in ("cosines", "angles", "ov", "norms", "spectra", "interference", "shares", "measures", "coefficients")
    }
    for name, one in found.items():
        for variable in one.data_vars.values():
            assert "units" in variable.attrs or "description" in variable.attrs, (name, variable.name)
            assert all(d in one.coords or d in ("pair",) for d in variable.dims), (name, variable.name)
        if "pair" in one.dims:
            assert {"head", "other_head"} <= set(one.coords)
    cosines = found["cosines.zarr"]
    assert cosines["cosine"].dims == ("pair", "quantile") and cosines.sizes["pair"] == H * (H - 1) // 2


def test_cosines_are_those_of_the_model(study: Path, model: Any, rows: torch.Tensor) -> None:
    _, cache = model.run_with_cache(rows)
    outputs = head_outputs(cache["blocks.1.attn.hook_z"].flatten(0, 1), read_attention(model, 1).W_O)
    wanted = torch.cosine_similarity(outputs[:, 1], outputs[:, 3], dim=1).view(rows.shape)[:, 1:]
    found = xr.open_zarr(study / "cosines.zarr")["cosine"]
    pair = int(np.flatnonzero((found["head"] == 1) & (found["other_head"] == 3))[0])
    quantiles = np.quantile(wanted.numpy(), found["quantile"].values)
    np.testing.assert_allclose(found.isel(pair=pair), quantiles, atol=1e-5)


@torch.no_grad()
def test_losses_without_cross_terms_are_those_of_hooked_passes(
    plan: Plan, study: Path, model: Any, rows: torch.Tensor
) -> None:
    table = pd.read_parquet(study / "cross_terms.parquet").set_index(["source", "way", "control"])
    attention = read_attention(model, 1)
    hook = "blocks.1.hook_attn_out"
    _, cache = model.run_with_cache(rows)
    z = cache["blocks.1.attn.hook_z"]

    def loss(output: torch.Tensor) -> float:
        hooks = [(hook, lambda _, hook: output.view(*rows.shape, -1))]
        log_p = model.run_with_hooks(rows, fwd_hooks=hooks).log_softmax(-1)[:, 1:-1]
        return -log_p.gather(2, rows[:, 2:, None]).double().mean().item()

    outputs = head_outputs(z.flatten(0, 1), attention.W_O)
    clean = loss(outputs.sum(1) + attention.b_O)
    assert table.loc[("model", "none", False), "ce_after"] == pytest.approx(clean, rel=1e-5)
    zeroed = loss(attention.b_O.expand(rows.numel(), -1))
    assert table.loc[("model", "heads_zeroed", False), "ce_after"] == pytest.approx(zeroed, rel=1e-5)
    whole = outputs.sum(1)
    for way, remove in removals(attention.W_O).items():
        changed = remove(outputs).sum(1)
        row = table.loc[("model", way, False)]
        assert row["ce_after"] == pytest.approx(loss(changed + attention.b_O), rel=1e-5)
        assert row["ce_increase"] == pytest.approx(row["ce_after"] - clean, abs=1e-5)
        squares = [x.view(*rows.shape, -1)[:, 1:].square().sum() for x in (changed - whole, whole)]  # without BOS
        size = (squares[0] / squares[1]).sqrt()
        control = table.loc[("model", way, True)]
        assert row["relative_change"] == pytest.approx(size.item(), rel=1e-4) == control["relative_change"]
        assert row["ce_beyond_control"] == pytest.approx(row["ce_after"] - control["ce_after"], abs=1e-9)
        assert row["ce_increase_low"] <= row["ce_increase_high"]
    for source in set(table.index.get_level_values("source")) - {"model"}:
        made = load_dictionary(plan.folder("train", source))
        output = head_outputs(made.forward(z.flatten(0, 1).flatten(1)).view(-1, H, HEAD), attention.W_O).sum(1)
        wanted = loss(output + attention.b_O)
        assert table.loc[(source, "none", False), "ce_after"] == pytest.approx(wanted, rel=1e-5)


def test_a_dictionary_spliced_after_the_output_weights_is_the_one_that_is_evaluated(plan: Plan, study: Path) -> None:
    table = pd.read_parquet(study / "cross_terms.parquet")
    table = table[(table["way"] == "none") & (table["source"] != "model")].set_index("source")
    evaluated = {}
    for key in plan.stages["evaluate"]:
        summary = json.loads((plan.folder("evaluate", key) / "summary.json").read_text())
        evaluated[summary["dictionary_key"]] = summary
    for source, row in table.iterrows():
        assert row["ce_after"] == pytest.approx(evaluated[source]["ce_replaced_without_bos"], rel=1e-6)
        assert row["kl"] == pytest.approx(evaluated[source]["kl_without_bos"], rel=1e-3)
    summary = json.loads((study / "summary.json").read_text())
    for key, held in summary["dictionaries"].items():
        assert held["l0"] == pytest.approx(evaluated[key]["l0_without_bos"], rel=1e-6)


def test_attributions_of_the_dashboards_add_up(plan: Plan, study: Path, model: Any, rows: torch.Tensor) -> None:
    """Over heads and sources, to the pre-activation less its bias; the activation is that of the dictionary."""
    key = next(
        k for k, h in json.loads((study / "summary.json").read_text())["dictionaries"].items() if h["kind"] == "concat"
    )
    made = load_dictionary(plan.folder("train", key))
    _, cache = model.run_with_cache(rows)
    z = cache["blocks.1.attn.hook_z"]
    table = pd.read_parquet(study / "dictionaries" / key / "attribution.parquet")
    assert len(table) and table["head"].nunique() == H
    for (latent, _), terms in table.groupby(["latent", "context"]):
        row, position = int(terms["row"].iloc[0]), int(terms["position"].iloc[0])
        x = z[row, position].flatten()[None]
        wanted = made.pre_activations(x)[0, latent] - bias(made)[latent]
        assert terms["attribution"].sum() == pytest.approx(wanted.item(), abs=1e-5)
        assert terms["activation"].iloc[0] == pytest.approx(made.encode(x)[0, latent].item(), rel=1e-4)
        assert terms["source"].max() == position


def test_decompositions_have_every_method_and_null(plan: Plan, study: Path) -> None:
    key = next(
        k for k, h in json.loads((study / "summary.json").read_text())["dictionaries"].items() if h["kind"] == "concat"
    )
    folder = study / "dictionaries" / key
    table = pd.read_parquet(folder / "decomposition.parquet")
    assert set(table["method"]) == set(METHODS) and set(table["dictionary"]) == {"own", "random", "other_head"}
    assert set(table["head"]) == {-1, 0, 1, 2, 3} and table["latent"].nunique() == 5
    made = load_dictionary(plan.folder("train", key))
    one = table[(table["head"] == 2) & (table["dictionary"] == "own") & (table["method"] == "omp")].iloc[-1]
    v = made.W_dec[int(one["latent"]), 2 * HEAD : 3 * HEAD].numpy()
    matched = json.loads((study / "summary.json").read_text())["dictionaries"][key]["decomposed_in"]
    (head_dictionary, coefficients) = load_dictionary(plan.folder("train", matched)), folder / "coefficients.zarr"
    C = xr.open_zarr(coefficients)["coefficient"].sel(latent=int(one["latent"]), head=2).values
    atoms = head_dictionary.heads[2].W_dec  # type: ignore[attr-defined]
    np.testing.assert_allclose(C @ atoms.numpy(), v, atol=1e-5)
    atoms = (atoms / atoms.norm(dim=1, keepdim=True)).numpy()[list(one["atoms"])]
    residual = np.linalg.norm(v - np.array(one["coefficients"]) @ atoms) / np.linalg.norm(v)
    assert one["residual"] == pytest.approx(residual, abs=1e-5)
    share = np.square(v).sum() / made.W_dec[int(one["latent"])].square().sum().item()
    assert one["decoder_squared_share"] == pytest.approx(share, rel=1e-5)
    agreed = pd.read_parquet(folder / "agreement.parquet")
    assert (agreed["jaccard"].dropna() <= agreed["jaccard_best"].dropna() + 1e-12).all()
    page = (folder / "dashboards.html").read_text()
    assert page.count("<section") == 2 and "attribution, sum" in page and "correlation" in page


def test_the_table_says_the_numbers(study: Path) -> None:
    text = (study / "table.txt").read_text()
    table = pd.read_parquet(study / "cross_terms.parquet")
    one = table[(table["source"] == "model") & (table["way"] == "others") & ~table["control"]].iloc[0]
    assert f"others      {one['ce_increase']:+.4f} [{one['ce_increase_low']:+.4f}, " in text
    median = xr.open_zarr(study / "cosines.zarr")["cosine"].isel(pair=0).sel(quantile=0.5).item()
    assert f" {median:.3f}" in text and text.count("SAEs of heads, L1") >= 4 and "mean share of each head" in text


def test_figures_are_there(plan: Plan) -> None:
    (key,) = plan.stages["figures"]
    folder = plan.folder("figures", key)
    (instance,) = plan.stages["figures"].values()
    assert len(instance.config["figures"]) == 16
    of_studies = {"heads_angles", "heads_cosines", "heads_cross_terms", "heads_ov"}
    for name in instance.config["figures"]:
        table = pd.read_csv(folder / f"{name}.csv")
        assert (folder / f"{name}.png").stat().st_size > 5000 and len(table), name
        if name.startswith("heads_"):
            first = ["study"] if name in of_studies else ["study", "dictionary_key"]
            assert list(table)[: len(first)] == first and table[first].notna().all(axis=None), name
        assert len(table.columns) <= 22, name


def test_a_study_is_the_same_twice(plan: Plan, study: Path) -> None:
    before = contents(study)
    (instance,) = plan.stages["heads"].values()
    heads_job(Job(instance, plan, "cpu"))
    after = contents(study)
    assert before.keys() == after.keys()
    differing = {name for name in before if before[name] != after[name]}
    assert differing <= {"provenance.json"}


# -------------------------------------------------------------------- the plan
@pytest.mark.parametrize(
    ("override", "stages"),
    [
        ("heads.top_pairs=7", {"heads", "figures"}),
        ("evaluation.resamples=7", {"evaluate", "figures"}),
        ("device.threads.heads=7", set()),
    ],
)
def test_what_the_study_reads(home: Path, override: str, stages: set[str]) -> None:  # noqa: F811
    before, after = (compose(home / "conf", [SWEEP, FIGURES, *more], results=str(home)) for more in ([], [override]))
    assert {s for s in after.stages if after.stages[s].keys() - before.stages[s].keys()} == stages


def test_a_study_is_made_where_there_are_dictionaries_of_heads_or_a_figure_of_them(home: Path) -> None:  # noqa: F811
    def studies(*overrides: str) -> int:
        return len(compose(home / "conf", list(overrides), results=str(home)).stages["heads"])

    assert studies("dictionary=concat", "site=attn_z") == 0
    assert studies("dictionary=concat", "site=attn_z", "figures=[heads_shares]") == 1
    assert studies("dictionary=heads", "site=attn_z", "site.layer=[1,2]") == 2
    assert studies("dictionary=heads", "site=attn_z", "site.hook_name=blocks.1.attn.hook_q") == 0
    with pytest.raises(ConfigError, match="shows what the stage heads makes, of which this experiment has nothing"):
        studies("dictionary=topk", "figures=[heads_shares]")


def test_heads_from_elsewhere_are_one_dictionary(plan: Plan, llama_folder: Path, corpus_file: Path) -> None:
    """By their folder, or by a list: with the tensors, evaluations and studies of one that was trained here."""
    trained = plan.folder("train", next(key for key in plan.stages["train"] if key.startswith("heads")))
    apart = [str(trained / f"head_{h}") for h in range(H)]
    chosen = ["model=local", f"model.path={llama_folder}", "corpus=local", f"corpus.path={corpus_file}"]
    chosen += [setting for setting in TINY if not setting.startswith(("training", "dictionary"))]
    chosen += ["dictionary=foreign", "site=attn_z", "features=all"]

    def plan_of(*more: str) -> Plan:
        return compose(ROOT / "conf", [*chosen, *more], results=plan.results)

    as_folder, as_list = plan_of(f"dictionary.path={trained}"), plan_of(f"dictionary.heads=[{','.join(apart)}]")
    assert as_folder.stages.keys() == as_list.stages.keys()
    ((key, instance),) = as_list.stages["foreign"].items()
    assert list(as_folder.stages["foreign"]) == [key]
    parts = [e.config.get("part") for e in as_list.stages["evaluate"].values()]
    assert parts == [None, "head_0", "head_1", "head_2", "head_3"] and len(as_list.stages["features"]) == 1
    (study,) = as_list.stages["heads"].values()
    assert study.needs["foreign"] == [key]
    foreign_job(Job(instance, as_list, "cpu"))
    made, own = load_dictionary(as_list.folder("foreign", key)), load_dictionary(trained)
    assert isinstance(made, BlockDiagonal)
    for name, tensor in own.tensors.items():
        torch.testing.assert_close(made.tensors[name], tensor, rtol=0, atol=0)
    for wrong, message in (
        ([f"dictionary.heads=[{','.join(apart[:3])}]"], r"SAEs of 3 heads, but blocks.1.attn.hook_z has 4 heads"),
        ([f"dictionary.path={trained}", "site.head=1"], "are SAEs of all heads of one hook: leave site.head"),
        (
            [f"dictionary.path={trained}", "site.hook_name=blocks.1.hook_mlp_out"],
            "SAEs of 4 heads, but .* has no heads",
        ),
        ([f"dictionary.heads=[{apart[0]},/none]"], "dictionary.heads=/none: no such file"),
        ([f"dictionary.path={trained}", f"dictionary.heads=[{apart[0]}]"], "set exactly one of"),
    ):
        with pytest.raises(ConfigError, match=message):
            plan_of(*wrong)


def test_figures_that_would_be_empty_are_refused(home: Path) -> None:  # noqa: F811
    def figures(*overrides: str) -> None:
        compose(home / "conf", ["site=attn_z", *overrides], results=str(home))

    one_head = ["dictionary=topk", "site.head=[0,1,2,3]"]
    with pytest.raises(ConfigError, match=r"figures=\[heads_norms\] show all heads .* are of one head each .*heads=\["):
        figures(*one_head, "figures=[heads_norms]")
    with pytest.raises(ConfigError, match="are of one head each"):  # of an experiment too
        figures("experiment=attention_heads", "sweep=null", *one_head)
    for dictionary, empty in (("heads", "heads_shares"), ("concat", "heads_agreement")):
        with pytest.raises(ConfigError, match=rf"figures=\[{empty}\] show nothing without a dictionary of"):
            figures(f"dictionary={dictionary}", f"figures=[heads_cosines,{empty}]")
        figures(f"dictionary={dictionary}", "figures=[heads_cosines]")
    known = {name for name, one in declared().items() if one.stage == "heads"}
    assert known >= {f"heads_{name}" for names in SHOWN.values() for name in names}


def test_a_study_runs_only_where_a_figure_asks_for_it(home: Path) -> None:  # noqa: F811
    asked = {
        figure: compose(home / "conf", [SWEEP, f"figures=[{figure}]"], results=str(home))
        for figure in ("sparsity_faithfulness", "heads_shares")
    }
    assert [len(plan.stages["heads"]) for plan in asked.values()] == [1, 1]  # heads_tables can ask for either
    assert [len(plan.to_make["heads"]) for plan in asked.values()] == [0, 1]


@pytest.mark.parametrize("dead", [False, True])
def test_a_study_without_live_dictionaries_of_heads(plan: Plan, study: Path, dead: bool) -> None:
    """One dictionary of all heads, as if read from elsewhere; and with it one of heads that never fires."""
    (instance,) = plan.stages["heads"].values()
    (concat,) = (key for key in instance.needs["train"] if key.startswith("sae"))
    keys = [concat]
    if dead:
        made = load_dictionary(plan.folder("train", next(key for key in instance.needs["train"] if key != concat)))
        keys.append("dead")
        for h, one in enumerate(made.heads):  # type: ignore[attr-defined]
            one.b_enc -= 1e6
            (plan.folder("train", "dead") / f"head_{h}").mkdir(parents=True)
            save_dictionary(one, plan.folder("train", "dead") / f"head_{h}")
        write_receipt(plan.folder("train", "dead"), "train")
    alone = dataclasses.replace(instance, key=f"alone{dead}", needs=instance.needs | {"train": keys})
    summary = heads_job(Job(alone, plan, "cpu"))
    folder = plan.folder("heads", alone.key)
    both = [pd.read_parquet(f / "dictionaries" / concat / "attribution.parquet") for f in (folder, study)]
    pd.testing.assert_frame_equal(*both)
    assert not (folder / "dictionaries" / concat / "decomposition.parquet").exists()
    if dead:
        held = summary["dictionaries"]["dead"]
        assert held["l0"] == 0 and held["interference_over_weight"] is None
    for name in DRAWN:
        draw_figure(f"heads_{name}", read_head_studies([folder]), folder)


def test_settings_out_of_range_are_refused(home: Path) -> None:  # noqa: F811
    with pytest.raises(ConfigError, match=r"heads.max_atoms=0 is out of range: it must be 1 or more"):
        compose(home / "conf", ["heads.max_atoms=0"], results=str(home))


# -------------------------------------------------------------------- contexts
def test_contexts_are_the_rows_of_the_largest_activations() -> None:
    dense = np.zeros((3, 5))  # 3 rows of 5 kept tokens, after a BOS
    dense[0, 2], dense[0, 4], dense[2, 1], dense[1, 0] = 3.0, 1.0, 3.0, 2.0
    column = sp.csc_array(dense.reshape(-1, 1))
    held = HeadMeasurements(np.zeros((3, 6), dtype=np.int64), 1, xr.Dataset(), {}, {}, pd.DataFrame())
    latent = seen(held, column)
    found = top_contexts(latent, 2)
    assert [(c.row, c.position, c.value) for c in found] == [(0, 3, 3.0), (2, 2, 3.0)]
    assert in_row(latent, 0).tolist() == [0, 0, 0, 3.0, 0, 1.0]
