"""One training step against its encoder product and the steps of SAELens, sparsify and dictionary_learning.

Last line, for each of `topk`, `l1`, `transcoder` and each size (d_sae 8192 and 32768 at d_in 512 and 4,096 tokens; 1024
at d_in 128 and 1,024 tokens, the demo's): {"topk.8192.step_over_product", "topk.8192.saelens_over_step", ...,
"max_relative_loss_difference", "bfloat16_over_float32_product", ...}.

Every contender starts from the same weights, takes the same batches in turn, and does all that it does in a training
step: ours is `Trainer.train_step`, with SAELens's clipping. All have memory as our jobs do (`keep_freed_memory`), and
threads that sleep while they wait, as there (`OMP_WAIT_POLICY`).
The product is `torch.addmm(b_enc, x, W_enc)`, measured in every round, with TF32 off. `max_relative_loss_difference`
compares our losses with SAELens's, over all steps. `bfloat16_over_float32_product`: what the product of the first size
takes in bfloat16, over what it takes in float32: a fraction where the processor has instructions for it (AVX512-BF16,
AMX), of which our step then makes use, and several times as much where it has none. `peak_bytes_over_saelens`: by how
much the memory of a process grows from before the weights are made to its peak over ten steps, ours over theirs; a step
of a tiny problem comes first, which loads code. On a GPU (`--device cuda`) memory is that allocated there, and a time
is a tenth of that of ten steps one after the other. sparsify trains no L1 dictionary, and its transcoder is a TopK;
dictionary_learning has no transcoder.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

SIZES = {  # tokens, d_in, d_sae
    "8192": (4096, 512, 8192),
    "32768": (4096, 512, 32768),
    "1024": (1024, 128, 1024),
    "8192@768": (4096, 768, 8192),
    "32768@768": (4096, 768, 32768),
}
KINDS = ("topk", "l1", "transcoder")
ACTIVE = {"topk": 32, "l1": 50, "transcoder": 50}


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sizes", nargs="+", default=list(SIZES)[:3], choices=list(SIZES))
    parser.add_argument("--kinds", nargs="+", default=list(KINDS), choices=KINDS)
    parser.add_argument("--rounds", type=int, default=7, help="the largest size has half as many, the smallest thrice")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--without", nargs="*", default=[], help="peers to leave out: those that need the network")
    parser.add_argument(
        "--peak", choices=["saeflow", "saelens"], help="only the peak memory of one, one kind, one size"
    )
    return parser.parse_args()


args = parse()
os.environ["OMP_NUM_THREADS"] = str(args.threads)
os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # as training jobs do

import torch  # noqa: E402 (after the number of threads is set)
from _steps import Ours, batches, problem_of  # noqa: E402

from saeflow.kernels.memory import keep_freed_memory  # noqa: E402


def main() -> None:
    torch.set_num_threads(args.threads)
    keep_freed_memory()  # as training jobs do
    if args.peak:
        print(peak_bytes(args.peak, args.kinds[0], args.sizes[0]))
        return
    found: dict[str, float] = {}
    differences = []
    for size in args.sizes:
        for kind in args.kinds:
            times, difference = measure(kind, size)
            differences.append(difference)
            ours = times["saeflow"]
            found[f"{kind}.{size}.step_s"] = ours
            found[f"{kind}.{size}.step_over_product"] = ours / times["product"]
            for peer in ("saelens", "sparsify", "dictionary_learning"):
                if peer in times:
                    found[f"{kind}.{size}.{peer}_over_step"] = times[peer] / ours
            names = [name for name in ("saeflow", "saelens") if name in times]
            peaks = {name: peak_of_process(name, kind, size) for name in names}
            if "saelens" in peaks:
                found[f"{kind}.{size}.peak_bytes_over_saelens"] = peaks["saeflow"] / peaks["saelens"]
            print(f"{kind}, d_sae {size}: {times}, peak {peaks}", file=sys.stderr)
    found["max_relative_loss_difference"] = max(differences)
    found["bfloat16_over_float32_product"] = bfloat16_product(args.sizes[0])
    print(json.dumps({name: float(f"{value:.3g}") for name, value in found.items()}))


def measure(kind: str, size: str) -> tuple[dict[str, float], float]:
    """Median seconds of the product and of every contender's step; the largest relative difference of losses."""
    import _peers

    N, d, n = SIZES[size]
    problem = problem_of(kind, d, n, ACTIVE[kind], args.device)
    makers: list[Callable] = [Ours, _peers.saelens, _peers.sparsify, _peers.dictionary_learning]
    makers = [make for make in makers if make.__name__ not in args.without]
    contenders = [made for made in (make(problem) for make in makers) if made is not None]
    rounds = {"32768": max(args.rounds // 2, 3), "1024": 3 * args.rounds}.get(size, args.rounds)
    data = batches(N, d, 3, args.device)
    times: dict[str, list[float]] = {}
    difference = 0.0
    for round_ in range(rounds + 2):  # two to warm up: after the first the step is sparse or dense
        x, y = data[round_ % len(data)]
        taken, _ = timed(partial(torch.addmm, problem.b_enc, x, problem.W_enc))
        times.setdefault("product", []).append(taken)
        losses = {}
        for contender in contenders:
            taken, losses[contender.name] = timed(partial(contender.step, x, y))
            times.setdefault(contender.name, []).append(taken)
        losses = {name: float(loss) for name, loss in losses.items()}
        if "saelens" in losses:
            difference = max(difference, abs(losses["saeflow"] / losses["saelens"] - 1))
    if difference > 1e-4:
        sys.exit(f"{kind}, {size}: our losses and SAELens's differ by {difference:g}")
    return {name: statistics.median(values[2:]) for name, values in times.items()}, difference


def bfloat16_product(size: str) -> float:
    """Time of the encoder's product in bfloat16 over that in float32: of the shortest of three in turn."""
    N, d, n = SIZES[size]
    problem = problem_of("topk", d, n, ACTIVE["topk"], args.device)
    ((x, _),) = batches(N, d, 1, args.device)
    times: dict[torch.dtype, list[float]] = {torch.bfloat16: [], torch.float32: []}
    for _ in range(3):
        for dtype, of in times.items():
            of.append(timed(partial(torch.addmm, *(t.to(dtype) for t in (problem.b_enc, x, problem.W_enc))))[0])
    return min(times[torch.bfloat16]) / min(times[torch.float32])


def timed(work: Callable) -> tuple[float, Any]:
    """Seconds that it takes, and what it returns."""
    repeats = 10 if args.device == "cuda" else 1
    synchronise()
    started = time.perf_counter()
    for _ in range(repeats):
        found = work()
    synchronise()
    return (time.perf_counter() - started) / repeats, found


def synchronise() -> None:
    if args.device == "cuda":
        torch.cuda.synchronize()


def peak_of_process(name: str, kind: str, size: str) -> int:
    options = f"--peak {name} --kinds {kind} --sizes {size} --threads {args.threads} --device {args.device}"
    command = [sys.executable, __file__, *options.split()]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        sys.exit(done.stderr)
    return int(done.stdout.split()[-1])


def peak_bytes(name: str, kind: str, size: str) -> int:
    import _peers

    make = Ours if name == "saeflow" else _peers.saelens
    N, d, n = SIZES[size]
    data = batches(N, d, 1, args.device)
    small = batches(4, 8, 1, args.device)[0]
    make(problem_of(kind, 8, 16, 4, args.device)).step(*small)  # loads what both load once: code, not data
    if args.device == "cpu":
        Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew from what is resident
    else:
        torch.cuda.reset_peak_memory_stats()
    before = peak()
    contender = make(problem_of(kind, d, n, ACTIVE[kind], args.device))
    for _ in range(10):
        contender.step(*data[0])
    return peak() - before


def peak() -> int:
    """Most memory so far, in bytes: allocated on the GPU, or resident, where getrusage would count that of the parent
    before it started this."""
    if args.device == "cuda":
        return torch.cuda.max_memory_allocated()
    (line,) = (line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
    return int(line.split()[1]) * 1024


main()
