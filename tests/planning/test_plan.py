"""The plan alone: which edits change which keys. That Snakemake agrees is in test_workflow.py."""

import shutil
from collections.abc import Iterable
from pathlib import Path

import pytest
from conftest import write_plain_model
from stores import write_receipt

from saeflow.config import ConfigError
from saeflow.planning.expansion import compose
from saeflow.planning.graph import Plan
from saeflow.planning.stages import stages

ROOT = Path(__file__).resolve().parents[2]
SWEEP = "sweep={dictionary:relu,dictionary.l1_coefficient:[0.001,0.003]}"
TRANSCODER = ["dictionary=transcoder", "site=mlp"]


@pytest.fixture
def home(tmp_path: Path) -> Path:
    """A copy of conf/ with a tiny model folder of its own, to edit. The plan reads sizes and bytes, not tensors."""
    shutil.copytree(ROOT / "conf", tmp_path / "conf")
    config = {
        "architectures": ["GPTNeoXForCausalLM"],
        "num_hidden_layers": 4,
        "hidden_size": 128,
        "num_attention_heads": 4,
        "intermediate_size": 512,
        "max_position_embeddings": 256,
    }
    write_plain_model(tmp_path / "resources" / "model", config)
    shutil.copy(ROOT / "resources" / "corpus.jsonl.gz", tmp_path / "resources")
    return tmp_path


def plan_of(home: Path, *overrides: str) -> Plan:
    return compose(home / "conf", [SWEEP, *overrides], results=str(home / "results"), digests=home / "digests.json")


def finish(plan: Plan, stage: str, keys: Iterable[str]) -> None:
    """Receipts of artifacts that were never made: the plan asks for no more."""
    for key in keys:
        instance, folder = plan.stages[stage][key], plan.folder(stage, key)
        folder.mkdir(parents=True, exist_ok=True)
        instance.write_config(folder / "config.yaml")
        write_receipt(folder, stage, instance.needs)


def changed(before: Plan, after: Plan) -> dict[str, int]:
    """How many instances of each stage are new."""
    return {s: n for s in stages() if (n := len(after.stages[s].keys() - before.stages[s].keys()))}


def test_stages_of_a_sweep(home: Path) -> None:
    plan = plan_of(home)
    assert {s: len(t) for s, t in plan.stages.items()} == {
        "groundtruth": 0,
        "tokens": 2,
        "activations": 1,
        "train": 2,
        "foreign": 0,
        "jacobian": 0,
        "baseline": 1,
        "evaluate": 2,
        "stack": 0,
        "heads": 0,
        "features": 0,
        "dashboards": 0,
        "comparisons": 0,
        "blind": 0,
        "recover": 0,
        "circuits": 0,
        "greater_than": 0,
        "figures": 1,
    }


def test_one_more_l1_value_is_one_training_one_evaluation_and_the_figures(home: Path) -> None:
    after = compose(home / "conf", [SWEEP.replace("0.003", "0.003,0.01")], results=str(home / "results"))
    assert changed(plan_of(home), after) == {"train": 1, "evaluate": 1, "figures": 1}


@pytest.mark.parametrize(
    ("override", "stages"),
    [
        ("device=cuda", set()),
        ("device.train=cuda:1", set()),
        ("device.threads.train=7", set()),
        ("training.together=2", set()),
        ("dictionary.l1_coefficient=[1e-3,3.0e-3]", set()),
        ("evaluation.resamples=100", {"evaluate", "figures"}),
        ("evaluation.batch_rows=8", {"baseline", "evaluate", "figures"}),
        ("seed=1", {"train", "evaluate", "figures"}),
        ("training.lr=0.01", {"train", "evaluate", "figures"}),
        ("activations.dtype=float16", {"activations", "train", "baseline", "evaluate", "figures"}),
        ("model.fold_ln=true", {"activations", "train", "baseline", "evaluate", "figures"}),
        ("model.randomise=reinit", {"activations", "train", "baseline", "evaluate", "figures"}),
        ("model.randomise_seed=1", set()),  # of nothing
        ("tokens.context_size=128", {"tokens", "activations", "train", "baseline", "evaluate", "figures"}),
        ("tokens.prepend_bos=false", {"tokens", "activations", "train", "baseline", "evaluate", "figures"}),
        ("tokens.train_tokens=100_000", {"tokens", "activations", "train", "baseline", "evaluate", "figures"}),
        ("tokens.held_out_tokens=10_000", {"tokens", "baseline", "evaluate", "figures"}),
        ("jacobian.bins=10", set()),
    ],
)
def test_an_edit_renews_exactly_its_descendants(home: Path, override: str, stages: set[str]) -> None:
    assert changed(plan_of(home), plan_of(home, override)).keys() == stages


def test_stacks_are_of_dictionaries_that_differ_in_the_layer_alone(home: Path) -> None:
    def of(stacks: str) -> Plan:
        overrides = [sweep, f"stacks={stacks}"]
        return compose(home / "conf", overrides, results=str(home / "results"), digests=home / "digests.json")

    sweep = "sweep={dictionary:transcoder,site:mlp,site.layer:[0,1,3],dictionary.l1_coefficient:[1,2]}"
    plan = of("[all,all_but_first,inner,[0,3]]")
    wanted = {(layers, l1) for layers in ("[0, 1, 3]", "[1, 3]", "[1]", "[0, 3]") for l1 in (1.0, 2.0)}
    found = set()
    for instance in plan.stages["stack"].values():
        trained = [plan.stages["train"][key].config for key in instance.needs["train"]]
        (l1,) = {c["dictionary"]["l1_coefficient"] for c in trained}
        assert [c["hook_name_out"] for c in trained] == [f"blocks.{n}.hook_mlp_out" for n in instance.config["layers"]]
        found.add((str(instance.config["layers"]), l1))
    assert found == wanted and len(plan.stages["stack"]) == 8
    alone = of("[]")
    assert alone.stages["evaluate"] == plan.stages["evaluate"]
    with pytest.raises(ConfigError, match=r"stacks: .2. needs layers .2.; dictionaries are of layers .0, 1, 3."):
        of("[[2]]")
    with pytest.raises(ConfigError, match="stacks: 'most' is none of all, all_but_first"):
        of("[most]")


def test_cosmetic_edits_of_the_configuration_change_nothing(home: Path) -> None:
    before = plan_of(home)
    file = home / "conf" / "dictionary" / "relu.yaml"
    lines = [line for line in file.read_text().splitlines() if line]
    file.write_text("# a comment\n" + "\n".join(reversed(lines)).replace("kind: sae", 'kind:   "sae"  # quoted') + "\n")
    assert plan_of(home) == before


def test_one_bit_of_the_weights_renews_everything_that_reads_them(home: Path) -> None:
    before = plan_of(home)
    weights = home / "resources" / "model" / "model.safetensors"
    held = bytearray(weights.read_bytes())
    held[500] ^= 1
    weights.write_bytes(held)
    assert changed(before, plan_of(home)).keys() == {"activations", "train", "baseline", "evaluate", "figures"}


def test_the_place_of_model_and_corpus_is_not_read(home: Path) -> None:
    before = plan_of(home)
    shutil.copytree(home / "resources", home / "elsewhere")
    moved = plan_of(home, f"model.path={home}/elsewhere/model", f"corpus.path={home}/elsewhere/corpus.jsonl.gz")
    assert changed(before, moved) == {}


def test_more_tokens_grow_the_same_store(home: Path) -> None:
    stores = [
        {key.split("/")[0] for key in plan_of(home, f"tokens.train_tokens={n}").stages["activations"]}
        for n in (100_000, 200_000)
    ]
    assert stores[0] == stores[1]


def test_transcoder_reads_two_columns_of_one_store(home: Path) -> None:
    plan = plan_of(home, *TRANSCODER, "sweep=null")
    (instance,) = plan.stages["train"].values()
    columns = instance.needs["activations"]
    assert [plan.instance("activations", c).config["hook_name"] for c in columns] == [
        "blocks.2.ln2.hook_normalized",
        "blocks.2.hook_mlp_out",
    ]
    assert len({c.split("/")[0] for c in columns}) == 1


def test_pair_shares_its_dictionaries_with_a_sweep(home: Path) -> None:
    union = "sweep=[{dictionary:topk,site:mlp_out,dictionary.k:[8,16]},{dictionary:pair,site:mlp,dictionary.k:16}]"
    plan = compose(home / "conf", [union])
    assert len(plan.stages["train"]) == 3  # k=8 and k=16 behind the MLP, k=16 before it
    (pair,) = plan.stages["jacobian"].values()
    assert len(pair.needs["train"]) == 2


def test_each_arm_of_a_model_has_weights_of_its_own(home: Path) -> None:
    plan = plan_of(home, "model.randomise=[none,reinit,permuted]", "model.randomise_seed=[0,1]")
    assert len(plan.stages["activations"]) == 5 and len(plan.stages["tokens"]) == 2
    models = [i.config["model"] for i in plan.stages["activations"].values()]
    assert len({m["weights"] for m in models}) == 5
    assert sorted(m.get("randomise", "none") for m in models) == ["none", "permuted", "permuted", "reinit", "reinit"]


def test_transcoders_are_studied_only_where_asked(home: Path) -> None:
    two = [*TRANSCODER, "sweep=null", "dictionary.l1_coefficient=[0.1,0.2]"]
    assert not plan_of(home, *two).stages["jacobian"]
    studies = plan_of(home, *two, "jacobian.transcoders=true").stages["jacobian"]
    assert len(studies) == 2 and all(len(s.needs["train"]) == 1 for s in studies.values())


def test_lists_span_the_product_of_every_kind_of_axis(home: Path) -> None:
    plan = plan_of(
        home, "sweep=null", "dictionary=topk,relu", "site=mlp_out,resid_post", "site.layer=[0,3]", "seed=[0,1]"
    )
    assert len(plan.stages["train"]) == 2 * 2 * 2 * 2
    assert len(plan.stages["activations"]) == 4


def test_a_value_derived_from_a_swept_one_follows_it(home: Path) -> None:
    plan = plan_of(home, "site.layer=[0,1,2,3]")
    hooks = {i.config["hook_name"] for i in plan.stages["activations"].values()}
    assert hooks == {f"blocks.{layer}.hook_mlp_out" for layer in range(4)}


def test_frozen_plan_is_the_plan(home: Path) -> None:
    plan = plan_of(home, "dictionary=pair,transcoder_topk", "site=mlp", "sweep=null")
    plan.freeze(home / "plan.json")
    assert Plan.load(home / "plan.json") == plan


def test_batches_hold_what_is_to_be_made_apart_from_what_is_there(home: Path) -> None:
    first = plan_of(home)
    (batch,) = first.batches["evaluate"]
    assert sorted(batch) == sorted(first.stages["evaluate"]) == sorted(first.to_make["evaluate"])
    finish(first, "evaluate", batch[:1])
    again = plan_of(home)
    assert again.batches["evaluate"] == [batch[1:], batch[:1]] and again.found["evaluate"] == batch[:1]
    assert again.members("evaluate", batch[0]) == batch[:1] and again.leaders["evaluate", batch[1]] == batch[1]
    small = plan_of(home, "device.batch.evaluate=1", "seed=5")
    assert sorted(map(len, small.batches["evaluate"])) == [1, 1]


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["dictionary.l2_coefficient=1"], "unknown key 'dictionary.l2_coefficient' .did you mean dictionary.l1_"),
        (["dictionnary=topk"], "unknown key 'dictionnary' .did you mean dictionary"),
        (
            ["dictionary=top"],
            "no config dictionary=top .did you mean topk.*; dictionary can be: batchtopk, concat, foreign",
        ),
        (["experiment=none_such"], "experiment can be: "),
        (["site.layer=4"], "layer 4 is out of range; the model has 4 layers, 0 to 3"),
        (
            ["site.hook_name=blocks.1.hook_mlp_outt"],
            "no hook 'blocks.1.hook_mlp_outt'; the nearest .* blocks.1.hook_mlp_out",
        ),
        (
            ["site.hook_name=blocks.1.hook_resid_mid"],
            "no hook 'blocks.1.hook_resid_mid': its attention and MLP are parallel",
        ),
        (
            ["sweep=null", "dictionary=transcoder", "site=mlp_with_residual"],
            "parallel, .* use site=mlp_before_norm site.hook_name=blocks.2.hook_resid_pre, for the MLP alone site=mlp",
        ),
        (["dictionary=jumprelu"], "no config dictionary=jumprelu .did you mean saelens/jumprelu.*kissane/concat"),
        (
            ["sweep=null", "dictionary=relu", "dictionary.k=8"],
            "dictionary.k is an option of .*topk.*, not of dictionary=relu, which has .*dictionary.l1_coefficient",
        ),
        (["experiment=demo", "experiment=stack"], "experiment is given twice; give one"),
        (["dictionary=topk", "dictionary=relu"], "dictionary is given twice; list all in one, dictionary=a,b"),
        (["experiment=demo,stack"], "one experiment can be given at a time"),
        (["experiment=[demo,stack]"], "one experiment can be given at a time"),
        (
            ["figures=[sparsity_faithfullness]"],
            "no figure is called sparsity_faithfullness; did you mean sparsity_faith",
        ),
        (["figures=[sparsity]"], "no figure is called sparsity; did you mean sparsity_faithfulness"),
        (["figures=[stacks,stacks]"], "stacks is given twice"),
        (["figures=sparsity_faithfulness"], r"a list belongs here: figures=\[sparsity_faithfulness\]"),
        (["figures=a,b"], r"a list needs brackets here: figures=\[a,b\]"),
        (["stacks=all"], r"a list belongs here: stacks=\[all\]"),
        (
            ["figures=[heads_norms]"],
            "heads_norms. shows what the stage heads makes, of which .* nothing; .*can be drawn: sp",
        ),
        (["training.lr_warm_up_steps=-5"], "training.lr_warm_up_steps=-5 is out of range: it must be 0 or more"),
        (["device.threads.train=0"], "device.threads.train=0 is out of range: it must be a whole number above 0"),
        (["site.layer=-1"], "site.layer=-1 is out of range"),
        (["experiment_name=a/b"], "experiment_name=a/b is out of range: it must be letters, digits"),
        (["corpus.path=no_such.txt"], "corpus.path=no_such.txt: no such file or folder in /.*, where the run is"),
        (["dictionary.l1_coefficient=-1"], "dictionary.l1_coefficient=-1.0 is out of range"),
        (["sweep=null", "dictionary=topk", "dictionary.k=0"], "dictionary.k=0 is out of range"),
        (["sweep=null", "dictionary=topk", "dictionary.k=2000"], "dictionary.k=2000 is more than d_sae=1024"),
        (["tokens.context_size=512"], "tokens.context_size=512 is longer than the model's context, 256"),
        (["tokens.train_tokens=10"], "tokens.train_tokens=10 is out of range: it must be one row"),
        (["sweep=null", "dictionary=transcoder"], "needs a site with hook_name and hook_name_out: use site=mlp"),
        (
            ["sweep=null", "dictionary=pair", "site=mlp", "jacobian.n_tokens=1_000_000"],
            "more than the 65280 held-out",
        ),
        (["sweep=null", "dictionary=pair", "site=mlp", "jacobian.norm=ignored"], "does not begin before the norm here"),
        (["site=mlp"], "dictionary.kind=sae reads one hook, but this site has two"),
        (["model.path=/no/such/folder"], "model.path=/no/such/folder: no such folder"),
        (["model=local"], "model.path has to be given: add model.path="),
        (["corpus.path=/no/such/file"], "corpus.path=/no/such/file: no such file or folder"),
        (["device.train=gpu"], "device.train=gpu: use cpu, cuda"),
        (["device.flops=fast"], "device.flops=fast: set it to floating-point operations a second"),
        (["training.n_tokens=many"], "training.n_tokens='many' must be of type int"),
        (["dictionary=topk"], "nothing is left of the sweep of experiment=default with dictionary=topk"),
        (["model=pythia-70m"], "model.hub=EleutherAI/pythia-70m-deduped is not in the local .* scripts/fetch.py"),
    ],
)
def test_what_cannot_run_is_refused_with_its_reason(home: Path, overrides: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        plan_of(home, *overrides)


def test_experiment_without_its_first_line_is_refused_by_name(home: Path) -> None:
    """Hydra would put all of it below `experiment`, and plan the default."""
    (home / "conf/experiment/mine.yaml").write_text("experiment_name: mine\ndictionary: {k: 4}\n")
    with pytest.raises(ConfigError, match=r"experiment/mine.yaml is read as a group .* `# @package _global_`"):
        compose(home / "conf", ["experiment=mine"])


def test_keys_of_an_experiment_that_nothing_reads_are_refused(home: Path) -> None:
    (home / "conf/experiment/mine.yaml").write_text("# @package _global_\nsweeps: {seed: [0, 1]}\n")
    with pytest.raises(ConfigError, match=r"a key 'sweeps' that nothing reads .did you mean sweep"):
        compose(home / "conf", ["experiment=mine"])


def test_figures_of_what_is_not_run_are_left_out_unless_asked_for(home: Path) -> None:
    """Part of the demo has no pair."""
    (drawn,) = compose(home / "conf", ["experiment=demo", "dictionary=relu"]).stages["figures"].values()
    assert "sparsity_faithfulness" in drawn.config["figures"] and "jacobian_histogram" not in drawn.config["figures"]
    with pytest.raises(ConfigError, match="jacobian_histogram"):
        compose(home / "conf", ["experiment=demo", "dictionary=relu", "figures=[jacobian_histogram]"])


@pytest.mark.parametrize(
    ("file", "message"),
    [
        ("model.safetensors", "has no weights: no .*safetensors"),
        ("tokenizer.json", "has no tokenizer.json; save it there"),
        ("config.json", "has no config.json"),
    ],
)
def test_model_folder_that_is_not_whole_is_refused(home: Path, file: str, message: str) -> None:
    (home / "resources" / "model" / file).unlink()
    with pytest.raises(ValueError, match=message):
        plan_of(home)


def test_the_docs_add_one_value_to_one_block_of_the_demo(home: Path) -> None:
    one_more = "+sweep.relu.dictionary.l1_coefficient=4"
    assert one_more in (ROOT / "docs/experiments.md").read_text()
    demo = compose(home / "conf", ["experiment=demo"])
    assert changed(demo, compose(home / "conf", ["experiment=demo", one_more])) == {
        "train": 1,
        "evaluate": 1,
        "features": 1,
        "dashboards": 1,
        "comparisons": 1,
        "figures": 1,
    }
    everywhere = compose(home / "conf", ["experiment=demo", "dictionary.l1_coefficient=[0.5]", one_more])
    found = [i.config["dictionary"] for i in everywhere.stages["train"].values()]
    assert sorted(d["l1_coefficient"] for d in found if d["kind"] == "transcoder") == [0.5]
    relu = sorted(d["l1_coefficient"] for d in found if d["kind"] == "sae" and d["activation"] == "relu")
    assert relu == [0.6, 1.0, 1.6, 2.5, 4.0]  # what is said of one block has the last word there
