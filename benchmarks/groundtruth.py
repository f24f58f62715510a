"""Training an SAE at notebook 002's sizes (12 to 48 latents, batches of 80 tokens, L1) against SAELens's trainer.

Last line: {"tokens_per_s", "saelens_tokens_per_s", "over_saelens", "over_notebook", "max_relative_loss_difference"}.

Both start from the same weights and take the same batches of the 1,600 activations of a small model of case 3, one
step each in turn, in one thread; tokens per second are 80 over the median step. Ours includes gathering the batch. The
notebook's fastest run on its GPU had 6,000 tokens a second.
"""

import json
import os
import statistics
import sys
import time

os.environ["OMP_NUM_THREADS"] = "1"

import torch  # after the number of threads is set
from _peers import saelens
from _steps import Ours, problem_of

from saeflow.groundtruth.cases import get_case, small_config
from saeflow.groundtruth.network import Network, initial_weights

STEPS, WARM_UP, BATCH, NOTEBOOK = 1500, 100, 80, 6000


def main() -> None:
    torch.set_num_threads(1)
    case = get_case(3)
    config = small_config(case)
    x = Network(config, initial_weights(config, 0))(torch.from_numpy(case.rows())).at("blocks.0.hook_mlp_out")
    x = x.flatten(0, 1) * (12**0.5 / x.norm(dim=-1).mean())
    problem = problem_of("l1", 12, 48, 24)
    ours, peer = Ours(problem), saelens(problem)
    generator = torch.Generator().manual_seed(0)
    times: dict[str, list[float]] = {"ours": [], "saelens": []}
    difference = 0.0
    for _ in range(STEPS + WARM_UP):
        rows = torch.randint(0, len(x), (BATCH,), generator=generator)
        started = time.perf_counter()
        mine = ours.step(x[rows], x[rows])
        times["ours"].append(time.perf_counter() - started)
        batch = x[rows]
        started = time.perf_counter()
        its = peer.step(batch, batch)
        times["saelens"].append(time.perf_counter() - started)
        difference = max(difference, abs(float(mine) / float(its) - 1))
    if difference > 1e-4:
        sys.exit(f"our losses and SAELens's differ by {difference:g}")
    rate = {name: BATCH / statistics.median(some[WARM_UP:]) for name, some in times.items()}
    found = {
        "tokens_per_s": rate["ours"],
        "saelens_tokens_per_s": rate["saelens"],
        "over_saelens": rate["ours"] / rate["saelens"],
        "over_notebook": rate["ours"] / NOTEBOOK,
        "max_relative_loss_difference": difference,
    }
    print(json.dumps({name: float(f"{value:.3g}") for name, value in found.items()}))


main()
