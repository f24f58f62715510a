"""What jobs ask of the machine: by the sizes of the plan, more on each try, and as an executor takes it."""

import json
import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml
from conftest import write_plain_model
from snakemake.iocontainers import Namedlist

from saeflow.config import ConfigError
from saeflow.models.resources import sizes
from saeflow.planning.batches import resources
from saeflow.planning.expansion import compose
from saeflow.planning.graph import Plan
from saeflow.planning.history import FILE
from saeflow.planning.stages import stages

ROOT = Path(__file__).resolve().parents[2]
CONFIG = {
    "architectures": ["GPTNeoXForCausalLM"], "num_hidden_layers": 4, "hidden_size": 128, "num_attention_heads": 4,
    "intermediate_size": 512, "max_position_embeddings": 256, "vocab_size": 300,
}  # fmt: skip


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return write_plain_model(tmp_path / "model", CONFIG)


def plan_of(model: Path, *overrides: str) -> Plan:
    return compose(ROOT / "conf", [f"model.path={model}", "dictionary=topk", *overrides], results=str(model / "none"))


def asked(plan: Plan, stage: str, attempt: int = 1) -> dict[str, Any]:
    return resources(plan, stage, list(plan.stages[stage]), attempt)


@pytest.mark.parametrize("stage", ["activations", "baseline", "evaluate"])
def test_jobs_that_run_a_model_ask_for_its_weights_and_for_time_by_its_operations(model: Path, stage: str) -> None:
    tokens = ["tokens.train_tokens=20_000_000", "tokens.held_out_tokens=1_000_000", "device.flops=1e7"]
    plan = plan_of(model, "dictionary.k=8", "dictionary.expansion=8", "site.layer=1", *tokens)
    sizes.cache_clear()
    small = asked(plan, stage)
    with (model / "model.safetensors").open("ab") as file:
        file.truncate(4_000_000_000)  # takes no disk: 1e9 parameters
    sizes.cache_clear()
    large = asked(plan, stage)
    assert large["mem_mb"] - small["mem_mb"] == pytest.approx(1.2 * 4000 - 1000, abs=20)  # 1 GB is asked for at least
    n_tokens = (20_000_000 if stage == "activations" else 1_000_000) // 256 * 256
    block = 4 * 128**2 + 2 * 256 * 128 + 2 * 128 * 512  # multiplications a token: q k v o, scores and patterns, the MLP
    logits, dictionary = 128 * 300, 2 * 128 * 1024 + 128 + 1024
    whole = 4 * block + logits
    each = {
        "activations": 2 * block + 128**2,  # and the covariance
        "baseline": whole + 2 * (3 * block + logits),
        "evaluate": whole + 3 * block + logits + dictionary,
    }[stage]
    assert small["runtime"] == large["runtime"] == pytest.approx(2 * n_tokens * 2 * each / 1e7 / 60, abs=1)


@pytest.mark.parametrize(
    ("model_is", "gigabytes"),
    [
        ("dtype=float32", 1.2 * 4),
        ("dtype=bfloat16", 1.2 * 2),
        ("fold_ln=true", 2.0 * 4),
        ("randomise=permuted", 2.0 * 4),
    ],
)
def test_memory_for_weights_goes_by_their_precision_and_whether_they_are_processed(
    model: Path, model_is: str, gigabytes: float
) -> None:
    plan = plan_of(model, "tokens.train_tokens=20_000_000", f"model.{model_is}")
    with (model / "model.safetensors").open("ab") as file:
        file.truncate(4_000_000_000)
    sizes.cache_clear()
    assert asked(plan, "activations")["mem_mb"] == pytest.approx(3000 + 1000 * gigabytes, abs=20)


def test_a_training_asks_for_two_buffers_of_the_buffered_order(model: Path) -> None:
    """Of what it reads, as it is stored."""
    half = ["activations.dtype=float16", "dictionary.expansion=1"]
    uniform = asked(plan_of(model, *half), "train")["mem_mb"]
    buffered = asked(plan_of(model, *half, "training.order=buffered", "training.buffer_tokens=10_000_000"), "train")
    assert buffered["mem_mb"] - uniform == 2 * 10_000_000 * 128 * 2 // 10**6


def test_the_order_is_in_the_key_and_its_buffer_where_there_is_one(model: Path) -> None:
    keys = {
        overrides: next(iter(plan_of(model, *overrides).stages["train"]))
        for overrides in (
            (),
            ("training.buffer_tokens=4096",),
            ("training.order=buffered",),
            ("training.order=buffered", "training.buffer_tokens=4096"),
        )
    }
    usual, unread, buffered, smaller = keys.values()
    assert usual == unread and len({usual, buffered, smaller}) == 3
    assert "-buffered-" in buffered and "-buffered-buffer4096-" in smaller


def test_trainings_of_different_orders_do_not_share_a_job(model: Path) -> None:
    plan = plan_of(model, "training.order=[uniform,buffered]", "dictionary.k=[4,8]")
    assert sorted(len(keys) for keys in plan.jobs("train")) == [2, 2]


def test_jobs_ask_for_twice_the_time_that_earlier_ones_took(model: Path) -> None:
    """Wherever they ran, on devices of the same kind."""
    plan = plan_of(model, "dictionary.k=8")
    (instance,) = plan.stages["train"].values()
    work = stages()["train"].operations(plan, [instance])
    line = {"stage": "train", "key": "k", "host": "node7", "work": 2 * work, "sharing": 1}
    lines = [line | {"device": "cpu", "seconds": 60_000.0}, line | {"device": "cuda:0", "seconds": 1.0}]
    Path(plan.results).mkdir(parents=True)
    file = Path(plan.results) / FILE
    file.write_text("".join(json.dumps(one) + "\n" for one in lines))
    assert asked(plan, "train")["runtime"] == 1000  # minutes: half of 60,000 s, twice
    assert asked(plan, "activations")["runtime"] == 240  # of which none ran
    assert asked(plan_of(model, "device.runtime.train=7"), "train")["runtime"] == 7
    file.write_text(json.dumps(lines[1]) + "\n")
    os.utime(file, (0, 0))  # it is looked at once a minute
    assert asked(plan, "train")["runtime"] == 240


def test_a_small_job_has_time_all_the_same(model: Path) -> None:
    plan = plan_of(model)
    runtimes = [asked(plan, stage)["runtime"] for stage in ("activations", "baseline", "evaluate", "train")]
    assert runtimes == [240, 60, 60, 240]


def test_evaluations_ask_for_the_dictionaries_that_they_hold(model: Path) -> None:
    one = asked(plan_of(model, "dictionary.d_sae=100_000", "dictionary.expansion=null"), "evaluate")["mem_mb"]
    two = asked(
        plan_of(model, "dictionary.d_sae=100_000", "dictionary.expansion=null", "dictionary.k=[4,8]"), "evaluate"
    )["mem_mb"]
    assert two - one == pytest.approx(4 * (257 * 100_000 + 128) / 1e6, abs=1)  # W_enc, W_dec, b_enc, b_dec in float32


def test_trainings_ask_for_four_times_the_weights_of_all_that_share_the_job(model: Path) -> None:
    one = asked(plan_of(model, "dictionary.d_sae=100_000", "dictionary.expansion=null"), "train")["mem_mb"]
    three = asked(
        plan_of(model, "dictionary.d_sae=100_000", "dictionary.expansion=null", "dictionary.k=[4,8,16]"), "train"
    )["mem_mb"]
    assert three - one == pytest.approx(2 * 4 * 4 * (257 * 100_000 + 128) / 1e6, abs=2)


def test_a_logit_costs_memory_and_a_vocabulary_of_its_size(tmp_path: Path) -> None:
    def memory(vocabulary: int) -> int:
        folder = write_plain_model(tmp_path / str(vocabulary), CONFIG | {"vocab_size": vocabulary})
        return int(asked(plan_of(folder), "evaluate")["mem_mb"])

    assert memory(1_000_000) - memory(500_000) == pytest.approx(4 * 16 * 256 * 500_000 * 4 / 1e6, abs=2)


def test_tokens_have_time_by_the_text_that_is_read(model: Path) -> None:
    plan = plan_of(model, "tokens.train_tokens=1_000_000_000", "tokens.held_out_tokens=1_000_000")
    (longest,) = [key for key in plan.stages["tokens"] if key.startswith("train")]
    assert resources(plan, "tokens", [longest])["runtime"] > 1e9 / 20_000 / 60 - 1


def test_each_try_asks_for_more_and_no_more_than_the_site_has(model: Path) -> None:
    first, *later = (asked(plan_of(model), "train", attempt) for attempt in (1, 2, 3))
    for attempt, found in enumerate(later, 2):
        assert (found["mem_mb"], found["runtime"]) == (attempt * first["mem_mb"], attempt * first["runtime"])
    most = (
        "device.most.mem_mb=4000",
        "device.most.runtime=300",
        "device.mem_mb.train=3000",
        "device.runtime.train=200",
    )
    tries = [asked(plan_of(model, *most), "train", attempt) for attempt in (1, 2, 3)]
    assert [(found["mem_mb"], found["runtime"]) for found in tries] == [(3000, 200), (4000, 300), (4000, 300)]
    beyond = plan_of(model, "device.most.mem_mb=1000", "device.mem_mb.train=3000")  # what is needed is asked for
    assert [asked(beyond, "train", attempt)["mem_mb"] for attempt in (1, 2)] == [3000, 3000]


SPREAD = ["device=cuda", "device.evaluate=cuda:0-3"]


@pytest.mark.parametrize(
    ("overrides", "stage", "expected"),
    [
        ([], "train", ""),
        (["device=cuda"], "train", " --gpus=1"),
        (["device=cuda", "device.gpu_model=a100"], "train", " --gpus=a100:1"),
        (["device=cuda", "device.gres='gpu:a100:1'"], "train", " --gres=gpu:a100:1"),
        (["device.gres='gpu:1'"], "train", ""),  # of a stage on the CPU
        (SPREAD, "train", " --gpus=1"),
        (SPREAD, "evaluate", " --gpus=4"),
        ([*SPREAD, "device.gpu_model=a100"], "evaluate", " --gpus=a100:4"),
        ([*SPREAD, "device.gres='gpu:a100:1'"], "evaluate", " --gres=gpu:a100:4"),
        ([*SPREAD, "device.gres='gpu'"], "evaluate", " --gres=gpu:4"),
    ],
)
def test_gpus_are_asked_for_as_the_executor_of_slurm_takes_them(
    model: Path, overrides: list[str], stage: str, expected: str
) -> None:
    utils = pytest.importorskip("snakemake_executor_plugin_slurm.utils")
    found = asked(plan_of(model, *overrides), stage)
    assert utils.set_gres_string(SimpleNamespace(resources=Namedlist(fromdict=found))) == expected


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("device.most.mem_mb=0", r"device\.most\.mem_mb=0 is out of range: it must be a whole number above 0, or null"),
        ("+device.most.gpus=1", r"device\.most\.gpus=1 is out of range: it must be of mem_mb or runtime"),
        ("device.gres='gpu a100'", r"device\.gres=gpu a100 is out of range: it must be like gpu:a100:1"),
        ("device.gpu_model='--x'", r"device\.gpu_model=--x is out of range: it must be like a100"),
    ],
)
def test_wrong_settings_are_refused_by_the_plan(model: Path, override: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        plan_of(model, override)


def test_the_profile_of_slurm_holds_what_is_right_on_any_machine() -> None:
    """It stands in for the default profile, which Snakemake then does not read."""
    default, slurm = (yaml.safe_load((ROOT / f"profiles/{n}/config.yaml").read_text()) for n in ("default", "slurm"))
    del default["cores"]
    assert default.items() <= slurm.items()
    assert not slurm.get("slurm-pass-command-as-script")  # its shell would die of TERM, and the training with it
