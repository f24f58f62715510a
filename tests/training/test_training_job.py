"""A training job: from columns of activations to a folder; what it records, and how it fails. Optional loggers."""

import math
import sys
import types
from types import SimpleNamespace

import pandas as pd
import pytest
import torch
from stores import TRAINING, TRAINING_STORE, contents, training_plan, write_store

from saeflow.config import ConfigError, TrainingConfig
from saeflow.dictionaries import Origin, load_dictionary
from saeflow.jobs.job import Job
from saeflow.training import loggers
from saeflow.training import loop as training
from saeflow.training.metrics import TrainingError, TrainingMetrics

HOOK, HOOK_OUT = "blocks.0.ln2.hook_normalized", "blocks.0.hook_mlp_out"


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


def plan_of(results, hooks, dictionary, training=TRAINING):
    return training_plan(results, hooks, {"it-1234": dictionary}, training)


def job_of(plan, key="it-1234"):
    return Job(plan.instance("train", key), plan, "cpu")


@pytest.fixture
def results(tmp_path):
    """A results folder with a store of two columns, 8 and 6 wide."""
    x = torch.relu(torch.randn(1000, 8))
    store = {HOOK: x, HOOK_OUT: x[:, :6] * 3 + 1}
    write_store(tmp_path / "activations" / TRAINING_STORE, store, chunk_tokens=64, shard_tokens=256)
    return tmp_path


TOPK = {"kind": "sae", "activation": "topk", "k": 3, "expansion": 2}
ENDLESS = {"kind": "sae", "activation": "relu", "l1_coefficient": 1e39, "expansion": 2}  # whose loss is infinite
TRANSCODER = {"kind": "transcoder", "activation": "relu", "l1_coefficient": 0.1, "expansion": 2}


@pytest.mark.parametrize(("hooks", "dictionary"), [([HOOK], TOPK), ([HOOK, HOOK_OUT], TRANSCODER)])
def test_a_job_writes_a_dictionary_and_its_metrics_and_again_the_same_bytes(results, hooks, dictionary):
    plan = plan_of(results, hooks, dictionary)
    said = training.train([job_of(plan)])
    folder = results / "train" / "it-1234"
    first = contents(folder)
    assert set(first) == {"cfg.json", "sae_weights.safetensors", "metrics.parquet", "config.yaml", "provenance.json"}
    table = pd.read_parquet(folder / "metrics.parquet")
    last = table.iloc[-1]
    assert last["tokens"] == 4096 and last["fvu"] < 0.8 * table["fvu"].iloc[0]
    assert f"L0 {last['l0']:.1f}" in said and str(folder) in said
    spec = load_dictionary(folder).spec
    assert (spec.kind, spec.d_in, spec.d_out) == (dictionary["kind"], 8, 6 if len(hooks) == 2 else 8)
    training.train([job_of(plan)])
    again = contents(folder)
    assert {name for name in first if first[name] != again[name]} <= {"provenance.json"}  # it holds the time


def test_a_job_that_fails_leaves_no_folder(results):
    plan = plan_of(results, [HOOK], ENDLESS)
    with pytest.raises(TrainingError, match=r"lower training\.lr"):
        training.train([job_of(plan)])
    assert not (results / "train" / "it-1234").exists()


def test_a_training_that_diverges_says_so_in_the_log_and_in_what_it_returns(results, caplog):
    """Its loss is finite to the end; without this its line would look like any other."""
    plan = plan_of(results, [HOOK], TOPK | {"sparsity": "decoder_norm"}, TRAINING | {"lr": 1.0})
    said = training.train([job_of(plan)])
    rows = pd.read_parquet(results / "train/it-1234/metrics.parquet")["explained_variance"]
    assert rows.iloc[-1] < -0.1 and rows.iloc[-1] < rows.iloc[0]
    told = f"explained variance {rows.iloc[-1]:.3g} at the end, {rows.iloc[0]:.3g} at the start: lower training.lr"
    assert f"it-1234: DIVERGED ({told}, now 1" in said
    assert [r for r in caplog.records if r.levelname == "WARNING" and f"it-1234 DIVERGED, {told}" in r.getMessage()]


def test_a_training_that_goes_well_is_not_said_to_diverge(results, caplog):
    said = training.train([job_of(plan_of(results, [HOOK], TOPK))])
    assert "DIVERGED" not in said + caplog.text


@pytest.mark.parametrize(
    ("variances", "diverged"),
    [([0.2, -4e11], True), ([-0.5, -0.6], True), ([-0.5, -0.4], False), ([0.1, -0.05], False), ([-0.5], False),
     ([0.5, math.nan], False), ([], False)],
)  # fmt: skip
def test_diverged_is_worse_than_the_mean_and_than_the_start(variances, diverged):
    metrics = TrainingMetrics(4, TrainingConfig(n_tokens=10, batch_size=10), "cpu")
    metrics.rows = [{"explained_variance": v} for v in variances]
    assert bool(metrics.diverged) == diverged


def columns_of(given, tokens=(1000, 1000)):
    return [SimpleNamespace(hook_name=h, size=(16,), n_tokens=n) for h, n in zip(given, tokens, strict=False)]


def test_the_spec_records_where_the_activations_came_from(tmp_path):
    hooks = [HOOK, HOOK_OUT]
    (spec,) = training.specs_of_job(job_of(plan_of(tmp_path, hooks, TRANSCODER)), columns_of(hooks))
    assert (spec.hook_name, spec.hook_name_out, spec.seed) == (HOOK, HOOK_OUT, 5)
    assert spec.origin == Origin("tiny-gpt2", "abc", True, False, False, 64, False)


@pytest.mark.parametrize(
    ("dictionary", "hooks", "given"),
    [
        (TOPK, [HOOK], [HOOK_OUT]),
        (TOPK, [HOOK], [HOOK, HOOK_OUT]),
        (TRANSCODER, [HOOK, HOOK_OUT], [HOOK_OUT, HOOK]),
        (TRANSCODER, [HOOK], [HOOK]),
    ],
)
def test_columns_of_other_hooks_are_refused(tmp_path, dictionary, hooks, given):
    job = job_of(plan_of(tmp_path, hooks, dictionary))
    with pytest.raises(ConfigError, match=rf"kind {dictionary['kind']} at .* was given the activations of"):
        training.specs_of_job(job, columns_of(given))


def test_columns_of_different_lengths_are_refused(tmp_path):
    hooks = [HOOK, HOOK_OUT]
    with pytest.raises(ConfigError, match=r"hold \[1000, 900\] tokens"):
        training.specs_of_job(job_of(plan_of(tmp_path, hooks, TRANSCODER)), columns_of(hooks, (1000, 900)))


# -------------------------------------------------------------------- loggers
ABOUT = loggers.About("key", "topk, layer 0", "demo", ("sae", "topk"), {"seed": 1, "dictionary.k": 4, "site": None})
ROW = {"step": 10, "tokens": 1280, "loss": 0.5, "l0": 4.0, "dead": 2, "jacobian_above_0.01": 0.25}
CURVES = {
    "details/n_training_samples": 1280,
    "losses/overall_loss": 0.5,
    "metrics/l0": 4.0,
    "sparsity/dead_features": 2,
    "metrics/jacobian_above_0.01": 0.25,
}


class Wandb(types.ModuleType):
    """Stands in for wandb, and remembers what it was given."""

    def __init__(self):
        super().__init__("wandb")
        self.seen, self.summary = [], {}

    def init(self, **options):
        self.seen.append(options)
        return self

    def Table(self, columns, data):
        return {"columns": columns, "data": data}

    def log(self, row, step=None):
        self.seen.append((step, row))

    def finish(self):
        self.seen.append("finished")


def test_wandb_gets_curves_settings_and_a_final_table(tmp_path, monkeypatch):
    fake = Wandb()
    monkeypatch.setitem(sys.modules, "wandb", fake)
    (logger,) = loggers.open_loggers(["wandb"], ABOUT, tmp_path)
    logger.log(ROW)
    logger.finish({"input": ROW, "output": ROW | {"loss": 0.25}})
    logger.close()
    started, logged, final, end = fake.seen
    assert (started["project"], started["group"], started["job_type"]) == ("saeflow", "demo", "train")
    assert (started["name"], started["tags"]) == ("topk, layer 0", ["sae", "topk"])
    assert started["config"] == {"key": "key", "seed": 1, "dictionary.k": 4, "site": None}
    assert logged == (10, CURVES) and end == "finished"
    assert fake.summary["input/losses/overall_loss"] == 0.5 and fake.summary["output/losses/overall_loss"] == 0.25
    table = final[1]["final"]
    assert table["columns"] == ["dictionary", *ROW]
    assert table["data"] == [["input", *ROW.values()], ["output", *(ROW | {"loss": 0.25}).values()]]


def test_tensorboard_gets_curves_settings_and_final_metrics(tmp_path, monkeypatch):
    seen = []

    class Writer:
        def __init__(self, folder):
            seen.append(folder)

        def add_text(self, *text):
            seen.append(text)

        def add_scalar(self, *scalar):
            seen.append(scalar)

        def add_hparams(self, held, metrics, run_name):
            seen.append((held, metrics, run_name))

        def close(self):
            seen.append("closed")

    fake = types.ModuleType("torch.utils.tensorboard")
    fake.SummaryWriter = Writer
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", fake)
    (logger,) = loggers.open_loggers(["tensorboard"], ABOUT, tmp_path)
    logger.log(ROW)
    logger.finish({"": ROW})
    logger.close()
    assert seen[0] == str(tmp_path / "logs" / "tensorboard" / "key")
    assert seen[1] == ("run", "topk, layer 0; demo; sae, topk")
    assert seen[2] == ("config", "    seed: 1\n    dictionary.k: 4\n    site: None")
    assert seen[3:8] == [(name, value, 10) for name, value in CURVES.items()]
    held, metrics, run_name = seen[8]
    assert held == {"name": "topk, layer 0", "seed": 1, "dictionary.k": 4, "site": "None"} and run_name == "."
    assert metrics == {f"final/{name}": value for name, value in CURVES.items()} and seen[9] == "closed"


def test_a_training_tells_loggers_what_it_is_and_how_it_ends(results, monkeypatch):
    fake = Wandb()
    monkeypatch.setitem(sys.modules, "wandb", fake)
    plan = training_plan(results, [HOOK, HOOK_OUT], {"it-1234": TRANSCODER}, TRAINING, '{"loggers": ["wandb"]}')
    plan.stages["tokens"]["text-train"].config |= {"split": "train", "n_rows": 20, "corpus": {"content": "0"}}
    plan.stages["tokens"]["text-train"].config["tokens"]["context_size"] = 50
    training.train([job_of(plan)])
    started, *logged, final, end = fake.seen
    assert started["name"] == (
        "transcoder relu, layer 0, ln2.normalized to layer 0, mlp_out, L1 = 0.1, 16 latents, seed 5"
    )
    assert started["group"] == "test" and started["tags"] == ["transcoder", "relu", HOOK, HOOK_OUT, "tiny-gpt2"]
    config = started["config"]
    assert config["key"] == "it-1234" and config["training.lr"] == TRAINING["lr"] and config["d_sae"] == 16
    assert config["tokens.train_tokens"] == 1000 and config["dictionary.l1_coefficient"] == 0.1
    table = pd.read_parquet(results / "train/it-1234/metrics.parquet")
    assert [step for step, _ in logged] == table["step"].tolist() and end == "finished"
    assert [row["losses/overall_loss"] for _, row in logged] == table["loss"].tolist()
    last = table.iloc[-1].to_dict()
    assert final[1]["final"] == {"columns": ["dictionary", *last], "data": [["whole", *last.values()]]}
    assert fake.summary["metrics/explained_variance"] == last["explained_variance"]


def test_curves_of_heads_are_under_the_heads():
    row = {"step": 5, "tokens": 20, "l0": 3.0, "head_0.loss": 1.0, "head_11.dead": 2}
    assert loggers.curves(row) == {
        "details/n_training_samples": 20,
        "metrics/l0": 3.0,
        "head_0/losses/overall_loss": 1.0,
        "head_11/sparsity/dead_features": 2,
    }


@pytest.mark.parametrize("name", ["wandb", "tensorboard"])
def test_a_missing_logger_says_what_to_install(tmp_path, monkeypatch, name):
    def missing(module):
        raise ImportError(module)

    monkeypatch.setattr(loggers, "import_module", missing)
    with pytest.raises(ConfigError, match=f"training.loggers={name} needs the package {name}: pip install {name}"):
        loggers.open_loggers([name], ABOUT, tmp_path)
