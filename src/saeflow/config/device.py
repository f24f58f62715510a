"""How each stage's jobs run, never what they compute: nothing of it enters a key, so it stays a plain tree."""

import re
from collections.abc import Iterable
from typing import Any

from saeflow.config.checks import ConfigError, require

SETTINGS: dict[str, str] = {
    "default": "Device of the stages that are not named: `cpu`, `cuda`, `cuda:N` or `mps`. A key of a stage's name "
    "(`device.train=cuda:1`) is that stage's. Of stages that only run models, `cuda:0-3` spreads layers over four.",
    "threads": "[threads] Of each job, by stage: how many processors it uses and asks Slurm for.",
    "mem_mb": "[MB] Of memory, by stage; null: by sizes, as `resources` of the stage says.",
    "runtime": "[minutes] That a job may take, by stage; null: by sizes.",
    "most": "What no retry asks more than: `mem_mb` of a node, `runtime` of a partition; null: no bound.",
    "batch": "[dictionaries] Evaluated in one job, by stage.",
    "parts": "[jobs] That share the work of one, by stage, on one node or many.",
    "flops": "[operations/s] Floating-point operations a second in training, from which the plan predicts hours.",
    "gpu_model": "Of a job on cuda, for Slurm: `a100` makes `--gpus=a100:1` of `--gpus=1`.",
    "gres": "In place of `--gpus`, where a site wants that: `gpu:a100:1`.",
    "remote": "A place in a bucket, `s3://bucket/folder`, for `make push` and `make pull`; null: none.",
    "read_ahead_mb": "[MB] Memory of a training for what it reads ahead of activations that lie in a bucket.",
}
"""What `conf/device/` says beside the device of each stage."""

# As the executor of Slurm takes them.
GPU_STRINGS = {"gpu_model": r"[A-Za-z0-9_.]+", "gres": r"\w+(:[\w.]+)?(:\d+)?"}
PLACE = r"s3://[A-Za-z0-9][A-Za-z0-9._-]{1,61}[A-Za-z0-9](/(?!\.{1,2}(/|$))[A-Za-z0-9._=+-]+)*/?"
EXAMPLES = {"gpu_model": "a100", "gres": "gpu:a100:1"}


def devices_of(name: str) -> list[str]:
    """The devices of a name: several of a range, `cuda:0-3`."""
    kind, _, numbers = name.partition(":")
    first, several, last = numbers.partition("-")
    return [f"{kind}:{n}" for n in range(int(first), int(last) + 1)] if several else [name]


def n_gpus(name: str) -> int:
    return len(devices_of(name)) if name.startswith("cuda") else 0


def check_device(
    device: dict[str, Any], stages: Iterable[str], in_parts: Iterable[str] = (), spread: Iterable[str] = ()
) -> None:
    """Errors now rather than in the job: a device that is not a device's name, a speed that is no number. `in_parts`:
    stages of which several jobs can share the work of one; `spread`: stages whose model may lie on several GPUs."""
    for stage in ("default", *stages):
        name = str(device.get(stage, device.get("default")))
        if not re.fullmatch(r"cpu|mps|cuda(:\d{1,4}(-\d{1,4})?)?", name):
            raise ConfigError(f"device.{stage}={name}: use cpu, cuda, cuda:N or mps")
        if "-" in name and len(devices_of(name)) < 2:
            raise ConfigError(f"device.{stage}={name}: write the lower number first, as in cuda:0-1")
        if "-" in name and stage not in spread:
            raise ConfigError(
                f"device.{stage}={name}: its jobs take one GPU, such as cuda:0; a model is spread over several by "
                f"these: {', '.join(spread)}"
            )
    for unit in ("threads", "mem_mb", "runtime", "batch", "parts"):
        for stage, value in (device.get(unit) or {}).items():
            legal = value is None or (isinstance(value, int) and not isinstance(value, bool) and value > 0)
            require(legal, f"device.{unit}.{stage}", value, "a whole number above 0")
    can = ", ".join(in_parts)
    for stage, value in (device.get("parts") or {}).items():
        if stage not in in_parts and value not in (None, 1):
            raise ConfigError(f"device.parts.{stage}={value}: its jobs cannot be shared; these can: {can}")
    for unit, value in (device.get("most") or {}).items():
        require(unit in ("mem_mb", "runtime"), f"device.most.{unit}", value, "of mem_mb or runtime")
        whole = isinstance(value, int) and not isinstance(value, bool) and value > 0
        require(value is None or whole, f"device.most.{unit}", value, "a whole number above 0, or null")
    for name, pattern in GPU_STRINGS.items():
        value = device.get(name)
        legal = value is None or re.fullmatch(pattern, str(value)) is not None
        require(legal, f"device.{name}", value, f"like {EXAMPLES[name]}")
    if (remote := device.get("remote")) is not None:
        legal = re.fullmatch(PLACE, str(remote)) is not None
        require(legal, "device.remote", remote, "a place in a bucket, s3://bucket or s3://bucket/folder, or null")
    read_ahead = device.get("read_ahead_mb", 1)
    whole = isinstance(read_ahead, int) and not isinstance(read_ahead, bool) and read_ahead > 0
    require(whole, "device.read_ahead_mb", read_ahead, "a whole number above 0")
    flops = device.get("flops")
    if not isinstance(flops, int | float) or flops <= 0:
        raise ConfigError(f"device.flops={flops}: set it to floating-point operations a second, such as 1.0e+11")


def missing(device: str) -> str:
    """Why there is no such device here; '' where there is. Imports torch where one is asked for that may be missing."""
    kind, _, number = device.partition(":")
    if kind == "cpu":
        return ""
    import torch

    if kind == "mps":
        return "" if torch.backends.mps.is_available() else "torch finds no GPU of Apple here"
    if not torch.cuda.is_available():
        built = torch.version.cuda is not None or torch.version.hip is not None
        return "torch finds no CUDA GPU here" if built else f"torch {torch.__version__} here is without CUDA"
    n, last = torch.cuda.device_count(), number.rpartition("-")[2]
    return f"there are {n} GPUs here, from cuda:0" if int(last or 0) >= n else ""
