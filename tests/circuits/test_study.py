"""Tables of the stage `circuits`, against autograd in float64 and closed forms; what is chosen, and what is refused."""

import dataclasses
import re
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from tests.circuits.test_circuits import N_LATENTS, TOKENS, D, model, run, transcoder
from tests.models.test_architectures import TINY, run_all
from torch import Tensor

from saeflow.circuits.attribution import CircuitRun
from saeflow.circuits.chosen import Activity, activity, choose, prompt_tokens
from saeflow.circuits.figures import Circuits, as_paths, circuits, circuits_overlap, largest
from saeflow.circuits.overlap import mean_contributions, overlap, overlap_table, pullbacks, strong_tokens
from saeflow.circuits.paths import greedy_paths
from saeflow.circuits.study import KINDS, Explained, extremes, path_table, tables_of, weight_tables
from saeflow.config import CircuitsConfig, ConfigError
from saeflow.config.circuits import conditions
from saeflow.dictionaries import DictionaryError
from saeflow.dictionaries.sae import build
from saeflow.features.text import Text
from saeflow.planning.expansion import compose

__all__ = ["model"]  # a fixture
ROOT = Path(__file__).resolve().parents[2]
CONFIG = CircuitsConfig(top=N_LATENTS, heads=8, iterations=2, branches=6)
LATENT, TOKEN = 4, 6


def frozen_gradient(held: CircuitRun, of: str, heads: dict[int, int] | None = None) -> Tensor:
    """Of the pre-activation of `LATENT` of layer 1 at `TOKEN` by what the stream holds at the hook `of`, (P, D), by
    autograd through the model: scales of norms, attention patterns and MLPs are what they were. `heads`: of a layer,
    the only head whose pattern is not taken as 0."""
    model: Any = held.model
    leaf: list[Tensor] = []

    def keep(value: Tensor, hook: Any) -> Tensor:
        return held._cache[hook.name]

    def pattern(value: Tensor, hook: Any) -> Tensor:
        whole = held._cache[hook.name]
        if heads is None:
            return whole
        only = torch.zeros_like(whole)
        if (head := heads.get(int(hook.name.split(".")[1]))) is not None:
            only[:, head] = whole[:, head]
        return only

    def make_leaf(value: Tensor, hook: Any) -> Tensor:
        leaf.append(value.detach().clone().requires_grad_())
        return leaf[0]

    read: list[Tensor] = []
    hooks: list[Any] = [
        (lambda name: name.endswith("hook_scale"), keep),
        (lambda name: name.endswith("hook_mlp_out") and name != of, keep),
        (lambda name: name.endswith("hook_pattern"), pattern),
        (of, make_leaf),
        ("blocks.1.ln2.hook_normalized", lambda value, hook: read.append(value)),
    ]
    model.run_with_hooks(held.tokens[None], fwd_hooks=hooks)
    value = read[0][0, TOKEN] @ held.transcoders[1].W_enc[:, LATENT]
    (gradient,) = torch.autograd.grad(value, leaf[0])
    return gradient[0]


def weights_of(held: CircuitRun) -> pd.DataFrame:
    return weight_tables(held.model, held.transcoders, 1, LATENT, CONFIG)[1]


def scale(held: CircuitRun, hook: str, token: int) -> float:
    return float(held._at(hook)[token])


def test_pullbacks_and_de_embeddings_are_gradients(model: Any) -> None:
    """Of what is written there directly, and through a single head, but for the scales of norms and the pattern."""
    held = run(model)
    table, mlp_scale = weights_of(held), scale(held, "blocks.1.ln2.hook_scale", TOKEN)
    direct = table[table["head"] < 0].set_index(["what", "unit"])["weight"] / mlp_scale
    by_mlp = frozen_gradient(held, "blocks.0.hook_mlp_out", heads={})[TOKEN]
    written = (held.transcoders[0].W_dec @ by_mlp).detach()
    np.testing.assert_allclose(direct["latents"].sort_index(), written, atol=1e-10)
    by_stream = frozen_gradient(held, "blocks.0.hook_resid_pre", heads={})[TOKEN]
    tokens = direct["embedding"]
    wanted = (model.W_E[tokens.index.tolist()] @ by_stream).detach()
    np.testing.assert_allclose(tokens, wanted, atol=1e-10)
    through = table[(table["what"] == "embedding") & (table["head_layer"] == 0)]
    assert len(through) and {*table["head_layer"]} == ({-1, 0} if held.parallel else {-1, 0, 1})
    for head, rows in through.groupby("head"):
        source = 3
        by_source = frozen_gradient(held, "blocks.0.hook_resid_pre", heads={0: int(str(head))})[source]
        factor = float(held._pattern(0)[int(str(head)), TOKEN, source])
        factor /= mlp_scale * scale(held, "blocks.0.ln1.hook_scale", source)
        wanted = (model.W_E[rows["unit"].tolist()] @ by_source).detach()
        np.testing.assert_allclose(rows["weight"] * factor, wanted, atol=1e-10)


def test_logit_weights_are_gradients_of_the_logits(model: Any) -> None:
    """Of what a latent of the last layer adds, but for the last norm's scale, up to what all logits share."""
    held = run(model)
    table = weights_of(held)
    rows = table[table["what"] == "logits"]
    stream = held.model.run_with_cache(held.tokens[None])[1]["blocks.1.hook_resid_post"][:, [TOKEN]]
    norm_scale = held._at("ln_final.hook_scale")[TOKEN]

    def logits(amount: Tensor) -> Tensor:
        moved = stream + amount * held.transcoders[1].W_dec[LATENT]
        centred = moved - moved.mean(-1, keepdim=True) if model.cfg.normalization_type == "LNPre" else moved
        return model.unembed(centred / norm_scale)[0, 0]

    slope = torch.autograd.functional.jacobian(logits, torch.zeros((), dtype=torch.float64))
    np.testing.assert_allclose(rows["weight"] / norm_scale.item(), slope[rows["unit"].tolist()], atol=1e-10)


@pytest.mark.parametrize(("skip", "layers"), [(False, (0, 1)), (True, (0, 1)), (False, (1,))])
def test_the_sums_of_a_latent_make_up_its_pre_activation(model: Any, skip: bool, layers: Any) -> None:
    held = run(model, skip=skip, layers=layers)
    tables = tables_of(Explained(LATENT, held, TOKEN, 0), 1, CONFIG)
    (row,) = tables["latents"].to_dict("records")
    x, made = held.read(1, "mlp")[TOKEN], held.transcoders[1]
    assert row["pre_activation"] == pytest.approx((x @ made.W_enc[:, LATENT] + made.b_enc[LATENT]).item(), abs=1e-10)
    assert sum(row[kind] for kind in KINDS) + row["b_enc"] == pytest.approx(row["pre_activation"], abs=1e-9)
    assert row["activation"] == pytest.approx(max(0.0, row["pre_activation"]), abs=1e-12)
    absolute = tables["attributions"].assign(contribution=tables["attributions"]["contribution"].abs())
    share = absolute.groupby("kind")["contribution"].sum() / absolute["contribution"].sum()
    assert row["error_share"] == pytest.approx(share.get("error", 0.0))
    brought = tables["text"]["contribution"].sum()
    assert brought == pytest.approx(row["head"] + row["embedding"], abs=1e-9)
    edges, nodes = tables["edges"], tables["nodes"]
    (root,) = nodes[nodes["kind"] == "target"].to_dict("records")
    assert edges.loc[edges["to_kind"] == "target", "contribution"].sum() == pytest.approx(root["children"])


def test_errors_are_all_of_an_mlp_whose_transcoder_says_nothing(model: Any) -> None:
    """In closed form: what the MLP writes along the direction, and nothing of latents."""
    nothing = transcoder(0)
    zero = {name: torch.zeros_like(tensor) for name, tensor in nothing.tensors.items()}
    held = CircuitRun(model, {0: build(nothing.spec, **zero), 1: transcoder(1)}, TOKENS)
    (row,) = tables_of(Explained(LATENT, held, TOKEN, 0), 1, CONFIG)["latents"].to_dict("records")
    u = held.in_stream(held.of_feature(1, LATENT, TOKEN))
    assert row["error"] == pytest.approx(float(held._at("blocks.0.hook_mlp_out")[TOKEN] @ u))
    assert row["feature"] == 0 and row["error_share"] > 0


def test_extremes_are_the_largest_and_the_least() -> None:
    table = extremes(torch.tensor([0.5, -3.0, 2.0, 1.0]), 2)
    assert table.to_dict("list") == {"rank": [1, 2, -1, -2], "unit": [2, 3, 1, 0], "weight": [2.0, 1.0, -3.0, 0.5]}
    assert sorted(extremes(torch.arange(3.0), 10)["unit"]) == [0, 1, 2]


def test_paths_are_read_back_and_shown_with_what_they_go_on_from(model: Any) -> None:
    held = run(model)
    paths = greedy_paths(held, held.of_feature(1, LATENT, TOKEN), 3, 8)
    assert as_paths(path_table(paths)) == paths
    shown = largest(paths, 3)
    assert shown[0] == paths[0] and {path.nodes[:-1] for path in shown[1:]} <= {path.nodes for path in shown}
    best = sorted(paths[1:], key=lambda path: -path.contributions[-1])[:3]
    assert {path.nodes for path in best} <= {path.nodes for path in shown}


# -------------------------------------------------------------------- filters of paths
WIDE = 10_000  # more than there are of anything: the search leaves nothing out


def found_paths(
    held: CircuitRun, through: Any = (), without: Any = (), branches: int = WIDE, per_node: int = WIDE
) -> Any:
    root = held.of_feature(1, LATENT, TOKEN)
    filters = ([conditions(text) for text in texts] for texts in (through, without))
    return [path.nodes for path in greedy_paths(held, root, 2, branches, per_node, *filters)]


@pytest.mark.parametrize(
    ("text", "meant"),
    [
        ("kind=head layer=0", lambda node: node.kind == "head" and node.layer == 0),
        ("head!=0 token<6", lambda node: node.kind == "head" and node.unit != 0 and node.token < 6),
        ("latent!=3", lambda node: node.kind == "feature" and node.unit != 3),
        ("kind!=feature token>4", lambda node: node.kind != "feature" and node.token > 4),
    ],
)
def test_filters_keep_of_all_paths_those_that_go_through_a_node_and_leave_out_those_that_do(
    model: Any, text: str, meant: Any
) -> None:
    held = run(model)
    every = found_paths(held)
    there = [nodes for nodes in every if any(map(meant, nodes[1:]))]
    passing = {nodes[: i + 1] for nodes in there for i in range(len(nodes))}
    assert 1 < len(passing) < len(every)
    kept = found_paths(held, through=[text])
    assert set(kept) == passing and len(kept) == len(passing) and kept[0] == every[0]
    left = found_paths(held, without=[text])
    assert set(left) == {nodes for nodes in every if not any(map(meant, nodes[1:]))}


def test_a_filtered_search_finds_what_the_greedy_one_passes_by(model: Any) -> None:
    held = run(model)
    table = held.attribute(held.of_feature(1, LATENT, TOKEN))
    ranked = table[(table["kind"] == "feature") & (table["contribution"] > 0)].sort_values("contribution")
    least = int(ranked["unit"].iloc[0])
    narrow = {"branches": 3, "per_node": 2}

    def goes(nodes: Any) -> bool:
        return any((node.kind, node.layer, node.unit) == ("feature", 0, least) for node in nodes)

    assert not any(map(goes, found_paths(held, **narrow)))
    kept = found_paths(held, through=[f"layer=0 latent={least}"], **narrow)
    assert len(kept) > 1 and all(any(goes(one) and one[: len(nodes)] == nodes for one in kept) for nodes in kept)
    assert found_paths(held, through=["latent=39 token=0"], **narrow) == [kept[0]]  # nothing reads there


# -------------------------------------------------------------------- means over text
def test_means_over_text_are_those_of_the_attributions_of_single_tokens(model: Any) -> None:
    made = {layer: transcoder(layer) for layer in (0, 1)}
    rows = np.random.default_rng(0).integers(1, 300, (5, 9))
    text, latents = Text(rows, np.zeros_like(rows), np.arange(5), first=1), np.array([7, LATENT])
    strong = strong_tokens(model, made[1], latents, text, batch_rows=2)
    means = mean_contributions(model, made, 1, latents, text, strong, batch_rows=2)
    runs = [CircuitRun(model, made, torch.from_numpy(row)) for row in rows]
    for n, latent in enumerate(latents.tolist()):
        of = np.array([one.features[1][1:, latent].numpy() for one in runs])
        wanted = of >= np.percentile(of[of > 0], 20)
        np.testing.assert_array_equal(strong[n].reshape(5, 8), wanted)
        total = np.zeros(N_LATENTS)
        for row, position in np.argwhere(wanted):
            table = runs[row].attribute(runs[row].of_feature(1, latent, position + 1))
            brought = table[(table["kind"] == "feature") & (table["layer"] == 0)]
            total[brought["unit"]] += brought["contribution"]
        np.testing.assert_allclose(means[0][n], total / wanted.sum(), atol=1e-12)
    weights = {0: pullbacks(model, made, 1, latents, 0)}
    table = weights_of(runs[0])
    direct = table[(table["what"] == "latents") & (table["head"] < 0)].set_index("unit")["weight"].sort_index()
    np.testing.assert_allclose(weights[0][1], direct)
    never = np.zeros_like(strong[:1])
    shares = overlap_table(means, weights, latents, np.concatenate([strong[:1], never]))
    assert shares["latent"].tolist() == [7, 7, 7] and shares["k"].tolist() == [5, 10, 20]
    assert shares["by_chance"].tolist() == [0.125, 0.25, 0.5] and (shares["n_tokens"] == strong[0].sum()).all()


def test_the_figure_of_overlaps_has_means_and_ranges_over_latents() -> None:
    rows = [(latent, 0, k, share, k / 40, 9) for k in (5, 10) for latent, share in ((3, 0.2), (7, 0.6))]
    data = pd.DataFrame(rows, columns=["latent", "layer", "k", "overlap", "by_chance", "n_tokens"])
    drawn, table = circuits_overlap(data.assign(key="one", of_layer=1))
    line, chance = drawn.axes[0].lines
    np.testing.assert_allclose(line.get_xydata(), [[5, 40], [10, 40]])
    np.testing.assert_allclose(chance.get_ydata(), [12.5, 25])
    band = drawn.axes[0].collections[0].get_paths()[0].vertices
    assert {*band[:, 1].round(6)} == {20, 60} and drawn.axes[0].get_title() == "2 latents of layer 1"
    assert len(table) == 4
    drawn, _ = circuits_overlap(data[:0].assign(key=[], of_layer=[]))
    assert "No latent" in drawn.axes[0].texts[0].get_text()


def test_overlap_is_the_share_of_the_largest_of_both() -> None:
    means, weights = torch.tensor([3.0, 2.0, 1.0, -5.0, 0.5]), torch.tensor([9.0, -9.0, 8.0, 7.0, 6.0])
    assert [overlap(means, weights, k) for k in (1, 2, 3, 4)] == [1.0, 0.5, 2 / 3, 0.75]


# -------------------------------------------------------------------- what is chosen
def test_activity_is_that_of_every_token(model: Any) -> None:
    made = transcoder(0, activation="topk")
    made.b_enc[:3] = -1e3  # these never fire
    rows = np.random.default_rng(0).integers(1, 300, (5, 9))
    text = Text(rows, np.zeros_like(rows), np.arange(5), first=1)
    found = activity(model, made, text, batch_rows=2)
    _, cache = model.run_with_cache(torch.from_numpy(rows), names_filter=[made.spec.hook_name])
    f = made.encode(cache[made.spec.hook_name][:, 1:].reshape(-1, D)).numpy()
    np.testing.assert_array_equal(found.fired, (f != 0).sum(0))
    np.testing.assert_allclose(found.largest, f.max(0))
    live = found.fired > 0
    np.testing.assert_array_equal(found.token, np.where(live, f.argmax(0), -1))
    assert not live[:3].any() and live.any() and isinstance(found, Activity)


def test_named_latents_are_taken_and_others_drawn_from_those_that_fire() -> None:
    fired = np.array([0, 11, 12, 13, 40, 0, 12])
    drawn = choose(fired, CircuitsConfig(n_latents=3), 2)
    assert len({*drawn}) == 3 and {*drawn} <= {2, 3, 4, 6} and [*drawn] == sorted(drawn)
    assert {int(n) for seed in range(20) for n in choose(fired, CircuitsConfig(n_latents=3, seed=seed), 2)} == {
        2,
        3,
        4,
        6,
    }
    assert choose(fired, CircuitsConfig(latents=(4, 1)), 2).tolist() == [4, 1]
    assert choose(fired, CircuitsConfig(latents=(0,), prompt="text"), 2).tolist() == [0]
    for config, message in (
        (CircuitsConfig(latents=(7, 1)), r"circuits.latents=\[7\], but the transcoder of layer 2 has 7 latents"),
        (CircuitsConfig(latents=(0, 1)), r"circuits.latents=\[0\] fire on none of the held-out tokens"),
        (CircuitsConfig(n_latents=5), r"circuits.n_latents=5, but 4 latents of layer 2 fire on 12 tokens or more"),
    ):
        with pytest.raises(ConfigError, match=message):
            choose(fired, config, 2)


def test_a_prompt_stands_behind_a_bos_and_fits_the_model() -> None:
    assert prompt_tokens([5, 6], 0, 3).tolist() == [0, 5, 6] and prompt_tokens([5, 6, 7], None, 3).tolist() == [5, 6, 7]
    for ids, most in (([], 2), ([5, 6, 7], 2)):
        with pytest.raises(ConfigError, match=f"circuits.prompt is {len(ids)} tokens long, .* takes 1 to {most}"):
            prompt_tokens(ids, 0, 3)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"prompt": " \n"}, "circuits.prompt"),
        ({"latents": (1, 1)}, "circuits.latents"),
        ({"latents": (-1,)}, "circuits.latents"),
        ({"layer": -1}, "circuits.layer"),
        ({"branches": 0}, "circuits.branches"),
        ({"heads": -1}, "circuits.heads"),
        ({"through": ("layer",)}, "circuits.through"),
        ({"through": ("kind<head",)}, "circuits.through"),
        ({"without": ("layer=1 of=2",)}, "circuits.without"),
        ({"without": (" ",)}, "circuits.without"),
    ],
)
def test_settings_out_of_range_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        CircuitsConfig(**settings)


def test_a_dictionary_without_an_encoder_is_refused(model: Any) -> None:
    class Behind:
        spec = dataclasses.replace(transcoder(0).spec, saelens="GatedTranscoder")

    with pytest.raises(DictionaryError, match="SAELens's GatedTranscoder has no encoder"):
        CircuitRun.check(model, {0: Behind()})  # type: ignore[dict-item]


# -------------------------------------------------------------------- the plan and the job
@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["model.fold_ln=false", "model.center_writing_weights=false"], "set model.fold_ln=true"),
        (
            [f"circuits.prompt='{'the sea ' * 400}'"],
            r"circuits.prompt is \d+ tokens long, of which the model takes 1 to",
        ),
        (["circuits.layer=4"], "circuits.layer=4 has no transcoder here; layers 0, 1, 2, 3 have"),
        (["circuits.latents=[3,1024]"], r"circuits.latents=\[1024\]: the transcoder of layer 3 has 1024 latents"),
        (
            ["sweep=null", "dictionary=relu", "dictionary.l1_coefficient=1", "figures=[circuits]"],
            "shows what the stage circuits makes",
        ),
    ],
)
def test_what_no_study_can_be_made_of_is_refused_by_the_plan(
    overrides: list[str], message: str, tmp_path_factory: pytest.TempPathFactory
) -> None:
    digests = tmp_path_factory.getbasetemp() / "digests.json"
    with pytest.raises(ConfigError, match=message):
        compose(ROOT / "conf", ["experiment=circuits", *overrides], digests=digests)


def test_studies_are_made_where_a_figure_of_them_is_asked_for(tmp_path_factory: pytest.TempPathFactory) -> None:
    digests = tmp_path_factory.getbasetemp() / "digests.json"
    asked = ["experiment=circuits", "dictionary.l1_coefficient=[0.3,1]"]
    plan = compose(ROOT / "conf", asked, digests=digests)
    assert [i.config["layer"] for i in plan.stages["circuits"].values()] == [3, 3]
    assert all(len(i.needs["train"]) == 4 for i in plan.stages["circuits"].values())
    assert not compose(ROOT / "conf", [*asked, "figures=[stacks]"], digests=digests).stages["circuits"]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory, neox_folder: Path, corpus_file: Path) -> Path:
    """A study of a prompt, by the pipeline."""
    chosen = ["model=local", f"model.path={neox_folder}", "corpus=local", f"corpus.path={corpus_file}", *TINY]
    asked = ["experiment=circuits", "model.center_writing_weights=true", "model.center_unembed=true"]
    asked += ["model.fold_ln=true", "stacks=[]", "figures=[circuits]", "evaluation.resamples=5"]
    asked += ["site.layer=[0,1]", "circuits.latents=[3,7]", "circuits.prompt='a <script> of words'"]
    plan = compose(ROOT / "conf", [*asked, *chosen[:4], *(t for t in TINY if "layer" not in t)],
                   results=str(tmp_path_factory.mktemp("circuits")))  # fmt: skip
    run_all(plan)
    (key,) = plan.stages["circuits"]
    (figures,) = plan.stages["figures"]
    assert (plan.folder("figures", figures) / "circuits.png").is_file()
    return plan.folder("circuits", key)


def test_a_study_holds_its_tables_and_a_page(made: Path) -> None:
    latents, attributions = (pd.read_parquet(made / f"{name}.parquet") for name in ("latents", "attributions"))
    assert latents["latent"].tolist() == [3, 7] and (latents["document"] == -1).all()
    sums = attributions.groupby("latent")["contribution"].sum() + latents.set_index("latent")["b_enc"]
    np.testing.assert_allclose(sums, latents.set_index("latent")["pre_activation"], rtol=1e-4, atol=1e-4)
    means, shares = (pd.read_parquet(made / f"{name}.parquet") for name in ("means", "overlap"))
    assert list(means) == ["latent", "layer", "rank", "unit", "contribution", "weight"] and {*shares["layer"]} <= {0}
    text = (made / "circuits.html").read_text()
    assert 'id="latent-3"' in text and 'id="latent-7"' in text and "<script" not in text
    assert not re.search(r'(?:src|href)="(?!#)', text.replace('xlink:href="#', ""))
    assert "".join(pd.read_parquet(made / "text.parquet").query("latent == 3")["text"][1:]) == "a <script> of words"


def test_the_figure_says_shares_of_the_contributions(made: Path) -> None:
    data = Circuits(*(pd.read_parquet(made / f"{n}.parquet").assign(key="one") for n in Circuits._fields))
    drawn, table = circuits(data)
    assert len(drawn.axes) == 2
    roots = table[table["kind"] == "target"]
    np.testing.assert_allclose(roots["share"], 1.0, rtol=1e-4)
    total = (data.latents["pre_activation"] - data.latents["b_enc"]).to_numpy()
    np.testing.assert_allclose(roots["contribution"], total, rtol=1e-4)
