"""The dictionaries of all heads of a hook in training, from one read of it: an SAE a head, their steps taken as one.

Each head has its own scaling, loss, firing statistics and resampling, and starts from weights of its own; it gets what
it would get alone, but for rounding.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from saeflow.config import TrainingConfig
from saeflow.dictionaries.spec import Spec
from saeflow.training.batched import BatchedTrainer
from saeflow.training.metrics import TrainingError
from saeflow.training.protocol import Batches, HookStatistics, Inputs, SeveralTrainers
from saeflow.training.trainer import Trainer

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

        Raises `TrainingError` for a head whose activations are all 0.
        """
        self.training, self.device, self.on_row = training, device, on_row
        by_head = statistics.by_head()
        silent = [h for h, of_head in enumerate(by_head) if of_head.mean_norm == 0]
        if silent:
            raise TrainingError(f"heads {silent} of {specs[0].hook_name} are 0 on every token: nothing to train on")
        self.heads = [Trainer(s, training, of_head, of_head, device) for s, of_head in zip(specs, by_head, strict=True)]
        self.batched, self.described = BatchedTrainer(self.heads), f"{len(self.heads)} heads"
        scales = (torch.as_tensor(head.scale_in, dtype=torch.float32, device=device) for head in self.heads)
        self.scale = torch.stack([scale.expand(specs[0].d_in) for scale in scales])[:, None]
        """(H, 1, d_head)"""

    @property
    def parts(self) -> dict[str, Trainer]:
        return {f"head_{h}": head for h, head in enumerate(self.heads)}

    def summary(self) -> str:
        rows = [head.metrics.rows[-1] for head in self.heads]
        l0, variance = ([row[name] for row in rows] for name in ("l0", "explained_variance"))
        return (
            f"L0 {sum(l0):.1f} in all, {min(l0):.1f} to {max(l0):.1f} a head, explained variance "
            f"{min(variance):.3f} to {max(variance):.3f}, {sum(row['dead'] for row in rows)} of "
            f"{sum(head.spec.d_sae for head in self.heads)} latents dead"
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

    def resample(self, batches: Batches) -> None:
        """As `Trainer.resample`, of each head, from one read of the batches."""
        dead = [head.dead_latents() for head in self.heads]
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
