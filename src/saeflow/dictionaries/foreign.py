"""Dictionaries that other libraries made, as this project's: `dictionary=foreign`.

`site` says where one reads and writes; what its files say of that is compared with it. No pickle is executed:
`torch.load` opens weights alone, and of transcoder_circuits' pickled configuration only the fields are read, into a
class that does nothing.

* `saelens`: `cfg.json` and `sae_weights.safetensors`; configs older than version 6 are read by SAELens.
* `transcoder_circuits`: a `.pt` of `cfg` and `state_dict`; ReLU((x - b_dec) W_enc + b_enc) W_dec + b_dec_out.
* `dictionary_learning`: `config.json` and `ae.pt`; what its `dict_class` computes.
* `sparsify`: `cfg.json` and `sae.safetensors`; TopK of ReLU, of x - b_dec unless it transcodes.
* `jsae`: `cfg.json` and `sae_weights.safetensors` of both SAEs around an MLP, whose site says which is meant.
* `kissane`: `<name>.pt`, a state dict, and `<name>_cfg.json`; ReLU((x - b_dec) W_enc + b_enc) W_dec + b_dec. It is of
  TransformerLens's processed model, whose heads' values are without their biases: see `_with_value_biases`.

Shapes: d and p the widths read and written, n latents.
"""

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from saeflow.dictionaries.fitting import check_fit
from saeflow.dictionaries.heads import BlockDiagonal
from saeflow.dictionaries.layouts import foreign_digest, foreign_format, kissane_config
from saeflow.dictionaries.sae import Dictionary, build
from saeflow.dictionaries.saelens_format import (
    CONFIG_FILE,
    SAELENS_FORMAT,
    WEIGHTS_FILE,
    load_dictionary,
    save_dictionary,
)
from saeflow.dictionaries.spec import DictionaryError, Origin, Spec
from saeflow.jobs.job import Job
from saeflow.models.attention import read_values
from saeflow.models.folder import read_geometry
from saeflow.models.opening import open_model


class Site(NamedTuple):
    """Where a dictionary reads and writes."""

    hook_name: str
    hook_name_out: str
    """For an SAE the same."""
    hook_head_index: int | None = None

    @property
    def kind(self) -> Any:
        return "sae" if self.hook_name == self.hook_name_out else "transcoder"


_NOT_WHOLE = (KeyError, TypeError, AttributeError, RecursionError)


def read_foreign(path: Path, site: Site, form: str | None = None) -> Dictionary:
    """Reads a dictionary from disk; the format is known by the files where `form` is None.

    Raises `DictionaryError` for what cannot be read, is of another kind, or says that it belongs elsewhere.
    """
    form = form or foreign_format(path)
    try:
        return _READERS[form](path, site)
    except (
        KeyError,
        TypeError,
        AttributeError,
        RecursionError,
        json.JSONDecodeError,
        SafetensorError,
        OSError,
    ) as error:
        raise DictionaryError(
            f"{path} is not a whole {form} dictionary: {type(error).__name__} {error}; if it is of another library, "
            f"set dictionary.format to one of {', '.join(_READERS)}"
        ) from error


def read_release(release: str, sae_id: str, site: Site) -> Dictionary:
    """Fetches one of SAELens's releases, as its `SAE.from_pretrained` does: from the local cache, or the network."""
    from sae_lens import SAE

    try:
        sae = SAE.from_pretrained(release, sae_id, device="cpu")
    except Exception as error:  # whatever the hub's client raises
        raise DictionaryError(
            f"SAELens cannot get {sae_id} of release {release}: {error}. It needs the network, or the files in the "
            "Hugging Face cache; offline, copy the folder here and set dictionary.path"
        ) from error
    return _through_saelens(sae, f"release {release}, {sae_id}", site)


# -------------------------------------------------------------------- formats
_IN_TRAINING = ("batchtopk", "matryoshka_batchtopk")
"""Architectures that SAELens has for training alone: it saves them for use as another."""


def _saelens(path: Path, site: Site) -> Dictionary:
    config = json.loads((path / CONFIG_FILE).read_text())
    if "metadata" in config and config.get("architecture") not in _IN_TRAINING:
        return _from_saelens_folder(path, path, site)
    from sae_lens import SAE, TrainingSAE

    if "metadata" not in config:
        return _through_saelens(SAE.load_from_disk(path, device="cpu"), path, site)
    with TemporaryDirectory() as folder:  # as SAELens's trainer leaves it
        TrainingSAE.load_from_disk(path, device="cpu").save_inference_model(folder)
        return _from_saelens_folder(Path(folder), path, site)


def _through_saelens(sae: Any, name: str | Path, site: Site) -> Dictionary:
    """What SAELens opened, saved in its present format."""
    sae.cfg.metadata.sae_lens_version = SAELENS_FORMAT
    with TemporaryDirectory() as folder:
        sae.save_model(folder)
        return _from_saelens_folder(Path(folder), name, site)


def _from_saelens_folder(folder: Path, name: str | Path, site: Site) -> Dictionary:
    """One in SAELens's present format. Where it belongs is what its metadata says, which SAELens's runner fills in, and
    for what they leave open (its trainer knows no hook) what the site says."""
    config = json.loads((folder / CONFIG_FILE).read_text())
    scaling = config.get("normalize_activations")
    if scaling in ("expected_average_only_in", "covariance_whitening"):
        raise DictionaryError(
            f"{name} takes activations scaled by normalize_activations={scaling}, and what by is not in its files: "
            "fold that into its weights with SAELens (fold_activation_norm_scaling_factor), as the end of its training "
            "does, and save it again"
        )
    said, transcodes = config["metadata"], config["architecture"].endswith("transcoder")
    hook, out, head = (said.get(field) for field in Site._fields)
    if hook is None:
        _check_kind(name, site, "transcoder" if transcodes or out else "sae")
        head = site.hook_head_index if head is None else head
    hook = hook or site.hook_name
    out = out or (site.hook_name_out if transcodes else hook)
    where = Site(hook, out, head)
    dictionary = load_dictionary(folder, hooks=where._asdict() | {"hook_name_out": None if out == hook else out})
    _check_site(name, site, hook, out)
    if head != site.hook_head_index:
        of = "all heads" if head is None else f"head {head}"
        raise DictionaryError(f"{name} is of {of}, but the site's is {site.hook_head_index}; set site.head to it")
    return dictionary


def _transcoder_circuits(path: Path, site: Site) -> Dictionary:
    content = _load_weights(path)
    config, tensors = vars(content["cfg"]), content["state_dict"]
    is_transcoder = bool(config.get("is_transcoder", False))
    _check_kind(path, site, "transcoder" if is_transcoder else "sae")
    hook_out = config.get("out_hook_point") if is_transcoder else config["hook_point"]
    _check_site(path, site, config["hook_point"], hook_out)
    W_enc, b_enc, b_dec = (tensors[name].float() for name in ("W_enc", "b_enc", "b_dec"))
    if is_transcoder:  # its b_dec belongs to the input alone
        b_enc, b_dec = b_enc - b_dec @ W_enc, tensors["b_dec_out"].float()
    # It was trained on TransformerLens's default processing.
    origin = Origin(config.get("model_name"), None, True, True, True, config.get("context_size"), True)
    spec = _spec(site, "relu", W_enc, b_dec, not is_transcoder, origin)
    spec = dataclasses.replace(spec, l1_coefficient=config.get("l1_coefficient"))
    return build(spec, W_enc, b_enc, tensors["W_dec"].float(), b_dec)


class _Fields:
    """Stands for a pickled configuration: takes its fields."""


_CONFIG_CLASSES = ("sae_training.config.LanguageModelSAERunnerConfig", "sae_training.config.RunnerConfig")


def _load_weights(path: Path) -> Any:
    """`torch.load` of weights alone; a file that wants more is refused."""
    try:
        with torch.serialization.safe_globals([(_Fields, name) for name in _CONFIG_CLASSES]):
            return torch.load(path, map_location="cpu", weights_only=True)  # noqa: TID251 -- runs no code
    except Exception as error:  # of pickle, zipfile and torch, as the file is damaged or asks for more
        raise DictionaryError(
            f"{path} is not opened: it is damaged, or holds more than weights, and loading it would run what its "
            f"pickle says ({str(error).splitlines()[0][:200]}). Convert it with the library that made it"
        ) from error


def _dictionary_learning(path: Path, site: Site) -> Dictionary:
    trainer = json.loads((path / "config.json").read_text())["trainer"]
    tensors = {name: t.float() if t.is_floating_point() else t for name, t in _load_weights(path / "ae.pt").items()}
    dict_class = trainer["dict_class"]
    _check_kind(path, site, "sae")
    layer = trainer.get("layer")
    if isinstance(layer, int) and f"blocks.{layer}." not in site.hook_name:
        raise DictionaryError(f"{path} is of layer {layer}, but the site is {site.hook_name}; set site.layer={layer}")
    origin = Origin(trainer.get("lm_name"), None, False, False, False)  # activations of the model as it is published
    if dict_class == "GatedAutoEncoder":
        return _gated(tensors, site, origin)
    activation, subtracts = {
        "AutoEncoder": ("relu", True),
        "AutoEncoderNew": ("relu", False),
        "AutoEncoderTopK": ("topk", True),
        "BatchTopKSAE": ("jumprelu", True),
        "MatryoshkaBatchTopKSAE": ("jumprelu", True),
        "JumpReluAutoEncoder": ("jumprelu", False),
    }.get(dict_class, (None, None))
    if activation is None or subtracts is None:
        raise DictionaryError(f"{path}/config.json: dict_class {dict_class!r} cannot be read here")
    W_enc = tensors["W_enc"] if "W_enc" in tensors else tensors["encoder.weight"].T.contiguous()
    W_dec = tensors["W_dec"] if "W_dec" in tensors else tensors["decoder.weight"].T.contiguous()
    b_enc = tensors["b_enc"] if "b_enc" in tensors else tensors["encoder.bias"]
    b_dec = tensors[next((name for name in ("bias", "decoder.bias") if name in tensors), "b_dec")]
    threshold = None
    if activation == "jumprelu":
        threshold = tensors["threshold"].expand(W_enc.shape[1]).contiguous()
        if threshold.min() < 0:
            raise DictionaryError(f"{path}: its threshold was never set, as it was trained for too few steps")
    k = int(tensors["k"]) if "k" in tensors else trainer.get("k")
    spec = _spec(site, activation, W_enc, b_dec, subtracts, origin, k=k)
    spec = dataclasses.replace(spec, l1_coefficient=trainer.get("l1_penalty"))
    return build(spec, W_enc, b_enc, W_dec, b_dec, None, threshold)


def _gated(tensors: dict[str, Tensor], site: Site, origin: Origin) -> Dictionary:
    """SAELens has the same: a gate and a magnitude that share directions."""
    W_enc, W_dec = (tensors[f"{side}.weight"].T.contiguous() for side in ("encoder", "decoder"))
    renamed = {"b_gate": "gate_bias", "b_mag": "mag_bias", "r_mag": "r_mag", "b_dec": "decoder_bias"}
    spec = _spec(site, "saelens", W_enc, tensors["decoder_bias"], True, origin)
    config = {
        "architecture": "gated",
        "d_in": spec.d_in,
        "d_sae": spec.d_sae,
        "dtype": "float32",
        "device": "cpu",
        "apply_b_dec_to_input": True,
        "normalize_activations": "none",
        "reshape_activations": "none",
        "metadata": {"sae_lens_version": SAELENS_FORMAT, "hook_name": spec.hook_name},
    }
    with TemporaryDirectory() as folder:
        save_file({"W_enc": W_enc, "W_dec": W_dec} | {new: tensors[old] for new, old in renamed.items()},
                  Path(folder) / WEIGHTS_FILE)  # fmt: skip
        (Path(folder) / CONFIG_FILE).write_text(json.dumps(config))
        dictionary = load_dictionary(folder)
    dictionary.spec = dataclasses.replace(dictionary.spec, origin=origin)
    return dictionary


def _sparsify(path: Path, site: Site) -> Dictionary:
    config = json.loads((path / CONFIG_FILE).read_text())
    tensors = {name: t.float() for name, t in load_file(path / "sae.safetensors").items()}
    transcodes = bool(config.get("transcode", False))
    _check_kind(path, site, "transcoder" if transcodes else "sae")
    if config.get("activation", "topk") != "topk" or config.get("signed", False):
        raise DictionaryError(f"{path}/{CONFIG_FILE}: only activation=topk, unsigned, can be read here")
    if transcodes and site.hook_name.endswith("hook_normalized"):
        raise DictionaryError(
            f"{path} reads the MLP's input with the norm's gain and bias, which {site.hook_name} lacks; "
            "there is no hook for it, unless the norm has neither"
        )
    W_enc = tensors["encoder.weight"].T.contiguous()
    W_skip = tensors.get("W_skip")
    origin = Origin(None, None, False, False, False)
    spec = _spec(site, "topk", W_enc, tensors["b_dec"], not transcodes, origin, k=config["k"], skip=W_skip is not None)
    # Its skip connection multiplies by the transpose of W_skip, as ours does.
    return build(spec, W_enc, tensors["encoder.bias"], tensors["W_dec"], tensors["b_dec"], W_skip)


_JSAE_SITES = {"ln2.hook_normalized": "mlp.hook_in"}
"""Hooks of TransformerLens 2, whose norm's hook was behind the gain and the bias, as they are called here."""


def _jsae(path: Path, site: Site) -> Dictionary:
    """One of both SAEs around the MLP of a layer: that at the site. Source: `SAEPair` of lucyfarnik/jacobian-saes."""
    config = json.loads((path / CONFIG_FILE).read_text())
    read = config.get("hook_name") or config["hook_point"]
    layer, hook = read.removeprefix("blocks.").split(".", 1)
    sides = {f"blocks.{layer}.{_JSAE_SITES.get(hook, hook)}": "", f"blocks.{layer}.hook_mlp_out": "_out"}
    if site.hook_name not in sides:
        raise DictionaryError(
            f"{path} holds SAEs of {' and '.join(sides)}, but the site is {site.hook_name}; set site.layer={layer} and "
            "site=mlp_after_norm, or site=mlp_before_norm where it reads the residual stream"
        )
    _check_kind(path, site, "sae")
    activation = config.get("activation_fn_str") or config["activation_fn"]
    computes = (config["architecture"], config["normalize_activations"], bool(config["finetuning_scaling_factor"]))
    if activation not in ("topk", "relu") or computes != ("standard", "none", False):
        raise DictionaryError(
            f"{path}/{CONFIG_FILE}: only standard SAEs with TopK or ReLU, of activations as they are, can be read here"
        )
    coefficient = config.get("jacobian_coefficient") if config.get("use_jacobian_loss", True) else 0.0
    if coefficient is None:
        raise DictionaryError(
            f"{path}/{CONFIG_FILE} does not say with which Jacobian coefficient the pair was trained: add "
            "jacobian_coefficient to it, 0 for a pair that was trained without the term"
        )
    found = load_file(path / WEIGHTS_FILE)
    W_enc, b_enc, W_dec, b_dec = (found[f"_{n}{sides[site.hook_name]}"].float() for n in _JSAE_TENSORS)
    k = config["activation_fn_kwargs"]["k"] if activation == "topk" else None
    origin = Origin(config["model_name"], None, context_size=config["context_size"], prepend_bos=config["prepend_bos"])
    spec = _spec(site, activation, W_enc, b_dec, bool(config["apply_b_dec_to_input"]), origin, k=k)
    options = {"jacobian_coefficient": float(coefficient)}
    options |= {"jacobian_penalty": config["sparsity_metric"]} if "sparsity_metric" in config else {}
    return build(dataclasses.replace(spec, options=options), W_enc, b_enc, W_dec, b_dec)


_JSAE_TENSORS = ("W_enc", "b_enc", "W_dec", "b_dec")


def _kissane(path: Path, site: Site) -> Dictionary:
    config, tensors = kissane_config(path), _load_weights(path)
    _check_kind(path, site, "sae")
    _check_site(path, site, config["act_name"], None)
    W_enc, b_enc, W_dec, b_dec = (tensors[name].float() for name in ("W_enc", "b_enc", "W_dec", "b_dec"))
    if (sizes := (config["act_size"], config["dict_size"])) != tuple(W_enc.shape):
        raise DictionaryError(f"{path} has W_enc of shape {tuple(W_enc.shape)}, but its _cfg.json says {sizes}")
    # Values of heads are what processing leaves as they are, but for their biases; of the stream it changes the rest.
    processed = None if site.hook_name.endswith("attn.hook_z") else True
    origin = Origin(config.get("model_name"), None, processed, processed, processed, config.get("seq_len"), True)
    spec = dataclasses.replace(_spec(site, "relu", W_enc, b_dec, True, origin), l1_coefficient=config["l1_coeff"])
    return build(spec, W_enc, b_enc, W_dec, b_dec)


_READERS: dict[str, Callable[[Path, Site], Dictionary]] = {
    "saelens": _saelens,
    "transcoder_circuits": _transcoder_circuits,
    "dictionary_learning": _dictionary_learning,
    "sparsify": _sparsify,
    "jsae": _jsae,
    "kissane": _kissane,
}


# -------------------------------------------------------------------- what they share
def _spec(site: Site, activation: Any, W_enc: Tensor, b_dec: Tensor, subtracts: bool, origin: Origin,
          k: int | None = None, skip: bool = False) -> Spec:  # fmt: skip
    d, n = W_enc.shape
    return Spec(
        site.kind, activation, d, len(b_dec), n, *site, k=k, skip=skip, apply_b_dec_to_input=subtracts, origin=origin
    )


def _check_kind(name: str | Path, site: Site, kind: str) -> None:
    if kind != site.kind:
        wanted = "a site with hook_name alone" if kind == "sae" else "a site with hook_name_out: site=mlp"
        raise DictionaryError(f"{name} is {'an SAE' if kind == 'sae' else 'a transcoder'}: it needs {wanted}")


def _check_site(name: str | Path, site: Site, hook: str, out: str | None) -> None:
    if (hook, out or hook) != (site.hook_name, site.hook_name_out):
        raise DictionaryError(
            f"{name} reads {hook} and writes {out or hook}, but the site is {site.hook_name} to "
            f"{site.hook_name_out}; choose the site that it was made for"
        )


# -------------------------------------------------------------------- jobs
def foreign_job(job: Job) -> list[Dictionary]:
    """Reads the dictionary that a job names, both of a pair, or those of all heads as one, checks them against the
    model, and writes each as a SAELens folder: those of a pair as `input` and `output`."""
    config = job.config
    hook, out = config["hook_name"], config["hook_name_out"] or config["hook_name"]
    site = Site(hook, out, config["head"])
    if "output" in config:
        sides = {"input": (config, Site(hook, hook), "foreign")}
        sides |= {"output": (config["output"], Site(out, out), "foreign_out")}
        dictionaries = {side: _read(job, *one) for side, one in sides.items()}
    else:
        contents = config.get("heads")
        heads = enumerate(contents or ())
        parts = [({**config, "content": c}, site._replace(hook_head_index=h), f"foreign_{h}") for h, c in heads]
        read = [_read(job, *part) for part in parts or [(config, site, "foreign")]]
        if config["format"] == "kissane" and hook.endswith("attn.hook_z"):
            read = _with_value_biases(read, job)
        dictionaries = {"": BlockDiagonal(read) if contents else read[0]}
    with job.writing() as folder:
        for side, dictionary in dictionaries.items():
            (folder / side).mkdir(exist_ok=True)
            save_dictionary(dictionary, folder / side)
    return list(dictionaries.values())


def _read(job: Job, identity: dict[str, Any], site: Site, name: str) -> Dictionary:
    """One dictionary, of files that lie at the job's source `name` or of a release, which fits the job's model."""
    if identity["release"] is None:
        form = identity["format"]
        with job.reading(name, lambda path, d: foreign_digest(path, form, d), identity["content"]) as source:
            dictionary = read_foreign(source, site, form)
    else:
        source = Path(identity["release"]) / identity["sae_id"]
        dictionary = read_release(identity["release"], identity["sae_id"], site)
    spec = dictionary.spec
    origin = dataclasses.replace(spec.origin, source=job.instance.sources["label"])
    dictionary.spec = dataclasses.replace(spec, origin=origin)
    folder = job.source("model")
    check_fit(dictionary, source, folder, job.config["model"], read_geometry(folder))
    return dictionary


def _with_value_biases(dictionaries: list[Dictionary], job: Job) -> list[Dictionary]:
    """The same for values of heads as they are here, which add each head's bias c (d): a dictionary of z - c that gives
    back z - c is one of z with b_dec + c in place of b_dec, since b_dec is subtracted from the input too.

    TransformerLens's default processing folds c = b_V + b_norm W_V into b_O, as attention patterns sum to 1.
    """
    _, biases = read_values(open_model(job), int(job.config["hook_name"].split(".")[1]))
    moved = []
    for one in dictionaries:
        head = one.spec.hook_head_index
        c = biases.flatten() if head is None else biases[head]
        moved.append(build(one.spec, **one.tensors | {"b_dec": one.b_dec + c.to(one.b_dec)}))
    return moved
