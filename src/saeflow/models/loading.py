"""Opens a Hugging Face folder in TransformerLens, offline, and makes sure that it computes what transformers does."""

import dataclasses
import json
import pkgutil
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from saeflow.config import ModelConfig
from saeflow.models.bridge import BridgedModel
from saeflow.models.conversion import SHORT, check_conversion, expect
from saeflow.models.folder import (
    GROUND_TRUTH,
    HOOKED,
    Geometry,
    ModelError,
    check_processing,
    config_file,
    read_geometry,
    read_keys,
    weight_files,
)
from saeflow.models.protocol import LanguageModel

if TYPE_CHECKING:
    from transformer_lens import HookedTransformer

# What opens a folder of an architecture that packages above this one made, as "module:function" of the folder. It is
# imported only when such a folder is opened, so that models know none of those packages.
LOADERS = {GROUND_TRUTH: "saeflow.groundtruth.folder:load_hooked"}


def load_model(folder: Path, model: ModelConfig, device: str, context_size: int = SHORT) -> LanguageModel:
    """Opens a local Hugging Face folder in float32, without touching the network: as a `HookedTransformer`, or as a
    `BridgedModel` where TransformerLens does not convert it rightly (`Geometry.bridged`).

    With `model.randomise` its weights are then replaced (`randomise`), and processed as the trained ones are. The
    conversion is checked on a row of `context_size` tokens: who is the first to run rows of some length says so, and
    the others need not pay for it again.
    Raises `ModelError` where the folder's weights are not whole or not finite, or where TransformerLens's conversion of
    them computes something else than transformers does. Imports both, which takes several seconds.
    """
    geometry = read_geometry(folder)
    if geometry.architecture in LOADERS:
        loaded: Any = pkgutil.resolve_name(LOADERS[geometry.architecture])(folder)
        return loaded.to(device, print_details=False)
    if geometry.architecture == HOOKED:
        from saeflow.models.hooked import read_hooked_format

        config, state = read_hooked_format(folder, model)
        check_finite(folder, state)
        return processed(config, state, model).to(device, print_details=False)
    check_processing(folder, geometry, model)
    original = _load_original(folder, **(_PLAIN if geometry.bridged else {}))
    if geometry.bridged:
        return _bridge(folder, geometry, original.to(device), context_size)
    expected = expect(original, geometry, context_size)
    try:
        hooked = _convert(folder, geometry, original, dataclasses.replace(model, randomise="none"))
        check_conversion(folder, expected, hooked, model.center_writing_weights)
        if model.randomise != "none":
            hooked = _convert(folder, geometry, original, model)
    except (AttributeError, RuntimeError) as error:
        raise ModelError(f"TransformerLens cannot convert the weights of {folder}: {error}") from error
    return hooked.to(device, print_details=False)


def _bridge(folder: Path, geometry: Geometry, original: Any, context_size: int) -> BridgedModel:
    """Transformers' model on its device, with hooks between its modules, and compared with itself without them."""
    expected = expect(original, geometry, context_size)  # before there are hooks
    bridged = BridgedModel(original, geometry)
    check_conversion(folder, expected, bridged, False)
    return bridged


def check_finite(folder: Path, state: Mapping[str, torch.Tensor]) -> None:
    """Raises `ModelError` for a weight that is NaN or infinite."""
    for name, weights in state.items():
        if not weights.is_floating_point() or bool(weights.sum().isfinite()):
            continue  # a sum is twenty times as fast, and is finite only if all are
        bad = weights.isfinite().logical_not()
        if bool(bad.any()):
            what = weights[bad][0].item()
            raise ModelError(
                f"the weights of {folder} are not finite: of {weights.numel():,} values of {name} "
                f"{int(bad.sum()):,} are not, {what} first; copy the model folder again, or take an earlier checkpoint"
            )


def _convert(folder: Path, geometry: Geometry, original: Any, model: ModelConfig) -> "HookedTransformer":
    """TransformerLens's model of the weights, randomised and processed."""
    from transformer_lens.loading_from_pretrained import get_pretrained_state_dict

    config = _hooked_config(folder, geometry, model.fold_ln, original.config)
    state = get_pretrained_state_dict(str(folder), config, hf_model=original, dtype=torch.float32)
    return processed(config, state, model)


def processed(config: Any, state: dict[str, Any], model: ModelConfig) -> "HookedTransformer":
    """TransformerLens's model of a state dict: randomised and processed as `model` says, without gradients."""
    from transformer_lens import HookedTransformer

    from saeflow.models.controls import randomise

    if model.randomise != "none":
        state = randomise(state, model.randomise, model.randomise_seed, config.initializer_range)
    hooked = HookedTransformer(config, move_to_device=False)
    hooked.load_and_process_state_dict(
        state,
        fold_ln=model.fold_ln,
        center_writing_weights=model.center_writing_weights,
        center_unembed=model.center_unembed,
        fold_value_biases=False,
        refactor_factored_attn_matrices=False,
    )
    return with_mlp_inputs(hooked.eval().requires_grad_(False))


def with_mlp_inputs(hooked: "HookedTransformer") -> "HookedTransformer":
    """Adds the hooks `blocks.L.mlp.hook_in`: what the MLP reads, after its norm's gain and bias.

    `ln2.hook_normalized` fires before those since version 3 of TransformerLens. The name is that of its newer
    `TransformerBridge`.
    """
    from transformer_lens.hook_points import HookPoint

    def read(mlp: Any, args: tuple[Any, ...]) -> tuple[Any, ...]:
        return (mlp.hook_in(args[0]), *args[1:])

    for block in hooked.blocks:
        block.mlp.hook_in = HookPoint()
        block.mlp.register_forward_pre_hook(read)
    hooked.setup()
    return hooked


_PLAIN = {"attn_implementation": "eager", "experts_implementation": "eager"}
"""How a model that is to be bridged computes: with masks written out, which are what the bridge can read, and experts
by operations that have derivatives."""


def _load_original(folder: Path, **how: Any) -> Any:
    """The transformers model of a folder, in float32 on the CPU. `how` it computes, by transformers' own names."""
    from safetensors import SafetensorError
    from transformers import AutoModelForCausalLM
    from transformers.utils.logging import disable_progress_bar

    weight_files(folder)
    disable_progress_bar()
    try:
        original, report = AutoModelForCausalLM.from_pretrained(
            folder,
            dtype=torch.float32,
            local_files_only=True,
            use_safetensors=True,
            trust_remote_code=False,
            output_loading_info=True,
            **how,
        )
    except (OSError, RuntimeError, SafetensorError) as error:
        raise ModelError(f"the weights of {folder} cannot be read ({error}); copy the model folder again") from error
    if missing := sorted(report["missing_keys"]):  # transformers would draw them at random
        raise ModelError(
            f"the weights of {folder} are not whole: {len(missing)} tensors are missing, {', '.join(missing[:3])} "
            "first; copy the model folder again"
        )
    check_finite(folder, original.state_dict())
    return original.eval()


def _hooked_config(folder: Path, geometry: Geometry, fold_ln: bool, theirs: Any) -> Any:
    """TransformerLens's config of a folder, of which `theirs` is transformers' config.

    TransformerLens guesses the architecture from the *path* (any with "llama" in it), and wants an `n_ctx` that
    transformers no longer writes for GPT-2: so it is given a copy of `config.json` in a place of its own. What its
    conversion drops is set afterwards.
    """
    from transformer_lens.loading_from_pretrained import get_pretrained_model_config

    plain, n_ctx = read_keys(config_file(folder)), geometry.n_ctx
    with tempfile.TemporaryDirectory() as neutral:
        (Path(neutral) / "config.json").write_text(
            json.dumps({"n_ctx": n_ctx} | plain | {"architectures": [geometry.architecture]})
        )
        given = {"fold_ln": fold_ln, "device": "cpu", "dtype": torch.float32, "n_ctx": n_ctx}
        config = get_pretrained_model_config(neutral, **given)
    config.model_name, config.tokenizer_name = folder.name, None
    config.d_mlp = geometry.d_mlp  # n_inner of GPT-2
    if geometry.architecture == "GPTNeoXForCausalLM":
        rope = plain.get("rope_parameters") or {}
        config.rotary_base = rope.get("rope_theta") or plain.get("rotary_emb_base") or 10000
    if geometry.architecture == "Qwen2ForCausalLM" and theirs.sliding_window:
        config.use_local_attn, config.window_size = True, theirs.sliding_window
        config.attn_types = ["local" if kind == "sliding_attention" else "global" for kind in theirs.layer_types]
    return config
