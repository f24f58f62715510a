"""How each stage's jobs run, never what they compute: nothing of it enters a key, so it stays a plain tree."""

from collections.abc import Iterable
from typing import Any

from saeflow.config.checks import ConfigError


def check_device(device: dict[str, Any], stages: Iterable[str]) -> None:
    """Errors now rather than in the job: a device that is not a device's name, a speed that is no number."""
    for stage in ("default", *stages):
        name = str(device.get(stage, device.get("default")))
        if name.split(":")[0] not in ("cpu", "cuda", "mps"):
            raise ConfigError(f"device.{stage}={name}: use cpu, cuda, cuda:N or mps")
    flops = device.get("flops")
    if not isinstance(flops, int | float) or flops <= 0:
        raise ConfigError(f"device.flops={flops}: set it to floating-point operations a second, such as 1.0e+11")
