"""The language model: its weights, `config.json` and tokenizer enter keys by content, its processing by its flags."""

from pathlib import Path

from saeflow.models.folder import (
    Geometry,
    check_processing,
    model_digest,
    read_geometry,
    resolve_folder,
    tokenizer_digest,
)
from saeflow.models.weights import n_embeddings, read_shapes
from saeflow.planning.digests import short_hash
from saeflow.planning.expansion import PlannedPoint
from saeflow.planning.stages import Source
from saeflow.text.tokenizer import check_tokenizer

PROCESSING = ("fold_ln", "center_writing_weights", "center_unembed")


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


def set_model(planned: PlannedPoint, folder: Path, geometry: Geometry, weights: str, tokenizer: str) -> None:
    """Puts the model into the point: what identifies it, and where it lies. A control has weights of its own."""
    model, tree = planned.point.model, planned.tree["model"]
    of_control = {}
    planned.model_label = model.name
    if model.randomise != "none":  # other weights: what was made for the trained ones does not fit
        of_control = {name: tree[name] for name in ("randomise", "randomise_seed")}
        weights = short_hash([weights, of_control], 32)
        planned.model_label += f"-{model.randomise}{model.randomise_seed}"
    planned.tree["model"] = {"weights": weights, **{name: tree[name] for name in PROCESSING}, **of_control}
    planned.tree["tokenizer"] = tokenizer
    planned.geometry, planned.sources["model"] = geometry, str(folder)


SOURCES = (Source(lambda point: point.model.tracr is None, identify),)
