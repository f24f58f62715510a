"""Dictionaries of the heads of a layer trained as one, against one at a time and one for the whole layer.

Last line, for each size (heads x d_head -> d_sae a head): {"gelu2l.heads_over_separate", "gelu2l.heads_over_concat",
..., "max_relative_loss_difference"}. `gelu2l` is the attention notebook's 8 heads of 64 with 2,048 latents each, and
4,096 tokens; `small` 8 heads of 16 with 128 latents each, and 1,024 tokens. `separate` are steps of one `Trainer` a
head, `concat` is a step of one dictionary on all heads side by side with as many latents in all. Losses are compared
with those of the heads alone, over all steps.
"""

import argparse
import json
import os
import statistics
import sys
import time

parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
parser.add_argument("--rounds", type=int, default=9)
parser.add_argument("--threads", type=int, default=2)
args = parser.parse_args()
os.environ["OMP_NUM_THREADS"] = str(args.threads)

import torch  # noqa: E402 (after the number of threads is set)

from saeflow.batched import BatchedTrainer  # noqa: E402
from saeflow.config import DictionaryConfig, TrainingConfig  # noqa: E402
from saeflow.dictionaries import Origin  # noqa: E402
from saeflow.trainer import Side, Trainer  # noqa: E402
from saeflow.training import make_spec  # noqa: E402

SIZES = {"gelu2l": (8, 64, 2048, 4096), "small": (8, 16, 128, 1024)}  # heads, d_head, d_sae a head, tokens


def trainer(d: int, n: int, k: int, seed: int) -> Trainer:
    config = DictionaryConfig("sae", "topk", k=k, expansion=None, d_sae=n)
    side = Side(torch.zeros(d), d**0.5)
    training = TrainingConfig(10**12, lr=1e-3, clip_grad_norm=1.0, log_every=10**9)
    return Trainer(make_spec(config, d, d, "z", "z", seed, Origin()), training, side, side)


def measure(size: str) -> dict[str, float]:
    H, d, n, N = SIZES[size]
    alone, members = ([trainer(d, n, 4, h) for h in range(H)] for _ in range(2))
    batched, concat = BatchedTrainer(members), trainer(H * d, H * n, 4 * H, 0)
    generator = torch.Generator().manual_seed(0)
    times: dict[str, list[float]] = {}
    difference = 0.0
    for _ in range(args.rounds + 2):
        z = torch.randn(N, H, d, generator=generator)
        heads = [(z[:, h].contiguous(),) for h in range(H)]

        def separate(heads: list = heads) -> None:
            for one, batch in zip(alone, heads, strict=True):
                one.take(batch)

        ways = {
            "separate": separate,
            "heads": lambda heads=heads: batched.take(heads),
            "concat": lambda z=z: concat.take((z.flatten(1),)),
        }
        for name, take in ways.items():
            started = time.perf_counter()
            take()
            times.setdefault(name, []).append(time.perf_counter() - started)
        for one, other in zip(members, alone, strict=True):
            losses = [(t.metrics.losses[-1] if t.metrics.losses else t.metrics.rows[-1]["loss"]) for t in (one, other)]
            difference = max(difference, abs(float(losses[0]) / float(losses[1]) - 1))
    if difference > 1e-4:
        sys.exit(f"{size}: losses as one and alone differ by {difference:g}")
    medians = {name: statistics.median(values[2:]) for name, values in times.items()}
    print(f"{size}: {medians}", file=sys.stderr)
    return {
        f"{size}.step_s": medians["heads"],
        f"{size}.heads_over_separate": medians["heads"] / medians["separate"],
        f"{size}.heads_over_concat": medians["heads"] / medians["concat"],
        "max_relative_loss_difference": difference,
    }


def main() -> None:
    torch.set_num_threads(args.threads)
    found: dict[str, float] = {}
    for size in SIZES:
        new = measure(size)
        worst = max(found.get("max_relative_loss_difference", 0.0), new["max_relative_loss_difference"])
        found |= new | {"max_relative_loss_difference": worst}
    print(json.dumps({name: float(f"{value:.3g}") for name, value in found.items()}))


main()
