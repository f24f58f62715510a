"""The Jacobian of a pair against notebook 003's einsum, and a Jacobian pair's training step against what it adds to.

Last line: {"einsum_over_block", "max_relative_error", "block_over_forward_per_token", "step_over_lambda0",
"subset_step_over_lambda0", "original_over_step", "peak_bytes_over_lambda0", "step_over_products", ...}.

* Block: the notebook's setting (d 768, d_mlp 3072, d_sae 49152, k 32, 64 tokens). Its einsum gathers strided columns;
  ours is `jacobian_blocks`. Both have the products of weights given. `max_relative_error`: of ours, to the einsum in
  float64, over its largest entry. `einsum` and `block` have what the notebook prints of its runs: mean, median,
  standard deviation, minimum, maximum, device, number of runs.
* `block_over_forward_per_token`: block and slopes of 1,024 tokens, over the forward pass of a randomly initialised
  GPT-2 small on a sequence of as many.
* Step: `JacobianTrainer.train_step` (d 512, d_mlp 2048, d_sae 8192, k 32, 4,096 tokens) with the whole penalty, with
  the penalty on 1/32 of the tokens, and with coefficient 0. `original_over_step`: against the formulation of the
  paper's code: dense decoders, gathers from full products, three-operand einsum, autograd, Adam, from the same weights
  on the same batches; it must find the same penalty. `step_over_products`: over the two encoders' products, dense and
  in float32, which the pair with coefficient 0 need not take; the arithmetic of the step is 2.75 times theirs.
  `peak_bytes_over_lambda0`: growth of a process's memory to its peak, median of some processes, as what glibc's
  allocator leaves unused differs from one to the next.
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

parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
parser.add_argument("--rounds", type=int, default=5)
parser.add_argument("--runs", type=int, default=20, help="of the block and of the einsum; the notebook: 100")
parser.add_argument("--threads", type=int, default=2)
parser.add_argument("--device", default="cpu", help="cpu or cuda")
parser.add_argument("--without", nargs="*", default=[], choices=["block", "forward", "step", "original"])
parser.add_argument("--peak", type=float, help="only print the peak memory of a step with this coefficient")
args = parser.parse_args()
os.environ["OMP_NUM_THREADS"] = str(args.threads)

import torch  # noqa: E402 (after the number of threads is set)
from torch import Tensor  # noqa: E402
from torch.nn import functional as F  # noqa: E402

from saeflow.config import TrainingConfig  # noqa: E402
from saeflow.dictionaries import Origin  # noqa: E402
from saeflow.dictionaries.kinds.jacobian import JacobianPairConfig  # noqa: E402
from saeflow.dictionaries.kinds.sae import alone  # noqa: E402
from saeflow.kernels.jacobian import BlockWeights, Linearisation, Products, jacobian_blocks  # noqa: E402
from saeflow.kernels.memory import keep_freed_memory  # noqa: E402
from saeflow.models.blocks import MLP, Block  # noqa: E402
from saeflow.training.jacobian_pair import JacobianTrainer  # noqa: E402
from saeflow.training.protocol import HookStatistics  # noqa: E402

DEVICE = args.device
WIDTH, HIDDEN, LATENTS, K, TOKENS = 512, 2048, 8192, 32, 4096


def main() -> None:
    torch.set_num_threads(args.threads)
    keep_freed_memory()
    if args.peak is not None:
        return print(peak_bytes(args.peak))
    found: dict[str, Any] = {}
    if "block" not in args.without:
        found |= block()
    if "forward" not in args.without:
        found |= {"block_over_forward_per_token": over_forward()}
    if "step" not in args.without:
        found |= step()
    print(json.dumps({name: rounded(value) for name, value in found.items()}))


def rounded(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: rounded(one) for name, one in value.items()}
    return float(f"{value:.3g}") if isinstance(value, float) else value


def timed(work: Callable[[], object], rounds: int) -> float:
    """Median seconds, after one that does not count."""
    return statistics.median(times_of(work, rounds))


def times_of(work: Callable[[], object], rounds: int) -> list[float]:
    """Seconds of each of `rounds` runs, after one that does not count."""
    return [timed_once(work) for _ in range(rounds + 1)][1:]


def statistics_of(times: list[float]) -> dict[str, Any]:
    """What notebook 003 prints of its runs, in milliseconds; its keys say so, and its numbers are seconds."""
    found = {"mean": statistics.mean, "median": statistics.median, "std": statistics.stdev, "min": min, "max": max}
    of_times = {f"{name}_ms": 1e3 * of(times) for name, of in found.items()}
    return of_times | {"device": DEVICE, "num_runs": len(times)}


def timed_once(work: Callable[[], object]) -> float:
    synchronise()
    started = time.perf_counter()
    work()
    synchronise()
    return time.perf_counter() - started


def synchronise() -> None:
    if DEVICE == "cuda":
        torch.cuda.synchronize()


def draw(*shape: int, scale: float = 1.0) -> Tensor:
    return (scale * torch.randn(*shape, generator=GENERATOR)).to(DEVICE)


GENERATOR = torch.Generator().manual_seed(0)


# -------------------------------------------------------------------- the block
def block() -> dict[str, Any]:
    m, n, N = 3072, 49152, 64
    WD, WE = draw(n, m), draw(n, m)
    w2e = WE.T.contiguous()  # as the notebook stores it
    A, B = (torch.randint(0, n, (N, K), generator=GENERATOR).to(DEVICE) for _ in range(2))
    slope = draw(N, m).abs()

    def einsum(WD: Tensor = WD, slope: Tensor = slope, w2e: Tensor = w2e) -> Tensor:
        return torch.einsum("tjm,tm,mti->tij", WD[A], slope, w2e[:, B])

    nothing = WD.new_zeros(n, 1)
    products = Products(nothing, nothing, WD[None], WE, BlockWeights(nothing, nothing))
    linearisation = Linearisation(slope[None])
    wanted = einsum(WD.double(), slope.double(), w2e.double())
    error = ((jacobian_blocks(products, linearisation, A, B) - wanted).abs().max() / wanted.abs().max()).item()
    if error > 1e-5:
        sys.exit(f"the block differs from the einsum by {error:g} of its largest entry")
    works = {"einsum": einsum, "block": lambda: jacobian_blocks(products, linearisation, A, B)}
    runs = {name: statistics_of(times_of(work, args.runs)) for name, work in works.items()}
    for name, found in runs.items():
        print(name, rounded(found), file=sys.stderr)
    theirs, ours = (found["median_ms"] / 1e3 for found in runs.values())
    return {"einsum_over_block": theirs / ours, "max_relative_error": error, "block_s": ours, **runs}


def over_forward() -> float:
    from transformers import GPT2Config, GPT2LMHeadModel

    d, m, n, N = 768, 3072, 49152, 1024
    torch.manual_seed(0)
    model = GPT2LMHeadModel(GPT2Config()).eval().to(DEVICE)
    tokens = torch.randint(0, 50257, (1, N), generator=GENERATOR).to(DEVICE)
    mlp = Block(MLP("gelu_new", draw(d, m, scale=0.03), draw(m), draw(m, d, scale=0.03), draw(d)))
    nothing = draw(n, 1)
    products = Products(nothing, nothing, draw(1, n, m), draw(n, m), BlockWeights(nothing, nothing))
    A, B = (torch.randint(0, n, (N, K), generator=GENERATOR).to(DEVICE) for _ in range(2))
    x = draw(N, d)
    with torch.no_grad():
        forward = timed(lambda: model(tokens).logits, args.rounds)
        ours = timed(lambda: jacobian_blocks(products, mlp.linearise(x), A, B), args.rounds)
    print(f"forward pass {forward:.3f} s, blocks {ours:.3f} s of {N} tokens", file=sys.stderr)
    return ours / forward


# -------------------------------------------------------------------- the step
SIZES = (WIDTH, HIDDEN, LATENTS, K)


def trainer_of(coefficient: float, fraction: float = 1.0, sizes: tuple[int, ...] = SIZES) -> JacobianTrainer:
    d, m, n, k = sizes
    g = torch.Generator().manual_seed(1)
    shapes = ((d, m), (m,), (m, d), (d,))
    weights = (torch.randn(s, generator=g).mul_(0.04 if len(s) == 2 else 0.1).to(DEVICE) for s in shapes)
    pair = JacobianPairConfig("jacobian", "topk", k=k, expansion=None, d_sae=n, squared_error="mean",
                            sparsity="unit_norm", jacobian_coefficient=coefficient)  # fmt: skip
    training = TrainingConfig(10**12, lr=1e-7, log_every=10**9, jacobian_fraction=fraction)
    specs = [alone(pair).spec(d, d, hook, hook, 0, Origin()) for hook in ("in", "out")]
    sides = [HookStatistics(torch.zeros(d), d**0.5) for _ in range(2)]
    trainer = JacobianTrainer(tuple(specs), pair, training, tuple(sides), Block(MLP("gelu", *weights)), DEVICE)
    for part in trainer.parts.values():
        part.step = 1  # the first step writes metrics
    return trainer


def batches(block: Block, tokens: int = TOKENS, width: int = WIDTH) -> list[tuple[Tensor, Tensor]]:
    return [(x, block(x)) for x in (draw(tokens, width) for _ in range(3))]


def step() -> dict[str, float]:
    trainers = {"lambda0": trainer_of(0.0), "step": trainer_of(1.0), "subset": trainer_of(1.0, 1 / 32)}
    data = batches(trainers["step"].block)
    original = None if "original" in args.without else Original(trainers["step"])
    encoders = [part.weights.encoder for part in trainers["step"].parts.values()]
    times: dict[str, list[float]] = {}
    for round_ in range(args.rounds + 2):
        batch = data[round_ % len(data)]
        times.setdefault("products", []).append(timed_once(partial(products, batch[0], encoders)))
        for name, trainer in trainers.items():
            costs = watch(trainer) if name == "step" and round_ == 0 else []
            times.setdefault(name, []).append(timed_once(partial(trainer.train_step, batch)))
            if costs:
                ours = costs[0]
        if original is not None and round_ < 3:  # it takes long
            times.setdefault("original", []).append(timed_once(partial(original.step, *batch)))
            if round_ == 0 and abs(original.penalty / ours - 1) > 1e-4:
                sys.exit(f"the penalty is {ours:g} here and {original.penalty:g} as originally formulated")
    median = {
        name: statistics.median(values[2:] if name != "original" else values[1:]) for name, values in times.items()
    }
    print(median, file=sys.stderr)
    peaks = [statistics.median(peak_of_process(c) for _ in range(args.rounds)) for c in (1.0, 0.0)]
    print(f"peak {peaks}", file=sys.stderr)
    return {
        "step_over_lambda0": median["step"] / median["lambda0"],
        "subset_step_over_lambda0": median["subset"] / median["lambda0"],
        **({"original_over_step": median["original"] / median["step"]} if original is not None else {}),
        "peak_bytes_over_lambda0": peaks[0] / peaks[1],
        "step_over_products": median["step"] / median["products"],
        "step_s": median["step"],
    }  # fmt: skip


def products(x: Tensor, encoders: list[Tensor]) -> None:
    for encoder in encoders:
        x @ encoder.T


def watch(trainer: JacobianTrainer) -> list[float]:
    """A list to which the trainer adds what its penalty is, at the next step."""
    costs: list[float] = []
    penalise = trainer._penalise

    def said(*args: Any) -> Tensor:
        trainer._penalise = penalise  # type: ignore[method-assign]
        cost = penalise(*args)
        costs.append(cost.item())
        return cost

    trainer._penalise = said  # type: ignore[method-assign]
    return costs


class Original:
    """The step of the paper's code (reference `jsae.md`, 1.2 to 1.6), for the weights that a trainer has now."""

    def __init__(self, trainer: JacobianTrainer) -> None:
        mlp = trainer.block.mlp
        self.W_in, self.b_in, self.W_out = mlp.W_in, mlp.b_in, mlp.W_out
        self.saes = [
            [t.clone().requires_grad_() for t in (w.encoder.T.contiguous(), w.b_enc, w.W_dec, w.b_dec)]
            for w in (part.weights for part in trainer.parts.values())
        ]
        self.optimiser = torch.optim.Adam([t for sae in self.saes for t in sae], lr=1e-7)

    def step(self, x: Tensor, y: Tensor) -> None:
        loss, kept = x.new_zeros(()), []
        for value, (W_enc, b_enc, W_dec, b_dec) in zip((x, y), self.saes, strict=True):
            with torch.no_grad():
                W_dec /= W_dec.norm(dim=1, keepdim=True)
            pre = (value - b_dec) @ W_enc + b_enc  # ours subtracts b_dec
            values, latents = pre.topk(K, dim=1)
            f = torch.zeros_like(pre).scatter(1, latents, values.relu())
            loss = loss + (f @ W_dec + b_dec - value).square().mean()
            kept.append((latents, values))
        z = (x @ self.W_in + self.b_in).requires_grad_()
        with torch.enable_grad():
            (slope,) = torch.autograd.grad(F.gelu(z).sum(), z)
        wd1, w2e = self.saes[0][2] @ self.W_in, self.W_out @ self.saes[1][0]
        J = torch.einsum("tjm,tm,mti->tij", wd1[kept[0][0]], slope, w2e[:, kept[1][0]])
        J = J * (kept[1][1] > 0)[:, :, None] * (kept[0][1] > 0)[:, None]  # K9; without it the numbers would differ
        penalty = J.abs().sum() / (len(x) * K * K)
        self.optimiser.zero_grad()
        (loss + penalty).backward()
        torch.nn.utils.clip_grad_norm_([t for sae in self.saes for t in sae], 1.0)
        self.optimiser.step()
        self.penalty = penalty.item()


def peak_of_process(coefficient: float) -> int:
    command = [sys.executable, __file__, "--peak", str(coefficient), "--threads", str(args.threads), "--device", DEVICE]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        sys.exit(done.stderr)
    return int(done.stdout.split()[-1])


def peak_bytes(coefficient: float) -> int:
    small = trainer_of(coefficient, sizes=(8, 16, 32, 4))
    small.train_step(batches(small.block, 16, 8)[0])  # loads code
    data = draw(TOKENS, WIDTH), draw(TOKENS, WIDTH)
    if DEVICE == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
    else:
        Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew from what is resident
        before = peak()
    trainer = trainer_of(coefficient)
    for _ in range(3):
        trainer.train_step(data)
    return (torch.cuda.max_memory_allocated() if DEVICE == "cuda" else peak()) - before


def peak() -> int:
    """Largest resident memory so far, in bytes."""
    (line,) = (line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
    return int(line.split()[1]) * 1024


main()
