"""What the penalty on 1/32 of each batch's tokens changes: pairs of five seeds at the last MLP of the embedded model.

Last line: {"fvu_input", "fvu_output", "mean_absolute", "effective_inputs"}, each with the means over seeds with the
whole penalty and with the subset, the standard deviation over seeds (the larger of the two), and their difference in
units of the standard error of a difference of two means; "seconds_over_whole": time of the trainings. Within seed noise
means: below about 2.
"""

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path

parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
parser.add_argument("--seeds", type=int, default=5)
parser.add_argument("--tokens", type=int, default=614_400, help="of a training; 307,200 different ones")
parser.add_argument("--fraction", type=float, default=1 / 32)
parser.add_argument("--threads", type=int, default=2)
args = parser.parse_args()
os.environ["OMP_NUM_THREADS"] = str(args.threads)

import torch  # noqa: E402 (after the number of threads is set)

from saeflow.config import ModelConfig, TrainingConfig  # noqa: E402
from saeflow.dictionaries import Origin  # noqa: E402
from saeflow.dictionaries.kinds.jacobian import JacobianPairConfig  # noqa: E402
from saeflow.dictionaries.kinds.sae import alone  # noqa: E402
from saeflow.kernels.jacobian import jacobian_blocks, make_products, mask_inactive  # noqa: E402
from saeflow.kernels.memory import keep_freed_memory  # noqa: E402
from saeflow.models.blocks import read_block  # noqa: E402
from saeflow.models.loading import load_model  # noqa: E402
from saeflow.models.splicing import read_hooks  # noqa: E402
from saeflow.text.corpus import read_documents  # noqa: E402
from saeflow.text.tokenizer import load_tokenizer  # noqa: E402
from saeflow.text.tokens import open_tokens, write_tokens  # noqa: E402
from saeflow.training.jacobian_pair import JacobianTrainer  # noqa: E402
from saeflow.training.protocol import HookStatistics  # noqa: E402

ROOT = Path(__file__).resolve().parents[1]
LAYER, BATCH, LATENTS, K = 3, 1024, 1024, 16
HOOKS = [f"blocks.{LAYER}.ln2.hook_normalized", f"blocks.{LAYER}.hook_mlp_out"]


def main() -> None:
    keep_freed_memory()
    model = load_model(ROOT / "resources/model", ModelConfig("embedded", path=str(ROOT / "resources/model")), "cpu")
    block = read_block(model, *HOOKS)
    train, held_out = (activations(model, split, rows) for split, rows in (("train", 1200), ("held_out", 64)))
    found: dict[float, list[dict[str, float]]] = {1.0: [], args.fraction: []}
    for seed in range(args.seeds):
        for fraction, results in found.items():
            results.append(run(block, train, held_out, seed, fraction))
            print(f"seed {seed}, fraction {fraction:g}: {results[-1]}", file=sys.stderr)
    whole, subset = found.values()
    report: dict[str, object] = {}
    for name in ("fvu_input", "fvu_output", "mean_absolute", "effective_inputs"):
        values = [[r[name] for r in results] for results in (whole, subset)]
        means = [statistics.mean(v) for v in values]
        spread = max(statistics.stdev(v) for v in values)
        error = (2 / args.seeds) ** 0.5 * spread
        named = {"whole": means[0], "subset": means[1], "std": spread, "standard_errors": (means[1] - means[0]) / error}
        report[name] = {key: float(f"{value:.3g}") for key, value in named.items()}
    times = [statistics.median(r["seconds"] for r in results) for results in (whole, subset)]
    print(json.dumps(report | {"seconds_over_whole": float(f"{times[1] / times[0]:.3g}")}))


def activations(model: object, split: str, n_rows: int) -> list[torch.Tensor]:
    """At both hooks, of all tokens but those at position 0: (tokens, d) each."""
    with tempfile.TemporaryDirectory() as folder:
        write_tokens(
            Path(folder), read_documents(ROOT / "resources/corpus.jsonl.gz"), load_tokenizer(ROOT / "resources/model"),
            split=split, n_rows=n_rows, context_size=256, prepend_bos=True, held_out_fraction=0.1, tokenizer_digest="",
        )  # fmt: skip
        rows = torch.from_numpy(open_tokens(Path(folder))[:]).long()
    parts = [[v[:, 1:].flatten(0, 1) for v in read_hooks(model, some, HOOKS)] for some in rows.split(32)]
    return [torch.cat(side) for side in zip(*parts, strict=True)]


def run(block: object, train: list[torch.Tensor], held_out: list[torch.Tensor], seed: int, fraction: float) -> dict:
    """Trains a pair; what it is worth on held-out tokens."""
    pair = JacobianPairConfig("jacobian", "topk", k=K, expansion=None, d_sae=LATENTS, squared_error="mean",
                            sparsity="unit_norm", jacobian_coefficient=1.0)  # fmt: skip
    n_steps = args.tokens // BATCH
    training = TrainingConfig(
        args.tokens, batch_size=BATCH, lr=6e-3, lr_warm_up_steps=50, lr_decay_steps=n_steps // 4,
        jacobian_warm_up_steps=n_steps // 20, jacobian_fraction=fraction, log_every=10**9,
    )  # fmt: skip
    d = train[0].shape[1]
    specs = [alone(pair).spec(d, d, hook, hook, seed, Origin()) for hook in HOOKS]
    sides = [HookStatistics(v.mean(0), v.norm(dim=1).mean().item()) for v in train]
    trainer = JacobianTrainer((specs[0], specs[1]), pair, training, (sides[0], sides[1]), block)
    started = time.perf_counter()
    order = torch.Generator().manual_seed(0)  # all read the same batches
    for _ in range(n_steps):
        some = torch.randint(len(train[0]), (BATCH,), generator=order)
        trainer.train_step((train[0][some], train[1][some]))
    seconds = time.perf_counter() - started
    input, output = (part.finished() for part in trainer.parts.values())
    fvu = [
        ((d.forward(v) - v).square().sum() / (v - v.mean(0)).square().sum()).item()
        for d, v in zip((input, output), held_out, strict=True)
    ]
    (values_in, A), (values_out, B) = (d.top_latents(v) for d, v in zip((input, output), held_out, strict=True))
    products = make_products(input.W_dec, output.W_enc.T.contiguous(), block.weights())
    J = mask_inactive(jacobian_blocks(products, block.linearise(held_out[0]), A, B), values_in, values_out).abs()
    live = J.sum(2) > 0
    effective = (J.sum(2).square() / J.square().sum(2))[live].mean().item()
    return {
        "fvu_input": fvu[0],
        "fvu_output": fvu[1],
        "mean_absolute": J.mean().item(),
        "effective_inputs": effective,
        "seconds": seconds,
    }


main()
