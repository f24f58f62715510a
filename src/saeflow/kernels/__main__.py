"""`python -m saeflow.kernels` compiles the loops of a training step ahead of the first job, once on a machine."""

import torch

from saeflow.kernels.step import Objective, Weights, take_step


def main() -> None:
    weights = Weights(torch.rand(64, 8), torch.zeros(64), torch.rand(64, 8), torch.zeros(8))
    x = torch.rand(16, 8)
    for activation in ("topk", "relu", "batchtopk"):
        take_step(Objective(activation, 4), weights, x, x, 0.1)


main()
