"""Language models as the plan sees them: what a Hugging Face folder holds, and which hooks the model in it has.

Only `config.json` and file names are read, so that a sweep is checked in milliseconds; `loading` opens a model.
"""

import difflib
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

from saeflow.config import ConfigError, ModelConfig
from saeflow.config.checks import where
from saeflow.planning.digests import DigestCache, short_hash
from saeflow.text.tokenizer import read_json

# What a folder is read for: no pickles, and no second copy of the weights in another format.
MODEL_FILES = (
    "config.json",
    "*.safetensors",
    "*.safetensors.index.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
)
HOOKED = "HookedTransformer"  # TransformerLens's own format, which names no architecture
# How the folders of presets come to be, by their names below models/.
MADE_BY = {
    "smollm2": "fetch it once, with the network: make model NAME=smollm2",
    "gelu-2l": "fetch it once, with the network: "
    "python scripts/fetch.py NeelNanda/GELU_2L512W_C4_Code --to models/gelu-2l",
    "greater_than": "train it once: python scripts/train_greater_than.py",
}
GROUND_TRUTH = "SaeflowGroundTruth"  # a model of a case, in a folder of our own
Norms = Literal["before", "both", "after"]
# Architectures with gated MLPs and norms by the root mean square, by where these norms are. Of the first three
# TransformerLens's `HookedTransformer` computes what most folders ask for; the others are run by its bridge.
RMS_NORM: dict[str, Norms] = {
    "LlamaForCausalLM": "before",
    "MistralForCausalLM": "before",
    "Qwen2ForCausalLM": "before",
    "Qwen3ForCausalLM": "before",
    "Qwen3MoeForCausalLM": "before",
    "MixtralForCausalLM": "before",
    "GptOssForCausalLM": "before",
    "Phi3ForCausalLM": "before",
    "SmolLM3ForCausalLM": "before",
    "GemmaForCausalLM": "before",
    "Gemma2ForCausalLM": "both",
    "Gemma3ForCausalLM": "both",
    "Olmo2ForCausalLM": "after",
    "Olmo3ForCausalLM": "after",
}
CONVERTED = ("LlamaForCausalLM", "MistralForCausalLM", "Qwen2ForCausalLM", "GPTNeoXForCausalLM", "GPT2LMHeadModel")
EXPERTS = ("Qwen3MoeForCausalLM", "MixtralForCausalLM", "GptOssForCausalLM")
SUPPORTED = (*RMS_NORM, "GPTNeoXForCausalLM", "GPT2LMHeadModel", GROUND_TRUTH, HOOKED)
# The architecture of a config.json that names none.
ARCHITECTURES = {
    "llama": "LlamaForCausalLM",
    "mistral": "MistralForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
    "qwen3_moe": "Qwen3MoeForCausalLM",
    "mixtral": "MixtralForCausalLM",
    "gpt_oss": "GptOssForCausalLM",
    "phi3": "Phi3ForCausalLM",
    "smollm3": "SmolLM3ForCausalLM",
    "gemma": "GemmaForCausalLM",
    "gemma2": "Gemma2ForCausalLM",
    "gemma3_text": "Gemma3ForCausalLM",
    "olmo2": "Olmo2ForCausalLM",
    "olmo3": "Olmo3ForCausalLM",
    "gpt_neox": "GPTNeoXForCausalLM",
    "gpt2": "GPT2LMHeadModel",
}
# What of a config.json no model can have here, and why.
UNSUPPORTED = {
    "quantization_config": "only weights that are plain numbers are read: save it again, dequantised, as bfloat16",
    "vision_config": "only models of text alone are run: save its language model in a folder of its own",
    "is_encoder_decoder": "only decoders are run: hooks are named by one stack of blocks",
    "use_bidirectional_attention": "only attention that looks back is run: losses are of the next token",
}
ROPE = {"LlamaForCausalLM": ("llama3",)}  # that are converted, beyond those that change nothing in the model's context


class ModelError(ConfigError):
    """A model folder that cannot be used; the message names the folder and what to do."""


@dataclass(frozen=True)
class Geometry:
    """Sizes of a model, read from its `config.json`."""

    architecture: str
    n_layers: int
    d_model: int
    n_heads: int
    n_key_value_heads: int
    d_head: int
    d_mlp: int
    parallel: bool
    """Attention and MLP both read the block's input (Pythia), so that there is no hook_resid_mid."""
    gated: bool
    n_ctx: int
    d_vocab: int | None = None
    """Rows of its embedding; None where `config.json` does not say it."""
    norms: Norms = "before"
    """Where a block normalises: what attention and MLP read, what they write, or both."""
    experts: bool = False
    """Whether the MLPs are mixtures of experts; `d_mlp` is then of those together that a token uses."""
    bridged: bool = False
    """Whether transformers' own modules run it, with TransformerLens's `TransformerBridge` for the hooks between them:
    what `HookedTransformer` cannot convert."""

    def block_hooks(self) -> dict[str, tuple[int, ...]]:
        """Sizes per token, (d,) or (head, d_head), of the hooks of one block that a dictionary can read; their names
        lack the `blocks.L.` in front."""
        d, m, z = (self.d_model,), (self.d_mlp,), (self.n_heads, self.d_head)
        hooks = {
            "hook_resid_pre": d,
            "ln1.hook_normalized": d,
            "attn.hook_q": z,
            "attn.hook_k": (self.n_key_value_heads, self.d_head),
            "attn.hook_v": (self.n_key_value_heads, self.d_head),
            "attn.hook_z": z,
            "hook_attn_out": d,
            "hook_resid_mid": d,
            "ln2.hook_normalized": d,
            "mlp.hook_in": d,
            "mlp.hook_pre": m,
            "mlp.hook_post": m,
            "hook_mlp_out": d,
            "hook_resid_post": d,
        }
        if self.parallel:
            del hooks["hook_resid_mid"]
        if self.architecture == GROUND_TRUTH:  # without norms
            del hooks["ln1.hook_normalized"], hooks["ln2.hook_normalized"], hooks["mlp.hook_in"]
        if self.norms == "after":  # what these norms see is not what attention and MLP read
            del hooks["ln1.hook_normalized"], hooks["ln2.hook_normalized"]
        if self.experts:  # each has hidden units of its own, for some of the tokens
            del hooks["mlp.hook_pre"], hooks["mlp.hook_post"]
        elif self.gated:
            hooks["mlp.hook_pre_linear"] = m
        return hooks

    def hook_size(self, hook_name: str) -> tuple[int, ...]:
        """Size per token at a hook: (d,) or (head, d_head).

        Raises `ConfigError` for a hook that the model does not have, naming the nearest that it has.
        """
        found = re.fullmatch(r"blocks\.(\d+)\.(.+)", hook_name)
        if found and int(found[1]) >= self.n_layers:
            raise ConfigError(
                f"{hook_name}: layer {found[1]} is out of range; the model has {self.n_layers} layers, "
                f"0 to {self.n_layers - 1}"
            )
        layer = found[1] if found else "0"
        sizes = {f"blocks.{layer}.{hook}": size for hook, size in self.block_hooks().items()}
        sizes |= {"hook_embed": (self.d_model,), "ln_final.hook_normalized": (self.d_model,)}
        if hook_name in sizes:
            return sizes[hook_name]
        if self.parallel and hook_name == f"blocks.{layer}.hook_resid_mid":
            raise ConfigError(
                f"the model has no hook {hook_name!r}: its attention and MLP are parallel, both read the stream before "
                f"the block, so that there is none between them; for the MLP with its norm use site=mlp_before_norm "
                f"site.hook_name=blocks.{layer}.hook_resid_pre, for the MLP alone site=mlp"
            )
        near = difflib.get_close_matches(hook_name, list(sizes), n=4, cutoff=0.3)
        raise ConfigError(f"the model has no hook {hook_name!r}; the nearest that it has: {', '.join(near or sizes)}")


def hook_layer(hook_name: str, n_layers: int) -> int:
    """Number of blocks that must run for the hook to fire: `stop_at_layer` of TransformerLens, but that a stopped pass
    leaves `ln_final` to the caller."""
    if found := re.match(r"blocks\.(\d+)\.", hook_name):
        return int(found[1]) + 1
    return n_layers if hook_name.startswith("ln_final") else 0


class Span(NamedTuple):
    """The block f between two hooks."""

    layer: int
    begins: Literal["norm", "gain", "mlp"]
    """With the norm, with the norm's gain and bias, or with the MLP itself."""
    skip: bool
    """Whether the residual stream is part of it."""

    @property
    def norm(self) -> bool:
        return self.begins == "norm"


def block_of_hooks(hook_name: str, hook_name_out: str, parallel: bool, norms: Norms = "before") -> Span:
    """The block between two hooks.

    `parallel`: attention and MLP both read the residual stream before the block (Pythia). `norms`: where the block
    normalises; with norms after the MLP they are part of what is between the hooks. Raises `ConfigError` where no MLP
    alone leads from one hook to the other.
    """
    before = "hook_resid_pre" if parallel else "hook_resid_mid"
    starts: dict[str, Literal["norm", "gain", "mlp"]] = {before: "norm", "ln2.hook_normalized": "gain"}
    if norms == "after":
        starts = {before: "mlp"}
    starts["mlp.hook_in"] = "mlp"
    found, out = (re.fullmatch(r"blocks\.(\d+)\.(.+)", name) for name in (hook_name, hook_name_out))
    if found and out and found[1] == out[1] and found[2] in starts:
        begins = starts[found[2]]
        if out[2] == "hook_mlp_out":
            return Span(int(found[1]), begins, False)
        if out[2] == "hook_resid_post" and found[2] == before and not parallel:
            return Span(int(found[1]), begins, True)
    ends = "hook_mlp_out" if parallel else f"hook_mlp_out, or from {before} to blocks.L.hook_resid_post"
    raise ConfigError(
        "a Jacobian is that of one MLP: from blocks.L.ln2.hook_normalized, blocks.L.mlp.hook_in or "
        f"blocks.L.{before} to blocks.L.{ends}, not from {hook_name} to {hook_name_out}; use site=mlp"
    )


def resolve_folder(model: ModelConfig) -> Path:
    """The local folder of a model's files. Never touches the network.

    Raises `ModelError` where the folder, or the hub name in the local cache, is not there.
    """
    if model.path is not None:
        folder = Path(model.path)
        if not folder.is_dir():
            made_by = MADE_BY.get(folder.name) if folder.parent.name == "models" else None
            how = f"; {made_by}" if made_by else ""
            raise ModelError(f"model.path={folder}: no such folder{where(folder)}{how}")
        return folder
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    try:
        found = snapshot_download(
            str(model.hub), revision=model.revision, local_files_only=True, allow_patterns=list(MODEL_FILES)
        )
    except LocalEntryNotFoundError as error:
        raise ModelError(
            f"model.hub={model.hub} is not in the local Hugging Face cache, or not whole; a run downloads nothing. "
            f"Fetch it once, with the network: python scripts/fetch.py {model.hub}"
            + (f" --revision {model.revision}" if model.revision else "")
            + ". Offline, copy its folder here and set model.path"
        ) from error
    return Path(found)


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files of a folder. Raises `ModelError` where there are none: pickled weights are not opened."""
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        pickled = [p.name for p in folder.glob("*.bin")]
        more = f" ({', '.join(pickled)}: a pickle is not opened, convert it with save_pretrained)" if pickled else ""
        raise ModelError(f"model folder {folder} has no weights: no *.safetensors in it{more}")
    return files


def model_digest(folder: Path, cache: DigestCache) -> str:
    """Hash of a model's weights and `config.json` by content, 32 hexadecimal digits."""
    digest = cache.files(folder, [config_file(folder), *weight_files(folder)])
    if read_keys(config_file(folder)).get("use_sliding_window"):  # of Qwen2; what was computed without it is stale
        digest = short_hash([digest, "sliding_window"], 32)
    return digest


def read_geometry(folder: Path) -> Geometry:
    """Reads the sizes that a folder's `config.json` states. Raises `ModelError` for an architecture not known here."""
    config = read_keys(config_file(folder))

    def get(*names: str, default: Any = None) -> Any:
        for name in names:
            if config.get(name) is not None:
                return config[name]
        if default is None:
            raise ModelError(f"{folder}/config.json has none of the keys {', '.join(names)}")
        return default

    if "auto_map" in config:  # transformers would ask in the middle of a job whether to run it
        raise ModelError(
            f"{folder}/config.json names code of its own (auto_map), and code of a model folder is never run: if the "
            "model is of a supported architecture, remove auto_map from a copy of the folder"
        )
    named = config.get("architectures") or [ARCHITECTURES.get(str(config.get("model_type")))]
    architecture = named[0] or _own_format(folder, config)
    for feature, what in UNSUPPORTED.items():
        if config.get(feature):
            raise ModelError(f"{folder}: config.json has {feature}, and {what}; this model cannot be used here")
    if architecture not in SUPPORTED:
        names = (name.removesuffix("ForCausalLM").removesuffix("LMHeadModel") for name in ARCHITECTURES.values())
        raise ModelError(
            f"{folder}: architecture {architecture} is not supported; these are: {', '.join(names)}, and "
            "TransformerLens's own format"
        )
    bridged = _must_be_bridged(folder, architecture, config)
    d_model, n_heads = get("hidden_size", "n_embd", "d_model"), get("num_attention_heads", "n_head", "n_heads")
    experts = architecture in EXPERTS
    d_mlp = get("intermediate_size", "n_inner", "d_mlp", default=4 * d_model)
    if experts:
        d_mlp = get("moe_intermediate_size", default=d_mlp) * get("num_experts_per_tok")
    return Geometry(
        architecture=architecture,
        n_layers=get("num_hidden_layers", "n_layer", "n_layers"),
        d_model=d_model,
        n_heads=n_heads,
        n_key_value_heads=get("num_key_value_heads", default=n_heads),
        d_head=get("head_dim", "d_head", default=d_model // n_heads),
        d_mlp=d_mlp,
        parallel=config.get("use_parallel_residual", True) if architecture == "GPTNeoXForCausalLM" else False,
        gated=architecture in RMS_NORM,
        n_ctx=get("max_position_embeddings", "n_positions", "n_ctx"),
        d_vocab=config.get("vocab_size", config.get("d_vocab")),
        norms=RMS_NORM.get(architecture, "before"),
        experts=experts,
        bridged=bridged,
    )


def _must_be_bridged(folder: Path, architecture: str, config: dict[str, Any]) -> bool:
    """Whether TransformerLens's `HookedTransformer` leaves out something of the model, and its bridge does not;
    `conversion` finds what is not known here. Raises `ModelError` for what neither computes."""
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    kind = rope.get("rope_type") or rope.get("type") or "default"
    left_out = {f"rope_type={kind}": kind not in ("default", "dynamic", *ROPE.get(architecture, ()))}
    if architecture == "LlamaForCausalLM":
        left_out |= {f"{name}=true": bool(config.get(name)) for name in ("attention_bias", "mlp_bias")}
    if architecture in ("LlamaForCausalLM", "Qwen2ForCausalLM") and config.get("head_dim"):
        d_head = config["head_dim"]
        left_out[f"head_dim={d_head}"] = d_head * config["num_attention_heads"] != config["hidden_size"]
    wrong = [setting for setting, is_left_out in left_out.items() if is_left_out]
    if wrong and architecture not in RMS_NORM:
        raise ModelError(
            f"{folder}: config.json has {wrong[0]}, which TransformerLens leaves out of {architecture}, so that it "
            "would compute something else than transformers; this model cannot be used here"
        )
    return bool(wrong) or (architecture in RMS_NORM and architecture not in CONVERTED)


def check_processing(folder: Path, geometry: Geometry, model: ModelConfig) -> None:
    """Raises `ModelError` for processing of the weights that would change what the model computes, or that there is no
    way to do."""
    if geometry.architecture == HOOKED and model.dtype != "float32":
        raise ModelError(
            f"model.dtype={model.dtype} does not apply to {folder}: models of TransformerLens's own format are opened "
            "as float32; set model.dtype=float32"
        )
    if geometry.norms == "after" and model.dtype != "float32":
        raise ModelError(
            f"model.dtype={model.dtype} does not apply to {folder}: TransformerLens's bridge rotates the queries of "
            f"{geometry.architecture} into float32, which its attention does not take; set model.dtype=float32"
        )
    asked = [name for name in ("fold_ln", "center_writing_weights", "center_unembed") if getattr(model, name)]
    if geometry.bridged and (asked or model.randomise != "none"):
        setting, off = (asked[0], "false") if asked else ("randomise", "none")
        raise ModelError(
            f"model.{setting} does not apply to {folder}: TransformerLens does not convert its weights, transformers' "
            f"own modules run it ({geometry.architecture}), and those are left as they are; set model.{setting}={off}"
        )
    if geometry.architecture in RMS_NORM and model.center_writing_weights:
        raise ModelError(
            f"model.center_writing_weights=true does not apply to {folder}: {geometry.architecture} normalises by the "
            "root mean square, which sees the mean; set model.center_writing_weights=false"
        )


def _own_format(folder: Path, config: dict[str, Any]) -> str:
    """`HOOKED` for a config of TransformerLens's own format. Raises `ModelError` for what of it is not supported."""
    if not {"d_model", "n_heads", "d_head", "d_vocab", "act_fn"} <= config.keys():
        return "unknown"
    norm = config.get("normalization", config.get("normalization_type"))
    wrong = {key: config.get(key) for key in ("attn_only", "shortformer_pos", "architecture")}
    for key, value in (wrong | {"normalization": None if norm in ("LN", "LNPre") else norm}).items():
        if value:
            raise ModelError(
                f"{folder}: config.json is of TransformerLens's own format with {key}={value}, which is not supported; "
                "supported are blocks of attention and MLP with LayerNorm and learned positions, such as gelu-2l"
            )
    return HOOKED


def config_file(folder: Path) -> Path:
    file = folder / "config.json"
    if not file.is_file():
        raise ModelError(f"model folder {folder} has no config.json; it must be a Hugging Face model folder")
    return file


def read_keys(file: Path) -> dict[str, Any]:
    return read_json(file, ModelError)
