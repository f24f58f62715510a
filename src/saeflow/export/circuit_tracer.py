"""Sets of transcoders, one of every layer, as circuit-tracer (0.5) loads them: `config.yaml`, `layer_<i>.safetensors`.

With circuit-tracer's names, D the width of the model and n latents:

    W_enc (n, D), b_enc (n,), W_dec (n, D), b_dec (D,), W_skip (D, D), activation_function.threshold (n,)

Its encoder is ours transposed, the others are as here. What has a threshold it computes as a JumpReLU, the rest as a
ReLU, whatever the file says: a TopK would become another function without a word, so it is refused.
"""

import re
from pathlib import Path
from typing import Any

import yaml
from safetensors.torch import save_file

from saeflow.dictionaries import Dictionary
from saeflow.export.subjects import Refusal, Subject, kept
from saeflow.models.folder import read_geometry
from saeflow.planning.digests import canonical, short_hash
from saeflow.storage.modes import share

COMPUTED = ("relu", "jumprelu")
"""Activation functions that it has."""
OF_A_LAYER = ("site.layer", "dictionary.content", "dictionary.label", "dictionary.sae_id")
"""Settings that differ between the layers of one set; of foreign ones, their files."""


def write(subjects: list[Subject], folder: Path) -> dict[str, Any]:
    """Writes a folder for every set of transcoders that differ in nothing but the layer. Raises `Refusal` where no set
    can be computed there."""
    why_not = {subject.name: why for subject in subjects if (why := refusal(subject.dictionary))}
    sets: dict[str, dict[int, Subject]] = {}
    for subject in kept(subjects, why_not, "circuit-tracer"):
        _add(sets.setdefault(_but_for_layer(subject), {}), subject)
    for layers in sets.values():
        if why := _lacks(layers):
            why_not |= {subject.name: why for subject in layers.values()}
    kept(subjects, why_not, "circuit-tracer")
    entries: dict[str, list[str]] = {}
    for layers in sets.values():
        names = [subject.name for _, subject in sorted(layers.items())]
        if not why_not.keys() & set(names):
            label = re.sub(r"-L\d+\.", "-", names[0].rsplit("-", 1)[0])
            name = f"{label}-{short_hash(names)}"
            (folder / name).mkdir()
            _write_set(layers, folder / name)
            entries |= {key: [name] for key in names}
    return {"entries": entries, "left_out": why_not}


def refusal(dictionary: Dictionary) -> str:
    """Why circuit-tracer cannot compute a dictionary; '' where it can."""
    spec = dictionary.spec
    if spec.reconstructs:
        return "it reconstructs what it reads, and circuit-tracer has transcoders alone"
    if spec.activation not in COMPUTED:
        return (
            f"circuit-tracer would compute its {spec.activation} as a ReLU: train it with "
            "dictionary.activation=relu or batchtopk instead"
        )
    if spec.d_in != spec.d_out:
        return f"it reads {spec.d_in} entries and writes {spec.d_out}, and circuit-tracer has one width"
    if _layer(spec.hook_name) is None or _layer(spec.hook_name) != _layer(spec.hook_name_out):
        return f"it reads at {spec.hook_name} and writes at {spec.hook_name_out}, which are not of one layer"
    processed = [name for name in ("fold_ln", "center_writing_weights") if getattr(spec.origin, name)]
    if processed:
        return (
            f"it was trained with {' and '.join(f'model.{name}=true' for name in processed)}, and circuit-tracer opens "
            "models as they were published: train it with false"
        )
    return ""


def _write_set(layers: dict[int, Subject], folder: Path) -> None:
    for layer, subject in layers.items():
        tensors = dict(subject.dictionary.tensors)
        tensors["W_enc"] = tensors["W_enc"].T
        if "threshold" in tensors:
            tensors["activation_function.threshold"] = tensors.pop("threshold")
        file = folder / f"layer_{layer}.safetensors"
        save_file({name: tensor.float().cpu().contiguous() for name, tensor in tensors.items()}, file)
        share(file)
    spec = layers[0].dictionary.spec
    config = {
        "model_name": spec.origin.model_name,
        "model_kind": "transcoder_set",
        "feature_input_hook": _in_block(spec.hook_name),
        "feature_output_hook": _in_block(spec.hook_name_out),
        "activation": spec.activation,
        "scan": folder.name,
        "scan_name": folder.name,  # what versions after 0.5 call it
    }
    text = yaml.safe_dump(config, sort_keys=False, allow_unicode=True)
    (folder / "config.yaml").write_text(text, encoding="utf-8")


def _in_block(hook: str) -> str:
    """A hook's name without its block's."""
    return re.sub(r"^blocks\.\d+\.", "", hook)


def _layer(hook: str) -> int | None:
    found = re.match(r"blocks\.(\d+)\.", hook)
    return int(found[1]) if found else None


def _but_for_layer(subject: Subject) -> str:
    """What is equal for the transcoders of one set: all that made them, but for the layers of their hooks."""
    rest = {path: value for path, value in subject.settings.items() if path not in OF_A_LAYER}
    spec = subject.dictionary.spec
    made = [spec.d_sae, spec.activation, spec.skip, _in_block(spec.hook_name), _in_block(spec.hook_name_out)]
    return canonical([rest, made, subject.stage])


def _add(layers: dict[int, Subject], subject: Subject) -> None:
    layer = _layer(subject.dictionary.spec.hook_name)
    assert layer is not None
    if other := layers.get(layer):
        raise Refusal(f"{other.name} and {subject.name} differ in nothing but their weights: export one of them alone")
    layers[layer] = subject


def _lacks(layers: dict[int, Subject]) -> str:
    """What a set lacks; '' of a whole one."""
    some = next(iter(layers.values()))
    n_layers = read_geometry(Path(some.plan.instance(some.stage, some.key).sources["model"])).n_layers
    missing = sorted(set(range(n_layers)) - set(layers))
    if not missing:
        return ""
    return (
        f"circuit-tracer replaces the MLP of every layer, and there is none like it of layer "
        f"{', '.join(map(str, missing))}: sweep site.layer=[{','.join(map(str, range(n_layers)))}]"
    )
