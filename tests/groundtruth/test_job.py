"""Models of cases in the pipeline: what is planned, what the jobs write, and the numbers against TransformerLens."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from tests.groundtruth.test_training import publish

from saeflow.config import ConfigError
from saeflow.dictionaries import Origin, Spec, save_dictionary
from saeflow.dictionaries.sae import Dictionary, build
from saeflow.groundtruth.cases import get_case, small_config
from saeflow.groundtruth.compiler import hooked_transformer
from saeflow.groundtruth.effects import node_effects
from saeflow.groundtruth.faithfulness import (
    compare_jacobians,
    dictionary_jacobians,
    effective_inputs,
    faithfulness,
    interchange_accuracy,
    mlp_jacobians,
    true_jacobians,
)
from saeflow.groundtruth.folder import load_hooked, read_model, write_model
from saeflow.groundtruth.interpbench import ACTIVATIONS as READ
from saeflow.groundtruth.network import ACTIVATIONS, HOOKS, Network, Node, initial_weights
from saeflow.groundtruth.training import Alignment, Truth, align, pairs
from saeflow.jobs.job import Job
from saeflow.models.folder import ModelError, read_geometry
from saeflow.planning.expansion import compose
from saeflow.planning.graph import Plan
from saeflow.text.tokenizer import load_tokenizer

ROOT = Path(__file__).resolve().parents[2]
EXPERIMENT = "experiment=tracr_case3"


def planned(results: Path, *overrides: str) -> Plan:
    return compose(ROOT / "conf", [EXPERIMENT, *overrides], results=str(results))


def identity(hook: str, d: int, signs: tuple[float, ...] = (1.0,)) -> Dictionary:
    """The SAE whose latents are the directions of the residual stream, each with every sign."""
    W = torch.cat([sign * torch.eye(d) for sign in signs], 1)
    n = W.shape[1]
    spec = Spec(kind="sae", activation="relu", d_in=d, d_out=d, d_sae=n, hook_name=hook, hook_name_out=hook)
    return build(dataclasses.replace(spec, origin=Origin()), W, torch.zeros(n), W.T.contiguous(), torch.zeros(d))


# -------------------------------------------------------------------- the plan
def test_experiment_has_seven_models_that_share_their_tokens(tmp_path: Path) -> None:
    plan = planned(tmp_path)
    found = {stage: len(table) for stage, table in plan.stages.items() if table}
    assert found == {
        "groundtruth": 7, "tokens": 2, "activations": 28, "train": 44, "recover": 44, "figures": 1,
    }  # fmt: skip
    made = set(plan.stages["groundtruth"])
    for stage in ("activations", "recover"):
        assert {i.needs["groundtruth"][0] for i in plan.stages[stage].values()} == made
    assert len({json.dumps(i.needs["tokens"]) for i in plan.stages["activations"].values()}) == 1


@pytest.mark.parametrize(
    ("override", "stages"),
    [
        ("model.tracr.lr=0.02", {"groundtruth": 6, "activations": 24, "train": 32, "recover": 32, "figures": 1}),
        ("dictionary.l1_coefficient=0.2", {"train": 44, "recover": 44, "figures": 1}),
        ("device=cuda", {}),
    ],
)
def test_an_edit_changes_exactly_its_descendants(tmp_path: Path, override: str, stages: dict[str, int]) -> None:
    """The compiled model does not depend on how others are trained."""
    before, after = planned(tmp_path), planned(tmp_path, override)
    changed = {s: len(t.keys() - before.stages[s].keys()) for s, t in after.stages.items()}
    assert {s: n for s, n in changed.items() if n} == stages


@pytest.mark.parametrize(
    ("override", "says"),
    [
        ("tokens.context_size=6", "set tokens.context_size=5"),
        ("tokens.train_tokens=100", "set tokens.train_tokens=1600"),
        ("model.tracr.case=5", "there is no case 5"),
        ("model.fold_ln=true", "have no norms"),
        ("corpus=embedded", "use model=tracr with corpus=tracr"),
        ("site.hook_name=blocks.2.hook_mlp_out", "layer 2 is out of range"),
        ("site.hook_name=blocks.0.mlp.hook_post", "no variables are known at"),
    ],
)
def test_what_a_case_does_not_have_is_refused_by_the_plan(tmp_path: Path, override: str, says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        planned(tmp_path, "sweep=[{model.tracr.seed:[0]}]", override)


def published(folder: Path) -> tuple[Path, Network]:
    """A folder as InterpBench publishes them, of a model of case 3 with random weights."""
    config = small_config(get_case(3))
    weights = initial_weights(config, 5)
    return publish(folder, config, weights), Network(config, weights)


def test_a_published_model_and_a_dictionary_from_elsewhere(tmp_path: Path) -> None:
    """Neither is trained; what the program says, and which node stands for what, is written beside the labels."""
    from saeflow.dictionaries.foreign import foreign_job
    from saeflow.groundtruth.job import make_model, recover_jobs, write_case_rows

    folder, network = published(tmp_path / "published")
    hook, made = "blocks.0.hook_mlp_out", identity("blocks.0.hook_mlp_out", 12, (1.0, -1.0))
    (tmp_path / "theirs").mkdir()
    save_dictionary(made, tmp_path / "theirs")
    sweep = f"sweep=[{{model.tracr.method:published,model.tracr.path:{folder},site.hook_name:{hook}}}]"
    elsewhere = ["dictionary=foreign", f"dictionary.path={tmp_path / 'theirs'}"]
    plan = planned(tmp_path / "results", sweep, *elsewhere)
    counts = {stage: len(table) for stage, table in plan.stages.items() if table}
    assert counts == {"groundtruth": 1, "tokens": 2, "activations": 1, "foreign": 1, "recover": 1, "figures": 1}
    ((_, instance),) = plan.stages["groundtruth"].items()
    assert set(instance.config["tracr"]) == {"case", "method", "content"}  # whatever the folder is called

    def jobs(stage: str) -> list[Job]:
        return [Job(one, plan, "cpu") for one in plan.stages[stage].values()]

    with pytest.MonkeyPatch.context() as patch:  # of 102,400 pairs some are enough here
        patch.setattr("saeflow.groundtruth.training.pairs", lambda n_rows: pairs(n_rows, 500))
        assert "published: accuracy" in make_model(jobs("groundtruth")[0])
    for job in jobs("tokens"):
        write_case_rows(job)
    foreign_job(jobs("foreign")[0])
    (summary,) = recover_jobs(jobs("recover"))
    assert (summary["method"], summary["source"], summary["fvu"]) == ("published", "theirs", pytest.approx(0, abs=1e-9))
    case, opened = read_model(plan.folder("groundtruth", instance.key))
    tokens = torch.from_numpy(case.rows())
    torch.testing.assert_close(opened(tokens).output, network(tokens).output)
    effects = pd.read_parquet(plan.folder("groundtruth", instance.key) / "effects.parquet")
    assert len(effects) == 10 and effects["on_circuit"].sum() == 2
    folder_of = plan.folder("recover", next(iter(plan.stages["recover"])))
    truth = pd.read_parquet(folder_of / "truth.parquet")
    np.testing.assert_array_equal(truth["label"], case.labels(case.rows()).ravel())
    words = [str(case.program.vocabulary[t]) for t in case.rows().ravel()]
    assert truth["token"].tolist() == words
    after_bos = truth["position"] > 0
    assert (truth["variable_is_x"] == (truth["token"] == "x"))[after_bos].all()
    of = pd.read_parquet(folder_of / "nodes.parquet").set_index("variable")
    assert of.loc["is_x", "hook"] == "blocks.0.mlp.hook_post" and of.loc["frac_prevs", "node"] == "blocks.1.attn.2"
    assert of.loc["tokens", "hook"] == "hook_embed" and len(of.loc["tokens", "directions"]) == 6
    labels = pd.read_parquet(folder_of / "labels.parquet")
    assert (labels["f1_states"] >= labels["f1_states_chance"]).mean() > 0.5 and labels["states"].notna().all()
    renamed = folder.rename(tmp_path / "renamed")
    again = planned(tmp_path / "results", sweep.replace(str(folder), str(renamed)), *elsewhere)
    assert list(again.stages["recover"]) == list(plan.stages["recover"])


def test_a_folder_that_is_no_model_of_the_case_is_refused_by_the_plan(tmp_path: Path) -> None:
    folder, _ = published(tmp_path / "published")
    for settings, message in (
        (["path:null", "method:published"], "model.tracr.path=None is out of range: it must be the folder of a model"),
        ([f"path:{folder}", "method:siit"], "null with all others"),
        (["path:/none", "method:published"], "model.tracr.path=/none: no such folder"),
        ([f"path:{tmp_path}", "method:published"], "has no ll_model_cfg.pkl: it is no folder of a model"),
        ([f"path:{folder}", "method:published", "case:4"], "is no model of case 4: it has n_ctx 5 for 10"),
    ):
        sweep = ",".join(f"model.tracr.{setting}" for setting in settings)
        size = ["tokens.context_size=10"] if "case:4" in settings else []
        with pytest.raises(ConfigError, match=message):
            planned(tmp_path, f"sweep=[{{{sweep}}}]", *size)
    assert tuple(ACTIVATIONS) == READ


@torch.no_grad()
@pytest.mark.parametrize("number", [3, 12])
def test_effects_of_nodes_are_those_of_hooked_passes(number: int) -> None:
    case = get_case(number)
    config = small_config(case)
    weights = initial_weights(config, 3)
    truth, found = Truth(case, case.rows(40)), align(case, config)
    network, model = Network(config, weights), hooked_transformer(config, weights)
    base, source = np.random.default_rng(0).integers(0, len(truth.rows), (2, 2000))
    table = node_effects(network, truth, found, base, source).set_index("node")
    assert list(table["on_circuit"]) == [True] * len(found.on_circuit) + [False] * len(found.off_circuit)
    tokens = torch.from_numpy(truth.rows)
    clean, cache = model.run_with_cache(tokens)
    labels = case.labels(truth.rows)
    for node in (*list(found.on_circuit)[:2], *found.off_circuit[-2:]):
        hook = f"blocks.{node.layer}." + ("mlp.hook_post" if node.head is None else "attn.hook_z")
        at = slice(None) if node.head is None else np.s_[:, :, node.head]

        def effect(rows: np.ndarray, value: torch.Tensor, counted: np.ndarray) -> float:
            def put(old: torch.Tensor, hook: Any) -> torch.Tensor:
                old[at] = value  # noqa: B023
                return old

            output = model.run_with_hooks(tokens[rows], fwd_hooks=[(hook, put)])  # noqa: B023
            if number == 3:
                changed = (output - clean[rows])[..., 0].abs() >= case.tolerance
            else:
                changed = output.argmax(-1) != clean[rows].argmax(-1)
            return changed.numpy()[:, 1:][counted[:, 1:]].mean()

        values, says, every = cache[hook][at], np.ones_like(labels, dtype=bool), np.arange(len(tokens))
        says = says if number == 3 else labels >= 0
        apart = np.abs(labels[base] - labels[source]) >= (case.tolerance if number == 3 else 1)
        both = apart & says[base] & says[source]
        assert table.loc[node.name, "resample"] == pytest.approx(effect(base, values[source], both), abs=2e-3)
        assert table.loc[node.name, "zero"] == pytest.approx(effect(every, torch.tensor(0.0), says), abs=2e-3)
        mean = values.mean((0, 1))
        assert table.loc[node.name, "mean"] == pytest.approx(effect(every, mean, says), abs=2e-3)
    assert table[["resample", "zero", "mean"]].max(axis=None) > 0.1


def test_nodes_of_a_model_that_is_the_program_have_the_effects_of_their_variables() -> None:
    """Case 3, compiled: its MLP and its head decide the output, and no other node does anything."""
    case = get_case(3)
    truth = Truth(case, case.rows())
    network = Network(case.compiled.config, case.compiled.weights)
    on = {Node(0): ("is_x",), Node(1, 0): ("frac_prevs",)}
    table = node_effects(network, truth, Alignment(on, (Node(0, 0), Node(1))), *pairs(len(truth.rows)))
    assert table["resample"].tolist() == [1.0, 1.0, 0.0, 0.0]
    nonzero = (case.labels(truth.rows)[:, 1:] > 0).mean()
    assert table["zero"].tolist() == [nonzero, nonzero, 0.0, 0.0]


# -------------------------------------------------------------------- the folder
def test_folder_holds_the_model(tmp_path: Path) -> None:
    case = get_case(4)
    config = small_config(case)
    weights = initial_weights(config, 3)
    write_model(tmp_path, case, config, weights, {"accuracy": 1.0})
    found, network = read_model(tmp_path)
    assert found is case
    tokens = torch.from_numpy(case.rows(10))
    torch.testing.assert_close(network(tokens).output, Network(config, weights)(tokens).output, rtol=0, atol=0)
    torch.testing.assert_close(load_hooked(tmp_path)(tokens), network(tokens).output, rtol=1e-5, atol=1e-5)
    tokenizer = load_tokenizer(tmp_path)
    row = case.rows(1)[0]
    words = " ".join(str(case.program.vocabulary[i]) for i in row)
    assert tokenizer.tokenizer.encode(words).ids == row.tolist()
    assert [tokenizer.tokenizer.decode([i], False) for i in row] == words.split()
    assert tokenizer.bos_token_id == row[0]
    geometry = read_geometry(tmp_path)
    assert (geometry.n_layers, geometry.d_head, geometry.n_ctx) == (config["n_layers"], config["d_head"], 10)
    (tmp_path / "model.safetensors").write_bytes(b"no")
    with pytest.raises(ModelError, match="is damaged"):
        read_model(tmp_path)


# -------------------------------------------------------------------- what replacing does
@pytest.mark.parametrize("hook", [f"blocks.{i % 2}.{hook}" for i, hook in enumerate(HOOKS)])
def test_replacement_is_that_of_a_hook_in_transformer_lens(hook: str) -> None:
    case = get_case(4)
    config, truth = small_config(case), Truth(case, case.rows(50))
    weights = initial_weights(config, 0)
    network, model = Network(config, weights), hooked_transformer(config, weights)
    tokens = torch.from_numpy(truth.rows)
    value = torch.randn(50, 10, config["d_model"], generator=torch.Generator().manual_seed(0))
    clean = network(tokens)
    torch.testing.assert_close(clean.at(hook), model.run_with_cache(tokens)[1][hook], rtol=1e-4, atol=1e-5)
    wanted = model.run_with_hooks(tokens, fwd_hooks=[(hook, lambda v, hook: value)])
    torch.testing.assert_close(network.spliced(clean, hook, value), wanted, rtol=1e-4, atol=1e-4)


def test_truth_is_faithful_and_nothing_is_not() -> None:
    case = get_case(3)
    truth = Truth(case, case.rows())
    network = Network(case.compiled.config, case.compiled.weights)
    hook = "blocks.0.hook_mlp_out"
    found = faithfulness(network, truth, identity(hook, 13))
    assert found["accuracy_clean"] == found["accuracy_replaced"] == 1.0
    labels = case.labels(truth.rows)[:, 1:]
    assert found["error_zero"] == pytest.approx((labels**2).mean(), rel=1e-5)  # 0.1582 of the reference
    assert found["error_zero"] == pytest.approx(0.1582, abs=5e-5)
    assert found["accuracy_zero"] == pytest.approx((labels == 0).mean())
    assert found["fvu"] == pytest.approx(0, abs=1e-12)
    for name in ("zero", "mean", "resample"):
        assert found[f"error_recovered_{name}"] == pytest.approx(1, abs=1e-6)
        assert found[f"accuracy_recovered_{name}"] == pytest.approx(1)
    dead = identity(hook, 13)
    dead.b_enc.fill_(-10.0)
    found = faithfulness(network, truth, dead)
    assert found["error_replaced"] == found["error_zero"] and found["error_recovered_zero"] == 0.0


@pytest.mark.parametrize(
    ("number", "hook", "variables"),
    [
        (3, "blocks.1.hook_attn_out", {"frac_prevs": 1}),
        (3, "blocks.0.hook_mlp_out", {"is_x": 1}),
        (3, "blocks.1.hook_resid_pre", {"tokens": 3, "is_x": 2}),
        (12, "blocks.1.hook_mlp_out", {"ab_before": 2}),
        (12, "blocks.1.hook_attn_out", {"a_two_ago": 2, "b_one_ago": 2}),
        (4, "blocks.1.hook_mlp_out", {"balance": 2}),
    ],
)
def test_iia_through_the_truth_is_perfect(number: int, hook: str, variables: dict[str, int]) -> None:
    """Latents that are directions carry their variable and nothing else; in case 3 latent `tokens:x` fires as `is_x`
    does, and goes to the later of the two. Both signs: a number below 0 needs a latent of its own."""
    case = get_case(number)
    truth = Truth(case, case.rows(300))
    config = case.compiled.config
    network = Network(config, case.compiled.weights)
    found = interchange_accuracy(network, truth, identity(hook, config["d_model"], (1.0, -1.0)))
    assert found["iia_all"] == 1.0
    for name, least in variables.items():
        assert found[f"latents_{name}"] >= least
        if (number, hook, name) != (3, "blocks.1.hook_resid_pre", "is_x"):
            assert found[f"iia_{name}"] == 1.0, name


# -------------------------------------------------------------------- derivatives
def transcoder_of(network: Network, layer: int) -> Dictionary:
    """The MLP itself as a transcoder: a latent a hidden unit."""
    p = {name.split(".")[-1]: w for name, w in network.parameters.items() if name.startswith(f"blocks.{layer}.mlp.")}
    d, m = p["W_in"].shape
    hooks = {"hook_name": f"blocks.{layer}.hook_resid_mid", "hook_name_out": f"blocks.{layer}.hook_mlp_out"}
    spec = Spec(kind="transcoder", activation="relu", d_in=d, d_out=d, d_sae=m, **hooks)
    return build(spec, *(p[name].clone() for name in ("W_in", "b_in", "W_out", "b_out")))


@pytest.mark.parametrize(("number", "layer"), [(12, 1), (12, 2), (13, 0), (4, 1)])
def test_jacobian_of_the_mlp_itself_is_the_truth_and_of_random_latents_is_not(number: int, layer: int) -> None:
    case = get_case(number)
    network = Network(case.compiled.config, case.compiled.weights)
    clean = network(torch.from_numpy(case.rows(100)))
    found = compare_jacobians(network, clean, transcoder_of(network, layer))
    assert found["jacobian_cosine"] == pytest.approx(1, abs=1e-5) and found["jacobian_error"] < 1e-9
    other = transcoder_of(network, layer)
    other.W_enc.copy_(torch.randn(other.W_enc.shape, generator=torch.Generator().manual_seed(0)))
    assert compare_jacobians(network, clean, other)["jacobian_cosine"] < 0.7
    assert compare_jacobians(network, clean, identity("blocks.0.hook_mlp_out", case.compiled.config["d_model"])) == {}


def around_mlp(d: int, layer: int = 0, **fields: Any) -> list[Spec]:
    hooks = (f"blocks.{layer}.hook_resid_mid", f"blocks.{layer}.hook_mlp_out")
    return [Spec(kind="sae", d_in=d, d_out=d, hook_name=hook, hook_name_out=hook, **fields) for hook in hooks]


@pytest.mark.parametrize(("number", "layer"), [(12, 1), (13, 0), (4, 1)])
def test_jacobian_of_the_true_pair_is_all_that_a_pair_can_have(number: int, layer: int) -> None:
    case = get_case(number)
    network = Network(case.compiled.config, case.compiled.weights)
    clean = network(torch.from_numpy(case.rows(100)))
    d, known = case.compiled.config["d_model"], true_jacobians(network, clean, layer)
    hooks = (f"blocks.{layer}.hook_resid_mid", f"blocks.{layer}.hook_mlp_out")
    input, output = (identity(hook, d, (1.0, -1.0)) for hook in hooks)
    found = compare_jacobians(network, clean, output, input)
    assert found["jacobian_cosine"] == pytest.approx(known["jacobian_cosine_directions"], abs=1e-5)
    assert known["jacobian_cosine_directions"] > 0.3
    assert 1 <= found["effective_inputs"] <= known["effective_inputs_true"] + 1e-6  # some inputs are at 0
    g = torch.Generator().manual_seed(0)
    input.W_enc.copy_(torch.randn(input.W_enc.shape, generator=g))
    input.W_dec.copy_(input.W_enc.T / d)
    assert compare_jacobians(network, clean, output, input)["jacobian_cosine"] < found["jacobian_cosine"] - 0.1


def test_jacobian_through_a_pair_matches_autograd_and_the_kernel() -> None:
    """Chain of the input SAE at x, the MLP at x, and the output SAE at what the MLP gives, against the sparse Jacobian
    of the study put between encoder and decoder."""
    from saeflow.jacobians.maps import Pair
    from saeflow.models.blocks import MLP, Block

    case = get_case(13)
    config = small_config(case)
    network, d = Network(config, initial_weights(config, 0)), config["d_model"]
    clean = network(torch.from_numpy(case.rows(20)))
    g = torch.Generator().manual_seed(0)

    def random(spec: Spec) -> Dictionary:
        W_enc, b_enc, W_dec, b_dec = (torch.randn(size, generator=g) for size in ((d, 60), (60,), (60, d), (d,)))
        return build(spec, W_enc, b_enc, W_dec / 8, b_dec)

    input, output = (random(spec) for spec in around_mlp(d, activation="topk", k=5, d_sae=60))
    x, y = (clean.at(dictionary.spec.hook_name).flatten(0, 1) for dictionary in (input, output))
    J = mlp_jacobians(network, 0, x)
    found = dictionary_jacobians(input, x) @ J @ dictionary_jacobians(output, y)

    p = {name.split(".")[-1]: w for name, w in network.parameters.items() if name.startswith("blocks.0.mlp.")}
    blocks = list(Pair(Block(MLP(config["act_fn"], **p)), input, output).blocks([x, y]))
    sparse = torch.zeros(len(x), 60, 60)
    for some, J_k, inputs, outputs, *_ in blocks:
        there = torch.arange(len(x))[some, None, None]
        sparse[there, outputs[:, :, None], inputs[:, None]] = J_k
    wanted = torch.einsum("in,Mmn,mo->Mio", input.W_enc, sparse, output.W_dec)
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)

    jacobian = torch.autograd.functional.jacobian
    for i in range(3):
        by_input = jacobian(lambda v: input.forward(v[None])[0], x[i]).T
        by_output = jacobian(lambda v: output.forward(v[None])[0], y[i]).T
        torch.testing.assert_close(found[i], by_input @ J[i] @ by_output, rtol=1e-4, atol=1e-4)


def test_known_jacobians_are_as_sparse_as_their_blocks() -> None:
    """A linear map of two numbers has two inputs where both hidden units of a sign are on; a pair map three: x_i, y_j
    and `one`, with weights of equal size."""
    found = {}
    for number, layer in ((4, 1), (13, 0)):
        case = get_case(number)
        network = Network(case.compiled.config, case.compiled.weights)
        x = network(torch.from_numpy(case.rows(100))).at(f"blocks.{layer}.hook_resid_mid").flatten(0, 1)
        found[number] = effective_inputs(mlp_jacobians(network, layer, x))
    assert 1 < found[4] <= 2 + 1e-6
    assert found[13] == pytest.approx(3, abs=0.1)  # at some positions what attention leaks turns a unit on


def test_mlp_jacobians_match_autograd_float64() -> None:
    case = get_case(4)
    config = small_config(case)
    network = Network(config, initial_weights(config, 0), torch.float64)
    x = network(torch.from_numpy(case.rows(3))).at("blocks.1.hook_resid_mid").flatten(0, 1)[:7]
    found = mlp_jacobians(network, 1, x)
    for row, J in zip(x, found, strict=True):

        def mlp(v: torch.Tensor) -> torch.Tensor:
            return network._mlp_out(network._hidden(v[:, None, None], 1), 1)[:, 0, 0]

        torch.testing.assert_close(J, torch.autograd.functional.jacobian(mlp, row).T, rtol=1e-10, atol=1e-12)


# -------------------------------------------------------------------- the jobs
@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[Plan, str]:
    """All jobs of a small run on the compiled model, one after the other, and the last line of the figures."""
    from saeflow.activations.caching import cache_jobs
    from saeflow.figures.job import draw
    from saeflow.groundtruth.job import make_model, recover_jobs, write_case_rows
    from saeflow.training.loop import train

    around = "model.tracr.method:compiled,site:mlp_before_norm,site.layer:0"
    pair = "dictionary:jacobian,dictionary.k:4,dictionary.l1_coefficient:null,dictionary.squared_error:mean"
    plan = planned(
        tmp_path_factory.mktemp("truth"),
        "sweep=[{model.tracr.method:compiled,site.hook_name:[blocks.0.hook_resid_pre,blocks.1.hook_attn_out]},"
        f"{{dictionary:transcoder,{around}}},{{{pair},dictionary.jacobian_coefficient:[0,1],{around}}}]",
        "training.n_tokens=40_000",
        "training.revive=none",
        "dictionary.apply_b_dec_to_input=true",
        "training.initial=saeflow",
        "jacobian.n_tokens=1280",
        "figures=[recovery,true_jacobian,training_curves,latents_by_state]",
    )

    def jobs(stage: str) -> list[Job]:
        return [Job(instance, plan, "cpu") for instance in plan.stages[stage].values()]

    for job in jobs("groundtruth"):
        make_model(job)
    for job in jobs("tokens"):
        write_case_rows(job)
    cache_jobs(jobs("activations"))
    for job in jobs("train"):
        train([job])
    recover_jobs(jobs("recover"))
    (figures,) = jobs("figures")
    return plan, draw([figures])


def test_jobs_write_what_they_should(finished: tuple[Plan, str]) -> None:
    plan, said = finished
    assert "wrote recovery" in said
    for stage, table in plan.stages.items():
        assert stage == "jacobian" or all(plan.done(stage, key) for key in table), stage  # it was not run
    (folder,) = (plan.folder("figures", key) for key in plan.stages["figures"])
    for name in ("recovery", "true_jacobian", "training_curves", "latents_by_state"):
        assert (folder / f"{name}.png").stat().st_size > 10_000
    identity = ["place", "hook_name_out", "case", "method", "model", "model_seed", "series", "amount_name"]
    identity += ["amount", "d_sae", "seed", "train_key", "part"]
    shown = [
        "l0",
        "fvu",
        "recovery",
        "recovery_raw",
        "recovery_random",
        "decoder_cosine",
        "mixtures",
        "mixtures_random",
    ]
    assert list(pd.read_csv(folder / "recovery.csv")) == [*identity, *shown]
    cosines = ["jacobian_cosine", "jacobian_cosine_directions"]
    assert list(pd.read_csv(folder / "true_jacobian.csv")) == [*identity, "l0", "fvu", *cosines]
    assert len(pd.read_csv(folder / "stability.csv").columns) == 11
    assert len(pd.read_csv(folder / "recovery_ranges.csv")) == 7
    table = pd.read_csv(folder / "recoveries.csv")
    assert sorted(table["part"].dropna()) == ["input", "input", "output", "output"] and len(table) == 2 + 1 + 4
    assert set(table["train_key"]) == set(plan.stages["train"])
    compared = table[table["jacobian_cosine"].notna()]
    assert sorted(compared["jacobian_coefficient"].fillna(-1)) == [-1, 0, 1]  # a transcoder, and each pair once
    assert (compared["jacobian_cosine"] > 0.5).all() and (compared["jacobian_cosine_directions"] > 0.5).all()
    for key in plan.stages["recover"]:
        folder = plan.folder("recover", key)
        summary = json.loads((folder / "summary.json").read_text())
        labels, contexts = (pd.read_parquet(folder / f"{name}.parquet") for name in ("labels", "contexts"))
        assert summary["n_live"] == len(labels) == contexts["latent"].nunique() > 0
        assert summary["accuracy_clean"] == 1.0 and -1 <= summary["recovery"] <= 1 + 1e-9
        assert labels["label"].notna().all()
        assert "<h2" in (folder / "latents.html").read_text()
        states = pd.read_parquet(folder / "states.parquet")
        assert set(states["latent"]) == set(labels["latent"])
        groups = json.loads((folder / "duplicates.json").read_text())
        assert summary["n_live"] - summary["n_distinct"] == sum(len(g) - 1 for g in groups["firing_and_writing"])
        assert summary["n_live"] - summary["n_distinct_firing"] == sum(len(g) - 1 for g in groups["firing"])
        assert summary["mse"] >= 0 and summary["l1"] > 0


def test_tables_of_sweeps_have_the_range_over_seeds(finished: tuple[Plan, str]) -> None:
    from saeflow.groundtruth.figures import RANGED, ranges_table, read_recoveries

    plan, _ = finished
    (figures,) = plan.stages["figures"].values()
    table = read_recoveries(Job(figures, plan, "cpu")).table
    once = ranges_table(table)
    assert (once["n"] == 1).all() and len(once) == len(table)
    others = [
        table.assign(recovery=table["recovery"] + seed, settings=[held | {"seed": seed} for held in table["settings"]])
        for seed in (0, 1, 5)
    ]
    found = ranges_table(pd.concat(others))
    assert (found["n"] == 3).all() and found["place"].tolist() == once["place"].tolist()
    for name in RANGED:
        move = (2, 0, 5) if name == "recovery" else (0, 0, 0)  # of mean, least, largest
        for end, by in zip(("", "_low", "_high"), move, strict=True):
            np.testing.assert_allclose(found[name + end], once[name] + by, rtol=1e-12)
    assert {*found["amount"].dropna()} == {*table["amount"].dropna()}


def test_both_splits_hold_all_rows_of_the_case(finished: tuple[Plan, str]) -> None:
    from saeflow.text.tokens import open_tokens

    plan, _ = finished
    for key in plan.stages["tokens"]:
        store = open_tokens(plan.folder("tokens", key))
        np.testing.assert_array_equal(store[:], get_case(3).rows())
        assert store.attributes["prepend_bos"] and store.attributes["case"] == 3


def test_training_reshuffles_finite_data_each_pass(finished: tuple[Plan, str]) -> None:
    from saeflow.activations.reader import BatchReader
    from saeflow.activations.store import open_column

    plan, _ = finished
    column = open_column(plan.folder("activations", next(iter(plan.stages["activations"]))))
    (passes,) = [[torch.cat([b for (b,) in reader.iterate(20 * i, 20)]) for i in (0, 1)]
                 for reader in [BatchReader([column], 80, 0)]]  # fmt: skip
    first, second = (set(map(tuple, p.tolist())) for p in passes)
    assert first == second and not torch.equal(*passes)


def test_dictionary_of_another_model_is_refused(finished: tuple[Plan, str]) -> None:
    from saeflow.dictionaries.fitting import FitError
    from saeflow.groundtruth.job import recover_jobs

    plan, _ = finished
    instance = next(iter(plan.stages["recover"].values()))
    config: dict[str, Any] = instance.config | {"model": instance.config["model"] | {"weights": "another"}}
    with pytest.raises(FitError, match="was trained on the model"):
        recover_jobs([Job(dataclasses.replace(instance, config=config), plan, "cpu")])
