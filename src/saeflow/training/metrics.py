"""What training writes down: one row every `log_every` steps, about the batch of that step, before its update."""

import math
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from saeflow.config import TrainingConfig
from saeflow.config.training import DIVERGED
from saeflow.kernels.step import StepMetrics


class TrainingError(RuntimeError):
    """Training that went wrong; the message names the step and what to try."""


class TrainingMetrics:
    """Rows of metrics. Between rows nothing waits for the device: losses stay there until the next row checks that all
    are finite."""

    def __init__(self, d_sae: int, training: TrainingConfig, device: str) -> None:
        self.training = training
        self.dead_after = math.ceil(training.dead_after_tokens / training.batch_size)
        self.idle_steps = torch.zeros(d_sae, dtype=torch.int32, device=device)
        self.losses: list[Tensor] = []
        self.rows: list[dict[str, float]] = []
        self.is_first: Callable[[int], Tensor] | None = None
        """Of a step's batch, which tokens are the first of their row, (N,) bool; None where batches do not say it."""

    def add(self, result: StepMetrics) -> None:
        self.idle_steps.add_(1).masked_fill_(result.activity > 0, 0)
        self.losses.append(result.loss)

    def row(self, step: int, result: StepMetrics, y: Tensor, lr: float, l1: float) -> dict[str, float]:
        """The metrics of step number `step`, counted from 0; rows count the steps done. `y` (N, p)."""
        losses = torch.stack(self.losses).tolist()
        for done, loss in enumerate(losses, start=step + 2 - len(losses)):
            if not math.isfinite(loss):
                raise TrainingError(
                    f"the loss became {loss} at step {done} (lr {lr:g}): lower training.lr, or lengthen "
                    "training.lr_warm_up_steps; with large activations set dictionary.normalize_activations="
                    "expected_average_only_in"
                )
        self.losses.clear()
        assert result.n_active is not None
        unexplained = fraction_unexplained(result.squared_norms, y)
        more = {}
        if self.is_first is not None:
            others = ~self.is_first(step).to(y.device)
            more["fvu_without_first"] = fraction_unexplained(result.squared_norms[others], y[others])
        self.rows.append(
            {
                "step": step + 1,
                "tokens": (step + 1) * self.training.batch_size,
                "loss": losses[-1],
                "squared_error": result.squared_error.item(),
                "sparsity": result.sparsity.item(),
                "l0": result.n_active.item() / y.shape[0],
                "explained_variance": 1 - unexplained,
                "fvu": unexplained,
                "dead": int(torch.count_nonzero(self.idle_steps >= self.dead_after)),
                "lr": lr,
                "l1_scheduled": l1,
                **more,
            }
        )
        return self.rows[-1]

    @property
    def diverged(self) -> str:
        """What to say of a training that made its dictionary worse than it began, and useless; '' of any other."""
        first, last = (self.rows[i]["explained_variance"] if self.rows else 0.0 for i in (0, -1))
        if not last < min(first, DIVERGED):
            return ""
        return (
            f"explained variance {last:.3g} at the end, {first:.3g} at the start: lower training.lr, now "
            f"{self.training.lr:g}, or lengthen training.lr_warm_up_steps"
        )


def told(explained_variance: float) -> str:
    """An explained variance for people."""
    return f"{explained_variance:.3f}" if abs(explained_variance) < 100 else f"{explained_variance:.2g}"


def fraction_unexplained(squared_errors: Tensor, y: Tensor) -> float:
    """Of the variance of y (N, p), by errors (N,); NaN without tokens."""
    variance = (y - y.mean(dim=0)).square().sum(dim=1).mean()
    return (squared_errors.mean() / variance).item()


def write_metrics(rows: list[dict[str, float]], path: Path) -> None:
    """One column a metric; `dead` counts latents that have not fired for `training.dead_after_tokens`, `fvu` is the
    fraction of the batch's variance unexplained, `fvu_without_first` that of the tokens of the batch which are not the
    first of their row, `l1_scheduled` the L1 coefficient of that step. All are of tokens that `training.exclude` keeps.
    """
    import pyarrow
    import pyarrow.parquet

    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
