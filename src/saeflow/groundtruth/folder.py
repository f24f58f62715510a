"""A model of a case on disk: `config.json`, `model.safetensors`, a tokenizer of its few words, and `quality.json` with
what it was measured to be.

`config.json` holds the fields of TransformerLens's config and the same sizes by Hugging Face's names, so that
`saeflow.models.folder.read_geometry` reads it as it reads any model folder. Weights have TransformerLens's names and
shapes.
"""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from saeflow.groundtruth.cases import Case, get_case
from saeflow.groundtruth.compiler import hooked_transformer
from saeflow.groundtruth.network import Network
from saeflow.groundtruth.program import BOS, PAD
from saeflow.models.folder import GROUND_TRUTH, ModelError, config_file, read_keys

if TYPE_CHECKING:
    from transformer_lens import HookedTransformer

_HUGGING_FACE = {
    "num_hidden_layers": "n_layers",
    "hidden_size": "d_model",
    "num_attention_heads": "n_heads",
    "head_dim": "d_head",
    "intermediate_size": "d_mlp",
    "max_position_embeddings": "n_ctx",
}


def write_model(
    folder: Path, case: Case, config: dict[str, Any], weights: dict[str, Any], quality: dict[str, Any]
) -> None:
    tensors = {name: torch.as_tensor(w).float().contiguous() for name, w in weights.items()}
    save_file(tensors, folder / "model.safetensors")
    sizes = {theirs: config[ours] for theirs, ours in _HUGGING_FACE.items()}
    keys = {"architectures": [GROUND_TRUTH], "case": case.number, **sizes, "transformer_lens": config}
    (folder / "config.json").write_text(json.dumps(keys, indent=1) + "\n")
    (folder / "quality.json").write_text(json.dumps(quality, indent=1) + "\n")
    _write_tokenizer(folder, case)


def _write_tokenizer(folder: Path, case: Case) -> None:
    """Words apart by spaces; a word that the case does not have reads as PAD."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    vocabulary = {str(word): i for i, word in enumerate(case.program.vocabulary)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token=PAD))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.decoder = decoders.WordPiece(prefix="")
    tokenizer.save(str(folder / "tokenizer.json"))
    names: dict[str, Any] = {"bos_token": BOS, "eos_token": PAD, "pad_token": PAD, "unk_token": PAD}
    names |= {"tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": case.n_ctx}
    (folder / "tokenizer_config.json").write_text(json.dumps(names, indent=1) + "\n")


def read_model(folder: Path) -> tuple[Case, Network]:
    """Raises `ModelError` for a folder that does not hold a whole model of a case."""
    keys = read_keys(config_file(folder))
    if keys.get("architectures") != [GROUND_TRUTH]:
        raise ModelError(f"{folder} is no model of a case; make one with model=tracr")
    try:
        return get_case(keys["case"]), Network(keys["transformer_lens"], load_file(folder / "model.safetensors"))
    except (OSError, KeyError, SafetensorError) as error:
        raise ModelError(f"the model in {folder} is damaged ({error}); delete the folder and run again") from error


def load_hooked(folder: Path) -> "HookedTransformer":
    """The same as a `HookedTransformer`; imports TransformerLens (ten seconds)."""
    _, network = read_model(folder)
    return hooked_transformer(network.config, network.weights())
