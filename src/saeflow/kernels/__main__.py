"""`python -m saeflow.kernels` compiles the loops of a training step ahead of the first job, once on a machine."""

import torch

from saeflow.kernels.jacobian import BlockWeights, Linearisation, Side, TopLatents, add_penalty
from saeflow.kernels.penalties import l1
from saeflow.kernels.step import Objective, Weights, take_step, take_steps


def main() -> None:
    weights = Weights(torch.rand(64, 8), torch.zeros(64), torch.rand(64, 8), torch.zeros(8))
    x = torch.rand(16, 8)
    both = x.expand(2, 16, 8).contiguous()
    heads = Weights(*(t.expand(2, *t.shape).contiguous() for t in weights[:4]))
    for activation in ("topk", "relu", "batchtopk"):
        take_step(Objective(activation, 4), weights, x, x, 0.1)
        take_steps(Objective(activation, 4), heads, both, both, torch.zeros(2))
    block = BlockWeights(torch.rand(1, 8, 12), torch.rand(12, 8))
    linearisation = Linearisation(torch.rand(1, 16, 12))
    kept = TopLatents(x[:, :4], torch.arange(4).expand(16, 4).contiguous())
    input, output = (Side(rows, kept, torch.zeros(64, 8)) for rows in (weights.W_dec, weights.encoder))
    add_penalty(block, linearisation, input, output, l1)


main()
