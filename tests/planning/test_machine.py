"""Whether a machine can run a plan: what is certain to fail is said first, with the setting that decides it."""

import os
import subprocess
import sys
from math import prod
from pathlib import Path

import pytest
import torch
from tests.planning.test_plan import finish, home, plan_of  # noqa: F401

from saeflow.config import ConfigError
from saeflow.config.device import devices_of, missing, n_gpus
from saeflow.planning.machine import bytes_on_disk, check_disk, check_folders, check_machine, notes, unfit
from saeflow.planning.stages import stages

ROOT = Path(__file__).resolve().parents[2]
CUDA = torch.cuda.is_available()


@pytest.mark.parametrize(
    ("dictionary", "site", "shapes"),
    [
        ("topk", "mlp_out", [(128, 1024), (1024, 128), (1024,), (128,)]),
        ("transcoder", "mlp", [(128, 1024), (1024, 128), (1024,), (128,)]),
        ("skip_transcoder", "mlp", [(128, 1024), (1024, 128), (1024,), (128,), (128, 128)]),
        ("jacobian", "mlp", 2 * [(128, 1024), (1024, 128), (1024,), (128,)]),
        ("heads_topk", "attn_z", 4 * [(32, 256), (256, 32), (256,), (32,)]),
        ("saelens/topk", "mlp_out", [(128, 1024), (1024, 128), (1024,), (128,)]),
    ],
)
def test_bytes_of_a_training_are_those_of_its_tensors(
    home: Path,  # noqa: F811
    dictionary: str,
    site: str,
    shapes: list[tuple[int, ...]],
) -> None:
    plan = plan_of(home, "sweep=null", f"dictionary={dictionary}", f"site={site}", "training.keep_checkpoints=2")
    (instance,) = plan.stages["train"].values()
    weights = 4 * sum(map(prod, shapes))
    train = stages()["train"]
    assert train.n_bytes(plan, instance) == weights
    assert train.beside(plan, [instance]) == 3 * 3 * weights  # two that are kept, the next; with Adam's moments
    assert train.holds(plan, [instance, instance]) == 2 * 4 * weights


def test_a_width_that_no_disk_holds_is_refused_with_the_setting(home: Path) -> None:  # noqa: F811
    plan = plan_of(home, "dictionary.expansion=100000000")
    assert bytes_on_disk(plan)["train"] > 10**13
    with pytest.raises(ConfigError, match=r"cannot hold this plan: .* 2 trainings .dictionary.expansion=100000000."):
        check_disk(plan)
    wide = plan_of(home, "dictionary.expansion=null", "dictionary.d_sae=10000000000")
    with pytest.raises(ConfigError, match=r"dictionary.d_sae=10000000000"):
        check_disk(wide)
    with pytest.raises(ConfigError, match=r"is for 1 activation column .tokens.train_tokens=10{15}\b"):
        check_disk(plan_of(home, f"tokens.train_tokens={10**15}"))
    check_disk(plan_of(home))


@pytest.mark.parametrize("name", ["logs", "results"])
def test_folders_that_cannot_be_written_are_named_before_anything_runs(
    home: Path,  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
    name: str,
) -> None:
    monkeypatch.chdir(home)
    plan = plan_of(home)
    check_folders(plan)
    monkeypatch.setattr(os, "access", lambda path, mode: Path(path).name != name)  # to root, all is allowed
    (home / name).mkdir(exist_ok=True)
    with pytest.raises(ConfigError, match=rf"{name}/ cannot be written: .*{name} is read-only"):
        check_folders(plan)
    (home / name).rmdir()
    (home / name).write_text("")
    with pytest.raises(ConfigError, match=rf"{name} is a file, and .*{name}/ has to be a folder"):
        check_folders(plan)


def test_a_training_that_holds_more_than_all_memory_is_refused(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:  # noqa: F811
    plan = plan_of(home, "training.together=2")
    instances = list(plan.stages["train"].values())
    held = stages()["train"].holds(plan, instances)
    assert not list(unfit(plan))
    pages = os.sysconf
    for memory, refused in ((held, False), (held - 1, True)):
        sizes = {"SC_PAGE_SIZE": 1, "SC_PHYS_PAGES": memory}
        monkeypatch.setattr(os, "sysconf", lambda name, sizes=sizes: sizes.get(name) or pages(name))
        (found,) = list(unfit(plan)) or [""]
        assert bool(found) == refused
    assert "(2 in one job) would hold" in found and "with dictionary.expansion=8, and there are" in found
    finish(plan, "train", plan.stages["train"])
    assert not list(unfit(plan_of(home, "training.together=2")))  # nothing of it is to be made


@pytest.mark.skipif(CUDA, reason="this machine has a GPU")
@pytest.mark.parametrize("device", ["cuda", "cuda:3"])
def test_a_device_that_this_machine_has_not_is_said_at_once(home: Path, device: str) -> None:  # noqa: F811
    plan = plan_of(home, f"device.train={device}")
    with pytest.raises(ConfigError, match=rf"device.{{train}}={device}, but torch .* CUDA.*; use device=cpu"):
        check_machine(plan)
    finish(plan, "train", plan.stages["train"])
    check_machine(plan_of(home, f"device.train={device}"))  # of what is there, nothing runs


@pytest.mark.parametrize("device", ["cuda:", "cuda:x", "cuda:$(touch pwned)", "cpu; touch pwned", "cpu:0", "", "cuda "])
def test_names_of_devices_are_those_that_a_shell_may_see(home: Path, device: str) -> None:  # noqa: F811
    with pytest.raises(ConfigError, match=r"device\.train=.*: use cpu, cuda, cuda:N or mps"):
        plan_of(home, f"device.train='{device}'")


def test_only_what_runs_a_model_spreads_it_over_gpus(home: Path) -> None:  # noqa: F811
    plan = plan_of(home, "device.activations=cuda:0-3", "device.evaluate=cuda:2-3")
    assert devices_of(plan.device_of("activations")) == ["cuda:0", "cuda:1", "cuda:2", "cuda:3"]
    assert devices_of(plan.device_of("evaluate")) == ["cuda:2", "cuda:3"] and devices_of("cuda:7") == ["cuda:7"]
    assert [n_gpus(name) for name in ("cpu", "mps", "cuda", "cuda:7", "cuda:2-3")] == [0, 0, 1, 1, 2]
    assert plan_of(home).stages.keys() == plan.stages.keys()
    for stage in ("activations", "evaluate"):
        assert plan_of(home).stages[stage].keys() == plan.stages[stage].keys()  # nothing of it enters a key
    with pytest.raises(
        ConfigError, match=r"device\.train=cuda:0-3: .* by these: activations, baseline, evaluate, stack"
    ):
        plan_of(home, "device.train=cuda:0-3")
    for name in ("cuda:3-0", "cuda:1-1"):
        with pytest.raises(ConfigError, match=rf"device\.evaluate={name}: write the lower number first"):
            plan_of(home, f"device.evaluate={name}")


def test_of_a_range_the_last_gpu_has_to_be_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 3)
    assert missing("cuda:0-2") == missing("cuda:2") == ""
    assert missing("cuda:1-3") == missing("cuda:3") == "there are 3 GPUs here, from cuda:0"


@pytest.mark.skipif(CUDA, reason="this machine has a GPU")
def test_a_plan_for_a_cluster_is_made_and_a_run_here_is_refused(home: Path) -> None:  # noqa: F811
    hydra = "device=cuda"
    plan = [ROOT / "scripts/plan.py", "--conf", home / "conf", "--directory", home, hydra]
    run = ["-m", "snakemake", "-s", ROOT / "Snakefile", "-d", home, "--cores", "1"]
    config = ["--config", f"conf={home / 'conf'}", f"hydra={hydra}"]
    for command, code, said in (
        (plan, 0, "on this machine a run is refused, on others"),
        ([*run, "-n", *config], 0, "on this machine a run is refused, on others"),
        ([*run, *config], 1, "refused: this machine cannot run this plan: device.{activations,train,"),
    ):
        done = subprocess.run([sys.executable, *command], cwd=home, capture_output=True, text=True)
        told = done.stdout + done.stderr
        assert (done.returncode != 0) == bool(code) and said in told and "Traceback" not in told
    assert not list((home / "results").rglob("*.zarr"))


def test_activations_larger_than_memory_are_said_and_no_order_is_changed_by_it(
    home: Path,  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    uniform, buffered = plan_of(home), plan_of(home, "training.order=buffered", "training.buffer_tokens=2048")
    assert not notes(uniform)
    size = sum(stages()["activations"].n_bytes(uniform, column) for column in uniform.stages["activations"].values())
    monkeypatch.setattr("saeflow.training.stage.machine_memory", lambda: size)
    assert not notes(uniform)
    monkeypatch.setattr("saeflow.training.stage.machine_memory", lambda: size - 1)
    assert all("at random from the disk; training.order=buffered reads them in order" in n for n in notes(uniform))
    assert all("mixed in buffers of 2,048 tokens (training.order=buffered)" in note for note in notes(buffered))
    assert len(notes(uniform)) == len(uniform.jobs("train")) == len(notes(buffered))


@pytest.mark.parametrize(
    ("override", "message"),
    [
        (f"seed={2**70}", r"a whole number here is below 2\^63"),
        (f"seed={2**32}", r"seed=4294967296 .* below 2\^32"),
        (f"training.shuffle_seed={2**32}", r"training.shuffle_seed=.* below 2\^32"),
        (f"model.randomise_seed={2**32}", r"model.randomise_seed=.* below 2\^32"),
        (f"heads.seed={2**32}", r"heads.seed=.* below 2\^32"),
        ("training.n_tokens=1e30", r"training.n_tokens=1000.* is out of range: a whole number here is below 2\^63"),
        ("training.lr=1e6", "training.lr=1000000.0 .* at most 1, since Adam"),
        ("activations.chunk_tokens=1000000000", "activations.chunk_tokens=1000000000 .* held in memory whole"),
    ],
)
def test_numbers_that_no_run_survives_are_refused(home: Path, override: str, message: str) -> None:  # noqa: F811
    with pytest.raises(ConfigError, match=message):
        plan_of(home, override)


def test_the_largest_seed_is_one_that_training_takes(home: Path) -> None:  # noqa: F811
    from saeflow.dictionaries.spec import Spec

    plan_of(home, f"seed={2**32 - 1}")
    spec = Spec("sae", "topk", 2, 2, 4, "a", "a", k=1, seed=2**32 - 1, hook_head_index=1000)
    torch.Generator().manual_seed(spec.random_seed * 1_000_003 + 10**9)  # as AuxK draws, at a late step
