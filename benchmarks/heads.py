"""Dictionaries of the heads of a layer trained as one, against one at a time and one for the whole layer.

Last line: {"heads_over_concat", "heads_over_separate", "max_relative_loss_difference", ...}; the first two again as
`gelu2l.*`, for the attention notebook's sizes (8 heads of 64, 2,048 latents each, 16,384 in all, 4,096 tokens), and as
`embedded.*` for those of the embedded model (4 heads of 32, 256 latents each, 1,024 tokens). TopK, k 4 a head.

* `heads_over_concat`, `heads_over_separate`: whole runs, as the workflow starts them: `job.py train` on a frozen
  plan and a store of hook_z in float32, each in a process of its own, from its start to the folder that it has written.
  `heads` is one run of `dictionary=heads`, `concat` one of an SAE of all heads with as many latents in all, `separate`
  the sum of a run a head (`site.head`). So many steps as `--steps` says.
* `<size>.long_*`: the same of what a step adds to a run, in runs of two lengths: what is left of the ratio where the
  start of a process is nothing. `<size>.start_s`: the start.
* `<size>.step_*`: bare steps in one process, on batches in memory: `HeadsTrainer.train_step`, `Trainer.train_step`.

`max_relative_loss_difference` compares the losses of heads trained as one with those of each trained alone: over all
steps of the bare steps, and all rows of the metrics of the runs.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

SIZES = {  # heads, d_head, d_sae a head, tokens a batch, stored tokens, steps of a run
    "gelu2l": (8, 64, 2048, 4096, 131_072, 60),
    "embedded": (4, 32, 256, 1024, 131_072, 600),
}
K = 4

parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
parser.add_argument("--sizes", nargs="+", default=list(SIZES), choices=list(SIZES))
parser.add_argument("--steps", type=int, help="of a run; default: 60 and 600")
parser.add_argument("--repeats", type=int, default=3, help="of whole runs")
parser.add_argument("--rounds", type=int, default=9, help="of bare steps")
parser.add_argument("--threads", type=int, default=2)
parser.add_argument("--without", nargs="*", default=[], choices=["runs", "steps"])
args = parser.parse_args()
os.environ["OMP_NUM_THREADS"] = str(args.threads)

import pandas as pd  # noqa: E402 (after the number of threads is set)
import torch  # noqa: E402
import zarr  # noqa: E402

from saeflow.activations.store import ActivationStore, Column, TokenRows, write_column  # noqa: E402
from saeflow.activations.writer import ColumnRequest, ColumnWriter  # noqa: E402
from saeflow.config import ActivationsConfig, TrainingConfig  # noqa: E402
from saeflow.dictionaries import Origin  # noqa: E402
from saeflow.dictionaries.kinds.sae import SAEConfig  # noqa: E402
from saeflow.kernels.memory import keep_freed_memory  # noqa: E402
from saeflow.planning.graph import Instance, Plan  # noqa: E402
from saeflow.training.heads import HeadsTrainer  # noqa: E402
from saeflow.training.protocol import HookStatistics  # noqa: E402
from saeflow.training.trainer import Trainer  # noqa: E402

HOOK, STORE = "blocks.1.attn.hook_z", "random-float32-00000000"
SCRIPT = Path(__file__).resolve().parent.parent / "scripts/job.py"


def main() -> None:
    torch.set_num_threads(args.threads)
    keep_freed_memory()
    found: dict[str, float] = {}
    differences = []
    for size in args.sizes:
        for name, measure in (("runs", runs), ("steps", steps)):
            if name not in args.without:
                measured, difference = measure(size)
                differences.append(difference)
                found |= {f"{size}.{key}": value for key, value in measured.items()}
    if max(differences) > 1e-3:
        sys.exit(f"losses as one and alone differ by {max(differences):g}")
    for name in ("heads_over_concat", "heads_over_separate"):
        if f"gelu2l.{name}" in found:
            found = {name: found[f"gelu2l.{name}"]} | found
    found["max_relative_loss_difference"] = max(differences)
    print(json.dumps({name: float(f"{value:.3g}") for name, value in found.items()}))


def activations(size: str, n_tokens: int) -> torch.Tensor:
    """(N, H, d): each head sums a few of its 4 d directions, at a scale of its own."""
    H, d, *_ = SIZES[size]
    g = torch.Generator().manual_seed(0)
    atoms = torch.nn.functional.normalize(torch.randn(H, 4 * d, d, generator=g), dim=2)
    f = (torch.rand(n_tokens, H, 4 * d, generator=g) < 1 / d) * torch.rand(n_tokens, H, 4 * d, generator=g)
    scales = torch.linspace(0.5, 2.0, H)[:, None]
    return torch.einsum("nhf,hfd->nhd", f, atoms) * scales + 0.05 * torch.randn(n_tokens, H, d, generator=g)


def ratios(times: dict[str, float]) -> dict[str, float]:
    return {f"heads_over_{other}": times["heads"] / times[other] for other in ("concat", "separate")}


# -------------------------------------------------------------------- whole runs
def runs(size: str) -> tuple[dict[str, float], float]:
    H, _, n, batch, stored, n_steps = SIZES[size]
    n_steps = args.steps or n_steps
    own = {"activation": "topk", "k": K, "d_sae": n, "expansion": None, "normalize_activations": "per_head"}
    whole = own | {"kind": "sae", "k": H * K, "d_sae": H * n}
    times: dict[str, dict[int, float]] = {"heads": {}, "concat": {}, "separate": {}}
    with tempfile.TemporaryDirectory(prefix="saeflow-bench-") as directory:
        results = Path(directory)
        write(results / "activations" / STORE, activations(size, stored))
        for steps in (n_steps // 3, n_steps):
            training = {"n_tokens": steps * batch, "batch_size": batch, "lr": 1e-3, "log_every": 10}
            configs = {"heads": (own | {"kind": "heads"}, None), "concat": (whole, None)}
            configs |= {f"head_{h}": (own | {"kind": "sae"}, h) for h in range(H)}
            plan = plan_of(results, configs, training)
            plan.freeze(results / "plan.json")
            rounds = [{key: run(results, key) for key in configs} for _ in range(args.repeats)]
            taken = {key: statistics.median(each[key] for each in rounds) for key in configs}
            for name in ("heads", "concat"):
                times[name][steps] = taken[name]
            times["separate"][steps] = sum(taken[f"head_{h}"] for h in range(H))
            print(f"{size}, {steps} steps: {taken}", file=sys.stderr)
        folder = results / "train"
        difference = max(relative(folder / f"heads/head_{h}", folder / f"head_{h}") for h in range(H))
    few, many = sorted(times["heads"])
    slopes = {name: (t[many] - t[few]) / (many - few) for name, t in times.items()}
    found = ratios({name: t[many] for name, t in times.items()})
    found |= {f"long_{name}": value for name, value in ratios(slopes).items()}
    found |= {f"{name}_run_s": t[many] for name, t in times.items()}
    return found | {"start_s": times["heads"][many] - many * slopes["heads"]}, difference


def run(results: Path, key: str) -> float:
    """Seconds of a process, from its start to its end."""
    command = [sys.executable, str(SCRIPT), "train", "--plan", str(results / "plan.json"), "--key", key]
    command += ["--threads", str(args.threads), "--log", str(results / "log")]
    started = time.perf_counter()
    done = subprocess.run(command, capture_output=True, text=True)
    taken = time.perf_counter() - started
    if done.returncode:
        sys.exit(done.stderr)
    return taken


def relative(one: Path, other: Path) -> float:
    losses = [pd.read_parquet(folder / "metrics.parquet")["loss"].to_numpy() for folder in (one, other)]
    return float(abs(losses[0] / losses[1] - 1).max())


def plan_of(results: Path, dictionaries: dict[str, tuple[dict, int | None]], training: dict) -> Plan:
    column = f"{STORE}/column"
    tokens = Instance("tokens", "text", {"tokens": {"prepend_bos": False}}, {}, {})
    model = {"weights": "w", "fold_ln": False, "center_writing_weights": False, "center_unembed": False}
    of_model = {"model": model, "tokens": {"context_size": 1}}
    stored = Instance("activations", column, of_model, {"tokens": ["text"]}, {})
    jobs = {}
    for key, (dictionary, head) in dictionaries.items():
        config = {"dictionary": dictionary, "training": training, "seed": 0, "hook_name": HOOK, "hook_name_out": None}
        config |= {} if head is None else {"head": head}
        jobs[key] = Instance("train", key, config, {"activations": [column]}, {"training": "{}"})
    stages = {"tokens": {"text": tokens}, "activations": {column: stored}, "train": jobs}
    return Plan("benchmark", stages, {}, results=str(results))


def write(folder: Path, values: torch.Tensor) -> None:
    """A store with one column of rows (N, H, d)."""
    from concurrent.futures import ThreadPoolExecutor

    store = ActivationStore(folder, ActivationsConfig())
    tokens = zarr.open_group(folder / "tokens/tokens.zarr", mode="w", zarr_format=3)
    for name in ("tokens", "document", "offset"):
        array = tokens.create_array(name, shape=(len(values), 1), chunks=(4096, 1), dtype="int32", fill_value=-1)
        array[:] = 0
    with store.locked(), ThreadPoolExecutor(1) as thread:
        wanted = ColumnRequest(HOOK, tuple(values.shape[1:]), len(values))
        store.create(HOOK, wanted.size, {})
        writer = ColumnWriter(store, [wanted], "cpu", thread)
        for start in range(0, len(values), 4096):
            writer.append(start, values[start : start + 4096])
        writer.wait()
        column = Column(folder / "column", HOOK, len(values), wanted.size, "float32")
        column.folder.mkdir()
        write_column(column, writer.statistics[wanted])
        store.commit({HOOK: len(values)}, TokenRows(folder / "tokens"), {})


# -------------------------------------------------------------------- bare steps
def steps(size: str) -> tuple[dict[str, float], float]:
    H, d, n, N, *_ = SIZES[size]
    batches = [activations(size, N).flatten(1) for _ in range(3)]
    z = batches[0]
    norms = z.unflatten(1, (H, d)).square().sum(2).mean(0).sqrt()
    side = HookStatistics(z.mean(0), z.norm(dim=1).mean().item(), norms)
    training = TrainingConfig(10**12, lr=1e-3, log_every=10**9)

    def specs(width: int, latents: int, k: int, heads: list[int | None]) -> list:
        config = SAEConfig("sae", "topk", k=k, expansion=None, d_sae=latents, normalize_activations="per_head")
        return [config.spec(width, width, HOOK, HOOK, 0, Origin(), h) for h in heads]

    of_heads = specs(d, n, K, list(range(H)))
    together = HeadsTrainer(of_heads, training, side)
    alone = [Trainer(spec, training, one, one) for spec, one in zip(of_heads, side.by_head(), strict=True)]
    (whole,) = specs(H * d, H * n, H * K, [None])
    concat = Trainer(whole, training, side, side)
    times: dict[str, list[float]] = {}
    difference = 0.0
    for i in range(args.rounds * (1 if size == "gelu2l" else 20) + 2):
        z = batches[i % len(batches)]

        def separate(z: torch.Tensor = z) -> None:
            for h, one in enumerate(alone):
                one.train_step((z[:, h * d : (h + 1) * d],))

        ways = {
            "separate": separate,
            "heads": lambda z=z: together.train_step((z,)),
            "concat": lambda z=z: concat.train_step((z,)),
        }
        for name, take in ways.items():
            started = time.perf_counter()
            take()
            times.setdefault(name, []).append(time.perf_counter() - started)
        for one, other in zip(together.heads, alone, strict=True):
            losses = [t.metrics.losses[-1] if t.metrics.losses else t.metrics.rows[-1]["loss"] for t in (one, other)]
            difference = max(difference, abs(float(losses[0]) / float(losses[1]) - 1))
    medians = {name: statistics.median(values[2:]) for name, values in times.items()}
    print(f"{size}, steps: {medians}", file=sys.stderr)
    found = {f"step_{name}": value for name, value in ratios(medians).items()}
    return found | {"step_s": medians["heads"]}, difference


main()
