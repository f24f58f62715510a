"""What a job that runs a model asks of the machine, by the sizes of the plan."""

import re
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

from saeflow.models.folder import Geometry, ModelError, config_file, read_geometry, read_keys
from saeflow.models.source import PROCESSING
from saeflow.planning.graph import Instance, Plan

BASE_MB = 3000  # the interpreter, torch, TransformerLens, and what they take while they start
ITEMSIZE = {"float32": 4, "bfloat16": 2, "float16": 2}
OPENED, PROCESSED = 1.2, 2.0
"""Memory of a process while it opens a model, over the bytes of the weights: as they are stored, where
`benchmarks/real_model.py` measures up to 1.15, and where they are processed or randomised."""
LOGITS = 4  # copies of a batch's logits that are there at once: of two models, and their logarithms


def running(
    plan: Plan, instances: Sequence[Instance], n_operations: float, batch_rows: int, held_mb: float = 0.0
) -> dict[str, int]:
    """`mem_mb` and `runtime` (minutes) of a job that runs the model of its instances for so many operations,
    `batch_rows` rows at a time, and holds `held_mb` beside it.

    Memory is for the weights in the model's precision, as while it is opened, and for the logits of a batch, which are
    float32, as the unembedding is that makes them; time twice that of the operations, but an hour at least.
    """
    first = instances[0]
    context = int(rows_of(plan, first)["tokens"]["context_size"])
    n_weights, d_model, d_vocab = sizes(Path(first.sources["model"]))
    how = first.config["model"]
    itemsize = ITEMSIZE[how.get("dtype", "float32")]
    processed = how.get("randomise", "none") != "none" or any(how.get(name) for name in PROCESSING)
    weights = (PROCESSED if processed else OPENED) * itemsize * n_weights
    logits = LOGITS * 4 * batch_rows * context * d_vocab
    if batch_rows and itemsize < 4:
        logits += 4 * d_model * d_vocab
    minutes = 2 * n_operations / float(plan.device["flops"]) / 60
    return {
        "mem_mb": BASE_MB + max(1000, round(1e-6 * (weights + logits))) + round(held_mb),
        "runtime": max(60, round(minutes)),
    }


def operations(
    plan: Plan, instance: Instance, first: int = 0, last: int | None = None, logits: bool = True, passes: float = 1
) -> float:
    """Floating-point operations, additions and multiplications, of `passes` of the model over an instance's tokens,
    from block `first` to `last` (both included; None: the last of the model): two for each weight of a block and of
    the unembedding, and the products of queries with keys and of patterns with values, which are computed whole. 0 for
    a model that the workflow has not made yet."""
    geometry = _geometry(Path(instance.sources["model"]))
    if geometry is None:
        return 0.0
    tokens = rows_of(plan, instance)
    context = tokens["tokens"]["context_size"]
    g, n_blocks = geometry, (geometry.n_layers - 1 if last is None else last) - first + 1
    heads = 2 * g.d_model * g.d_head * (g.n_heads + g.n_key_value_heads) + 2 * context * g.n_heads * g.d_head
    block = heads + (3 if g.gated else 2) * g.d_model * g.d_mlp
    unembedding = g.d_model * (g.d_vocab or 0) if logits else 0
    return 2.0 * passes * tokens["n_rows"] * context * (max(n_blocks, 0) * block + unembedding)


def block_of(hook_name: str) -> int:
    """Number of the block of a hook, `blocks.L.…`; 0 for one of no block, which lies before all."""
    found = re.match(r"blocks\.(\d+)\.", hook_name)
    return int(found[1]) if found else 0


def rows_of(plan: Plan, instance: Instance) -> dict[str, Any]:
    """`n_rows` and `tokens.context_size` of what a model is run on: a token store, or the one `row` of a text."""
    if "row" in instance.config:
        return {"n_rows": 1, "tokens": {"context_size": len(instance.config["row"])}}
    return plan.instance("tokens", instance.needs["tokens"][-1]).config


@cache
def _geometry(folder: Path) -> Geometry | None:
    try:
        return read_geometry(folder)
    except (ModelError, OSError):
        return None


@cache
def sizes(folder: Path) -> tuple[int, int, int]:
    """How many weights a model has, its width and its vocabulary; all 0 where the workflow has not made it yet."""
    geometry = _geometry(folder)
    if geometry is None:
        return 0, 0, 0
    stored = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
    return stored // (2 if _is_half(folder) else 4), geometry.d_model, geometry.d_vocab or 0


def _is_half(folder: Path) -> bool:
    config = read_keys(config_file(folder))
    return str(config.get("torch_dtype") or config.get("dtype")) in ("float16", "bfloat16")
