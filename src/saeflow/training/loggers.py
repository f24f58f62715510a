"""Optional copies of the training metrics to wandb or TensorBoard, beside `metrics.parquet`, which is always written.

They keep times and host names, so they write below `results/logs/`, never into an artifact.
"""

from collections.abc import Mapping, Sequence
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any

from saeflow.config import ConfigError


class WandbLogger:
    """One wandb run a dictionary, in the project `saeflow`; wandb's environment variables apply (WANDB_MODE, ...)."""

    def __init__(self, key: str, config: Mapping[str, Any], folder: Path) -> None:
        wandb = _package("wandb", "wandb")
        folder.mkdir(parents=True, exist_ok=True)
        self.run = wandb.init(project="saeflow", name=key, config=dict(config), dir=str(folder))

    def log(self, row: Mapping[str, float]) -> None:
        self.run.log(dict(row), step=int(row["step"]))

    def close(self) -> None:
        self.run.finish()


class TensorboardLogger:
    """One folder of event files a dictionary: `tensorboard --logdir results/logs/tensorboard`."""

    def __init__(self, key: str, config: Mapping[str, Any], folder: Path) -> None:
        tensorboard = _package("torch.utils.tensorboard", "tensorboard")
        self.writer = tensorboard.SummaryWriter(str(folder / key))
        self.writer.add_text("config", str(dict(config)))

    def log(self, row: Mapping[str, float]) -> None:
        for name, value in row.items():
            self.writer.add_scalar(name, value, int(row["step"]))

    def close(self) -> None:
        self.writer.close()


Logger = WandbLogger | TensorboardLogger


def open_loggers(names: Sequence[str], key: str, config: Mapping[str, Any], results: Path) -> list[Logger]:
    """The loggers that `training.loggers` names. Raises `ConfigError` where a package is not installed."""
    classes: dict[str, type[Logger]] = {"wandb": WandbLogger, "tensorboard": TensorboardLogger}
    return [classes[name](key, config, results / "logs" / name) for name in names]


def _package(module: str, package: str) -> ModuleType:
    try:
        return import_module(module)
    except ImportError as error:
        raise ConfigError(
            f"training.loggers={package} needs the package {package}: pip install {package} (or remove it from the "
            "list)"
        ) from error
