"""Optional copies of the training metrics to wandb or TensorBoard, beside `metrics.parquet`, which is always written.

They keep times and host names, so they write below `results/logs/`, never into an artifact.
"""

import configparser
import netrc
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType
from typing import Any
from urllib.parse import urlparse

from saeflow.config import ConfigError

MODULES = {"wandb": "wandb", "tensorboard": "tensorboard"}
NO_UPLOAD = ("offline", "disabled", "dryrun")  # of wandb's modes


NAMES = {
    "loss": "losses/overall_loss",
    "squared_error": "losses/mse_loss",
    "sparsity": "losses/sparsity",
    "jacobian_loss": "losses/jacobian_loss",
    "l0": "metrics/l0",
    "explained_variance": "metrics/explained_variance",
    "fvu": "metrics/fvu",
    "fvu_without_first": "metrics/fvu_without_first",
    "dead": "sparsity/dead_features",
    "lr": "details/current_learning_rate",
    "l1_scheduled": "details/l1_coefficient",
    "jacobian_scheduled": "details/jacobian_coefficient",
    "tokens": "details/n_training_samples",
}
"""Curves by SAELens's names, where it has them, so that runs of both lie in the same panels; the rest are metrics."""


@dataclass(frozen=True)
class About:
    """What a run is of."""

    key: str
    """Of the artifact."""
    name: str
    """For people."""
    group: str
    """The experiment."""
    tags: tuple[str, ...]
    """Its kind, and where it is."""
    config: Mapping[str, Any]
    """Everything that its training reads, by dotted path."""


def curves(row: Mapping[str, float]) -> dict[str, float]:
    """A row of metrics as people look for it. What a dictionary of several has for each is under the name of that:
    `head_0.loss`."""
    found = {}
    for name, value in row.items():
        part, metric = re.fullmatch(r"(?:(head_\d+)\.)?(.*)", name).groups()  # type: ignore[union-attr]
        if metric != "step":
            found[(f"{part}/" if part else "") + NAMES.get(metric, f"metrics/{metric}")] = value
    return found


class WandbLogger:
    """One wandb run a dictionary, in the project `saeflow`; wandb's environment variables apply (WANDB_MODE, ...)."""

    def __init__(self, about: About, folder: Path) -> None:
        self.wandb = _package("wandb", "wandb")
        folder.mkdir(parents=True, exist_ok=True)
        config = {"key": about.key, **about.config}
        tags = [tag[:64] for tag in about.tags]  # wandb takes no longer ones
        named = {"project": "saeflow", "name": about.name, "group": about.group, "job_type": "train"}
        self.run = self.wandb.init(config=config, tags=tags, dir=str(folder), **named)

    def log(self, row: Mapping[str, float]) -> None:
        self.run.log(curves(row), step=int(row["step"]))

    def finish(self, rows: Mapping[str, Mapping[str, float]]) -> None:
        """The last row of each part of a finished dictionary: as the run's summary, and as the table `final`."""
        for part, row in rows.items():
            prefix = f"{part}/" if part else ""
            self.run.summary.update({prefix + name: value for name, value in curves(row).items()})
        columns = ["dictionary", *next(iter(rows.values()))]
        data = [[part or "whole", *(row[name] for name in columns[1:])] for part, row in rows.items()]
        self.run.log({"final": self.wandb.Table(columns=columns, data=data)})

    def close(self) -> None:
        self.run.finish()


class TensorboardLogger:
    """One folder of event files a dictionary: `tensorboard --logdir results/logs/tensorboard`."""

    def __init__(self, about: About, folder: Path) -> None:
        tensorboard = _package("torch.utils.tensorboard", "tensorboard")
        self.about = about
        self.writer = tensorboard.SummaryWriter(str(folder / about.key))
        self.writer.add_text("run", f"{about.name}; {about.group}; {', '.join(about.tags)}")
        lines = (f"    {path}: {value}" for path, value in about.config.items())  # indented, it is shown as it is
        self.writer.add_text("config", "\n".join(lines))

    def log(self, row: Mapping[str, float]) -> None:
        for name, value in curves(row).items():
            self.writer.add_scalar(name, value, int(row["step"]))

    def finish(self, rows: Mapping[str, Mapping[str, float]]) -> None:
        """The last row of each part of a finished dictionary, beside its settings in the page of hyperparameters."""
        final = {
            "/".join(filter(None, ("final", part, name))): value
            for part, row in rows.items()
            for name, value in curves(row).items()
        }
        plain = {
            path: v if isinstance(v, bool | int | float | str) else str(v) for path, v in self.about.config.items()
        }
        self.writer.add_hparams({"name": self.about.name, **plain}, final, run_name=".")

    def close(self) -> None:
        self.writer.close()


Logger = WandbLogger | TensorboardLogger


def open_loggers(names: Sequence[str], about: About, results: Path) -> list[Logger]:
    """The loggers that `training.loggers` names. Raises `ConfigError` where a package is not installed."""
    classes: dict[str, type[Logger]] = {"wandb": WandbLogger, "tensorboard": TensorboardLogger}
    return [classes[name](about, results / "logs" / name) for name in names]


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
