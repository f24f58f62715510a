"""Dictionaries that belong to a job's model: checked before any forward pass."""

from pathlib import Path
from typing import Any

from saeflow.config import ConfigError
from saeflow.dictionaries.sae import Dictionary
from saeflow.dictionaries.saelens_format import load_dictionary
from saeflow.jobs.job import Job
from saeflow.models.folder import Geometry, read_geometry
from saeflow.models.source import PROCESSING


class FitError(ConfigError):
    """A dictionary that does not fit the model or the site; the message names both sides and what to do."""


def open_dictionary(folder: Path, job: Job) -> Dictionary:
    """The dictionary in `folder`, on a job's device. Raises `FitError` unless it fits the job's model."""
    dictionary, model_folder = load_dictionary(folder, job.device), job.source("model")
    check_fit(dictionary, folder, model_folder, job.config["model"], read_geometry(model_folder))
    return dictionary


def check_fit(
    dictionary: Dictionary, folder: Path, model_folder: Path, model: dict[str, Any], geometry: Geometry
) -> None:
    """Raises `FitError` unless the dictionary in `folder` was made for this model, its weight processing and its sizes.

    `model`: `weights` (the digest) and the processing flags. What a foreign dictionary does not record is not checked.
    """
    spec, origin = dictionary.spec, dictionary.spec.origin
    if origin.model_weights not in (None, model["weights"]):
        raise FitError(
            f"dictionary {folder} was trained on the model {origin.model_name or 'of another name'} with weights "
            f"{origin.model_weights}, but {model_folder} has weights {model['weights']}; use it with its own model "
            "(set model.path to that one's folder), or train one on this model"
        )
    for name in PROCESSING:
        trained = getattr(origin, name)
        if trained not in (None, model[name]):
            raise FitError(
                f"dictionary {folder} was trained with model.{name}={str(trained).lower()}, but is used with "
                f"model.{name}={str(model[name]).lower()}; activations differ between the two, so set "
                f"model.{name}={str(trained).lower()}, or train it again"
            )
    for side, hook, width in (("d_in", spec.hook_name, spec.d_in), ("d_out", spec.hook_name_out, spec.d_out)):
        try:
            size = geometry.hook_size(hook)
        except ConfigError as error:
            raise FitError(f"dictionary {folder} does not fit the model {model_folder}: {error}") from error
        wide = size[0] * (size[1] if len(size) == 2 else 1)
        head = spec.hook_head_index
        if head is not None:
            if len(size) != 2 or not 0 <= head < size[0]:
                raise FitError(
                    f"dictionary {folder} is of head {head} of {hook}, where {model_folder} has no such head"
                )
            wide = size[1]
        if width != wide:
            raise FitError(
                f"dictionary {folder} has {side}={width} at {hook}, but the model {model_folder} is {wide} wide there; "
                "use it with its own model, or train one on this model"
            )
