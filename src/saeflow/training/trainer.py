"""A dictionary in training: its weights, its optimiser and what it remembers, one step at a time.

`Trainer.state` holds everything that the coming steps depend on, so training that goes on from it is the same training.
Nothing here reads files or knows jobs; batches come from outside. Units are those of `protocol`.
"""

import json
import math
from collections.abc import Callable
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

from saeflow.config import TrainingConfig
from saeflow.dictionaries.initial import geometric_median, initial_weights
from saeflow.dictionaries.sae import Dictionary
from saeflow.dictionaries.sae import build as build_dictionary
from saeflow.dictionaries.spec import Spec
from saeflow.kernels.adam import Adam
from saeflow.kernels.cuda_graphs import GraphedStep
from saeflow.kernels.select import Active
from saeflow.kernels.step import (
    AuxiliaryLoss,
    Objective,
    Step,
    Weights,
    clip_norm_,
    clip_norms_,
    normalise_rows_,
    remove_parallel_,
    squared_norms,
    take_step,
)
from saeflow.training.metrics import TrainingError, TrainingMetrics, told
from saeflow.training.protocol import Batches, HookStatistics, Inputs, Tables
from saeflow.training.revival import REFRESH_STEPS, auxk, ghost, resample

SPARSE_BELOW = {True: 0.33, False: 0.22}
"""Density at which a ReLU step changes between sparse and dense, by whether the encoder stays in a processor's cache:
both take as long at 0.34 with 1,024 latents of width 128, and at 0.24 with 8,192 of 512."""
DENSE_ABOVE = 1.2  # times that density it changes back
CACHED = 1 << 18  # numbers
DENSITY_STEPS = 10  # how often the density is looked at; looking waits for a GPU
MEDIAN_TOKENS = 65_536  # of which the geometric median is taken
WARM_UP = 3  # steps on a GPU before they are recorded: by then all is compiled
THRESHOLD_RATE = 0.01  # of the running mean of BatchTopK's threshold, as in SAELens


class Trainer:
    """Trains one dictionary on batches that it is given in order."""

    @classmethod
    def of_job(cls, inputs: Inputs) -> "Trainer":
        statistics = inputs.statistics[0], inputs.statistics[-1]
        return cls(inputs.specs[0], inputs.training, *statistics, inputs.device, inputs.on_row)

    def __init__(
        self,
        spec: Spec,
        training: TrainingConfig,
        statistics_in: HookStatistics,
        statistics_out: HookStatistics,
        device: str = "cpu",
        on_row: Callable[[dict[str, float]], None] = lambda row: None,
    ) -> None:
        """`statistics_out` is the target's side; for an SAE the same as `statistics_in`. `on_row` gets each new row of
        metrics."""
        for statistics, hook in ((statistics_in, spec.hook_name), (statistics_out, spec.hook_name_out)):
            head = spec.hook_head_index
            where, other = (hook, "site") if head is None else (f"head {head} of {hook}", "site.head")
            if statistics.mean_norm == 0:
                raise TrainingError(f"{where} is 0 on every token: nothing to train on; choose another {other}")
            if not (statistics.mean_norm < math.inf and statistics.mean.isfinite().all()):
                raise TrainingError(
                    f"the activations of {where} have mean norm {statistics.mean_norm}: they hold infinities or what "
                    "is no number; a wider activations.dtype (float32) may help"
                )
        self.spec, self.training, self.device, self.on_row = spec, training, device, on_row
        sides = statistics_in, statistics_out
        self.scale_in, self.scale_out = (side.scale(spec.normalize_activations, device) for side in sides)
        self._build(statistics_out)
        self.metrics = TrainingMetrics(spec.d_sae, training, device)
        self.step = 0
        """Steps done."""
        self.n_steady_steps = 0
        """Those on a GPU that could have been a graph."""
        self.graphed_step: GraphedStep | None = None
        self.n_steps = training.n_tokens // training.batch_size
        self.sparse = not spec.any_number_active
        self.dead = torch.zeros(0, dtype=torch.int64, device=device)
        self.threshold = torch.zeros((), dtype=torch.float64, device=device)
        """Running mean of BatchTopK's smallest kept value."""

    def _build(self, statistics_out: HookStatistics) -> None:
        """Makes what is trained, and its optimiser."""
        spec, training, device = self.spec, self.training, self.device
        mean = (statistics_out.mean.to(device) * self.scale_out).cpu()
        drawn = initial_weights(spec, mean, spec.random_seed, training.initial)
        self.weights = Weights(*(None if t is None else t.to(device) for t in drawn))  # type: ignore[arg-type]
        self.optimiser = Adam(self.weights.parameters(), training.adam_beta1, training.adam_beta2)
        assert spec.activation != "jumprelu" and spec.activation != "saelens"  # trained by SAELens's own losses
        by_norm, bf16 = spec.sparsity == "decoder_norm", training.precision == "bfloat16"
        centred, squared_error = spec.apply_b_dec_to_input, spec.squared_error or "sum"
        self.objective = Objective(spec.activation, spec.k or 0, by_norm, centred, squared_error, bf16)

    # ------------------------------------------------------------------------------------------------ one step
    def train_step(self, batch: tuple[Tensor, ...]) -> None:
        """One step on batch number `self.step`: (x,) for an SAE, (x, y) for a transcoder.

        Raises `TrainingError`, at the next row of metrics, when the loss stops being finite.
        """
        x, y = self._scaled(batch)
        if self.device.startswith("cuda"):
            self._take_on_gpu(x, y)
        else:
            self.apply_gradients(self.loss_and_gradients(x, y), y)

    def loss_and_gradients(self, x: Tensor, y: Tensor) -> Step:
        """Loss and gradients of this step, at a batch in training's units."""
        self._choose_first_step(x, y)
        how = self.sparse, self._counts_active(), self._auxiliary_loss()
        return take_step(self.objective, self.weights, x, y, self._rates()[1], *how)

    def apply_gradients(self, result: Step, y: Tensor) -> None:
        """Changes the weights by what was found, which nothing may use after that."""
        lr, l1 = self._rates()
        update_weights(self, self.optimiser, self.weights, result.gradients, lr)
        self._record(result, y, lr, l1)

    def _take_on_gpu(self, x: Tensor, y: Tensor) -> None:
        """`loss_and_gradients` and `apply_gradients`, as a CUDA graph where only batch and rates change from step to
        step."""
        self._choose_first_step(x, y)
        auxiliary_loss, rates = self._auxiliary_loss(), self._rates()
        lr, l1 = (torch.full((), rate, device=self.device) for rate in rates)
        steady = auxiliary_loss is None and self.sparse
        self.n_steady_steps += steady
        if steady and self.n_steady_steps > WARM_UP:
            if self.graphed_step is None:
                self.graphed_step = GraphedStep(self.objective, self.weights)
            result = self.graphed_step(self._update, x, y, lr, l1)
            result = replace(result, loss=result.loss.clone())  # the metrics read it after later steps
        else:
            result = self._update(x, y, lr, l1, auxiliary_loss)
        self._record(result, y, *rates)

    def _update(
        self,
        x: Tensor,
        y: Tensor,
        lr: Tensor,
        l1: Tensor,
        extra: AuxiliaryLoss | None = None,
        active: Active | None = None,
    ) -> Step:
        how = self.sparse, self._counts_active(), extra, active
        result = take_step(self.objective, self.weights, x, y, l1, *how)
        update_weights(self, self.optimiser, self.weights, result.gradients, lr)
        return result

    @property
    def parts(self) -> dict[str, "Trainer"]:
        """What is saved, by the name of its folder in the artifact."""
        return {"": self}

    def tables(self) -> Tables:
        return {}

    def text(self) -> str:
        return ""

    def summary(self) -> str:
        row = self.metrics.rows[-1]
        others = 1 - row.get("fvu_without_first", row["fvu"])
        apart = f" ({told(others)} without the first of rows)" if abs(others - row["explained_variance"]) > 0.01 else ""
        return (
            f"L0 {row['l0']:.1f}, explained variance {told(row['explained_variance'])}{apart}, {row['dead']} of "
            f"{self.spec.d_sae} latents dead"
        )

    def _rates(self) -> tuple[float, float]:
        """Learning rate and L1 coefficient of this step."""
        training, step = self.training, self.step
        return learning_rate(training, step, self.n_steps), l1_coefficient(self.spec, training, step)

    def _measures_density(self) -> bool:
        return self.spec.any_number_active and self.step % DENSITY_STEPS == 0

    def _counts_active(self) -> bool:
        return self._logged() or self._measures_density()

    def _choose_first_step(self, x: Tensor, y: Tensor) -> None:
        """Chooses a sparse or a dense first step by some of its tokens."""
        if self._measures_density() and self.step == 0:
            self._choose_sparse_or_dense(take_step(self.objective, self.weights, x[:64], y[:64]))

    def _record(self, result: Step, y: Tensor, lr: float, l1: float) -> None:
        """What follows a step: firing statistics, the choice of a sparse or dense next step, a row of metrics."""
        self.metrics.add(result)
        if result.smallest is not None:
            smallest = result.smallest.double()
            followed = torch.where(self.threshold > 0, torch.lerp(self.threshold, smallest, THRESHOLD_RATE), smallest)
            self.threshold = torch.where(smallest.isfinite(), followed, self.threshold)
        if self._measures_density():
            self._choose_sparse_or_dense(result)
        if self._logged():
            self.on_row(self.metrics.row(self.step, result, y, lr, l1))
        self.step += 1

    def _logged(self) -> bool:
        return (self.step + 1) % self.training.log_every == 0 or self.step in (0, self.n_steps - 1)

    def resamples_next(self) -> bool:
        """Whether `resample` is to be called before the next step."""
        return self.step in self.training.resample_steps or self.starts_at_median()

    def starts_at_median(self) -> bool:
        """Whether `start_at_median` is to be called before the next step, which is the first."""
        return self.step == 0 and self.training.initial == "kaiming"

    @torch.no_grad()
    def start_at_median(self, batches: Batches) -> None:
        """Sets `b_dec` to the geometric median of the first `MEDIAN_TOKENS` targets that training will see."""
        n = min(self.n_steps, -(-MEDIAN_TOKENS // self.training.batch_size))
        targets = torch.cat([self._scaled(batch)[1] for batch in batches.iterate(0, n)])
        self.weights.b_dec.copy_(geometric_median(targets))

    def resample(self, batches: Batches) -> None:
        """Sets dead latents anew, judged on batches that come after all those of training. Before the first step, of
        which latents cannot be dead, what of the first weights depends on the data."""
        if self.starts_at_median():
            self.start_at_median(batches)
        elif len(dead := self.dead_latents()):
            sampled = batches.iterate(self.n_steps, self.training.resample_batches)
            self.reset_latents(dead, [self.token_errors(batch) for batch in sampled])

    def token_errors(self, batch: tuple[Tensor, ...]) -> tuple[Tensor, Tensor, Tensor]:
        """Of one batch, in training's units: x (N, d), y (N, p) and the squared error of each token (N,)."""
        x, y = self._scaled(batch)
        return x, y, squared_norms(self.objective, self.weights, x, y, self.sparse)

    def reset_latents(self, dead: Tensor, samples: list[tuple[Tensor, Tensor, Tensor]]) -> None:
        """Sets the latents `dead` (m,) anew, by batches that were judged."""
        generator = torch.Generator().manual_seed(self.spec.random_seed * 1_000_003 + self.step)
        rows = [m for moments in (self.optimiser.first, self.optimiser.second) for m in moments[:3]]
        x, y, losses = (torch.cat(part) for part in zip(*samples, strict=True))
        centred, unit_norm = self.objective.centred, self.spec.sparsity == "unit_norm"
        resample(self.weights, rows, dead, x, y, losses, generator, centred, unit_norm)
        self.metrics.idle_steps[dead] = 0

    def _choose_sparse_or_dense(self, result: Step) -> None:
        """Sparse or dense, by how many of the activations of a step were above 0; with hysteresis."""
        assert result.n_active is not None
        density = result.n_active.item() / (len(result.squared_norms) * self.spec.d_sae)
        bound = SPARSE_BELOW[self.weights.encoder.numel() <= CACHED]
        self.sparse = density < (DENSE_ABOVE * bound if self.sparse else bound)

    def _scaled(self, batch: tuple[Tensor, ...]) -> tuple[Tensor, Tensor]:
        x = batch[0].to(self.device, non_blocking=True) * self.scale_in
        return x, x if self.spec.reconstructs else batch[1].to(self.device, non_blocking=True) * self.scale_out

    def _auxiliary_loss(self) -> AuxiliaryLoss | None:
        """The term for dead latents, where there are any: none at the first step."""
        revive = self.training.revive
        if revive not in ("auxk", "ghost") or not self.step:
            return None
        if self.step % REFRESH_STEPS == 0:
            self.dead = self.dead_latents()
        if not len(self.dead):
            return None
        if revive == "ghost":
            return partial(ghost, dead=self.dead)
        return partial(auxk, dead=self.dead, coefficient=self.training.auxk_coefficient, by_norm=self.objective.by_norm)

    def dead_latents(self) -> Tensor:
        """Latents that have not fired for long, (m,)."""
        return (self.metrics.idle_steps >= self.metrics.dead_after).nonzero()[:, 0]

    # ------------------------------------------------------------------------------------------------ its state
    def state(self) -> dict[str, Tensor]:
        """All that the coming steps and the metrics depend on, on the CPU; `note` holds what is no tensor, as JSON."""
        note = {"step": self.step, "sparse": self.sparse, "rows": self.metrics.rows}
        tensors = self._updated_in_place() | {"dead": self.dead, "threshold": self.threshold}
        tensors["losses"] = torch.stack(self.metrics.losses) if self.metrics.losses else torch.zeros(0)
        text = torch.frombuffer(bytearray(json.dumps(note).encode()), dtype=torch.uint8)
        return {name: t.detach().cpu() for name, t in tensors.items()} | {"note": text}

    @torch.no_grad()
    def restore(self, state: dict[str, Tensor]) -> None:
        """Goes on from `state` of a trainer of the same dictionary. Raises `TrainingError` for another's."""
        note = json.loads(state["note"].numpy().tobytes())
        tensors = self._updated_in_place()
        if any(name not in state or state[name].shape != tensor.shape for name, tensor in tensors.items()):
            raise TrainingError("this is the state of another dictionary: names or sizes differ")
        for name, tensor in tensors.items():
            tensor.copy_(state[name])
        self.dead, self.threshold = state["dead"].to(self.device), state["threshold"].to(self.device)
        self.metrics.losses = list(state["losses"].to(self.device))
        self.step, self.sparse, self.metrics.rows = note["step"], note["sparse"], note["rows"]

    def _updated_in_place(self) -> dict[str, Tensor]:
        """The tensors of the state that keep their place from step to step, by their names in a checkpoint."""
        tensors = dict(self._trained())
        moments = zip(list(tensors), self.optimiser.first, self.optimiser.second, self.optimiser.steps, strict=True)
        for name, first, second, steps in moments:
            tensors |= {f"adam.{name}.first": first, f"adam.{name}.second": second, f"adam.{name}.steps": steps}
        return tensors | {"idle_steps": self.metrics.idle_steps}

    def _trained(self) -> dict[str, Tensor]:
        """What the optimiser changes, by name, in its order."""
        return self.weights.named()

    def finished(self) -> Dictionary:
        """The trained dictionary, for raw activations.

        Decoder norms move into the encoder where training ranked or penalised latents as if they were 1; a ReLU
        dictionary with `sparsity=decoder_norm` keeps its norms, as SAELens's does. With TopK and a scale by head, rows
        have norm 1 in training's units, by which they were ranked, and so not in those of raw activations.
        """
        if not all(t.isfinite().all() for t in self.weights.parameters()):
            raise TrainingError("the last step made weights that are not finite; lower training.lr")
        encoder, b_enc, W_dec, b_dec, W_skip = self.weights
        threshold = None
        if self.spec.activation == "batchtopk":  # in units of what competes; the dictionary compares pre-activations
            norms = W_dec.norm(dim=1).clamp(min=1e-8) if self.objective.by_norm else torch.ones_like(b_enc)
            threshold = self.threshold.float() / norms
        dictionary = build_dictionary(self.spec, encoder.T.contiguous(), b_enc, W_dec, b_dec, W_skip, threshold)
        ranks_in_scaled_units = self.spec.ranks_in_scaled_units
        if ranks_in_scaled_units:
            dictionary = dictionary.with_unit_decoder()
        dictionary = dictionary.with_scaling_folded(self.scale_in, self.scale_out)
        keeps_norms = self.spec.keeps_decoder_norms or ranks_in_scaled_units
        return dictionary if keeps_norms else dictionary.with_unit_decoder()


def update_weights(of: Trainer, optimiser: Adam, weights: Weights, gradients: Weights, lr: float | Tensor) -> None:
    """Changes the weights of the dictionary `of` a trainer, or of several like it with heads in front, in place."""
    gradient, rows = (one.W_dec.flatten(0, -2) for one in (gradients, weights))
    if of.spec.sparsity == "unit_norm":
        remove_parallel_(gradient, rows)
    if of.training.clip_grad_norm is not None:
        clip = clip_norm_ if weights.W_dec.dim() == 2 else clip_norms_
        clip(gradients.parameters(), of.training.clip_grad_norm)
    optimiser.step(gradients.parameters(), lr)
    if of.spec.sparsity == "unit_norm":
        normalise_rows_(rows)


def learning_rate(training: TrainingConfig, step: int, n_steps: int) -> float:
    """Of step 0, 1, ..., n_steps - 1: it rises linearly over `lr_warm_up_steps`, falls linearly over the last
    `lr_decay_steps`, and rises from a tenth along half a cosine after each resampling."""
    rise = min((step + 1) / max(training.lr_warm_up_steps, 1), 1.0)
    fall = min((n_steps - step) / max(training.lr_decay_steps, 1), 1.0)
    since = min((step - s for s in training.resample_steps if step >= s), default=training.resample_warm_up_steps)
    if since < training.resample_warm_up_steps:
        rise *= 0.55 - 0.45 * math.cos(math.pi * since / training.resample_warm_up_steps)
    return training.lr * rise * fall


def l1_coefficient(spec: Spec, training: TrainingConfig, step: int) -> float:
    """Of step 0, 1, ...: 0 at the first, unless there is no warm-up."""
    rise = min(step / training.l1_warm_up_steps, 1.0) if training.l1_warm_up_steps else 1.0
    return (spec.l1_coefficient or 0.0) * rise
