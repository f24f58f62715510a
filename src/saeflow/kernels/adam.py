"""Adam in one pass over the parameters, on any device.

This calls the kernel behind `torch.optim.Adam(fused=True)`, its twin. That class gives the same numbers but imports
torch's compiler, which takes a training job longer than its first hundred steps.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor


class Adam:
    """State of Adam (Kingma & Ba, 2015) for a list of contiguous parameters, which `step` changes in place."""

    def __init__(self, parameters: Sequence[Tensor], beta1: float, beta2: float, eps: float = 1e-8) -> None:
        self.parameters = list(parameters)
        self.beta1, self.beta2, self.eps = beta1, beta2, eps
        self.first = [torch.zeros_like(p) for p in self.parameters]
        self.second = [torch.zeros_like(p) for p in self.parameters]
        self.steps = [torch.zeros((), dtype=torch.float32, device=p.device) for p in self.parameters]

    @torch.no_grad()
    def step(self, gradients: Sequence[Tensor], lr: float | Tensor) -> None:
        """One update; `lr` may be a tensor () on the same device.

        A gradient must lie in memory as its parameter does: the kernel runs over both as flat arrays.
        """
        for parameter, gradient in zip(self.parameters, gradients, strict=True):
            if parameter.stride() != gradient.stride():
                raise ValueError(f"gradient strides {gradient.stride()} are not the parameter's {parameter.stride()}")
        torch._foreach_add_(self.steps, 1)
        lists: list[list[Tensor]] = [self.parameters, list(gradients), self.first, self.second, [], self.steps]
        rates: dict[str, Any] = {"lr": lr, "beta1": self.beta1, "beta2": self.beta2, "eps": self.eps}
        torch._fused_adam_(*lists, **rates, weight_decay=0.0, amsgrad=False, maximize=False)
