"""SAELens's training classes on this project's trainer, store, resume and evaluation: `dictionary=saelens/<name>`.

The class brings its first weights, its forward pass and its loss; batches, schedules, Adam, clipping, metrics and
checkpoints are ours. What SAELens saves for use opens natively where it is an architecture of this project (BatchTopK
and Matryoshka become JumpReLU); the rest (gated, AbsTopK, matching pursuit) stays SAELens's own class
(`saeflow.dictionaries.saelens_classes`). Importing this takes ten seconds.
"""

from contextlib import nullcontext
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from sae_lens.registry import get_sae_training_class
from sae_lens.saes.sae import SAE, TrainCoefficientConfig, TrainingSAE, TrainStepInput
from torch import Tensor

from saeflow.config import ConfigError
from saeflow.dictionaries.sae import Dictionary
from saeflow.dictionaries.saelens_format import load_dictionary, save_saelens
from saeflow.dictionaries.spec import Spec
from saeflow.kernels.adam import Adam
from saeflow.kernels.step import StepMetrics, clip_norm_
from saeflow.training.metrics import TrainingError
from saeflow.training.protocol import HookStatistics
from saeflow.training.trainer import Trainer, learning_rate


class SAELensTrainer(Trainer):
    """Trains one of SAELens's classes. `training.revive=auxk` lets it know which latents are dead; it has no other."""

    def _build(self, statistics_out: HookStatistics) -> None:
        spec, training = self.spec, self.training
        if training.revive not in ("none", "auxk"):
            raise ConfigError(f"training.revive={training.revive}: SAELens's classes know only none and auxk")
        assert spec.saelens is not None
        self.sae = training_sae(spec).to(self.device)
        self.sae.train()
        self.parameters = dict(self.sae.named_parameters())
        self.optimiser = Adam(list(self.parameters.values()), training.adam_beta1, training.adam_beta2)

    def train_step(self, batch: tuple[Tensor, ...]) -> None:
        x, _ = self._scaled(batch)
        training, step = self.training, self.step
        lr = learning_rate(training, step, self.n_steps)
        rise = min(step / training.l1_warm_up_steps, 1.0) if training.l1_warm_up_steps else 1.0
        coefficients = {
            name: rise * (value.value if isinstance(value, TrainCoefficientConfig) else value)
            for name, value in self.sae.get_coefficients().items()
        }
        dead = self.metrics.idle_steps >= self.metrics.dead_after if training.revive == "auxk" else None
        low = training.precision == "bfloat16"
        with torch.autocast(torch.device(self.device).type, torch.bfloat16) if low else nullcontext():
            output = self.sae.training_forward_pass(TrainStepInput(x, coefficients, dead, step, False))
        parameters = list(self.parameters.values())
        found = torch.autograd.grad(output.loss, parameters, materialize_grads=True)
        gradients = [g if g.stride() == p.stride() else g.contiguous() for p, g in zip(parameters, found, strict=True)]
        if training.clip_grad_norm is not None:
            clip_norm_(gradients, training.clip_grad_norm)
        self.optimiser.step(gradients, lr)
        with torch.no_grad():
            f = output.feature_acts.detach()
            f = f.to_dense() if f.is_sparse else f
            squares = (output.sae_out.detach() - x).square().sum(dim=1)
            activity, active = f.abs().sum(dim=0), torch.count_nonzero(f)
            sparsity = activity.sum() / len(x)
            result = StepMetrics(output.loss.detach(), squares.mean(), sparsity, squares, activity, active)
        self.metrics.add(result)
        if self._logged():
            self.on_row(self.metrics.row(step, result, x, lr, next(iter(coefficients.values()), 0.0)))
        self.step += 1

    def _trained(self) -> dict[str, Tensor]:
        return {f"sae.{name}": parameter for name, parameter in self.parameters.items()}

    def _updated_in_place(self) -> dict[str, Tensor]:
        return super()._updated_in_place() | {f"sae.{name}": buffer for name, buffer in self.sae.named_buffers()}

    def finished(self) -> Dictionary:
        if not all(t.isfinite().all() for t in self.parameters.values()):
            raise TrainingError("the last step made weights that are not finite; lower training.lr")
        assert isinstance(self.scale_in, float)
        with TemporaryDirectory() as folder:
            self.sae.save_inference_model(folder)
            sae = SAE.load_from_disk(folder, device="cpu")
            sae.fold_activation_norm_scaling_factor(self.scale_in)
            save_saelens(sae, self.spec, Path(folder))
            return load_dictionary(folder)


def training_sae(spec: Spec) -> TrainingSAE[Any]:
    """SAELens's class for training, on the CPU, with the weights that the spec's seed gives."""
    sae_class, config_class = get_sae_training_class(spec.saelens or "")
    amounts = {name: getattr(spec, name) for name in ("k", "l1_coefficient") if getattr(spec, name) is not None}
    config = config_class(d_in=spec.d_in, d_sae=spec.d_sae, dtype="float32", device="cpu", **amounts, **spec.options)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(spec.seed or 0)
        return sae_class(config)
