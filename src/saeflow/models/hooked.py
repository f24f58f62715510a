"""Models in TransformerLens's own format, such as gelu-2l and the other toy models of NeelNanda on the hub.

`config.json` has TransformerLens's names (`d_model`, `act_fn`, `normalization`), and the weights are a pickled state
dict, `*final.pth`, with the names of its parameters. `scripts/fetch.py NAME --to FOLDER` makes of it a folder that is
opened here: the same `config.json`, the weights as `model.safetensors`, and the tokenizer that the config names. What
the keys mean is taken from TransformerLens's `convert_neel_model_config`; what is not sequential blocks of attention
and MLP with learned positions is refused (`saeflow.models.folder.read_geometry`).
"""

import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from saeflow.config import ModelConfig
from saeflow.models.folder import MODEL_FILES, ModelError, config_file, read_keys
from saeflow.storage.modes import share

if TYPE_CHECKING:
    from transformer_lens import HookedTransformer

BUFFERS = ("attn.mask", "attn.IGNORE")  # what old versions saved beside parameters


def convert(folder: Path, tokenizer_folder: Path, to: Path) -> None:
    """Makes the folder `to` from a model's `config.json` and `*final.pth`, and its tokenizer's folder.

    Raises `ModelError` for weights that are not there, or are more than tensors.
    """
    found = sorted(folder.glob("*final.pth"))
    if len(found) != 1:
        raise ModelError(f"{folder} has {len(found)} files *final.pth; one was expected: the weights at the end")
    try:
        state = torch.load(found[0], map_location="cpu", weights_only=True)  # noqa: TID251 -- tensors only, no code
        tensors = {name: t.float().contiguous() for name, t in state.items() if not name.endswith(BUFFERS)}
    except Exception as error:  # of pickle, zipfile and torch, as the file is damaged or asks for more
        reason = str(error).splitlines()[0][:200] if str(error) else type(error).__name__
        raise ModelError(f"{found[0]} is not a file of weights alone, and is not opened: {reason}") from error
    to.mkdir(parents=True, exist_ok=True)
    save_file(tensors, to / "model.safetensors")
    share(to / "model.safetensors")
    shutil.copyfile(config_file(folder), to / "config.json")
    for pattern in MODEL_FILES:
        for file in tokenizer_folder.glob(pattern) if "token" in pattern else ():
            shutil.copyfile(file, to / file.name)


def read_hooked_format(folder: Path, model: ModelConfig) -> tuple[Any, dict[str, Tensor]]:
    """TransformerLens's config and the weights, by its names, of a folder that `convert` made, on the CPU.

    The config is the one to process them with. Raises `ModelError` for weights that do not fit. Imports
    TransformerLens, which takes several seconds.
    """
    from transformer_lens import HookedTransformer

    config = _config(read_keys(config_file(folder)), model.fold_ln)
    try:
        state = load_file(folder / "model.safetensors")
    except (OSError, SafetensorError) as error:
        raise ModelError(f"the weights of {folder} cannot be read ({error}); fetch the model again") from error
    _check(folder, state, HookedTransformer(_config(read_keys(config_file(folder)), False), move_to_device=False))
    return config, state


def _config(keys: dict[str, Any], fold_ln: bool) -> Any:
    """As TransformerLens's `convert_neel_model_config` reads the keys."""
    from transformer_lens import HookedTransformerConfig

    names = ("n_layers", "d_model", "n_ctx", "d_head", "n_heads", "d_mlp", "d_vocab", "act_fn")
    normalization = keys.get("normalization", keys.get("normalization_type"))
    if fold_ln and normalization == "LN":
        normalization = "LNPre"
    return HookedTransformerConfig(
        **{name: keys[name] for name in names},
        normalization_type=normalization,
        final_rms=keys.get("final_rms", False),
        eps=keys.get("ln_eps", 1e-5),
        positional_embedding_type="standard",
        init_weights=False,
        dtype=torch.float32,
        device="cpu",
        default_prepend_bos=True,
    )


def _check(folder: Path, state: dict[str, Tensor], plain: "HookedTransformer") -> None:
    """Every parameter and its shape, before anything is folded: TransformerLens fills what is missing, unsaid."""
    wanted = {name: tuple(t.shape) for name, t in plain.state_dict().items() if not name.endswith(BUFFERS)}
    stored = {name: tuple(t.shape) for name, t in state.items()}
    wrong = sorted(name for name in wanted.keys() | stored.keys() if wanted.get(name) != stored.get(name))
    if wrong:
        name = wrong[0]
        raise ModelError(
            f"the weights of {folder} do not fit its config.json in {len(wrong)} tensors: {name} is "
            f"{stored.get(name, 'missing')} where {wanted.get(name, 'nothing')} belongs; fetch the model again"
        )
