"""Many small dictionaries of one shape, trained as one: heads of a layer, seeds, or L1 coefficients at a small d.

A step of a small dictionary is mostly calls; here H of them make the calls of one (`kernels.step.take_steps`). Each
member stays a `Trainer` with its own seed, scaling, L1 coefficient, metrics, state and finished dictionary; its weights
are a slice of the stacked ones. It gets what it would get alone but for rounding.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from saeflow.config import ConfigError
from saeflow.kernels.adam import Adam
from saeflow.kernels.step import Weights, clip_norms_, normalise_rows_, remove_parallel_, take_steps
from saeflow.training.metrics import TrainingError
from saeflow.training.trainer import Trainer


class BatchedTrainer:
    """Takes the steps of its members, which from now on must not take steps alone."""

    def __init__(self, members: Sequence[Trainer]) -> None:
        """Raises `ConfigError` for members that differ in more than seed, scaling and L1 coefficient."""
        first = members[0]
        for member in members:
            same = (member.objective, member.training, member.step) == (first.objective, first.training, first.step)
            if not same or [t.shape for t in member.weights.parameters()] != [
                t.shape for t in first.weights.parameters()
            ]:
                raise ConfigError("dictionaries that train as one must have one shape, objective, training and step")
        if first.training.revive in ("auxk", "ghost"):
            raise ConfigError(
                f"training.revive={first.training.revive}: dictionaries that train as one have no such term"
            )
        self.members = list(members)
        each = zip(*(member.weights for member in members), strict=True)
        self.weights = Weights(*(None if t[0] is None else torch.stack(t) for t in each))  # type: ignore[arg-type]
        self.optimiser = Adam(self.weights.parameters(), first.training.adam_beta1, first.training.adam_beta2)
        for name in ("first", "second"):
            for i, stacked in enumerate(getattr(self.optimiser, name)):
                for h, member in enumerate(members):
                    moments = getattr(member.optimiser, name)
                    stacked[h].copy_(moments[i])
                    moments[i] = stacked[h]
        for stacked_step, step in zip(self.optimiser.steps, first.optimiser.steps, strict=True):
            stacked_step.copy_(step)
        for h, member in enumerate(members):
            member.weights = Weights(*(None if t is None else t[h] for t in self.weights))  # type: ignore[arg-type]
            member.optimiser.parameters, member.optimiser.steps = member.weights.parameters(), self.optimiser.steps

    def train_step(self, batches: Sequence[tuple[Tensor, ...]]) -> None:
        """One step of all: a batch for each member, (x,) or (x, y), of equally many tokens."""
        scaled = [member._scaled(batch) for member, batch in zip(self.members, batches, strict=True)]
        x = torch.stack([one for one, _ in scaled])
        self.train_step_scaled(
            x, x if self.members[0].spec.reconstructs else torch.stack([target for _, target in scaled])
        )

    def train_step_scaled(self, x: Tensor, y: Tensor) -> None:
        """`train_step` of batches in training's units: x (H, N, d), and y (H, N, p), which is x for SAEs."""
        members, first = self.members, self.members[0]
        for h, member in enumerate(members):
            member._choose_first_step(x[h], y[h])
        lr, _ = first._rates()
        l1 = [member._rates()[1] for member in members]
        sparse = all(member.sparse for member in members)
        l1_coefficients = torch.tensor(l1, dtype=x.dtype, device=x.device)
        results, stacked = take_steps(
            first.objective, self.weights, x, y, l1_coefficients, sparse, first._counts_active()
        )
        gradients = stacked.parameters()
        W_dec = self.weights.W_dec.flatten(0, 1)
        if first.spec.sparsity == "unit_norm":
            remove_parallel_(stacked.W_dec.flatten(0, 1), W_dec)
        if first.training.clip_grad_norm is not None:
            clip_norms_(gradients, first.training.clip_grad_norm)
        self.optimiser.step(gradients, lr)
        if first.spec.sparsity == "unit_norm":
            normalise_rows_(W_dec)
        for h, member in enumerate(members):
            try:
                member._record(results[h], y[h], lr, l1[h])
            except TrainingError as error:
                head = member.spec.hook_head_index
                raise TrainingError(f"dictionary {h}: {error}" if head is None else f"head {head}: {error}") from error
