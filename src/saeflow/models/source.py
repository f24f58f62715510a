"""The language model: its weights, `config.json` and tokenizer enter keys by content, its processing by its flags."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from saeflow.jobs.job import Job
from saeflow.models.folder import Geometry, check_processing, model_digest, read_geometry, resolve_folder
from saeflow.models.weights import n_embeddings, read_shapes
from saeflow.planning.digests import DigestCache, short_hash
from saeflow.planning.expansion import PlannedPoint
from saeflow.planning.graph import Instance
from saeflow.planning.stages import Source
from saeflow.storage.receipts import verify
from saeflow.text.tokenizer import check_tokenizer, tokenizer_digest

PROCESSING = ("fold_ln", "center_writing_weights", "center_unembed")
CONTROL = ("randomise", "randomise_seed")
OTHER = (*CONTROL, "dtype")  # weights, where they are not as usual: what was made for those as stored does not fit


def identify(planned: PlannedPoint) -> None:
    model = planned.point.model
    folder, geometry, n_tokens, weights, tokenizer = planned.digests.once(
        ("model", model.path, model.hub, model.revision), lambda: _read(planned)
    )
    check_processing(folder, geometry, model)
    tokens = planned.point.tokens
    special = (tokens.prepend_bos, tokens.bos_token, tokens.eos_token)
    planned.digests.once(("tokenizer", folder, special), lambda: check_tokenizer(folder, tokens, n_tokens))
    set_model(planned, folder, geometry, weights, tokenizer)


def _read(planned: PlannedPoint) -> tuple[Path, Geometry, int | None, str, str]:
    folder, digests = resolve_folder(planned.point.model), planned.digests
    geometry, n_tokens = read_geometry(folder), n_embeddings(read_shapes(folder))
    return folder, geometry, n_tokens, model_digest(folder, digests), tokenizer_digest(folder, digests)


def set_model(
    planned: PlannedPoint, folder: Path, geometry: Geometry, weights: str, tokenizer: str, label: str = ""
) -> None:
    """Puts the model into the point: what identifies it, where it lies and how it is called. A control and
    a rounded model have weights of their own."""
    model, tree = planned.point.model, planned.tree["model"]
    other = {}
    name = label or f"{geometry.n_layers}L{geometry.d_model}.{weights[:4]}"
    if model.randomise != "none":
        other = {name: tree[name] for name in CONTROL}
        name += f"-{model.randomise}{model.randomise_seed}"
    if model.dtype != "float32":
        other["dtype"] = tree["dtype"]
        name += f"-{model.dtype}"
    weights = _identity(weights, other)
    bridged = {"bridge": True} if geometry.bridged else {}  # of the others keys stay as they were
    processing = {name: tree[name] for name in PROCESSING}
    planned.tree["model"] = {"weights": weights, **processing, **other, **bridged}
    planned.tree["tokenizer"] = tokenizer
    planned.geometry, planned.labels["model"] = geometry, name
    planned.sources |= {"model": str(folder), "model_name": model.name}


def _identity(weights: str, other: dict[str, Any]) -> str:
    """Of weights that are replaced at random or rounded, as `other` says, from those with the digest `weights`."""
    return short_hash([weights, other], 32) if other else weights


def settings_of(model: dict[str, Any]) -> dict[str, Any]:
    """Of a job's `model` group, what a `ModelConfig` has: `weights` stands for the folder, and `bridge` follows from
    it."""
    return {name: value for name, value in model.items() if name not in ("weights", "bridge")}


@contextmanager
def reading_model(job: Job, instance: Instance | None = None) -> Iterator[Path]:
    """The folder of a job's model, while its files are opened: what is in it is what the plan read, by the config of
    the job or of another `instance` that it needs.

    Raises `SourceError` where it is not, and `DamagedError` where the workflow made the model and it is damaged.
    """
    instance = instance or job.instance
    folder = job.source("model")
    if folder.is_relative_to(job.plan.results):
        verify(folder)
        yield folder
        return
    model: dict[str, Any] = instance.config.get("model", {})
    tokenizer = instance.config.get("tokenizer")
    for key in instance.needs.get("tokens", ()):
        tokenizer = job.plan.instance("tokens", key).config["tokenizer"]
    other = {name: model[name] for name in OTHER if name in model}

    def digest(path: Path, digests: DigestCache) -> list[str | None]:
        weights = _identity(model_digest(path, digests), other) if model else None
        return [weights, tokenizer_digest(path, digests) if tokenizer else None]

    with job.reading("model", digest, [model.get("weights"), tokenizer]):
        yield folder


SOURCES = (Source(lambda point: point.model.tracr is None, identify),)
