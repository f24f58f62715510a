"""Every family of models against plain transformers: values at hooks, splices, losses and Jacobians.

The reference is transformers' own model in eager attention, whose modules' inputs and outputs are read and replaced by
hooks of torch. Rows are longer than every window.
"""

import copy
import dataclasses
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import Any, Literal, NamedTuple

import pytest
import torch
import transformers
from conftest import save_model
from pretended import held, pretended
from torch import Tensor

from saeflow.config import ConfigError, ModelConfig
from saeflow.evaluation.baseline import drop_last_position, model_losses
from saeflow.kernels.jacobian import jacobian_by_jvp, jacobian_chunks, make_products
from saeflow.models import loading
from saeflow.models.blocks import Block, ModuleBlock, read_block
from saeflow.models.bridge import BridgedModel
from saeflow.models.folder import Geometry, ModelError, block_of_hooks, check_processing, read_geometry
from saeflow.models.loading import load_model
from saeflow.models.protocol import LanguageModel
from saeflow.models.source import settings_of
from saeflow.models.splicing import read_hooks, run_clean, run_spliced
from saeflow.models.weights import open_weights
from saeflow.planning.expansion import compose
from saeflow.planning.graph import Plan

ROOT = Path(__file__).resolve().parents[2]
ROPE = {"rope_theta": 10_000.0, "original_max_position_embeddings": 32}
LLAMA3 = ROPE | {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
SIZES: dict[str, Any] = {
    "vocab_size": 100,
    "hidden_size": 16,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 6,
    "intermediate_size": 20,
    "max_position_embeddings": 128,
    "sliding_window": 12,
    "pad_token_id": None,
}
ALTERNATE = ["sliding_attention", "full_attention", "sliding_attention"]
EXPERTS = {"num_local_experts": 4, "num_experts_per_tok": 2}
WINDOW = {"use_sliding_window": True, "max_window_layers": 1}
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "gpt2": ("GPT2LMHead", {}),
    "gpt_neox": ("GPTNeoX", {}),
    "llama": ("Llama", {}),
    "llama3_rope": ("Llama", {"rope_parameters": LLAMA3}),
    "llama_yarn_rope": ("Llama", {"rope_parameters": ROPE | {"rope_type": "yarn", "factor": 4.0}}),
    "llama_biases": ("Llama", {"attention_bias": True, "mlp_bias": True, "head_dim": 4}),
    "llama_head_dim": ("Llama", {}),
    "mistral": ("Mistral", {}),
    "qwen2": ("Qwen2", WINDOW),
    "qwen3": ("Qwen3", WINDOW),
    "gemma": ("Gemma", {}),
    "gemma2": ("Gemma2", {"query_pre_attn_scalar": 7}),
    "gemma3": ("Gemma3", {"query_pre_attn_scalar": 7, "layer_types": ALTERNATE}),
    "olmo2": ("Olmo2", {}),
    "olmo3": ("Olmo3", {"layer_types": ALTERNATE}),
    "phi3": ("Phi3", {}),
    "smollm3": ("SmolLM3", {"no_rope_layer_interval": 2}),
    "mixtral": ("Mixtral", EXPERTS),
    "qwen3_moe": ("Qwen3Moe", {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 8}),
    "gpt_oss": ("GptOss", EXPERTS | {"layer_types": ALTERNATE}),
}
CONVERTED = ("gpt2", "gpt_neox", "llama", "llama3_rope", "mistral", "qwen2")
IDS = torch.randint(0, 100, (2, 40), generator=torch.Generator().manual_seed(1))


class Opened(NamedTuple):
    name: str
    folder: Path
    plain: Any
    model: LanguageModel

    @property
    def hooks(self) -> list[str]:
        geometry = read_geometry(self.folder)
        blocks = [f"blocks.{layer}.{hook}" for layer in range(3) for hook in geometry.block_hooks()]
        return ["hook_embed", *blocks, "ln_final.hook_normalized"]


def make(folder: Path, name: str, tokenizer_folder: Path | None = None, **more: Any) -> Path:
    family, settings = MODELS[name]
    settings = settings | more
    if name == "gpt2":
        config: Any = transformers.GPT2Config(vocab_size=100, n_embd=16, n_layer=3, n_head=4, n_positions=128)
    elif name == "gpt_neox":
        sizes = {key: value for key, value in SIZES.items() if key not in ("num_key_value_heads", "head_dim")}
        config = transformers.GPTNeoXConfig(**sizes | {"rotary_pct": 0.5} | more)
    else:
        sizes = SIZES | ({"head_dim": 4} if name in CONVERTED else {})
        config = getattr(transformers, f"{family}{'Text' if name == 'gemma3' else ''}Config")(**sizes | settings)
    suffix = "Model" if name == "gpt2" else "ForCausalLM"
    return save_model(getattr(transformers, family + suffix)(config), folder, tokenizer_folder)


@pytest.fixture(scope="module", params=MODELS)
def opened(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Opened:
    folder = make(tmp_path_factory.mktemp("model"), request.param)
    plain = transformers.AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager", experts_implementation="eager"
    ).eval()
    model = load_model(folder, ModelConfig("tiny", path=str(folder)), "cpu", IDS.shape[1])
    return Opened(request.param, folder, plain, model)


# -------------------------------------------------------------------- the reference
class Place(NamedTuple):
    """Where plain transformers has the value of a hook: what a module reads, or what it writes."""

    module: str
    writes: bool
    part: Callable[[Tensor], Tensor] = lambda value: value
    """The hook's value of the module's."""
    whole: Callable[[Tensor, Tensor], Tensor] = lambda value, of_module: value
    """The module's value, of the hook's and the module's as it was."""


NORMS = {
    "before": ("input_layernorm", "post_attention_layernorm", "self_attn", "mlp"),
    "both": ("input_layernorm", "pre_feedforward_layernorm", "post_attention_layernorm", "post_feedforward_layernorm"),
    "after": ("", "", "post_attention_layernorm", "post_feedforward_layernorm"),
}


def places(opened: Opened, layer: int) -> dict[str, Place]:
    """By hook of a block, but for hook_resid_mid."""
    geometry, config = read_geometry(opened.folder), opened.plain.config
    H, G, d = geometry.n_heads, geometry.n_key_value_heads, geometry.d_head
    if opened.name == "gpt2":
        block, ln1, ln2, attn, mlp = f"transformer.h.{layer}", "ln_1", "ln_2", "attn", "mlp"
        out, z, hidden = "c_proj", "attn.c_proj", "mlp.c_fc"
    elif opened.name == "gpt_neox":
        block, ln1, ln2 = f"gpt_neox.layers.{layer}", "input_layernorm", "post_attention_layernorm"
        attn, mlp, out, z, hidden = "attention", "mlp", "dense_4h_to_h", "attention.dense", "mlp.dense_h_to_4h"
    else:
        block, (ln1, ln2, attn, mlp) = f"model.layers.{layer}", NORMS[geometry.norms]
        out, z, hidden = "down_proj", "self_attn.o_proj", "mlp.gate_proj"

    def normalised(norm: str) -> Place:
        module = opened.plain.get_submodule(f"{block}.{norm}")
        gain = module.weight + (1 if opened.name.startswith("gemma") else 0)
        bias = getattr(module, "bias", None)
        bias = torch.zeros_like(gain) if bias is None else bias
        return Place(norm, True, lambda v: (v - bias) / gain, lambda v, _: v * gain + bias)

    def heads(module: str, writes: bool, n: int, start: int = 0) -> Place:
        some = slice(start, start + n * d)

        def put(value: Tensor, of_module: Tensor) -> Tensor:
            of_module = of_module.clone()
            of_module[..., some] = value.flatten(2)
            return of_module

        return Place(module, writes, lambda v: v[..., some].unflatten(-1, (n, d)), put)

    def qkv(i: int) -> Place:
        if opened.name == "gpt_neox":  # by head: query, key, value

            def put(value: Tensor, of_module: Tensor) -> Tensor:
                of_module = of_module.unflatten(-1, (H, 3, d)).clone()
                of_module[..., i, :] = value
                return of_module.flatten(2)

            return Place("attention.query_key_value", True, lambda v: v.unflatten(-1, (H, 3, d))[..., i, :], put)
        joint = {"gpt2": "attn.c_attn", "phi3": "self_attn.qkv_proj"}.get(opened.name)
        n = H if i == 0 else G
        if joint:
            return heads(joint, True, n, (0, H, H + G)[i] * d)
        return heads(f"self_attn.{'qkv'[i]}_proj", True, n)

    def half(i: int) -> Place:
        m = geometry.d_mlp

        def put(value: Tensor, of_module: Tensor) -> Tensor:
            parts = list(of_module.split(m, dim=-1))
            parts[i] = value
            return torch.cat(parts, dim=-1)

        return Place("mlp.gate_up_proj", True, lambda v: v.split(m, dim=-1)[i], put)

    found = {
        "hook_resid_pre": Place("", False),
        "attn.hook_q": qkv(0),
        "attn.hook_k": qkv(1),
        "attn.hook_v": qkv(2),
        "attn.hook_z": heads(z, False, H),
        "hook_attn_out": Place(attn, True),
        "mlp.hook_in": Place("mlp", False),
        "hook_mlp_out": Place(mlp, True),
        "hook_resid_post": Place("", True),
    }
    if ln1:
        found |= {"ln1.hook_normalized": normalised(ln1), "ln2.hook_normalized": normalised(ln2)}
    if not geometry.experts:
        fused = opened.name == "phi3"
        found |= {
            "mlp.hook_pre": half(0) if fused else Place(hidden, True),
            "mlp.hook_post": Place(f"mlp.{out}", False),
        }
        if geometry.gated:
            found["mlp.hook_pre_linear"] = half(1) if fused else Place("mlp.up_proj", True)
    assert config.num_hidden_layers == 3
    return {hook: place._replace(module=f"{block}.{place.module}".rstrip(".")) for hook, place in found.items()}


def place_of(opened: Opened, hook: str) -> Place:
    if hook == "hook_embed":
        names = {"gpt2": "transformer.wte", "gpt_neox": "gpt_neox.embed_in"}
        return Place(names.get(opened.name, "model.embed_tokens"), True)
    if hook.startswith("ln_final"):
        names = {"gpt2": "transformer.ln_f", "gpt_neox": "gpt_neox.final_layer_norm"}
        norm = opened.plain.get_submodule(name := names.get(opened.name, "model.norm"))
        gain = norm.weight + (1 if opened.name.startswith("gemma") else 0)
        bias = getattr(norm, "bias", None)
        bias = torch.zeros_like(gain) if bias is None else bias
        return Place(name, True, lambda v: (v - bias) / gain, lambda v, _: v * gain + bias)
    _, layer, name = hook.split(".", 2)
    return places(opened, int(layer))[name]


@contextmanager
def hooked(plain: Any, place: Place, function: Callable[[Tensor], Tensor | None]) -> Iterator[None]:
    """Within it, `function` reads the value at a place, and may replace it."""

    def changed(whole: Tensor) -> Tensor:
        new = function(place.part(whole))
        return whole if new is None else place.whole(new, whole)

    def write(module: Any, args: Any, output: Any) -> Any:
        return (changed(output[0]), *output[1:]) if isinstance(output, tuple) else changed(output)

    def read(module: Any, args: Any, kwargs: Any) -> Any:
        if args:
            return (changed(args[0]), *args[1:]), kwargs
        return args, kwargs | {"hidden_states": changed(kwargs["hidden_states"])}

    module = plain.get_submodule(place.module)
    handle = (
        module.register_forward_hook(write)
        if place.writes
        else module.register_forward_pre_hook(read, with_kwargs=True)
    )
    try:
        yield
    finally:
        handle.remove()


@torch.no_grad()
def plain_values(opened: Opened, hooks: list[str]) -> dict[str, Tensor]:
    values: dict[str, Tensor] = {}
    with ExitStack() as undo:
        for hook in hooks:
            undo.enter_context(hooked(opened.plain, place_of(opened, hook), partial(values.__setitem__, hook)))
        opened.plain(input_ids=IDS)
    return values


@torch.no_grad()
def plain_logits(opened: Opened, hook: str = "", value: Tensor | None = None) -> Tensor:
    """With the value at a hook replaced."""
    if value is None:
        return opened.plain(input_ids=IDS).logits
    if hook.endswith("hook_resid_mid"):
        block = hook.removesuffix("hook_resid_mid")
        before = plain_values(opened, [block + "hook_resid_pre"])
        value, hook = value - before[block + "hook_resid_pre"], block + "hook_attn_out"
    with hooked(opened.plain, place_of(opened, hook), lambda _: value):
        return opened.plain(input_ids=IDS).logits


def close(found: Tensor, wanted: Tensor, tolerance: float = 2e-5) -> bool:
    return found.shape == wanted.shape and bool((found - wanted).abs().max() <= tolerance * wanted.abs().max())


# -------------------------------------------------------------------- what is computed
def test_what_runs_the_model_is_what_its_folder_says(opened: Opened) -> None:
    assert isinstance(opened.model, BridgedModel) == (opened.name not in CONVERTED)
    assert read_geometry(opened.folder).bridged == (opened.name not in CONVERTED)


def test_values_at_every_hook_are_those_of_transformers(opened: Opened) -> None:
    wanted = plain_values(opened, [hook for hook in opened.hooks if not hook.endswith("hook_resid_mid")])
    for hook, found in zip(opened.hooks, read_hooks(opened.model, IDS, opened.hooks), strict=True):
        if hook.endswith("hook_resid_mid"):  # the sum of what the block and its attention hand on
            block = hook.removesuffix("hook_resid_mid")
            wanted[hook] = wanted[block + "hook_resid_pre"] + wanted[block + "hook_attn_out"]
        assert tuple(found.shape[2:]) == read_geometry(opened.folder).hook_size(hook), hook
        assert close(found, wanted[hook]), hook


def test_a_pass_that_stops_and_one_that_begins_at_a_layer_make_a_whole(opened: Opened) -> None:
    whole = plain_logits(opened)
    assert whole.std() > 0.3
    with torch.no_grad():
        assert close(opened.model(IDS), whole)
        for layer in range(4):
            residual = opened.model(IDS, stop_at_layer=layer)
            assert close(opened.model(residual, start_at_layer=layer), whole), layer


def test_splices_and_their_losses_are_those_of_transformers_with_the_value_replaced(opened: Opened) -> None:
    hooks = [hook for hook in opened.hooks if not hook.startswith(("blocks.0", "blocks.2"))]
    clean = run_clean(opened.model, IDS, hooks, hooks)
    targets, generator = IDS[:, 1:].flatten(), torch.Generator().manual_seed(2)
    variants, wanted = [], []
    for hook in hooks:
        value = clean.values[hook]
        value = value + 0.5 * value.std() * torch.randn(value.shape, generator=generator)
        variants.append(drop_last_position(run_spliced(opened.model, clean, hook, value)))
        wanted.append(plain_logits(opened, hook, value)[:, :-1].flatten(0, 1).log_softmax(-1))
    ce_clean, losses = model_losses(opened.model, IDS, drop_last_position(clean.final), variants)
    log_p = plain_logits(opened)[:, :-1].flatten(0, 1).log_softmax(-1)
    assert close(ce_clean, -log_p.gather(1, targets[:, None])[:, 0])
    for hook, loss, log_q in zip(hooks, losses, wanted, strict=True):
        assert close(loss.ce, -log_q.gather(1, targets[:, None])[:, 0], 1e-4), hook
        assert close(loss.kl, (log_p.exp() * (log_p - log_q)).sum(1), 1e-3), hook
        assert loss.kl.max() > 1e-3, hook  # a splice that did nothing would pass nothing


def test_one_head_is_replaced_alone(opened: Opened) -> None:
    hook = "blocks.1.attn.hook_z"
    clean = run_clean(opened.model, IDS, [hook], [hook])
    value = clean.values[hook].clone()
    value[:, :, 2] = 0
    final = run_spliced(opened.model, clean, hook, torch.zeros_like(value[:, :, 2]).flatten(0, 1), head=2)
    with torch.no_grad():
        wanted = plain_logits(opened, hook, value)
        assert not close(opened.model(IDS), wanted)
    _, (loss,) = model_losses(opened.model, IDS, drop_last_position(clean.final), [drop_last_position(final)])
    log_q = wanted[:, :-1].flatten(0, 1).log_softmax(-1)
    assert close(loss.ce, -log_q.gather(1, IDS[:, 1:].flatten()[:, None])[:, 0], 1e-4)


# -------------------------------------------------------------------- Jacobians
def blocks_of(opened: Opened) -> Iterator[tuple[str, str]]:
    """Hooks around the MLP of the middle layer, in every way that the model has."""
    geometry = read_geometry(opened.folder)
    before = "hook_resid_pre" if geometry.parallel else "hook_resid_mid"
    normed = [] if geometry.norms == "after" else ["ln2.hook_normalized"]
    for start in (before, "mlp.hook_in", *normed):
        yield start, "hook_mlp_out"
    if not geometry.parallel:
        yield before, "hook_resid_post"


def plain_block(opened: Opened, start: str, end: str) -> Callable[[Tensor], Tensor]:
    """The same by transformers' modules in float64, of values (N, d)."""
    geometry = read_geometry(opened.folder)
    if opened.name == "gpt2":
        block, norm, after = opened.plain.transformer.h[1], "ln_2", ""
    elif opened.name == "gpt_neox":
        block, norm, after = opened.plain.gpt_neox.layers[1], "post_attention_layernorm", ""
    else:
        block = opened.plain.model.layers[1]
        norm = NORMS[geometry.norms][1]
        after = "" if geometry.norms == "before" else "post_feedforward_layernorm"
    block = copy.deepcopy(block).double()
    gain = getattr(block, norm).weight if norm else None
    bias = getattr(getattr(block, norm), "bias", None) if norm else None

    def function(x: Tensor) -> Tensor:
        y = x
        if start == "ln2.hook_normalized":
            y = y * (gain + (1 if opened.name.startswith("gemma") else 0)) + (0 if bias is None else bias)
        elif start != "mlp.hook_in" and norm:
            y = getattr(block, norm)(y)
        written = block.mlp(y[None])
        written = (written[0] if isinstance(written, tuple) else written)[0]
        written = getattr(block, after)(written) if after else written
        return x + written if end == "hook_resid_post" else written

    return function


def test_jacobians_of_every_block_are_those_of_autograd_in_float64(opened: Opened) -> None:
    eye, n = torch.eye(16), 3
    everything = torch.arange(16).expand(n, 16)
    for start, end in blocks_of(opened):
        hooks = f"blocks.1.{start}", f"blocks.1.{end}"
        x, y = (value[0, -n:] for value in read_hooks(opened.model, IDS, list(hooks)))
        block, reference = read_block(opened.model, *hooks), plain_block(opened, start, end)
        if isinstance(block, Block):
            products = make_products(eye, eye, block.weights())
            J = torch.cat([J for _, J in jacobian_chunks(products, block.linearise(x), everything, everything)])
        else:
            J = jacobian_by_jvp(block, x, eye.expand(n, 16, 16), eye.expand(n, 16, 16))
        for token in range(n):
            wanted = torch.autograd.functional.jacobian(reference, x[token : token + 1].double())[0, :, 0]
            assert close(J[token].double(), wanted, 1e-4), (start, end)
        assert close(block(x), y, 1e-4), (start, end)


CLOSED = {
    name for name in MODELS if not name.startswith(("gemma2", "gemma3", "olmo", "mixtral", "qwen3_moe", "gpt_oss"))
}


def test_the_closed_form_is_used_where_there_is_one(opened: Opened) -> None:
    block = read_block(opened.model, "blocks.1.mlp.hook_in", "blocks.1.hook_mlp_out")
    assert isinstance(block, Block if opened.name in CLOSED else ModuleBlock)


def test_hooks_that_norms_after_the_mlp_leave_no_meaning_are_refused() -> None:
    for start in ("ln2.hook_normalized", "hook_resid_pre"):
        with pytest.raises(ConfigError, match=r"a Jacobian is that of one MLP"):
            block_of_hooks(f"blocks.1.{start}", "blocks.1.hook_mlp_out", False, "after")
    assert not block_of_hooks("blocks.1.hook_resid_mid", "blocks.1.hook_resid_post", False, "after").norm


@pytest.mark.parametrize("setting", ["fold_ln", "center_writing_weights", "center_unembed", "randomise"])
def test_processing_of_a_bridged_model_is_refused(setting: str) -> None:
    bridged = Geometry("Qwen3ForCausalLM", 2, 16, 4, 2, 6, 20, False, True, 64, bridged=True)
    value = "reinit" if setting == "randomise" else True
    model = dataclasses.replace(ModelConfig("tiny", path="m"), **{setting: value})
    with pytest.raises(ModelError, match=rf"model.{setting} does not apply to m: .*transformers' own modules run it"):
        check_processing(Path("m"), bridged, model)


# -------------------------------------------------------------------- the plan
def plan_of(model: Path, corpus: Path, *overrides: str) -> Plan:
    chosen = ["model=local", f"model.path={model}", "corpus=local", f"corpus.path={corpus}", "site.layer=1"]
    small = ["tokens.context_size=32", "tokens.train_tokens=4096", "tokens.held_out_tokens=512"]
    return compose(ROOT / "conf", [*chosen, *small, *overrides], results="results")


def test_what_runs_a_model_and_its_precision_are_in_its_identity_and_refused_where_they_cannot_be(
    tmp_path: Path, tokenizer_folder: Path, corpus_file: Path
) -> None:
    gemma, neox = (make(tmp_path / name, name, tokenizer_folder, vocab_size=300) for name in ("gemma2", "gpt_neox"))
    plans = [plan_of(gemma, corpus_file), plan_of(gemma, corpus_file, "model.dtype=bfloat16")]
    bridged, half = (next(iter(plan.stages["train"].values())) for plan in plans)
    (key,) = bridged.needs["activations"]
    assert plans[0].instance("activations", key).config["model"]["bridge"] is True
    assert "dtype" not in plans[0].instance("activations", key).config["model"]
    assert {*plans[0].stages["activations"]}.isdisjoint(plans[1].stages["activations"])
    model = plans[1].instance("activations", half.needs["activations"][0]).config["model"]
    assert model["dtype"] == "bfloat16" and settings_of(model)["dtype"] == "bfloat16"
    (plain,) = plan_of(neox, corpus_file).stages["activations"].values()
    assert set(plain.config["model"]) == {"weights", "fold_ln", "center_writing_weights", "center_unembed"}

    with pytest.raises(ConfigError, match=r"study of the heads .* Gemma2ForCausalLM normalises that sum"):
        plan_of(gemma, corpus_file, "dictionary=heads", "site=attn_z")
    with pytest.raises(
        ConfigError, match=r"circuits follow weights .* those of Gemma2ForCausalLM are left as they are"
    ):
        plan_of(gemma, corpus_file, "dictionary=transcoder", "site=mlp", "figures=[circuits]")
    with pytest.raises(ConfigError, match=r"model.dtype=bfloat16: Jacobians of Gemma2ForCausalLM are derivatives of"):
        plan_of(gemma, corpus_file, "dictionary=pair", "site=mlp", "model.dtype=bfloat16")
    olmo = make(tmp_path / "olmo2", "olmo2", tokenizer_folder, vocab_size=300)
    with pytest.raises(ConfigError, match=r"the model has no hook 'blocks.1.ln2.hook_normalized'"):
        plan_of(olmo, corpus_file, "dictionary=pair", "site=mlp")
    with pytest.raises(ConfigError, match=r"model.dtype=bfloat16 does not apply to .*Olmo2ForCausalLM"):
        plan_of(olmo, corpus_file, "model.dtype=bfloat16")


@pytest.mark.parametrize("processing", [{"fold_ln": True}, {"randomise": "reinit"}])
def test_a_precision_with_processed_weights_is_refused(processing: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=r"model.dtype=float16 rounds the weights as they are stored"):
        ModelConfig("m", path="m", dtype="float16", **processing)


# -------------------------------------------------------------------- precision and loading
@pytest.mark.parametrize(
    ("name", "dtype"),
    [(name, "bfloat16") for name in ("gpt_neox", "llama", "gemma2", "phi3", "qwen3_moe")] + [("gemma2", "float16")],
)
def test_a_model_in_fewer_bits_computes_what_transformers_does_in_them(
    tmp_path: Path, name: str, dtype: Literal["bfloat16", "float16"]
) -> None:
    folder = make(tmp_path / "m", name)
    plain = transformers.AutoModelForCausalLM.from_pretrained(
        folder, dtype=getattr(torch, dtype), attn_implementation="eager", experts_implementation="eager"
    ).eval()
    model = load_model(folder, ModelConfig("tiny", path=str(folder), dtype=dtype), "cpu", IDS.shape[1])
    opened = Opened(name, folder, plain, model)
    near = {"bfloat16": 0.06, "float16": 0.01}[dtype]
    hooks = ["blocks.1.hook_resid_pre", "blocks.1.attn.hook_z", "blocks.1.hook_mlp_out", "blocks.2.hook_resid_post"]
    wanted = plain_values(opened, hooks)
    clean = run_clean(model, IDS, hooks, hooks)
    for hook in hooks:
        assert wanted[hook].dtype is getattr(torch, dtype)
        assert clean.values[hook].dtype is torch.float32
        assert close(clean.values[hook], wanted[hook].float(), near), hook
        assert torch.equal(run_spliced(model, clean, hook, clean.values[hook]), clean.final), hook
    value = torch.zeros_like(clean.values[hooks[2]])
    final = run_spliced(model, clean, hooks[2], value)
    ce, (loss,) = model_losses(model, IDS, drop_last_position(clean.final), [drop_last_position(final)])
    targets = IDS[:, 1:].flatten()[:, None]
    for found, logits in ((ce, plain_logits(opened)), (loss.ce, plain_logits(opened, hooks[2], value.to(plain.dtype)))):
        log_p = logits[:, :-1].float().flatten(0, 1).log_softmax(-1)
        assert found.dtype is torch.float32 and close(found, -log_p.gather(1, targets)[:, 0], near)


@pytest.mark.parametrize("name", ["gpt2", "gpt_neox", "llama", "qwen2", "gemma3"])
def test_layers_above_the_last_are_not_read_and_those_below_compute_the_same(
    tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = make(tmp_path / "m", name)
    model = ModelConfig("tiny", path=str(folder))
    hooks = ["hook_embed", "blocks.0.hook_mlp_out", "blocks.1.hook_resid_post"]
    whole = read_hooks(load_model(folder, model, "cpu"), IDS, hooks)
    read: list[str] = []

    class Recording:
        def __init__(self, name: str, of: Any) -> None:
            self.name, self.of = name, of

        def __getitem__(self, some: Any) -> Tensor:
            read.append(self.name)
            return self.of[some]

        def __getattr__(self, name: str) -> Any:
            return getattr(self.of, name)

    tensors = {name: Recording(name, of) for name, of in open_weights(folder).items()}
    monkeypatch.setattr(loading, "open_weights", lambda _: tensors)
    lower = load_model(folder, model, "cpu", n_layers=2)
    assert lower.cfg.n_layers == len(lower.blocks) == 2
    assert all(torch.equal(*both) for both in zip(read_hooks(lower, IDS, hooks), whole, strict=True))
    assert any(".1." in name for name in read) and not any(".2." in name for name in read)
    assert len(read) == len(set(read)), "once each"


def test_shards_are_read_and_a_file_that_changes_later_changes_nothing(tmp_path: Path) -> None:
    one, many = make(tmp_path / "one", "qwen3"), tmp_path / "many"
    transformers.AutoModelForCausalLM.from_pretrained(one).save_pretrained(many, max_shard_size="20KB")
    assert len(list(many.glob("*.safetensors"))) > 1
    hooks = ["blocks.2.hook_resid_post"]
    models = [load_model(folder, ModelConfig("tiny", path=str(folder)), "cpu") for folder in (one, many)]
    for file in (*one.glob("*.safetensors"), *many.glob("*.safetensors")):
        size = file.stat().st_size
        with file.open("r+b") as opened:
            opened.write(bytes(size))
    assert torch.equal(*(read_hooks(model, IDS, hooks)[0] for model in models))


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_a_tied_unembedding_is_the_embedding_s_memory(tmp_path: Path, name: str) -> None:
    folder = make(tmp_path / "m", name, **({} if name == "gpt2" else {"tie_word_embeddings": True}))
    model = load_model(folder, ModelConfig("tiny", path=str(folder)), "cpu")
    assert model.unembed.W_U.untyped_storage().data_ptr() == model.embed.W_E.untyped_storage().data_ptr()
    plain = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    with torch.no_grad():
        assert close(model(IDS), plain(IDS).logits)


def test_layers_share_the_tables_of_their_rotations(tmp_path: Path) -> None:
    folder = make(tmp_path / "m", "llama")
    model = load_model(folder, ModelConfig("tiny", path=str(folder)), "cpu")
    assert len(model.blocks) > 1
    for name in ("rotary_sin", "rotary_cos"):
        tables = [getattr(block.attn, name) for block in model.blocks]
        assert len({table.data_ptr() for table in tables}) == 1
    plain = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    with torch.no_grad():
        assert close(model(IDS), plain(IDS).logits)


# -------------------------------------------------------------------- several devices
def test_layers_that_lie_on_two_devices_compute_the_same(opened: Opened) -> None:
    """Bit for bit, with all that comes in and goes out on the first."""
    hooks = [hook for hook in opened.hooks if not hook.startswith("blocks.0")]
    wanted = run_clean(opened.model, IDS, hooks, hooks)
    spliced = {hook: run_spliced(opened.model, wanted, hook, 0.5 * wanted.values[hook]) for hook in hooks}
    model: Any = load_model(opened.folder, ModelConfig("tiny", path=str(opened.folder)), "cpu", IDS.shape[1])
    layers = [block._block if isinstance(model, BridgedModel) else block for block in model.blocks]

    def shared() -> int:
        """Tables that two layers have in common, as those of rotations."""
        return len({id(b) for b in layers[0].buffers()} & {id(b) for b in layers[1].buffers()})

    first, tables = torch.device("meta:0"), shared()
    with pretended():
        if isinstance(model, BridgedModel):
            model.spread([first, torch.device("meta:1")])
        else:
            model = loading._placed(model, "meta:0-1")
        lie = [{str(weights.device) for weights in layer.parameters()} for layer in layers]
        assert lie == [{"meta:0"}, {"meta:0"}, {"meta:1"}] and shared() == tables
        clean = run_clean(model, IDS.to(first), hooks, hooks)
        assert {value.device for value in (clean.final, *clean.values.values())} == {first}
        for hook in hooks:
            assert torch.equal(held(clean.values[hook]), wanted.values[hook]), hook
            final = run_spliced(model, clean, hook, (0.5 * wanted.values[hook]).to(first))
            assert final.device == first
            assert torch.equal(held(final), spliced[hook]), hook
        ce_clean, _ = model_losses(model, clean.tokens, drop_last_position(clean.final), [])
    assert torch.equal(held(ce_clean), model_losses(opened.model, IDS, drop_last_position(wanted.final), [])[0])


def test_pretended_devices_do_not_mix() -> None:
    with pretended():
        one, other = (torch.ones(2).to(f"meta:{n}") for n in range(2))
        assert torch.equal(held(one + other.to("meta:0")), torch.full((2,), 2.0))
        with pytest.raises(RuntimeError, match="meta:0 and meta:1"):
            one + other
