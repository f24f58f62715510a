"""Problems for benchmarks of a training step, and our step on them. Shapes as in the library."""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from saeflow.config import DictionaryConfig, TrainingConfig, build
from saeflow.dictionaries import Origin
from saeflow.kernels.step import Weights
from saeflow.training.protocol import HookStatistics
from saeflow.training.trainer import Trainer


@dataclass(frozen=True)
class Problem:
    """What is trained, and from where. The weights are copied."""

    kind: Literal["topk", "l1", "transcoder"]
    """An SAE by TopK, an SAE by ReLU and L1, a transcoder by ReLU and L1; L1 is weighted by the decoder's norms."""
    d_in: int
    d_out: int
    d_sae: int
    k: int | None
    l1: float | None
    lr: float
    W_enc: Tensor
    """(d, n)."""
    b_enc: Tensor
    """(n,)."""
    W_dec: Tensor
    """(n, p)."""
    b_dec: Tensor
    """(p,)."""

    @property
    def device(self) -> str:
        """Where the weights are."""
        return self.W_enc.device.type

    def __post_init__(self) -> None:
        if self.kind == "topk" and self.k is None:
            raise ValueError("a TopK problem needs k")
        if self.kind != "topk" and self.l1 is None:
            raise ValueError(f"an {self.kind} problem needs l1")
        if self.kind != "transcoder" and self.d_in != self.d_out:
            raise ValueError(f"an SAE's d_out is its d_in: {self.d_out} is not {self.d_in}")


class Ours:
    """`Trainer.train_step` from the weights of a problem, with SAELens's clipping."""

    name = "saeflow"

    def __init__(self, problem: Problem) -> None:
        kind = "transcoder" if problem.kind == "transcoder" else "sae"
        amount = {"activation": "topk", "k": problem.k}
        if problem.kind != "topk":
            amount = {"activation": "relu", "l1_coefficient": problem.l1}
        config = build(DictionaryConfig, {"kind": kind, "expansion": None, "d_sae": problem.d_sae, **amount})
        training = TrainingConfig(10**12, lr=problem.lr, clip_grad_norm=1.0, log_every=10**9)
        hooks = ("in", "out" if kind == "transcoder" else "in")
        spec = config.spec(problem.d_in, problem.d_out, *hooks, 0, Origin())
        sides = [HookStatistics(torch.zeros(d), d**0.5) for d in (problem.d_in, problem.d_out)]
        self.trainer = Trainer(spec, training, *sides, device=problem.device)
        given = Weights(problem.W_enc.T, problem.b_enc, problem.W_dec, problem.b_dec)
        for mine, start in zip(self.trainer.weights.parameters(), given.parameters(), strict=True):
            mine.copy_(start)

    def step(self, x: Tensor, y: Tensor) -> float | Tensor:
        """One step on x (N, d) and y (N, p), of which an SAE does not read the latter; its loss."""
        self.trainer.train_step((x, y) if self.trainer.spec.kind == "transcoder" else (x,))
        metrics = self.trainer.metrics
        return metrics.losses[-1] if metrics.losses else metrics.rows[-1]["loss"]


def problem_of(kind: str, d: int, n: int, active: int, device: str = "cpu") -> Problem:
    """Random unit rows. TopK keeps `active` latents; with L1 biases make about so many of a token active."""
    generator = torch.Generator().manual_seed(0)
    W_dec, W_enc = (torch.nn.functional.normalize(torch.randn(n, d, generator=generator), dim=1) for _ in range(2))
    bias = 0.0 if kind == "topk" else torch.special.ndtri(torch.tensor(active / n)).item()
    W_enc = (W_enc if kind == "transcoder" else W_dec).T.contiguous()
    l1 = None if kind == "topk" else 0.3
    given = (t.to(device) for t in (W_enc, torch.full((n,), bias), W_dec, torch.zeros(d)))
    return Problem(kind, d, d, n, active, l1, 1e-7, *given)


def batches(N: int, d: int, count: int, device: str = "cpu") -> list[tuple[Tensor, Tensor]]:
    """Inputs, and as targets those of the next batch."""
    generator = torch.Generator().manual_seed(1)
    x = [torch.randn(N, d, generator=generator).to(device) for _ in range(count)]
    return list(zip(x, x[1:] + x[:1], strict=True))
