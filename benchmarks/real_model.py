"""What SmolLM2-135M takes of memory while it is opened, and of time while 15 of its layers are cached.

Memory is that of a process of its own for each precision. It first opens the model's lowest layer alone, so that code
and libraries are there, and gives back what it can; then it opens the whole, from a folder that holds the weights at
that precision. Time is first that of jobs as the workflow starts them, each in a folder of its own, and then, in one
process, that of caching and of the bare forward pass in turn, in both precisions. Last line:

load_peak_over_weights, held_over_weights, bfloat16.…: the peak of the process's resident memory above what was there
before, and that at the end, over the bytes of the weights.
bfloat16.nats, float16.nats: how far log-probabilities are from those in float32.
start_s: seconds from the start of a job's process to its first batch, the median of three jobs.
predicted_over_measured: the time that the plan says of a caching job, from two smaller ones, over what it took;
guessed_over_measured: that of the first job, of which the plan knows its operations and `device.flops` alone.
forward_over_caching, bfloat16.forward_over_caching: seconds of the model up to the last hook, with its attention fused
as caching has it and keeping nothing, over those of caching in the same precision: at 1 caching costs nothing beside.
statistics_over_forward, bfloat16.statistics_over_forward: seconds of the statistics of as many rows of as many hooks,
by themselves and always in float32, over those of the bare pass: with s of them, caching can reach 1 / (1 + s).
bfloat16_over_float32: tokens a second of caching in bfloat16 over those in float32. On a processor without instructions
for bfloat16 (AVX512-BF16, AMX) it is far below 1, as its products are: bfloat16_over_float32_product is the time of the
product of an MLP in bfloat16 over that in float32.

A first run fetches the model, with the network (`make model NAME=smollm2`).
"""

import gc
import json
import math
import os
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
MODEL = ROOT / "models/smollm2"
SINGLE = "model.safetensors"
BYTES = {"float32": 4, "bfloat16": 2}
LAYERS, CONTEXT, THREADS = 15, 256, 2
TOKENS = (4_096, 8_192, 24_576)
"""Of the jobs: of the last the plan predicts the time, and the others are what it knows. Whole batches of 16 rows. The
last one's are what is cached beside the bare pass, so that what is done once, as metadata, weighs little."""
ROUNDS = 3
SHORT_CALLS = 5
"""Of what takes milliseconds, in each round; the fastest counts."""


def main() -> None:
    if not (MODEL / "config.json").is_file():
        subprocess.run([sys.executable, str(ROOT / "scripts/fetch.py"), "smollm2"], check=True)
    with tempfile.TemporaryDirectory() as work:
        whole = measured("memory", str(MODEL), "float32")
        half = measured("memory", str(rounded(Path(work) / "smollm2")), "bfloat16")
        found = whole | {f"bfloat16.{name}": value for name, value in half.items()}
        found |= jobs(Path(work))
        (tokens,) = (Path(work) / str(TOKENS[-1])).glob("results/tokens/*train*")
        found |= measured("caching", str(tokens), work)
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


def measured(what: str, *about: str) -> dict[str, float]:
    """What a function of this file says of it, in a new process."""
    child = [sys.executable, __file__, what, *about]
    out = subprocess.run(child, check=True, stdout=subprocess.PIPE, text=True).stdout
    found: dict[str, float] = json.loads(out.splitlines()[-1])
    return found


# -------------------------------------------------------------------- jobs
def jobs(work: Path) -> dict[str, float]:
    """Caching jobs of several sizes. Those that come later know what the earlier ones took."""
    from saeflow.planning.graph import Plan
    from saeflow.planning.history import lines, predict

    starts, ratios, before = [], [], None
    for n_tokens in TOKENS:
        folder = work / str(n_tokens)
        (folder / "results").mkdir(parents=True)
        if before is not None:
            shutil.copy(before / "results/made.jsonl", folder / "results")
        file, earlier = folder / "plan.json", lines(folder / "results")
        call(
            [str(ROOT / "scripts/plan.py"), "--directory", str(folder), "--freeze", str(file), *hydra(n_tokens)], folder
        )
        plan = Plan.load(file)
        (keys,) = plan.jobs("activations")
        predicted = predict(plan, earlier).by_stage["activations"]
        for key in plan.stages["tokens"]:
            call([str(ROOT / "scripts/job.py"), "tokens", "--plan", str(file), "--key", key], folder)
        options = ["activations", "--plan", str(file), "--job", keys[0], "--threads", str(THREADS)]
        call([__file__, "job", *options], folder)
        made = [line for line in lines(folder / "results")[len(earlier) :] if line["stage"] == "activations"]
        ratios.append(predicted / sum(line["seconds"] for line in made))
        starts.append(float((folder / START).read_text()))
        print(f"{n_tokens} tokens: {predicted:.1f} s predicted, over measured {ratios[-1]:.3f}", file=sys.stderr)
        before = folder
    return {
        "start_s": round(statistics.median(starts), 2),
        "predicted_over_measured": round(ratios[-1], 3),
        "guessed_over_measured": round(ratios[0], 3),
    }


def hydra(n_tokens: int) -> list[str]:
    layers = ",".join(map(str, range(LAYERS)))
    return [
        f"experiment_name=real{n_tokens}", "figures=[]", "model=smollm2", f"model.path={MODEL}",
        f"site.layer=[{layers}]",
        f"tokens.context_size={CONTEXT}", f"tokens.train_tokens={n_tokens}", f"tokens.held_out_tokens={CONTEXT}",
        "training.n_tokens=1024", "training.batch_size=1024", "training.lr_warm_up_steps=0",
        "training.lr_decay_steps=0",
    ]  # fmt: skip


def call(command: list[str], cwd: Path) -> None:
    done = subprocess.run([sys.executable, *command], cwd=cwd, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"{' '.join(command)} failed:\n{done.stdout}{done.stderr}")


START = "start_s"


def job() -> None:
    """`scripts/job.py`, which also notes when its first batch begins."""
    from saeflow.activations import caching
    from saeflow.jobs.command import main as work
    from saeflow.jobs.signals import stoppable

    run_block = caching.run_block

    def first(*given: Any) -> None:
        Path(START).write_text(f"{seconds_alive():.2f}")
        caching.run_block = run_block
        run_block(*given)

    caching.run_block = first
    with stoppable():
        work()


def seconds_alive() -> float:
    """Of this process, from Linux's clock."""
    began = int(Path("/proc/self/stat").read_text().rpartition(")")[2].split()[19]) / os.sysconf("SC_CLK_TCK")
    return float(Path("/proc/uptime").read_text().split()[0]) - began


# -------------------------------------------------------------------- caching beside the bare pass
def caching(tokens: Path, work: Path) -> dict[str, float]:
    import torch

    from saeflow.activations.store import TokenRows
    from saeflow.config import ModelConfig
    from saeflow.kernels.memory import keep_freed_memory
    from saeflow.kernels.select import multiplies_bfloat16
    from saeflow.models.loading import load_model

    torch.set_num_threads(THREADS)
    rows = TokenRows(tokens)
    few = rows.n_rows if multiplies_bfloat16() else BATCH_ROWS  # of all it would take minutes
    sides: dict[str, Callable[[], Any]] = {}
    for dtype, n_rows in (("float32", rows.n_rows), ("bfloat16", few)):
        config = ModelConfig("smollm2", path=str(MODEL), dtype=dtype)  # type: ignore[arg-type]
        model = load_model(MODEL, config, "cpu", n_layers=LAYERS)
        sides[f"forward {dtype}"] = partial(forward, model, rows, n_rows)
        sides[f"caching {dtype}"] = partial(cache, model, rows, n_rows, work / "store")
        sides[f"statistics {dtype}"] = partial(statistics_alone, model.cfg.d_model, n_rows * CONTEXT)
    left, matrix = torch.randn(2048, 576), torch.randn(1536, 576)
    sides["product float32"] = partial(torch.mm, left, matrix.T)
    sides["product bfloat16"] = partial(torch.mm, left.bfloat16(), matrix.bfloat16().T)
    seconds: dict[str, list[float]] = {}
    keep_freed_memory()  # as caching jobs do
    for _ in range(ROUNDS):
        for name, side in sides.items():
            shutil.rmtree(work / "store", ignore_errors=True)
            os.sync()  # else the disk still frees that store, and a flush of the next one waits for it
            for _ in range(SHORT_CALLS if name.startswith("product") else 1):
                started = time.perf_counter()
                side()
                seconds.setdefault(name, []).append(time.perf_counter() - started)
            print(f"{name}: {seconds[name][-1]:.3f} s", file=sys.stderr)
    took = {name: min(of) if name.startswith("product") else statistics.median(of) for name, of in seconds.items()}
    found = {}
    for dtype, prefix in (("float32", ""), ("bfloat16", "bfloat16.")):
        bare = took[f"forward {dtype}"]
        found[f"{prefix}forward_over_caching"] = bare / took[f"caching {dtype}"]
        found[f"{prefix}statistics_over_forward"] = took[f"statistics {dtype}"] / bare
    found |= {
        "bfloat16_over_float32": took["caching float32"] / rows.n_rows * few / took["caching bfloat16"],
        "bfloat16_over_float32_product": took["product bfloat16"] / took["product float32"],
    }
    return {name: round(value, 3) for name, value in found.items()}


BATCH_ROWS = 8  # of which both numbers of rows are multiples, as caching fills the last batch up


def forward(model: Any, rows: Any, n_rows: int) -> None:
    """The pass that caching makes, without hooks."""
    import torch

    from saeflow.models.attention import fused_attention

    with fused_attention(model), torch.inference_mode():
        for first in range(0, n_rows, BATCH_ROWS):
            ids = torch.from_numpy(rows.tokens(first, min(first + BATCH_ROWS, n_rows))).long()
            model(ids, stop_at_layer=LAYERS)


def cache(model: Any, rows: Any, n_rows: int, folder: Path) -> None:
    from saeflow.activations.caching import cache as fill
    from saeflow.activations.store import ActivationStore
    from saeflow.activations.writer import ColumnRequest
    from saeflow.config import ActivationsConfig

    n_tokens = n_rows * CONTEXT
    hooks = [ColumnRequest(f"blocks.{layer}.hook_mlp_out", (model.cfg.d_model,), n_tokens) for layer in range(LAYERS)]
    store = ActivationStore(folder, ActivationsConfig(batch_rows=BATCH_ROWS))
    with store.locked():
        fill(store, hooks, rows, lambda: model)


def statistics_alone(d: int, n_tokens: int) -> None:
    """Of random values, chunk by chunk, in memory that is at hand."""
    import torch

    from saeflow.activations.moments import Moments
    from saeflow.config import ActivationsConfig

    chunk = torch.randn(min(ActivationsConfig().chunk_tokens, n_tokens), d, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        for _ in range(LAYERS):
            moments = Moments(d)
            for _ in range(n_tokens // len(chunk)):
                moments.add(chunk)


# -------------------------------------------------------------------- memory
def loading(folder: Path, dtype: str) -> dict[str, float]:
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
    return {"load_peak_over_weights": round(peak, 3), "held_over_weights": round(held, 3)}


def memory(name: str) -> int:
    """Bytes, from what Linux says of this process."""
    found = re.search(rf"{name}:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found
    return 1024 * int(found[1])


if __name__ == "__main__":
    match sys.argv[1:]:
        case []:
            main()
        case ["job", *_]:
            del sys.argv[1]
            job()
        case ["memory", where, precision]:
            print(json.dumps(loading(Path(where), precision)))
        case ["caching", where, place]:
            print(json.dumps(caching(Path(where), Path(place))))
