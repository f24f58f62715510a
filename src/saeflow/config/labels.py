"""The names of artifacts' folders: what is not as usual, for people. Their hashes are what identifies them.

A name is a function of what is read alone, never of a sweep: one more value renames nothing. `USUAL` is therefore for
ever too; a setting that is not in it is usual at its dataclass's default.
"""

import hashlib
import re
from collections.abc import Iterable, Mapping
from typing import Any

from saeflow.config.checks import ConfigError
from saeflow.config.defaults import defaults_of, groups

LONGEST = 150
"""Characters of what is not as usual; a file's name may have 255."""

USUAL: dict[str, Any] = {
    "tokens.context_size": 256,
    "tokens.train_tokens": 307_200,
    "tokens.held_out_tokens": 65_536,
    "training.n_tokens": 614_400,
    "training.batch_size": 1024,
    "training.lr": 6e-3,
    "training.lr_warm_up_steps": 50,
    "training.lr_decay_steps": 150,
    "training.l1_warm_up_steps": 100,
    "training.jacobian_warm_up_steps": 30,
}
"""Of settings whose dataclass has no default, or another."""

SHORT: dict[str, str] = {
    "dictionary.activation": "",
    "dictionary.expansion": "x",
    "dictionary.d_sae": "d",
    "dictionary.squared_error": "error",
    "dictionary.sparsity": "",
    "dictionary.normalize_activations": "scaled",
    "dictionary.options": "",
    "dictionary.apply_b_dec_to_input": "b_dec_in",
    "dictionary.jacobian_penalty": "",
    "dictionary.jacobian_at": "at",
    "tokens.context_size": "ctx",
    "tokens.train_tokens": "train",
    "tokens.held_out_tokens": "held",
    "tokens.held_out_fraction": "fraction",
    "tokens.prepend_bos": "bos",
    "training.n_tokens": "n",
    "training.batch_size": "batch",
    "training.shuffle_seed": "shuffle",
    "training.order": "",
    "training.buffer_tokens": "buffer",
    "training.adam_beta1": "beta1",
    "training.adam_beta2": "beta2",
    "training.lr_warm_up_steps": "warmup",
    "training.lr_decay_steps": "decay",
    "training.l1_warm_up_steps": "l1warmup",
    "training.precision": "",
    "training.clip_grad_norm": "clip",
    "training.initial": "initial",
    "training.revive": "",
    "training.dead_after_tokens": "dead",
    "training.auxk_coefficient": "auxk",
    "training.jacobian_warm_up_steps": "jwarmup",
    "training.jacobian_fraction": "jfraction",
    "training.log_every": "log",
    "jacobian.text_tokens": "",
    "features.n_tokens": "looked",
    "features.split": "on",
    "activations.dtype": "",
    "activations.batch_rows": "rows",
}
"""How settings are called in names; others by their own names."""

NAMED_ALREADY = (
    *("model.weights", "model.randomise", "model.randomise_seed", "model.dtype", "model.bridge"),
    *("dictionary.kind", "dictionary.saelens"),
    *("dictionary.k", "dictionary.l1_coefficient", "dictionary.jacobian_coefficient"),
)
"""What the first part of a dictionary's name says, or what stands for a model."""
ORDER = ("dictionary", "seed", "tracr", "model", "corpus", "tokens", "activations", "training")


def unusual(config: Mapping[str, Any], stands: Mapping[str, str]) -> dict[str, str]:
    """Of what a stage reads, the settings that a name tells, with how it tells them. `stands`: what stands in names for
    groups that are something from outside, a model or a corpus."""
    found: dict[str, str] = {}
    for group, tree in config.items():
        if group == "seed":
            found[group] = f"seed{tree}"
        elif group in groups() and isinstance(tree, dict):
            found |= {group: stands[group]} if group in stands else {}
            usual = defaults_of(group, tree) | (_usual_loss(tree) if group == "dictionary" else {})
            order = {name: place for place, name in enumerate(usual)}
            names = sorted(tree, key=lambda name: order.get(name, -1))  # as declared, those without a default first
            for name in names if group != "corpus" else ():  # of which all is in what stands for it
                found |= told(f"{group}.{name}", tree[name], usual.get(name))
    return found


def told(path: str, value: Any, usual: Any = None) -> dict[str, str]:
    """One setting, or nothing where it is as usual."""
    if path in NAMED_ALREADY or value in (USUAL.get(path, usual), None) or value == {}:
        return {}
    if path == "jacobian.text":  # as what stands for a corpus
        return {path: f"prompt.{hashlib.sha256(value.encode()).hexdigest()[:4]}"}
    return {path: _token(SHORT.get(path, path.rsplit(".", 1)[1]), value)}


def joined(base: str, parts: Mapping[str, str]) -> str:
    """A name without its hash: `base`, then what is not as usual, as far as it goes."""

    def place(path: str) -> tuple[int, str]:
        group = path.split(".")[0]
        return (ORDER.index(group) if group in ORDER else len(ORDER)), group

    name, most = "", min(LONGEST, LONGEST + 60 - len(base))
    for path in sorted((p for p in parts if parts[p]), key=place):
        if len(name) + len(parts[path]) > most:
            name += "-etc"
            break
        name += f"-{parts[path]}"
    return base + name


def merged(several: Iterable[Mapping[str, str]]) -> dict[str, str]:
    """What several artifacts tell; what they do not agree on is left out."""
    found: dict[str, str] = {}
    for parts in several:
        for path, token in parts.items():
            found[path] = token if found.get(path, token) == token else ""
    return found


def file_safe(text: str) -> str:
    """Letters, digits, dots, dashes and underscores; nothing that a shell or a file system minds."""
    return re.sub(r"[^A-Za-z0-9._-]+", "_", text)[:60].strip("._-") or "_"


def check_names(key: str) -> None:
    """Raises `ConfigError` for a key that is not the name of a folder, or of a store and a column of it, that every
    shell and file system takes as it is, with what is put behind it while it is made."""
    for part in key.split("/"):
        if not re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9._+-]*", part) or len(part) > LONGEST + 80:
            raise ConfigError(f"{part!r} cannot be a folder's name: give what it is made of a plain and shorter one")


def _usual_loss(dictionary: dict[str, Any]) -> dict[str, Any]:
    """TopK with unit-norm rows; what an L1 penalty asks for without it."""
    dense = dictionary.get("activation") == "relu"
    return {
        "activation": "relu" if dense else "topk",
        "sparsity": "decoder_norm" if dense else "unit_norm",
        "normalize_activations": "expected_average_only_in" if dense else "none",
    }


def _token(name: str, value: Any) -> str:
    if isinstance(value, bool):
        return name if value else f"no_{name}"
    if isinstance(value, dict):
        return "_".join(_token(file_safe(k), v) for k, v in value.items())
    if isinstance(value, list):
        return file_safe("_".join([name, *map(str, value)]))
    value = "mean" if value == "expected_average_only_in" else value
    text = f"{value:g}" if isinstance(value, float) and float(f"{value:g}") == value else str(value)
    apart = "_" if name and (isinstance(value, str) or name[-1].isdigit()) else ""
    return file_safe(f"{name}{apart}{text}")
