"""Shared fixtures: tiny models of three architectures, a corpus, packed tokens. What is heavy is imported late."""

import json
import math
import os
import random
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from bucket import Proxy

os.environ.setdefault("OMP_NUM_THREADS", "1")  # on tensors this small a second thread costs more than it brings

CONTEXT_SIZE = 32
SENTENCE = (
    "the sea lay calm under a pale moon and no ship came near it for seven days café naïve — 海 🌊 Yes, No! one two"
)
WORDS = SENTENCE.split()


def make_texts(n: int, seed: int = 0, words: tuple[int, int] = (5, 80)) -> list[str]:
    """Texts of random words, some of more than one byte a character, in sentences and a few paragraphs."""
    rng = random.Random(seed)
    texts = []
    for i in range(n):
        chosen = [rng.choice(WORDS) for _ in range(rng.randint(*words))]
        texts.append("".join(w + rng.choice([" ", " ", " ", ". ", ".\n\n"]) for w in chosen) + f"{i}")
    return texts


def write_jsonl(path: Path, texts: list[str]) -> Path:
    lines = (json.dumps({"source": "ab"[i % 2], "text": text}, ensure_ascii=False) for i, text in enumerate(texts))
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


@pytest.fixture(scope="session")
def corpus_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """300 documents, some 20,000 tokens of `tokenizer_folder`, as JSON lines with `source` and `text`."""
    return write_jsonl(tmp_path_factory.mktemp("corpus") / "corpus.jsonl", make_texts(300))


@pytest.fixture(scope="session")
def tokenizer_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with nothing but a byte-level BPE tokenizer of 300 tokens; `<|endoftext|>` (id 0) is BOS and EOS."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    end = "<|endoftext|>"
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=300, special_tokens=[end], initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(make_texts(100), trainer)
    folder = tmp_path_factory.mktemp("tokenizer")
    tokenizer.save(str(folder / "tokenizer.json"))
    names = {"bos_token": end, "eos_token": end, "tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": 64}
    (folder / "tokenizer_config.json").write_text(json.dumps(names))
    return folder


@pytest.fixture(scope="session")
def tokens_folder(tmp_path_factory: pytest.TempPathFactory, corpus_file: Path, tokenizer_folder: Path) -> Path:
    """A tokens artifact: the first 64 rows of 32 tokens of the training split."""
    from stores import write_receipt

    from saeflow.text.corpus import read_documents
    from saeflow.text.tokenizer import load_tokenizer
    from saeflow.text.tokens import write_tokens

    folder = tmp_path_factory.mktemp("tokens")
    write_tokens(
        folder,
        read_documents(corpus_file),
        load_tokenizer(tokenizer_folder),
        split="train",
        n_rows=64,
        context_size=CONTEXT_SIZE,
        prepend_bos=True,
        held_out_fraction=0.3,
        tokenizer_digest="tiny",
    )
    write_receipt(folder, "tokens")
    return folder


def write_weights(file: Path, shapes: dict[str, tuple[int, ...]]) -> None:
    """A safetensors file of zeros of these shapes, by name."""
    header: dict[str, Any] = {}
    end = 0
    for name, shape in shapes.items():
        start, end = end, end + 4 * math.prod(shape)
        header[name] = {"dtype": "F32", "shape": list(shape), "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    file.write_bytes(len(text).to_bytes(8, "little") + text + bytes(end))


def write_plain_model(folder: Path, config: dict[str, Any], **tokenizer: Any) -> Path:
    """A model folder as far as the plan reads it: sizes, an embedding of 300 zeros, a tokenizer of two words."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    write_weights(folder / "model.safetensors", {"gpt_neox.embed_in.weight": (300, 1)})
    model = {"type": "WordLevel", "vocab": {"<|endoftext|>": 0, "a": 1}, "unk_token": "a"}
    words = {"version": "1.0", "pre_tokenizer": {"type": "WhitespaceSplit"}, "model": model}
    (folder / "tokenizer.json").write_text(json.dumps(words | {"added_tokens": []}))
    names = {"bos_token": "<|endoftext|>", "eos_token": "<|endoftext|>"} | tokenizer
    (folder / "tokenizer_config.json").write_text(json.dumps(names))
    return folder


def save_model(model: Any, folder: Path, tokenizer_folder: Path | None = None) -> Path:
    """Fills a transformers model with seeded numbers, norms and biases too, and saves it, with a tokenizer if given.

    The numbers are large enough for logits to differ by 1 and more, so that a wrong conversion shows.
    """
    import torch

    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = 0.3 * torch.randn(parameter.shape, generator=generator)
            is_scale = ("norm" in name or "ln_" in name) and name.endswith("weight")
            parameter.copy_(1 + noise if is_scale else noise)
    model.save_pretrained(folder)
    for file in tokenizer_folder.iterdir() if tokenizer_folder else ():
        (folder / file.name).write_bytes(file.read_bytes())
    return folder


@pytest.fixture(scope="session")
def neox_folder(tmp_path_factory: pytest.TempPathFactory, tokenizer_folder: Path) -> Path:
    """A random GPT-NeoX of 2 layers: parallel blocks, rotary positions on half of each head."""
    from transformers import GPTNeoXConfig, GPTNeoXForCausalLM

    sizes = {"vocab_size": 300, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
    rope = {"rope_type": "default", "rope_theta": 10_000.0, "partial_rotary_factor": 0.5}
    config = GPTNeoXConfig(
        **sizes,
        intermediate_size=64,
        max_position_embeddings=64,
        rope_parameters=rope,
        use_parallel_residual=True,
        bos_token_id=0,
        eos_token_id=0,
    )
    return save_model(GPTNeoXForCausalLM(config), tmp_path_factory.mktemp("neox"), tokenizer_folder)


@pytest.fixture(scope="session")
def gpt2_folder(tmp_path_factory: pytest.TempPathFactory, tokenizer_folder: Path) -> Path:
    """A random GPT-2 of 2 layers: sequential blocks, learned positions, tied embeddings."""
    from transformers import GPT2Config, GPT2LMHeadModel

    # n_ctx: as in the files of the hub; transformers no longer sets it, TransformerLens asks for it
    config = GPT2Config(
        vocab_size=300, n_embd=32, n_layer=2, n_head=4, n_positions=64, n_ctx=64, bos_token_id=0, eos_token_id=0
    )
    return save_model(GPT2LMHeadModel(config), tmp_path_factory.mktemp("gpt2"), tokenizer_folder)


@pytest.fixture(scope="session")
def llama_folder(tmp_path_factory: pytest.TempPathFactory, tokenizer_folder: Path) -> Path:
    """A random Llama of 2 layers: RMSNorm, gated MLP of an odd width, two query heads for each key and value head."""
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {"vocab_size": 300, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = LlamaConfig(
        **sizes,
        num_key_value_heads=2,
        intermediate_size=48,
        max_position_embeddings=64,
        bos_token_id=0,
        eos_token_id=0,
    )
    return save_model(LlamaForCausalLM(config), tmp_path_factory.mktemp("llama"), tokenizer_folder)


@pytest.fixture(scope="session")
def hooked_source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random model of 2 layers in TransformerLens's own format, as on the hub: `config.json` and a pickled state.

    Its config has the keys of NeelNanda/GELU_1L512W_C4_Code that matter, with other sizes.
    """
    import torch
    from transformer_lens import HookedTransformer, HookedTransformerConfig

    keys = {"n_layers": 2, "d_model": 32, "d_mlp": 64, "d_head": 8, "n_heads": 4, "n_ctx": 64, "d_vocab": 300}
    config = HookedTransformerConfig(**keys, act_fn="gelu", normalization_type="LN", seed=0, device="cpu")
    model = HookedTransformer(config, move_to_device=False)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = 0.3 * torch.randn(parameter.shape, generator=generator)
            parameter.copy_(1 + noise if name.endswith(".w") else noise)
    folder = tmp_path_factory.mktemp("hooked")
    torch.save(model.state_dict(), folder / "tiny_1000_final.pth")  # noqa: TID251 -- as the hub has it
    keys |= {"act_fn": "gelu", "normalization": "LN", "shortformer_pos": False, "attn_only": False, "ln_eps": 1e-5}
    (folder / "config.json").write_text(json.dumps(keys | {"tokenizer_name": "some/tokenizer", "lr_hidden": 0.002}))
    return folder


@pytest.fixture(params=["neox", "gpt2", "llama"])
def model_folder(request: pytest.FixtureRequest) -> Path:
    """Each of the three tiny models in turn."""
    return request.getfixturevalue(f"{request.param}_folder")


@pytest.fixture(scope="session")
def s3_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """URL of a real S3 server."""
    from bucket import server

    with server(tmp_path_factory.mktemp("moto") / "log") as url:
        yield url


@pytest.fixture
def s3(s3_server: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> "Iterator[Proxy]":
    """A proxy before that server, which is where AWS_ENDPOINT_URL points, with an empty bucket `lab`."""
    from bucket import KEY_ID, SECRET, Proxy, make_bucket

    from saeflow.storage import remote

    proxy = Proxy(s3_server)
    urllib.request.urlopen(urllib.request.Request(f"{s3_server}/moto-api/reset", method="POST"), timeout=60).close()
    make_bucket(s3_server, "lab")
    names = {"AWS_ENDPOINT_URL": proxy.url, "AWS_ACCESS_KEY_ID": KEY_ID, "AWS_SECRET_ACCESS_KEY": SECRET}
    for name, value in (names | {"AWS_REGION": "us-east-1"}).items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(remote, "FIRST_WAIT", 0.02)
    monkeypatch.setattr(remote, "TIMEOUT", 1.0)
    monkeypatch.setattr(remote, "PATIENCE", 20.0)
    yield proxy
    proxy.close()
