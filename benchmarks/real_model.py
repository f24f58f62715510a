"""What SmolLM2-135M takes of memory while it is opened, in a process of its own for each precision.

The process first opens the model's lowest layer alone, so that code and libraries are there, and gives back what it
can; then it opens the whole, from a folder that holds the weights at that precision. Last line:
{"load_peak_over_weights", "held_over_weights", "bfloat16.load_peak_over_weights", "bfloat16.held_over_weights",
"bfloat16.nats", "float16.nats"}: the peak of its resident memory above what was there before, and that at the end, over
the bytes of the weights; and how far log-probabilities are from those in float32. A first run fetches the model, with
the network (`make model NAME=smollm2`).
"""

import gc
import json
import math
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
MODEL = ROOT / "models/smollm2"
SINGLE = "model.safetensors"
BYTES = {"float32": 4, "bfloat16": 2}


def main() -> None:
    if not (MODEL / "config.json").is_file():
        subprocess.run([sys.executable, str(ROOT / "scripts/fetch.py"), "smollm2"], check=True)
    with tempfile.TemporaryDirectory() as work:
        whole = measured(MODEL, "float32")
        half = measured(rounded(Path(work) / "smollm2"), "bfloat16")
    found = whole | {f"bfloat16.{name}": value for name, value in half.items()}
    print(json.dumps(found | {f"{dtype}.nats": nats for dtype, nats in errors().items()}))


def errors() -> dict[str, float]:
    """By precision, how far log-probabilities are from those in float32: the mean difference on a row of 64 random
    tokens, over positions and vocabulary."""
    import torch

    from saeflow.config import ModelConfig
    from saeflow.models.loading import load_model
    from saeflow.models.protocol import unembedding
    from saeflow.models.splicing import run_clean

    found = {}
    for dtype in ("float32", "bfloat16", "float16"):
        model = load_model(MODEL, ModelConfig("smollm2", path=str(MODEL), dtype=dtype), "cpu")  # type: ignore[arg-type]
        ids = torch.randint(model.cfg.d_vocab, (1, 64), generator=torch.Generator().manual_seed(0))
        found[dtype] = unembedding(model).logits(run_clean(model, ids, [], []).final).log_softmax(-1)
    exact = found.pop("float32")
    return {dtype: round(float((log_p - exact).abs().mean()), 3) for dtype, log_p in found.items()}


def rounded(folder: Path) -> Path:
    """The model with weights in bfloat16."""
    import torch
    from safetensors.torch import load_file, save_file

    shutil.copytree(MODEL, folder, ignore=shutil.ignore_patterns("*.safetensors"))
    state = {name: weights.bfloat16() for name, weights in load_file(MODEL / SINGLE).items()}
    assert all(weights.dtype is torch.bfloat16 for weights in state.values())
    save_file(state, folder / SINGLE, metadata={"format": "pt"})
    return folder


def measured(folder: Path, dtype: str) -> dict[str, float]:
    """In a new process."""
    child = [sys.executable, __file__, str(folder), dtype]
    out = subprocess.run(child, check=True, capture_output=True, text=True).stdout
    found: dict[str, float] = json.loads(out.splitlines()[-1])
    return found


def measure(folder: Path, dtype: str) -> None:
    from saeflow.config import ModelConfig
    from saeflow.kernels.memory import give_back_freed_memory
    from saeflow.models.loading import load_model
    from saeflow.models.weights import read_shapes

    model = ModelConfig("smollm2", path=str(folder), dtype=dtype)  # type: ignore[arg-type]
    load_model(folder, model, "cpu", n_layers=1)
    gc.collect()
    give_back_freed_memory()
    Path("/proc/self/clear_refs").write_text("5")  # the peak is counted from here
    before = memory("VmRSS")
    opened = load_model(folder, model, "cpu")
    weights = BYTES[dtype] * sum(math.prod(shape) for shape in read_shapes(folder).values())
    peak, held = ((memory(of) - before) / weights for of in ("VmHWM", "VmRSS"))
    assert len(opened.blocks) == opened.cfg.n_layers  # and it is still there
    print(json.dumps({"load_peak_over_weights": round(peak, 3), "held_over_weights": round(held, 3)}))


def memory(name: str) -> int:
    """Bytes, from what Linux says of this process."""
    found = re.search(rf"{name}:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found
    return 1024 * int(found[1])


if __name__ == "__main__":
    measure(Path(sys.argv[1]), sys.argv[2]) if len(sys.argv) > 1 else main()
