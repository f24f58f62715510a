"""Dictionaries on disk, in SAELens's format: `cfg.json` and `sae_weights.safetensors`.

Written without importing SAELens (that takes ten seconds); its `SAE.load_from_disk` opens them and computes the same.
A dictionary of heads is a folder of such folders, one a head: `head_0`, `head_1`, .... What SAELens has no field for
stands in `metadata.saeflow`. A TopK transcoder has no class in SAELens, but a TopK SAE
that does not subtract `b_dec` from its input computes the same wherever d_in = d_out, and SAELens splices by
`metadata.hook_name_out`, so it is written as one. Where d_in != d_out no class of SAELens can hold it: it is written as
architecture `topk_transcoder`, which SAELens refuses by that name and `load_dictionary` opens.

The bytes depend on the dictionary alone: keys are sorted, the device is always `cpu`.
"""

import dataclasses
import json
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from saeflow.dictionaries.heads import BlockDiagonal
from saeflow.dictionaries.layouts import head_folders
from saeflow.dictionaries.sae import Dictionary, build
from saeflow.dictionaries.spec import DictionaryError, Origin, Spec
from saeflow.storage.modes import share

CONFIG_FILE, WEIGHTS_FILE = "cfg.json", "sae_weights.safetensors"
SAELENS_FORMAT = "6.54.12"  # the version of SAELens whose files these are; below 6 it would rewrite the config on load
_ORIGIN = ("model_name", "context_size", "prepend_bos")  # what SAELens too keeps of it
_TRAINING = ("l1_coefficient", "squared_error", "sparsity", "normalize_activations", "seed", "saelens")


def save_dictionary(dictionary: Dictionary, folder: str | Path) -> None:
    """Writes `cfg.json` and `sae_weights.safetensors` into an existing folder, or a folder a head."""
    folder = Path(folder)
    if isinstance(dictionary, BlockDiagonal):
        for h, head in enumerate(dictionary.heads):
            (folder / f"head_{h}").mkdir()
            save_dictionary(head, folder / f"head_{h}")
        return
    if dictionary.spec.activation == "saelens":
        from saeflow.dictionaries.saelens_classes import SAELensDictionary

        assert isinstance(dictionary, SAELensDictionary)
        return save_saelens(dictionary.sae, dictionary.spec, folder)
    tensors = {name: t.detach().float().cpu().contiguous() for name, t in dictionary.tensors.items()}
    save_file(tensors, folder / WEIGHTS_FILE)
    share(folder / WEIGHTS_FILE)
    (folder / CONFIG_FILE).write_text(json.dumps(_config(dictionary.spec), indent=1, sort_keys=True) + "\n")


def save_saelens(sae: Any, spec: Spec, folder: Path) -> None:
    """The two files of `sae`, one of SAELens's classes for use, with what `load_dictionary` reads in the metadata."""
    if spec.hook_name.endswith("hook_z") and spec.hook_head_index is None:
        sae.cfg.reshape_activations = "hook_z"
    sae.save_model(folder)
    share(folder / WEIGHTS_FILE)
    config = json.loads((folder / CONFIG_FILE).read_text())
    config["device"] = "cpu"
    config["metadata"] |= _metadata(spec)
    (folder / CONFIG_FILE).write_text(json.dumps(config, indent=1, sort_keys=True) + "\n")


def load_dictionary(folder: str | Path, device: str = "cpu", hooks: dict[str, Any] | None = None) -> Dictionary:
    """Opens a dictionary of this project, or one of SAELens's architectures of the same kinds. `hooks`: `hook_name`,
    `hook_name_out` and `hook_head_index`, where its metadata may lack them.

    Raises `DictionaryError` for a folder that does not hold a dictionary that can be used here.
    """
    folder = Path(folder)
    if heads := head_folders(folder):
        return BlockDiagonal([load_dictionary(head, device) for head in heads])
    for name in (CONFIG_FILE, WEIGHTS_FILE):
        if not (folder / name).is_file():
            raise DictionaryError(f"{folder} holds no dictionary: it has no {name}; train it first (rule train)")
    try:
        config = json.loads((folder / CONFIG_FILE).read_text())
        tensors = load_file(folder / WEIGHTS_FILE, device=device)
    except (json.JSONDecodeError, UnicodeDecodeError, SafetensorError) as error:
        raise DictionaryError(
            f"the dictionary in {folder} is damaged ({error}); delete the folder and run the workflow to train it again"
        ) from error
    if _needs_saelens(config):
        from saeflow.dictionaries.saelens_classes import SAELensDictionary

        return SAELensDictionary.load(folder, _spec(config, folder, hooks), device)
    missing = {"W_enc", "b_enc", "W_dec", "b_dec"} - tensors.keys()
    if missing:
        raise DictionaryError(f"{folder}/{WEIGHTS_FILE} lacks {', '.join(sorted(missing))}")
    unknown = tensors.keys() - {"W_enc", "b_enc", "W_dec", "b_dec", "W_skip", "threshold"}
    if unknown:
        raise DictionaryError(f"{folder}/{WEIGHTS_FILE} holds {', '.join(sorted(unknown))}, which nothing here uses")
    return build(_spec(config, folder, hooks), **tensors)


_ARCHITECTURES = {  # SAELens's names for what computes the same; topk_transcoder and topk_skip_transcoder are ours
    ("sae", "relu", False): "standard",
    ("sae", "topk", False): "topk",
    ("sae", "jumprelu", False): "jumprelu",
    ("transcoder", "relu", False): "transcoder",
    ("transcoder", "relu", True): "skip_transcoder",
    ("transcoder", "jumprelu", False): "jumprelu_transcoder",
    ("transcoder", "jumprelu", True): "jumprelu_skip_transcoder",
    ("transcoder", "topk", False): "topk_transcoder",
    ("transcoder", "topk", True): "topk_skip_transcoder",
}
OPENED_BY_SAELENS = ("gated", "abstopk", "matching_pursuit")


def _config(spec: Spec) -> dict[str, Any]:
    """The content of `cfg.json`: fields of SAELens's config classes, and its free-form metadata."""
    architecture = _ARCHITECTURES[spec.kind, spec.activation, spec.skip]
    if spec.activation == "topk" and spec.d_in == spec.d_out and not spec.skip:
        architecture = "topk"
    reshaped = spec.kind == "sae" and spec.hook_name.endswith("hook_z") and spec.hook_head_index is None
    config: dict[str, Any] = {
        "architecture": architecture,
        "d_in": spec.d_in,
        "d_sae": spec.d_sae,
        "dtype": "float32",
        "device": "cpu",
        "apply_b_dec_to_input": spec.apply_b_dec_to_input,
        "normalize_activations": "none",  # it is folded into the weights
        "reshape_activations": "hook_z" if reshaped else "none",  # SAELens then takes (..., head, d_head)
        "metadata": {"sae_lens_version": SAELENS_FORMAT, "sae_lens_training_version": None, **_metadata(spec)},
    }
    if spec.activation == "topk":
        config |= {"k": spec.k, "rescale_acts_by_decoder_norm": False}
    if architecture.endswith("transcoder"):
        config["d_out"] = spec.d_out
    return config


def _metadata(spec: Spec) -> dict[str, Any]:
    """What SAELens keeps of a dictionary's origin, and as `saeflow` all that it has no field for."""
    held = {name: getattr(spec, name) for name in ("kind", "d_out", "k", "options", *_TRAINING)}
    origin = dataclasses.asdict(spec.origin)
    if origin["source"] is None:
        del origin["source"]
    return {
        "hook_name": spec.hook_name,
        "hook_name_out": spec.hook_name_out if spec.kind == "transcoder" else None,
        "hook_head_index": spec.hook_head_index,
        **{name: origin[name] for name in _ORIGIN},
        "saeflow": held | {"origin": origin},
    }


def _needs_saelens(config: dict[str, Any]) -> bool:
    """Whether it computes what only SAELens can."""
    scales = config.get("normalize_activations", "none") != "none" or config.get("rescale_acts_by_decoder_norm")
    return bool(scales) or config.get("architecture") in OPENED_BY_SAELENS


def _spec(config: dict[str, Any], folder: Path, hooks: dict[str, Any] | None = None) -> Spec:
    """The spec that a `cfg.json` describes. Raises `DictionaryError` for what is not supported."""
    architecture = str(config.get("architecture"))
    legal = (*_ARCHITECTURES.values(), *OPENED_BY_SAELENS)
    if architecture not in legal:
        raise DictionaryError(
            f"{folder}/{CONFIG_FILE}: architecture {architecture!r} is not supported; these are: {', '.join(legal)}"
        )
    activation: Any = next((name for name in ("topk", "jumprelu") if architecture.startswith(name)), "relu")
    try:
        metadata = config["metadata"] | (hooks or {})
        held = metadata.get("saeflow") or {}
        out = metadata.get("hook_name_out")
        return Spec(
            kind=held.get("kind") or ("transcoder" if architecture.endswith("transcoder") or out else "sae"),
            activation="saelens" if _needs_saelens(config) else activation,
            d_in=config["d_in"],
            d_out=held.get("d_out") or config.get("d_out", config["d_in"]),
            d_sae=config["d_sae"],
            hook_name=metadata["hook_name"],
            hook_name_out=out or metadata["hook_name"],
            hook_head_index=metadata.get("hook_head_index"),
            k=config.get("k") or held.get("k"),
            skip="skip" in architecture,
            apply_b_dec_to_input=config["apply_b_dec_to_input"],
            origin=Origin(**(held["origin"] if held else {name: metadata.get(name) for name in _ORIGIN})),
            options=held.get("options") or {},
            **{name: held.get(name) for name in _TRAINING},
        )
    except (KeyError, TypeError) as error:
        raise DictionaryError(f"{folder}/{CONFIG_FILE} is not a whole SAELens config: {error}") from error
