"""How each stage's jobs run, never what they compute: nothing of it enters a key, so it stays a plain tree."""

from collections.abc import Iterable
from typing import Any

from saeflow.config.checks import ConfigError, require


def check_device(device: dict[str, Any], stages: Iterable[str]) -> None:
    """Errors now rather than in the job: a device that is not a device's name, a speed that is no number."""
    for stage in ("default", *stages):
        name = str(device.get(stage, device.get("default")))
        if name.split(":")[0] not in ("cpu", "cuda", "mps"):
            raise ConfigError(f"device.{stage}={name}: use cpu, cuda, cuda:N or mps")
    for unit in ("threads", "mem_mb", "runtime", "batch"):
        for stage, value in (device.get(unit) or {}).items():
            legal = value is None or (isinstance(value, int) and not isinstance(value, bool) and value > 0)
            require(legal, f"device.{unit}.{stage}", value, "a whole number above 0")
    flops = device.get("flops")
    if not isinstance(flops, int | float) or flops <= 0:
        raise ConfigError(f"device.flops={flops}: set it to floating-point operations a second, such as 1.0e+11")
