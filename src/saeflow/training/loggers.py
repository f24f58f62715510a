"""Optional copies of the training metrics to wandb or TensorBoard, beside `metrics.parquet`, which is always written.

They keep times and host names, so they write below `results/logs/`, never into an artifact.
"""

import configparser
import netrc
import os
from collections.abc import Iterable, Mapping, Sequence
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType
from typing import Any
from urllib.parse import urlparse

from saeflow.config import ConfigError

MODULES = {"wandb": "wandb", "tensorboard": "tensorboard"}
NO_UPLOAD = ("offline", "disabled", "dryrun")  # of wandb's modes


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


def check_loggers(names: Iterable[str]) -> None:
    """Raises `ConfigError` for what would stop the first training: a package that is not installed, and wandb where
    nobody is logged in. Nothing is asked over the network."""
    for name in names:
        if find_spec(MODULES[name]) is None:
            raise _not_installed(name)
    if "wandb" in names and not _wandb_is_ready():
        raise ConfigError(
            "training.loggers=[wandb]: nobody is logged in to wandb here: run `wandb login` once or set WANDB_API_KEY, "
            "or set WANDB_MODE=offline to upload later with `wandb sync`"
        )


def _wandb_is_ready() -> bool:
    """Whether wandb would start without asking for a key: by its environment, its settings files, or a netrc file."""
    settings = dict[str, str]()
    folder = Path(os.environ.get("WANDB_CONFIG_DIR") or "~/.config/wandb").expanduser()
    for file in (folder / "settings", Path("wandb/settings")):
        parser = configparser.ConfigParser(interpolation=None, strict=False)
        try:
            parser.read(file)
        except (OSError, configparser.Error):
            continue  # wandb leaves aside what it cannot read, too
        settings |= dict(parser["default"]) if parser.has_section("default") else {}
    if os.environ.get("WANDB_MODE", settings.get("mode", "online")) in NO_UPLOAD:
        return True
    if any(os.environ.get(name) for name in ("WANDB_API_KEY", "WANDB_IDENTITY_TOKEN_FILE")) or "api_key" in settings:
        return True
    host = urlparse(os.environ.get("WANDB_BASE_URL") or settings.get("base_url") or "https://api.wandb.ai").netloc
    named = os.environ.get("NETRC")
    for file in [Path(named)] if named else [Path("~/.netrc").expanduser(), Path("~/_netrc").expanduser()]:
        try:
            if host and netrc.netrc(file).authenticators(host):
                return True
        except (OSError, netrc.NetrcParseError):
            continue
    return False


def _package(module: str, package: str) -> ModuleType:
    try:
        return import_module(module)
    except ImportError as error:
        raise _not_installed(package) from error


def _not_installed(package: str) -> ConfigError:
    return ConfigError(
        f"training.loggers={package} needs the package {package}: pip install {package} (or remove it from the list)"
    )
