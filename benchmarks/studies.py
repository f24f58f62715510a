"""What large studies cost, as the plan predicts it before anything is run or downloaded: the notebooks' presets, a
study of a Pythia-410M and one of a Llama-3-8B, on one GPU of `FLOPS` floating-point operations a second.

Prints a row a study, as docs/scaling.md has it. Models are stand-ins of the true shapes, whose weights are holes in a
file. Last line: {"<study>.gpu_hours", "<study>.tb"}.
"""

import json
import struct
import sys
import tempfile
from pathlib import Path

from saeflow.planning.batches import resources
from saeflow.planning.expansion import compose
from saeflow.planning.history import predict
from saeflow.planning.machine import bytes_on_disk, jobs

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "tests"))
FLOPS = 1e13  # half of an A100's peak in float32, 19.5e12 (NVIDIA's data sheet); not measured, as none is here
PYTHIA_410M = {
    "architectures": ["GPTNeoXForCausalLM"], "num_hidden_layers": 24, "hidden_size": 1024, "num_attention_heads": 16,
    "intermediate_size": 4096, "max_position_embeddings": 2048, "vocab_size": 50304,
}  # fmt: skip
PYTHIA_70M = PYTHIA_410M | {
    "num_hidden_layers": 6, "hidden_size": 512, "num_attention_heads": 8, "intermediate_size": 2048,
}  # fmt: skip
LLAMA_3_8B = {
    "architectures": ["LlamaForCausalLM"], "num_hidden_layers": 32, "hidden_size": 4096, "num_attention_heads": 32,
    "num_key_value_heads": 8, "intermediate_size": 14336, "max_position_embeddings": 8192, "vocab_size": 128256,
    "hidden_act": "silu", "rms_norm_eps": 1e-5, "torch_dtype": "bfloat16", "rope_theta": 500000.0,
}  # fmt: skip
GELU_2L = {
    "n_layers": 2, "d_model": 512, "n_ctx": 1024, "d_head": 64, "n_heads": 8, "d_mlp": 2048, "d_vocab": 48262,
    "act_fn": "gelu", "normalization": "LN", "shortformer_pos": False, "attn_only": False, "ln_eps": 1e-5,
    "tokenizer_name": "NeelNanda/gpt-neox-tokenizer-digits",
}  # fmt: skip
GIGABYTES = {"pythia-410m": 1.6, "pythia-70m": 0.28, "gelu-2l": 0.22, "llama-3-8b": 16.0}
SWEEP = "[{dictionary: topk, site: mlp_out, dictionary.k: [32, 64, 128]}, {dictionary: transcoder_topk, site: mlp}]"
LARGE = [
    "corpus=pile", "training=saelens", "training.n_tokens=200_000_000", "dictionary.expansion=16",
    "activations.dtype=bfloat16", "figures=[matched_l0]", f"sweep={SWEEP}",
    "tokens={context_size: 1024, train_tokens: 200_000_000, held_out_tokens: 2_000_000}",
]  # fmt: skip
STUDIES = {
    "notebook 000 (JSAE paper, 70M)": ("pythia-70m", ["experiment=jsae_paper", "site.layer=3", "dictionary.k=32"]),
    "notebook 001 (heads of gelu-2l)": ("gelu-2l", ["experiment=notebook_001"]),
    "JSAE paper, 410M": ("pythia-410m", ["experiment=jsae_paper"]),
    "notebook 004 (transcoder paper, 410M)": ("pythia-410m", ["experiment=notebook_004"]),
    "Pythia-410M, layer 12, 200M tokens": ("pythia-410m", [*LARGE, "site.layer=12"]),
    "Llama-3-8B, layer 16, 200M tokens": ("llama-3-8b", [*LARGE, "site.layer=16"]),
}
KEYS = ("activations", "train")  # with columns of their own
SHAPES = {"pythia-410m": PYTHIA_410M, "pythia-70m": PYTHIA_70M, "gelu-2l": GELU_2L, "llama-3-8b": LLAMA_3_8B}


def main() -> None:
    found: dict[str, float] = {}
    print("| study | jobs | activations | in all | caching | training | the rest | largest job |")
    print("|---|---|---|---|---|---|---|---|")
    with tempfile.TemporaryDirectory() as work:
        folders = {name: stand_in(Path(work) / name, name) for name in SHAPES}
        for study, (model, overrides) in STUDIES.items():
            device = [
                "device=cuda",
                f"device.flops={FLOPS:g}",
                f"model.path={folders[model]}",
                f"model.name={model}",
            ]
            plan = compose(ROOT / "conf", [*overrides, *device], results=f"{work}/results")
            hours = {stage: seconds / 3600 for stage, seconds in predict(plan, []).by_stage.items()}
            sizes = bytes_on_disk(plan)
            rest = sum(hours.values()) - sum(map(hours.get, KEYS))
            memory = max(resources(plan, stage, keys).get("mem_mb", 0) for stage, keys in jobs(plan))
            cells = [
                study, str(len([*jobs(plan)])), f"{sizes['activations'] / 1e12:.2f} TB",
                f"{sum(sizes.values()) / 1e12:.2f} TB", *(f"{h:.1f} h" for h in (*map(hours.get, KEYS), rest)),
                f"{memory / 1000:.0f} GB",
            ]  # fmt: skip
            print(f"| {' | '.join(cells)} |")
            found |= {f"{study}.gpu_hours": round(sum(hours.values()), 1)}
            found |= {f"{study}.tb": round(sum(sizes.values()) / 1e12, 2)}
    print(json.dumps(found))


def stand_in(folder: Path, name: str) -> Path:
    """A folder that the plan takes for a model, of the true shapes and the true size of weights."""
    from conftest import write_plain_model

    write_plain_model(folder, SHAPES[name])
    n = int(GIGABYTES[name] * 1e9)
    tensors = {"all": {"dtype": "U8", "shape": [n], "data_offsets": [0, n]}}
    header = json.dumps(tensors).encode()
    with (folder / "model.safetensors").open("wb") as file:
        file.write(struct.pack("<Q", len(header)) + header)
        file.truncate(8 + len(header) + n)
    return folder


main()
