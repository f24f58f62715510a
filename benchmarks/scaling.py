"""Time of a training step against d_sae, against how many latents are active, and against the batch.

Writes docs/figures/step_scaling.csv, .png and .pdf (or to --out; --draw only draws what the CSV holds). Last line:
{"topk.largest_step_over_product", "topk.median_step_over_product", ...}, over all points with 4,096 tokens or more. The
product is the encoder's, `torch.addmm(b_enc, x, W_enc)` in float32, measured in every round beside the steps. Medians;
around d_in 512, d_sae 8,192, 32 active latents and 4,096 tokens.
"""

import argparse
import csv
import json
import os
import statistics
import sys
import time
from pathlib import Path

FIGURES = Path(__file__).resolve().parent.parent / "docs/figures"
D, N, WIDTH, ACTIVE = 512, 4096, 8192, 32
SWEEPS = {
    "d_sae": [2**i for i in range(10, 17)],
    "active": [8, 16, 32, 64, 128, 256, 512],
    "tokens": [256, 1024, 4096, 16384],
}
AXES = {"d_sae": "d_sae", "active": "active latents a token (k, L0)", "tokens": "tokens a batch"}
LINES = {
    "topk": ("TopK step", "#0072B2", "o-"),
    "l1": ("ReLU + L1 step", "#D55E00", "s-"),
    "product": ("float32 encoder product", "#000000", ":"),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=FIGURES)
    parser.add_argument("--draw", action="store_true", help="only draw")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    os.environ["OMP_NUM_THREADS"] = str(args.threads)
    table = args.out / "step_scaling.csv"
    if not args.draw:
        rows = [row for sweep, values in SWEEPS.items() for value in values for row in measure(sweep, value, args)]
        with table.open("w", newline="") as file:
            writer = csv.DictWriter(file, ["sweep", "value", "what", "seconds"], lineterminator="\n")
            writer.writeheader()
            writer.writerows(rows)
    with table.open() as file:
        rows = list(csv.DictReader(file))
    draw(rows, args.out / "step_scaling")
    print(json.dumps(ratios(rows) | {"wrote": str(table)}))


def measure(sweep: str, value: int, args: argparse.Namespace) -> list[dict]:
    import torch
    from _steps import Ours, batches, problem_of

    torch.set_num_threads(args.threads)
    point = {"d_sae": WIDTH, "active": ACTIVE, "tokens": N} | {sweep: value}
    problems = {kind: problem_of(kind, D, point["d_sae"], point["active"]) for kind in ("topk", "l1")}
    steps = {kind: Ours(problem) for kind, problem in problems.items()}
    ((x, y),) = batches(point["tokens"], D, 1)
    times: dict[str, list[float]] = {}
    for _ in range(args.rounds + 2):  # two to warm up: after the first the step is sparse or dense
        for what, call in {
            "product": lambda: torch.addmm(problems["topk"].b_enc, x, problems["topk"].W_enc),
            **{kind: (lambda step=step: step.step(x, y)) for kind, step in steps.items()},
        }.items():
            started = time.perf_counter()
            call()
            times.setdefault(what, []).append(time.perf_counter() - started)
    medians = {what: statistics.median(seconds[2:]) for what, seconds in times.items()}
    print(sweep, value, medians, file=sys.stderr)
    return [{"sweep": sweep, "value": value, "what": w, "seconds": f"{s:.6f}"} for w, s in medians.items()]


def ratios(rows: list[dict]) -> dict[str, float]:
    """The largest ratio of each kind of step to the product of the same point."""
    seconds = {(r["sweep"], int(r["value"]), r["what"]): float(r["seconds"]) for r in rows}
    found = {}
    for kind in ("topk", "l1"):
        points = [(s, v) for s, v, w in seconds if w == kind and (s != "tokens" or v >= N)]
        found[f"{kind}.largest_step_over_product"] = max(
            seconds[s, v, kind] / seconds[s, v, "product"] for s, v in points
        )
        found[f"{kind}.median_step_over_product"] = statistics.median(
            seconds[s, v, kind] / seconds[s, v, "product"] for s, v in points
        )
    return {name: round(value, 2) for name, value in found.items()}


def draw(rows: list[dict], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    from saeflow.figures.style import STYLE

    with plt.rc_context(STYLE):
        figure, axes = plt.subplots(1, len(SWEEPS), figsize=(6.8, 2.4), sharey=True, layout="constrained")
        for axis, sweep in zip(axes, SWEEPS, strict=True):
            for what, (label, colour, style) in LINES.items():
                points = [
                    (int(r["value"]), float(r["seconds"])) for r in rows if (r["sweep"], r["what"]) == (sweep, what)
                ]
                axis.plot(*zip(*sorted(points), strict=True), style, color=colour, label=label)
            axis.set_xscale("log", base=2)
            axis.set_yscale("log")
            axis.set_xlabel(AXES[sweep])
            axis.set_xticks(SWEEPS[sweep][:: 2 if len(SWEEPS[sweep]) > 4 else 1])
        axes[0].set_ylabel("seconds")
        axes[0].legend(loc="upper left")
        figure.savefig(path.with_suffix(".png"))
        figure.savefig(path.with_suffix(".pdf"), metadata={"CreationDate": None})


main()
