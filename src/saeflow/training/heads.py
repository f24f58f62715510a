"""The dictionaries of all heads of a hook in training, from one read of it: an SAE a head, their steps taken as one.

Each head has its own scaling, loss, firing statistics and resampling, and starts from weights of its own; it gets what
it would get alone, but for rounding. `BatchedTrainer` does so for any small dictionaries of one shape: heads, seeds, or
L1 coefficients at a small d. A step of a small dictionary is mostly calls; there H of them make the calls of one
(`kernels.step.take_steps`).
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

from saeflow.config import ConfigError, TrainingConfig
from saeflow.dictionaries.spec import Spec
from saeflow.kernels.adam import Adam
from saeflow.kernels.step import Weights, take_steps
from saeflow.training.metrics import TrainingError, told
from saeflow.training.protocol import Batches, HookStatistics, Inputs, PartOfBatches, SeveralTrainers
from saeflow.training.trainer import Trainer, update_weights

SHARED_METRICS = ("step", "tokens", "lr", "l1_scheduled")  # the same for every head


class HeadsTrainer(SeveralTrainers):
    """Trains the SAEs of H heads on batches of all of them; does what a `Trainer` does."""

    @classmethod
    def of_job(cls, inputs: Inputs) -> "HeadsTrainer":
        return cls(inputs.specs, inputs.training, inputs.statistics[0], inputs.device, inputs.on_row)

    def __init__(
        self,
        specs: Sequence[Spec],
        training: TrainingConfig,
        statistics: HookStatistics,
        device: str = "cpu",
        on_row: Callable[[dict[str, float]], None] = lambda row: None,
    ) -> None:
        """`specs` of head 0, 1, ...; `statistics` of the whole hook. `on_row` gets one row of all heads, as
        `head_h.<name>`.

        A head that is 0 on every token stops no other: its latents never fire, and its dictionary gives the 0 that it
        gets. Raises `TrainingError` where all heads are so.
        """
        self.training, self.device, self.on_row = training, device, on_row
        by_head, self.silent = statistics.by_head(), statistics.silent_heads
        if len(self.silent) == len(specs):
            raise TrainingError(f"all heads of {specs[0].hook_name} are 0 on every token: choose another site.layer")
        for h in self.silent:
            by_head[h] = replace(by_head[h], mean_norm=1.0, head_norms=torch.ones(1))  # 0 is 0 by any scale
        self.heads = [Trainer(s, training, of_head, of_head, device) for s, of_head in zip(specs, by_head, strict=True)]
        self.batched, self.described = BatchedTrainer(self.heads), f"{len(self.heads)} heads"
        scales = (torch.as_tensor(head.scale_in, dtype=torch.float32, device=device) for head in self.heads)
        self.scale = torch.stack([scale.expand(specs[0].d_in) for scale in scales])[:, None]
        """(H, 1, d_head)"""

    @property
    def parts(self) -> dict[str, Trainer]:
        return {f"head_{h}": head for h, head in enumerate(self.heads)}

    def summary(self) -> str:
        rows = [head.metrics.rows[-1] for h, head in enumerate(self.heads) if h not in self.silent]
        silent = "".join(f"; of head {h}, 0 on every token, none fires" for h in self.silent)
        l0, variance = ([row[name] for row in rows] for name in ("l0", "explained_variance"))
        return (
            f"L0 {sum(l0):.1f} in all, {min(l0):.1f} to {max(l0):.1f} a head, explained variance "
            f"{told(min(variance))} to {told(max(variance))}, {sum(row['dead'] for row in rows)} of "
            f"{len(rows) * self.heads[0].spec.d_sae} latents dead{silent}"
        )

    def train_step(self, batch: tuple[Tensor, ...]) -> None:
        """One step on batch number `self.step`: z (N, H d_head), raw, heads side by side.

        Raises `TrainingError`, at the next row of metrics, when the loss of a head stops being finite.
        """
        logged = self.heads[0]._logged()
        z = batch[0].to(self.device, non_blocking=True).unflatten(1, (len(self.heads), -1)).transpose(0, 1)
        x = torch.empty(z.shape, dtype=z.dtype, device=z.device)
        self.batched.train_step_scaled(torch.mul(z, self.scale, out=x), x)
        if logged:
            rows = {name: head.metrics.rows[-1] for name, head in self.parts.items()}
            row = {name: rows["head_0"][name] for name in SHARED_METRICS} | {"l0": sum(r["l0"] for r in rows.values())}
            for part, of_head in rows.items():
                row |= {f"{part}.{name}": value for name, value in of_head.items() if name not in SHARED_METRICS}
            self.on_row(row)

    def _of_head(self, h: int, batch: tuple[Tensor, ...]) -> tuple[Tensor]:
        return (batch[0].tensor_split(len(self.heads), dim=1)[h],)

    def resample(self, batches: Batches) -> None:
        """As `Trainer.resample`, of each head, from one read of the batches; before the first step from one each."""
        if self.first.starts_at_median():
            for h, head in enumerate(self.heads):
                head.start_at_median(PartOfBatches(batches, partial(self._of_head, h)))
            return
        dead = [head.dead_latents()[: None if h not in self.silent else 0] for h, head in enumerate(self.heads)]
        if not any(map(len, dead)):
            return
        samples: list[list[tuple[Tensor, Tensor, Tensor]]] = [[] for _ in self.heads]
        for batch in batches.iterate(self.n_steps, self.training.resample_batches):
            for h, z in enumerate(batch[0].tensor_split(len(self.heads), dim=1)):
                if len(dead[h]):
                    samples[h].append(self.heads[h].token_errors((z,)))
        for head, latents, errors in zip(self.heads, dead, samples, strict=True):
            if len(latents):
                head.reset_latents(latents, errors)


class BatchedTrainer:
    """Takes the steps of its members, which from now on must not take steps alone.

    Each stays a `Trainer` with its own seed, scaling, L1 coefficient, metrics, state and finished dictionary; its
    weights are a slice of the stacked ones.
    """

    def __init__(self, members: Sequence[Trainer]) -> None:
        """Raises `ConfigError` for members that differ in more than seed, scaling and L1 coefficient."""
        first = members[0]
        for member in members:
            same = (member.objective, member.training, member.step) == (first.objective, first.training, first.step)
            shapes, firsts = ([t.shape for t in one.weights.parameters()] for one in (member, first))
            if not same or shapes != firsts:
                raise ConfigError("dictionaries that train as one must have one shape, objective, training and step")
        if (revive := first.training.revive) in ("auxk", "ghost"):
            raise ConfigError(f"training.revive={revive}: dictionaries that train as one have no such term")
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
        x, y = (torch.stack(side) for side in zip(*scaled, strict=True))
        self.train_step_scaled(x, x if self.members[0].spec.reconstructs else y)

    def train_step_scaled(self, x: Tensor, y: Tensor) -> None:
        """`train_step` of batches in training's units: x (H, N, d), and y (H, N, p), which is x for SAEs."""
        members, first = self.members, self.members[0]
        for h, member in enumerate(members):
            member._choose_first_step(x[h], y[h])
        lr, _ = first._rates()
        l1 = [member._rates()[1] for member in members]
        sparse, count = all(member.sparse for member in members), first._counts_active()
        coefficients = torch.tensor(l1, dtype=x.dtype, device=x.device)
        results, stacked = take_steps(first.objective, self.weights, x, y, coefficients, sparse, count)
        update_weights(first, self.optimiser, self.weights, stacked, lr)
        for h, member in enumerate(members):
            try:
                member._record(results[h], y[h], lr, l1[h])
            except TrainingError as error:
                head = member.spec.hook_head_index
                raise TrainingError(f"dictionary {h}: {error}" if head is None else f"head {head}: {error}") from error
