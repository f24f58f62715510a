"""What stands in for the hub: models of the true architectures, scaled down, with random weights, and data sets in the
layout that they have on the hub, so that presets which need it can be planned and run without.
"""

import gzip
import json
import math
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import yaml

ROOT = Path(__file__).resolve().parents[2]
EXPERIMENTS = ROOT / "conf/experiment"
EMBEDDED = ROOT / "resources"
WIDTH, HEADS = 32, 4
N_DOCUMENTS = 400


class Preset(NamedTuple):
    """An experiment that needs the hub, on one of its models."""

    experiment: str
    model: str
    corpus: str
    overrides: tuple[str, ...] = ()
    """What its file says of the model, where that is not its own."""

    @property
    def name(self) -> str:
        return f"{self.experiment}-{self.model}"


OTHERS = (
    Preset("jsae_paper", "pythia-160m-deduped", "pile", ("site.layer=7", "dictionary.jacobian_coefficient=[0,0.667]")),
    Preset("jsae_paper", "pythia-70m", "pile", ("site.layer=3", "dictionary.jacobian_coefficient=[0,1]")),
)
"""Of the models that presets name in their comments."""
TRANSCODERS = ("notebook_004", "blind_pythia-410m", "transcoders_gpt2-small", "transcoders_pythia-1.4b")
LAYERS = {"pythia-70m": 6, "pythia-160m-deduped": 12, "gpt2-small": 12, "gelu-2l": 2, "smollm2": 30}
"""Of others 24."""
REDUCED = {
    **{"tokens.context_size": 64, "tokens.train_tokens": 8192, "tokens.held_out_tokens": 16_384},
    **{"tokens.held_out_fraction": 0.3, "training.n_tokens": 4096, "training.batch_size": 512},
    **{"activations.chunk_tokens": 1024, "activations.shard_tokens": 4096, "evaluation.resamples": 100},
    **{"jacobian.linearity_samples": 64, "jacobian.resamples": 100},
    **{"heads.n_tokens": 1024, "heads.loss_tokens": 512, "heads.resamples": 50, "heads.dashboards": 2},
}
"""What makes a run of minutes of one of days; sizes follow from the model's."""
ALSO = {
    "jsae_paper": {"jacobian.n_tokens": 512},
    "notebook_000_pythia": {"jacobian.n_tokens": 512},
    **{experiment: {"dictionary.d_sae": 512} for experiment in TRANSCODERS},
}


def presets() -> list[Preset]:
    """Of every file of `conf/experiment/` whose model or corpus has to be fetched."""
    found = []
    for file in sorted(EXPERIMENTS.glob("*.yaml")):
        chosen = _chosen(file)
        model, corpus = chosen.get("model", "embedded"), chosen.get("corpus", "embedded")
        about = (ROOT / f"conf/model/{model}.yaml").read_text()
        if "dataset" in _group("corpus", corpus) or "fetch.py" in about or "make model" in about:
            found.append(Preset(file.stem, model, corpus))
    return [*found, *OTHERS]


def _chosen(file: Path) -> dict[str, str]:
    """The groups that an experiment's file, and those that it begins from, override."""
    found: dict[str, str] = {}
    for item in yaml.safe_load(file.read_text()).get("defaults", ()):
        if isinstance(item, dict):
            found |= {name.removeprefix("override /"): value for name, value in item.items()}
        elif item != "_self_":
            found |= _chosen(file.with_stem(item))
    return found


def _group(name: str, choice: str) -> dict[str, Any]:
    found: dict[str, Any] = yaml.safe_load((ROOT / f"conf/{name}/{choice}.yaml").read_text())
    return found


def overrides(preset: Preset, folder: Path) -> list[str]:
    """Of the plan and the run of a preset, over stand-ins below a folder."""
    model = write_model(folder / preset.model, preset.model)
    return [
        *(f"experiment={preset.experiment}", f"model={preset.model}", f"model.path={model}", *preset.overrides),
        *(
            []
            if preset.corpus == "embedded"
            else [f"corpus.dataset={write_corpus(folder / preset.corpus, preset.corpus)}"]
        ),
        *(f"{path}={value}" for path, value in (REDUCED | ALSO.get(preset.experiment, {})).items()),
    ]


# -------------------------------------------------------------------- models
def write_model(folder: Path, name: str) -> Path:
    """A random model of a preset's architecture and number of layers, `WIDTH` wide, with the embedded tokenizer."""
    if folder.is_dir():
        return folder
    import torch
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    torch.manual_seed(0)
    n_vocab = len(json.loads((EMBEDDED / "model/tokenizer.json").read_text())["model"]["vocab"]) + 8
    others = {"gelu-2l": _write_gelu_2l, "gpt2-small": _write_gpt2, "smollm2": _write_llama}
    write = others.get(name, _write_pythia)
    write(folder, n_vocab, LAYERS.get(name, 24))
    for file in (EMBEDDED / "model").glob("token*.json"):
        (folder / file.name).write_bytes(file.read_bytes())
    return folder


def _write_pythia(folder: Path, n_vocab: int, n_layers: int) -> None:
    from transformers import GPTNeoXConfig, GPTNeoXForCausalLM

    config = GPTNeoXConfig(
        vocab_size=n_vocab, hidden_size=WIDTH, num_hidden_layers=n_layers, num_attention_heads=HEADS,
        intermediate_size=4 * WIDTH, max_position_embeddings=2048, hidden_act="gelu", use_parallel_residual=True,
        rope_parameters={"rope_type": "default", "rope_theta": 10_000.0, "partial_rotary_factor": 0.25},
        bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    GPTNeoXForCausalLM(config).save_pretrained(folder)


def _write_gpt2(folder: Path, n_vocab: int, n_layers: int) -> None:
    from transformers import GPT2Config, GPT2LMHeadModel

    sizes = {"n_embd": WIDTH, "n_layer": n_layers, "n_head": HEADS, "n_positions": 1024, "vocab_size": n_vocab}
    GPT2LMHeadModel(GPT2Config(**sizes, bos_token_id=0, eos_token_id=0)).save_pretrained(folder)


def _write_llama(folder: Path, n_vocab: int, n_layers: int) -> None:
    """With SmolLM2's tied embeddings, and its odd number of heads that share keys and values by three."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=n_vocab, hidden_size=9 * 4, num_hidden_layers=n_layers, num_attention_heads=9, num_key_value_heads=3,
        intermediate_size=96, max_position_embeddings=8192, tie_word_embeddings=True, rms_norm_eps=1e-5,
        bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder)


def _write_gelu_2l(folder: Path, n_vocab: int, n_layers: int) -> None:
    """As `scripts/fetch.py` leaves it: TransformerLens's keys and names of weights."""
    import torch
    from safetensors.torch import save_file
    from transformer_lens import HookedTransformer, HookedTransformerConfig

    sizes = {"n_layers": n_layers, "d_model": WIDTH, "n_ctx": 1024, "d_head": WIDTH // HEADS, "n_heads": HEADS}
    sizes |= {"d_mlp": 4 * WIDTH, "d_vocab": n_vocab}
    model = HookedTransformer(HookedTransformerConfig(**sizes, act_fn="gelu", normalization_type="LN", device="cpu"))
    state = {k: v.contiguous() for k, v in model.state_dict().items() if not k.endswith(("attn.mask", "attn.IGNORE"))}
    folder.mkdir(parents=True)
    save_file({name: torch.randn_like(v) / math.sqrt(WIDTH) if v.ndim > 1 else v for name, v in state.items()},
              folder / "model.safetensors")  # fmt: skip
    keys = {"act_fn": "gelu", "normalization": "LN", "shortformer_pos": False, "attn_only": False, "ln_eps": 1e-5}
    keys["tokenizer_name"] = "NeelNanda/gpt-neox-tokenizer-digits"
    (folder / "config.json").write_text(json.dumps(sizes | keys))


# -------------------------------------------------------------------- data sets
def write_corpus(folder: Path, name: str) -> Path:
    """The first documents of the embedded corpus, in the layout of a data set of the hub."""
    if folder.is_dir():
        return folder
    with gzip.open(EMBEDDED / "corpus.jsonl.gz", "rt", encoding="utf-8") as file:
        texts = [json.loads(line)["text"] for line in islice(file, N_DOCUMENTS)]
    {"pile": _pile, "c4": _c4, "openwebtext": _openwebtext}[name](folder, texts)
    return folder


def _pile(folder: Path, texts: list[str]) -> None:
    """Shards of JSON lines compressed by zstd, with the source within `meta`."""
    import pyarrow

    (folder / "train").mkdir(parents=True)
    for shard in range(2):
        records = [{"text": text, "meta": {"pile_set_name": "Gutenberg (PG-19)"}} for text in texts[shard::2]]
        with pyarrow.output_stream(str(folder / f"train/{shard:02}.jsonl.zst"), compression="zstd") as stream:
            stream.write(_lines(records))
    _describe(folder, "default", "train/*.jsonl.zst")


def _c4(folder: Path, texts: list[str]) -> None:
    """Shards of JSON lines compressed by gzip, a folder for each language."""
    (folder / "en").mkdir(parents=True)
    for shard in range(2):
        records = [{"text": t, "timestamp": "2019-04-25T12:57:54Z", "url": "https://…"} for t in texts[shard::2]]
        file = folder / f"en/c4-train.{shard:05}-of-01024.json.gz"
        file.write_bytes(gzip.compress(_lines(records)))
    _describe(folder, "en", "en/c4-train.*.json.gz")


def _openwebtext(folder: Path, texts: list[str]) -> None:
    """Parquet, into which the hub has converted what was a script."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    (folder / "plain_text").mkdir(parents=True)
    for shard in range(2):
        pq.write_table(pa.table({"text": texts[shard::2]}), folder / f"plain_text/train-{shard:05}-of-00002.parquet")
    _describe(folder, "plain_text", "plain_text/train-*.parquet")


def _lines(records: list[dict[str, Any]]) -> bytes:
    return "".join(json.dumps(record) + "\n" for record in records).encode()


def _describe(folder: Path, name: str, files: str) -> None:
    """The head of its page on the hub, which says what its configurations are."""
    about = {"configs": [{"config_name": name, "data_files": [{"split": "train", "path": files}]}]}
    (folder / "README.md").write_text(f"---\n{yaml.safe_dump(about)}---\n")
