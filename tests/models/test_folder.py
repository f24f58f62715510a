"""Models: hooks and sizes as TransformerLens has them, the logits of transformers, and folders that cannot be used."""

import json
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import save_model

from saeflow.config import ConfigError, ModelConfig
from saeflow.models import folder as models
from saeflow.models import loading
from saeflow.models.folder import Geometry, ModelError, hook_layer, read_geometry
from saeflow.models.loading import load_model
from saeflow.planning.digests import DigestCache
from saeflow.text.tokenizer import TokenizerError, tokenizer_digest

PLAIN = ModelConfig("tiny", path="unused")
# What fires in a block and is no vector of a token: scales, attention patterns, and queries and keys after rotation.
NOT_FOR_DICTIONARIES = {
    "ln1.hook_scale",
    "ln2.hook_scale",
    "attn.hook_attn_scores",
    "attn.hook_pattern",
    "attn.hook_rot_q",
    "attn.hook_rot_k",
}


def ids_of(n_rows: int = 2, n_positions: int = 64):
    import torch

    return torch.randint(0, 300, (n_rows, n_positions), generator=torch.Generator().manual_seed(1))


def original_logits(folder: Path, ids):
    import torch
    from transformers import AutoModelForCausalLM

    with torch.no_grad():
        return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()(input_ids=ids).logits


def edit_config(folder: Path, to: Path, drop: tuple[str, ...] = (), **values) -> Path:
    """A copy of a model folder with other keys in its `config.json`."""
    shutil.copytree(folder, to)
    config = json.loads((to / "config.json").read_text()) | values
    (to / "config.json").write_text(json.dumps({k: v for k, v in config.items() if k not in drop}))
    return to


# -------------------------------------------------------------------- hooks
def test_hook_sizes_are_those_of_the_activations(model_folder):
    geometry, model = read_geometry(model_folder), load_model(model_folder, PLAIN, "cpu")
    _, cache = model.run_with_cache(ids_of(2, 10), return_cache_object=False)
    names = [f"blocks.{layer}.{hook}" for layer in range(geometry.n_layers) for hook in geometry.block_hooks()]
    for name in [*names, "hook_embed", "ln_final.hook_normalized"]:
        assert name in model.hook_dict
        assert tuple(cache[name].shape) == (2, 10, *geometry.hook_size(name)), name


def test_no_hook_of_a_block_is_left_out(model_folder):
    geometry, model = read_geometry(model_folder), load_model(model_folder, PLAIN, "cpu")
    _, cache = model.run_with_cache(ids_of(1, 4), return_cache_object=False)
    fired = {name.removeprefix("blocks.1.") for name in cache if name.startswith("blocks.1.")}
    assert fired - NOT_FOR_DICTIONARIES == set(geometry.block_hooks())


def test_a_pass_stopped_at_a_hooks_layer_is_the_shortest_that_fires_it(model_folder):
    geometry, model = read_geometry(model_folder), load_model(model_folder, PLAIN, "cpu")
    hooks = ["hook_embed", *(f"blocks.{layer}.{hook}" for layer in range(2) for hook in geometry.block_hooks())]
    for stop in range(geometry.n_layers + 1):
        _, cache = model.run_with_cache(ids_of(1, 4), names_filter=hooks, stop_at_layer=stop, return_cache_object=False)
        assert set(cache) == {name for name in hooks if hook_layer(name, geometry.n_layers) <= stop}


def test_geometry_is_that_of_the_opened_model(model_folder):
    geometry, config = read_geometry(model_folder), load_model(model_folder, PLAIN, "cpu").cfg
    for name in ("n_layers", "d_model", "n_heads", "d_head", "d_mlp", "n_ctx"):
        assert getattr(geometry, name) == getattr(config, name), name
    assert geometry.n_key_value_heads == (config.n_key_value_heads or config.n_heads)
    assert (geometry.parallel, geometry.gated) == (config.parallel_attn_mlp, config.gated_mlp)


SMALL = Geometry("GPTNeoXForCausalLM", 2, 32, 4, 4, 8, 64, parallel=True, gated=False, n_ctx=64)


@pytest.mark.parametrize(
    ("hook", "message"),
    [
        ("blocks.2.hook_mlp_out", "layer 2 is out of range; the model has 2 layers, 0 to 1"),
        ("blocks.1.hook_mlp_ot", "no hook 'blocks.1.hook_mlp_ot'; the nearest that it has: blocks.1.hook_mlp_out"),
        ("blocks.1.mlp.hook_out", "the nearest that it has: .*blocks.1.hook_mlp_out"),
        ("blocks.1.hook_resid_mid", "attention and MLP are parallel.*site.hook_name=blocks.1.hook_resid_pre"),
        ("block.1.hook_mlp_out", "the nearest that it has: blocks.0.hook_mlp_out"),
        ("ln_final.hook_normalised", "the nearest that it has: ln_final.hook_normalized"),
        ("???", "the nearest that it has: blocks.0.hook_resid_pre, .*ln_final.hook_normalized"),
    ],
)
def test_hook_that_is_not_there_names_the_nearest(hook, message):
    with pytest.raises(ConfigError, match=message):
        SMALL.hook_size(hook)


# -------------------------------------------------------------------- the same numbers as transformers
def test_logits_are_those_of_transformers(model_folder):
    ids = ids_of()
    expected = original_logits(model_folder, ids)
    assert expected.std() > 1  # or a wrong conversion could pass
    assert (load_model(model_folder, PLAIN, "cpu")(ids) - expected).abs().max() <= 1e-4


@pytest.mark.parametrize("family", ["Mistral", "Qwen2"])
def test_logits_of_the_other_families_are_those_of_transformers(tmp_path, family):
    import transformers

    config = getattr(transformers, f"{family}Config")(
        vocab_size=300,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        intermediate_size=48,
        max_position_embeddings=64,
    )
    folder = save_model(getattr(transformers, f"{family}ForCausalLM")(config), tmp_path / family)
    assert (load_model(folder, PLAIN, "cpu")(ids_of()) - original_logits(folder, ids_of())).abs().max() <= 1e-4


@pytest.mark.parametrize("processing", ["fold_ln", "center_writing_weights", "center_unembed", "all"])
def test_weight_processing_keeps_log_probabilities(model_folder, processing):
    names = ("fold_ln", "center_writing_weights", "center_unembed")
    flags = {name: processing in (name, "all") for name in names}
    if read_geometry(model_folder).gated:  # RMSNorm
        flags["center_writing_weights"] = False
    ids = ids_of()
    found = load_model(model_folder, ModelConfig("tiny", path="unused", **flags), "cpu")(ids).log_softmax(-1)
    assert (found - original_logits(model_folder, ids).log_softmax(-1)).abs().max() <= 1e-4


def test_processing_changes_what_it_should(neox_folder):
    folded = load_model(neox_folder, ModelConfig("tiny", path="unused", fold_ln=True), "cpu")
    centred = load_model(neox_folder, ModelConfig("tiny", path="unused", center_writing_weights=True), "cpu")
    _, cache = centred.run_with_cache(ids_of(1, 8), return_cache_object=False)
    assert folded.cfg.normalization_type == "LNPre" and centred.cfg.normalization_type == "LN"
    assert cache["blocks.1.hook_resid_post"].mean(-1).abs().max() < 1e-5


def test_opening_touches_no_network(neox_folder, monkeypatch):
    def refuse(*_, **__):
        raise AssertionError("a connection was tried")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    load_model(neox_folder, PLAIN, "cpu")


def test_opening_prints_nothing(neox_folder, capfd):
    load_model(neox_folder, PLAIN, "cpu")
    assert capfd.readouterr().out == ""


def test_the_folders_name_does_not_decide_the_architecture(gpt2_folder, tmp_path):
    folder = shutil.copytree(gpt2_folder, tmp_path / "llama" / "gemma-t5-bert")
    model = load_model(folder, PLAIN, "cpu")
    assert (model(ids_of()) - original_logits(folder, ids_of())).abs().max() <= 1e-4
    assert model.cfg.model_name == "gemma-t5-bert"


def test_gpt2_as_transformers_saves_it_now(tmp_path):
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(vocab_size=300, n_embd=32, n_layer=2, n_head=4, n_positions=64, n_inner=48)
    assert not hasattr(config, "n_ctx")
    folder = save_model(GPT2LMHeadModel(config), tmp_path / "gpt2")
    assert read_geometry(folder).hook_size("blocks.0.mlp.hook_post") == (48,)
    assert (load_model(folder, PLAIN, "cpu")(ids_of()) - original_logits(folder, ids_of())).abs().max() <= 1e-4


@pytest.mark.parametrize("key", ["rope_parameters", "rotary_emb_base"])
def test_rotary_base_of_a_neox_is_kept(neox_folder, tmp_path, key):
    rope = {"rope_type": "default", "rope_theta": 500.0, "partial_rotary_factor": 0.5}
    if key == "rope_parameters":
        folder = edit_config(neox_folder, tmp_path / "m", rope_parameters=rope)
    else:  # as older files, Pythia's among them, spell it
        old = {"rotary_emb_base": 500, "rotary_pct": 0.5}
        folder = edit_config(neox_folder, tmp_path / "m", drop=("rope_parameters",), **old)
    expected = original_logits(folder, ids_of())
    assert (expected - original_logits(neox_folder, ids_of())).abs().max() > 0.1
    assert (load_model(folder, PLAIN, "cpu")(ids_of()) - expected).abs().max() <= 1e-4


# -------------------------------------------------------------------- folders that cannot be used
@pytest.mark.parametrize(
    "settings",
    [
        {"rope_parameters": {"rope_type": "linear", "rope_theta": 10_000.0, "factor": 8.0}},
        {"rope_parameters": None, "rope_scaling": {"type": "yarn", "factor": 4.0}},
        {"attention_bias": True},
        {"mlp_bias": True},
        {"head_dim": 12},
    ],
)
def test_settings_that_hooked_transformer_leaves_out_are_for_the_bridge(llama_folder, tmp_path, settings):
    assert not read_geometry(llama_folder).bridged
    assert read_geometry(edit_config(llama_folder, tmp_path / "m", **settings)).bridged


def test_a_setting_that_nothing_here_computes_is_refused_from_the_config(neox_folder, tmp_path):
    linear = {"rope_type": "linear", "rope_theta": 10_000.0, "factor": 8.0}
    folder = edit_config(neox_folder, tmp_path / "m", rope_parameters=linear)
    with pytest.raises(ModelError, match=r"/m: config.json has rope_type=linear, which TransformerLens leaves out of"):
        read_geometry(folder)


@pytest.mark.parametrize(
    ("settings", "why"),
    [
        ({"quantization_config": {"bits": 4}}, "only weights that are plain numbers are read: save it again"),
        ({"architectures": ["Gemma3ForConditionalGeneration"], "vision_config": {"a": 1}}, "only models of text alone"),
        ({"architectures": ["T5ForConditionalGeneration"], "is_encoder_decoder": True}, "only decoders are run"),
        ({"use_bidirectional_attention": True}, "only attention that looks back is run"),
    ],
)
def test_a_feature_that_no_model_can_have_here_is_named(llama_folder, tmp_path, settings, why):
    folder = edit_config(llama_folder, tmp_path / "m", **settings)
    with pytest.raises(ModelError, match=rf"/m: config.json has {list(settings)[-1]}, and {why}"):
        read_geometry(folder)


def test_a_config_without_architectures_is_understood_by_its_model_type(llama_folder, tmp_path):
    folder = edit_config(llama_folder, tmp_path / "m", drop=("architectures",))
    assert read_geometry(folder) == read_geometry(llama_folder)
    load_model(folder, PLAIN, "cpu")


def test_centering_a_model_with_rms_norm_is_refused(llama_folder):
    with pytest.raises(ModelError, match=r"center_writing_weights=true does not apply .*LlamaForCausalLM"):
        load_model(llama_folder, ModelConfig("tiny", path="unused", center_writing_weights=True), "cpu")


def test_weights_that_lack_a_tensor_are_refused(neox_folder, tmp_path):
    from safetensors.torch import load_file, save_file

    folder = shutil.copytree(neox_folder, tmp_path / "m")
    tensors = load_file(folder / "model.safetensors")
    del tensors["gpt_neox.layers.1.mlp.dense_h_to_4h.weight"]
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(
        ModelError, match=r"not whole: 1 tensors are missing, gpt_neox.layers.1.mlp.dense_h_to_4h.weight"
    ):
        load_model(folder, PLAIN, "cpu")


def test_torn_weights_are_refused(neox_folder, tmp_path):
    folder = shutil.copytree(neox_folder, tmp_path / "m")
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1000])
    with pytest.raises(ModelError, match=r"the weights of .*/m cannot be read .*copy the model folder again"):
        load_model(folder, PLAIN, "cpu")


def fake_folder(folder: Path, **config) -> Path:
    """A model folder without a model: what the plan reads."""
    folder.mkdir(exist_ok=True)
    sizes = {"num_hidden_layers": 2, "hidden_size": 32, "num_attention_heads": 4, "max_position_embeddings": 64}
    (folder / "config.json").write_text(json.dumps({"architectures": ["GPTNeoXForCausalLM"]} | sizes | config))
    return folder


@pytest.mark.parametrize(
    ("file", "message"),
    [
        (None, r"model folder .* has no weights: no \*.safetensors in it$"),
        ("pytorch_model.bin", r"no \*.safetensors in it \(pytorch_model.bin: a pickle is not opened, convert it"),
    ],
)
def test_folder_without_weights_is_refused(tmp_path, file, message):
    folder = fake_folder(tmp_path / "m")
    if file:
        (folder / file).write_bytes(b"pickled")
    for use in (lambda: models.model_digest(folder, DigestCache(None)), lambda: load_model(folder, PLAIN, "cpu")):
        with pytest.raises(ModelError, match=message):
            use()


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (None, "has no config.json; it must be a Hugging Face model folder"),
        ("{", "config.json is not JSON .*copy the model folder again"),
        ("[]", "config.json holds a list where keys should be"),
        (
            '{"architectures": ["BertModel"]}',
            "architecture BertModel is not supported; these are: Llama, Mistral, .*Gemma2, .*GPT2, and Trans",
        ),
        ('{"model_type": "x"}', "architecture unknown is not supported"),
        ('{"architectures": ["GPT2LMHeadModel"], "n_embd": 8}', "has none of the keys num_attention_heads, n_head"),
    ],
)
def test_config_that_cannot_be_used_is_named(tmp_path, config, message):
    if config is not None:
        (tmp_path / "config.json").write_text(config)
    with pytest.raises(ModelError, match=message) as error:
        read_geometry(tmp_path)
    assert str(tmp_path) in str(error.value)


def test_folder_without_tokenizer_is_refused(tmp_path):
    with pytest.raises(TokenizerError, match=r"has no tokenizer.json; save it there with AutoTokenizer"):
        tokenizer_digest(tmp_path, DigestCache(None))


def test_folder_that_is_not_there_is_named():
    with pytest.raises(ModelError, match=r"model\.path=/no/such: no such folder"):
        models.resolve_folder(ModelConfig("m", path="/no/such"))


# -------------------------------------------------------------------- the hub's local cache
def test_hub_name_is_found_in_the_local_cache_or_says_how_to_fetch_it(tmp_path, monkeypatch):
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    hub = ModelConfig("m", hub="someone/tiny", revision="step3")
    with pytest.raises(
        ModelError, match=r"python scripts/fetch.py someone/tiny --revision step3\. Offline.*model.path"
    ):
        models.resolve_folder(hub)
    cached = tmp_path / "models--someone--tiny"
    commit = "0123456789012345678901234567890123456789"
    (cached / "refs").mkdir(parents=True)
    (cached / "refs" / "step3").write_text(commit)
    (cached / "snapshots" / commit).mkdir(parents=True)
    fake_folder(cached / "snapshots" / commit)
    assert read_geometry(models.resolve_folder(hub)) == SMALL.__class__(
        "GPTNeoXForCausalLM", 2, 32, 4, 4, 8, 128, parallel=True, gated=False, n_ctx=64
    )


# -------------------------------------------------------------------- digests
def test_model_digest_is_of_content(neox_folder, tmp_path):
    digest = models.model_digest(neox_folder, DigestCache(None))
    moved = shutil.copytree(neox_folder, tmp_path / "elsewhere")
    assert models.model_digest(moved, DigestCache(None)) == digest
    data = bytearray((moved / "model.safetensors").read_bytes())
    data[-1] ^= 1
    (moved / "model.safetensors").write_bytes(data)
    assert models.model_digest(moved, DigestCache(None)) != digest


def test_what_was_computed_without_the_window_of_a_qwen2_has_another_key(tmp_path):
    fake_folder(tmp_path / "m", use_sliding_window=False)
    (tmp_path / "m" / "model.safetensors").write_bytes(b"weights")
    cache = DigestCache(None)
    files = [tmp_path / "m" / "config.json", tmp_path / "m" / "model.safetensors"]
    assert models.model_digest(tmp_path / "m", cache) == cache.files(tmp_path / "m", files)
    fake_folder(tmp_path / "m", use_sliding_window=True)
    assert models.model_digest(tmp_path / "m", cache) != cache.files(tmp_path / "m", files)


def test_tokenizer_digest_is_of_what_decides_token_ids(tokenizer_folder, tmp_path):
    folder = shutil.copytree(tokenizer_folder, tmp_path / "t")
    digest = tokenizer_digest(folder, DigestCache(None))
    config = json.loads((folder / "tokenizer_config.json").read_text())

    def with_config(**values) -> str:
        (folder / "tokenizer_config.json").write_text(json.dumps(config | values))
        return tokenizer_digest(folder, DigestCache(None))

    assert with_config(model_max_length=99) == digest
    assert with_config(eos_token="a") != digest and with_config(bos_token="a") != digest
    assert with_config() == digest
    (folder / "tokenizer.json").write_text((folder / "tokenizer.json").read_text() + " ")
    assert tokenizer_digest(folder, DigestCache(None)) != digest


def test_what_the_plan_asks_imports_nothing_heavy(neox_folder):
    code = f"""
import sys
from pathlib import Path
from saeflow.models import folder as models
from saeflow.planning.digests import DigestCache
from saeflow.text.tokenizer import tokenizer_digest
folder = Path({str(neox_folder)!r})
models.read_geometry(folder).hook_size("blocks.0.hook_mlp_out")
models.model_digest(folder, DigestCache(None)), tokenizer_digest(folder, DigestCache(None))
print(sorted({{"torch", "transformers", "transformer_lens", "tokenizers", "numpy", "zarr"}} & set(sys.modules)))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.strip() == "[]", done.stdout + done.stderr


def test_code_of_a_model_folder_is_refused_by_name_and_never_run(tmp_path, neox_folder):
    folder = tmp_path / "model"
    shutil.copytree(neox_folder, folder)
    (folder / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    config = json.loads((folder / "config.json").read_text())
    own = {"model_type": "evil", "auto_map": {"AutoConfig": "evil.C", "AutoModelForCausalLM": "evil.M"}}
    (folder / "config.json").write_text(json.dumps(config | own))
    with pytest.raises(ModelError, match="auto_map"):
        read_geometry(folder)
    with pytest.raises(ValueError, match="trust_remote_code"):  # nor where transformers alone is asked
        loading._load_original(folder, loading.dtype_of(PLAIN))
    assert not (tmp_path / "ran").exists()
