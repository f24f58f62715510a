"""Opens a Hugging Face folder in TransformerLens, offline, and makes sure that it computes what transformers does."""

import dataclasses
import gc
import json
import pkgutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from saeflow.config import ModelConfig
from saeflow.config.device import devices_of
from saeflow.kernels.memory import give_back_freed_memory, uncollected
from saeflow.models.bridge import BridgedModel
from saeflow.models.conversion import SHORT, Expected, check_conversion, expect
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
from saeflow.models.spreading import spread
from saeflow.models.weights import open_weights

if TYPE_CHECKING:
    from transformer_lens import HookedTransformer

# What opens a folder of an architecture that packages above this one made, as "module:function" of the folder. It is
# imported only when such a folder is opened, so that models know none of those packages.
LOADERS = {GROUND_TRUTH: "saeflow.groundtruth.folder:load_hooked"}

LARGE = 1 << 22  # bytes of tensors that are moved until their memory is given back


def load_model(
    folder: Path, model: ModelConfig, device: str, context_size: int = SHORT, n_layers: int | None = None
) -> LanguageModel:
    """Opens a local Hugging Face folder without touching the network: as a `HookedTransformer`, or as a `BridgedModel`
    where TransformerLens does not convert it rightly (`Geometry.bridged`).

    `device` may be a range of GPUs, `cuda:0-3`, over which the layers are spread (`saeflow.models.spreading`).
    With `n_layers` it ends after so many layers, and the weights of others are not read: what hooks below see is the
    same. With `model.randomise` its weights are then replaced (`randomise`), and processed as the trained ones are. The
    conversion is checked on a row of `context_size` tokens: who is the first to run rows of some length says so, and
    the others need not pay for it again.
    Raises `ModelError` where the folder's weights are not whole or not finite, or where TransformerLens's conversion of
    them computes something else than transformers does. Imports both, which takes several seconds.
    """
    geometry = read_geometry(folder)
    with uncollected():
        import transformer_lens  # noqa: F401 -- and transformers: what follows imports parts of them
    if geometry.architecture in LOADERS:
        loaded: Any = pkgutil.resolve_name(LOADERS[geometry.architecture])(folder)
        return _placed(loaded, device)
    if geometry.architecture == HOOKED:
        from saeflow.models.hooked import read_hooked_format

        config, state = read_hooked_format(folder, model)
        check_finite(folder, state)
        return _placed(processed(config, state, model), device)
    check_processing(folder, geometry, model)
    n_layers = geometry.n_layers if n_layers is None else min(n_layers, geometry.n_layers)
    whole = n_layers == geometry.n_layers
    geometry = dataclasses.replace(geometry, n_layers=n_layers)
    if geometry.bridged:
        return _bridge(folder, geometry, model, device, context_size, whole)
    try:
        hooked, expected = _convert(folder, geometry, dataclasses.replace(model, randomise="none"), context_size)
        check_conversion(folder, expected, hooked, model.center_writing_weights, whole)
        if model.randomise != "none":
            del hooked
            hooked, _ = _convert(folder, geometry, model, 1)
    except (AttributeError, RuntimeError) as error:
        raise ModelError(f"TransformerLens cannot convert the weights of {folder}: {error}") from error
    give_back_freed_memory()  # what the check took
    return _placed(hooked, device)


def _placed(hooked: "HookedTransformer", device: str) -> "HookedTransformer":
    """On its device, or spread over those of a range."""
    first, *others = devices_of(device)
    if not others:
        return hooked.to(first, print_details=False)
    devices = [torch.device(name) for name in (first, *others)]
    hooked.cfg.device, hooked.cfg.n_devices = first, len(devices)  # by which its passes move the residual stream
    spread(hooked, hooked.blocks, getattr(hooked, "ln_final", None), devices)
    return hooked


def _bridge(
    folder: Path, geometry: Geometry, model: ModelConfig, device: str, context_size: int, whole: bool
) -> BridgedModel:
    """Transformers' model, with hooks between its modules, and compared with itself without them."""
    first, *others = devices_of(device)
    original = _load_original(folder, dtype_of(model), geometry.n_layers, **_PLAIN)
    original = original if others else original.to(first)  # all of it may be too much for one device
    expected = expect(original, geometry, context_size)  # before there are hooks
    bridged = BridgedModel(original, geometry)
    check_conversion(folder, expected, bridged, False, whole)
    return bridged.spread([torch.device(name) for name in (first, *others)]) if others else bridged


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


def _convert(
    folder: Path, geometry: Geometry, model: ModelConfig, n_tokens: int
) -> "tuple[HookedTransformer, Expected]":
    """TransformerLens's model of the weights, randomised and processed, and what transformers computes on a row.

    There is one copy of the weights: a tensor of transformers is let go when TransformerLens's is made of it.
    """
    from transformer_lens.loading_from_pretrained import get_pretrained_state_dict

    original = _load_original(folder, dtype_of(model), geometry.n_layers)
    expected = expect(original, geometry, n_tokens)
    config = _hooked_config(folder, geometry, model, original.config)
    state = get_pretrained_state_dict(str(folder), config, hf_model=original, dtype=dtype_of(model))
    del original  # `state` alone has its tensors, and loses one after the other
    gc.collect()
    give_back_freed_memory()
    return processed(config, state, model), expected


def processed(config: Any, state: dict[str, Any], model: ModelConfig) -> "HookedTransformer":
    """TransformerLens's model of a state dict: randomised and processed as `model` says, without gradients."""
    from transformer_lens import HookedTransformer

    from saeflow.models.controls import randomise

    if model.randomise != "none":
        state = randomise(state, model.randomise, model.randomise_seed, config.initializer_range)
    with _rotations_once():
        hooked = HookedTransformer(config, move_to_device=False)
    processing = {name: getattr(model, name) for name in ("fold_ln", "center_writing_weights", "center_unembed")}
    if any(processing.values()):
        hooked.load_and_process_state_dict(
            state, **processing, fold_value_biases=False, refactor_factored_attn_matrices=False
        )
    else:
        _move(hooked, state)
    return with_mlp_inputs(hooked.eval().requires_grad_(False))


def _move(hooked: "HookedTransformer", state: dict[str, torch.Tensor]) -> None:
    """Moves all of `state` into a model, tensor by tensor, so that memory holds them once.

    The embedding's matrix is taken as it is, and an unembedding that is tied to it stays the same memory: a copy of
    each would be a large part of a small model.
    """
    W_E, W_U = state["embed.W_E"], state["unembed.W_U"]
    tied = W_U.untyped_storage().data_ptr() == W_E.untyped_storage().data_ptr()
    hooked.load_state_dict({"embed.W_E": W_E} | ({"unembed.W_U": W_U} if tied else {}), strict=False, assign=True)
    hooked.fill_missing_keys(state)
    freed = 0
    for name in list(state):
        weights = state.pop(name)
        if name != "embed.W_E" and not (tied and name == "unembed.W_U"):
            module, _, its_name = name.rpartition(".")
            # through its own module: the whole model would be walked through for each tensor
            hooked.get_submodule(module).load_state_dict({its_name: weights}, strict=False)
        freed += weights.nbytes
        del weights
        if freed > LARGE:
            give_back_freed_memory()
            freed = 0


@contextmanager
def _rotations_once() -> Iterator[None]:
    """Within it, layers that rotate alike share the tables for it, of which TransformerLens makes one a layer: they
    would be a twentieth of SmolLM2's memory."""
    from transformer_lens.components import AbstractAttention

    made: dict[tuple[Any, ...], tuple[torch.Tensor, torch.Tensor]] = {}
    calculate = AbstractAttention.calculate_sin_cos_rotary

    def shared(attention: Any, *of: Any, **by_name: Any) -> tuple[torch.Tensor, torch.Tensor]:
        key = (attention.attn_type, of, *sorted(by_name.items()))  # with the config, which layers share, that is all
        if key not in made:
            made[key] = calculate(attention, *of, **by_name)
        return made[key]

    AbstractAttention.calculate_sin_cos_rotary = shared
    try:
        yield
    finally:
        AbstractAttention.calculate_sin_cos_rotary = calculate


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


def dtype_of(model: ModelConfig) -> torch.dtype:
    dtype: torch.dtype = getattr(torch, model.dtype)
    return dtype


def _load_original(folder: Path, dtype: torch.dtype, n_layers: int | None = None, **how: Any) -> Any:
    """The transformers model of a folder on the CPU, or of its first layers. `how` it computes, by transformers' names.

    Every tensor is read once, when its place in the model is filled; those of other layers are not read.
    """
    from safetensors import SafetensorError
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, AutoConfig
    from transformers.utils.logging import disable_progress_bar

    weight_files(folder)
    disable_progress_bar()
    config = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    if n_layers is not None:
        config.num_hidden_layers = n_layers
        if getattr(config, "layer_types", None):
            config.layer_types = config.layer_types[:n_layers]
    try:
        original, report = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)].from_pretrained(
            None,
            config=config,
            state_dict=open_weights(folder),
            dtype=dtype,
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
    give_back_freed_memory()  # what reading took
    return original.eval()


def _hooked_config(folder: Path, geometry: Geometry, model: ModelConfig, theirs: Any) -> Any:
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
        given = {"fold_ln": model.fold_ln, "device": "cpu", "dtype": dtype_of(model), "n_ctx": n_ctx}
        config = get_pretrained_model_config(neutral, **given)
    config.model_name, config.tokenizer_name = folder.name, None
    config.d_mlp, config.n_layers = geometry.d_mlp, geometry.n_layers  # n_inner of GPT-2
    if geometry.architecture == "GPTNeoXForCausalLM":
        rope = plain.get("rope_parameters") or {}
        config.rotary_base = rope.get("rope_theta") or plain.get("rotary_emb_base") or 10000
    if geometry.architecture == "Qwen2ForCausalLM" and theirs.sliding_window:
        config.use_local_attn, config.window_size = True, theirs.sliding_window
        config.attn_types = ["local" if kind == "sliding_attention" else "global" for kind in theirs.layer_types]
    return config
