"""The model of a job, as every stage that runs one opens it."""

from pathlib import Path
from typing import Any

from saeflow.config import ModelConfig
from saeflow.jobs.job import Job
from saeflow.kernels.memory import keep_freed_memory
from saeflow.models.conversion import SHORT
from saeflow.models.loading import load_model
from saeflow.models.protocol import LanguageModel
from saeflow.models.source import reading_model, settings_of


def model_config(folder: Path, model: dict[str, Any]) -> ModelConfig:
    """`load_model`'s config from a job's `model` group, in which the weights' digest stands for the path."""
    return ModelConfig(name=folder.name, path=str(folder), **settings_of(model))


def open_model(job: Job, context_size: int = SHORT, n_layers: int | None = None) -> LanguageModel:
    """The model of a job, on its device or devices; with `n_layers` no more of it than so many.

    The layers whose activations were cached were checked on whole rows then, and all others by the baselines. A job
    that needs neither says how long rows are.
    """
    with reading_model(job) as folder:
        model = load_model(folder, model_config(folder, job.config["model"]), job.model_device, context_size, n_layers)
    keep_freed_memory()  # a pass takes and frees the same megabytes in every layer
    return model
