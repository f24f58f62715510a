"""What a job that runs a model asks of the machine, by the sizes of the plan."""

from collections.abc import Sequence
from functools import cache
from pathlib import Path

from saeflow.models.folder import ModelError, config_file, read_geometry, read_keys
from saeflow.planning.graph import Instance, Plan

BASE_MB = 3000  # the interpreter, torch, TransformerLens, and what they take while they start
LOGITS = 4  # copies of a batch's logits that are there at once: of two models, and their logarithms


def running(
    plan: Plan, instances: Sequence[Instance], passes: float, batch_rows: int, held_mb: float = 0.0
) -> dict[str, int]:
    """`mem_mb` and `runtime` (minutes) of a job that runs the model `passes` times over the tokens that its instances
    share, `batch_rows` rows at a time, and holds `held_mb` beside it.

    Memory is for the weights in float32 twice, as while a model is opened, and for the logits of a batch; time twice
    that of the operations, but an hour at least.
    """
    first = instances[0]
    tokens = plan.instance("tokens", first.needs["tokens"][-1]).config
    context = int(tokens["tokens"]["context_size"])
    weights, d_vocab = sizes(Path(first.sources["model"]))
    logits = LOGITS * 4 * batch_rows * context * d_vocab
    n_operations = passes * tokens["n_rows"] * context * weights / 2  # 2 a parameter, of 4 bytes
    minutes = 2 * n_operations / float(plan.device["flops"]) / 60
    return {
        "mem_mb": BASE_MB + max(1000, round(2e-6 * weights + 1e-6 * logits)) + round(held_mb),
        "runtime": max(60, round(minutes)),
    }


@cache
def sizes(folder: Path) -> tuple[int, int]:
    """Bytes of a model's weights as float32 and its vocabulary; both 0 where the workflow has not made it yet."""
    try:
        geometry = read_geometry(folder)
    except (ModelError, OSError):
        return 0, 0
    stored = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
    return stored * (2 if _is_half(folder) else 1), geometry.d_vocab or 0


def _is_half(folder: Path) -> bool:
    config = read_keys(config_file(folder))
    return str(config.get("torch_dtype") or config.get("dtype")) in ("float16", "bfloat16")
