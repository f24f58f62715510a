"""A Jacobian pair in training: two TopK SAEs around a block, and a penalty on the Jacobian between their latents.

After Farnik, Lawson, Houghton, Aitchison (2025), "Jacobian Sparse Autoencoders" (arXiv 2502.18147). The loss is that of
both SAEs plus

    coefficient(step) / (k_in k_out) * mean over tokens of penalty(J_t),

where J_t is the Jacobian from the active latents of the input SAE to those of the output SAE, zero for a latent that
TopK kept at 0. Taken at the input x (the paper) it depends on the input SAE's decoder and the output SAE's encoder
alone: which latents are active, and f' at x, are given. Taken at the input SAE's reconstruction of x it depends on all
weights of the input SAE, through f', and the output SAE's active latents are those of f at the reconstruction.

f is the model's own; with `jacobian_norm=ignored` the norm that it begins with is left out, as in notebook 000.

What differs from the paper's code on purpose: the target is the stored f(x); gradients are clipped for each SAE by
itself and lose their part along decoder rows before the optimiser's step; latents that TopK kept at 0 have no Jacobian.
With coefficient 0 both SAEs are, bit for bit, what they would be alone.
"""

import json
import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from saeflow.config import TrainingConfig
from saeflow.dictionaries.kinds.jacobian import JacobianPairConfig
from saeflow.dictionaries.spec import Spec
from saeflow.kernels.jacobian import (
    Linearisation,
    Side,
    TopLatents,
    add_penalty,
    add_penalty_by_jvp,
    jacobian_blocks,
    jacobian_by_jvp,
    make_products,
    mask_inactive,
)
from saeflow.kernels.memory import Workspace
from saeflow.kernels.penalties import PENALTIES
from saeflow.kernels.select import Active, top_k
from saeflow.kernels.sparse import decode, encode
from saeflow.kernels.step import Step, Weights
from saeflow.models.blocks import Block, ModuleBlock, without_norm
from saeflow.training.jacobian_histogram import JacobianHistograms, count_entries
from saeflow.training.metrics import TrainingError
from saeflow.training.protocol import Batches, HookStatistics, Inputs, PartOfBatches, SeveralTrainers, Tables
from saeflow.training.trainer import Trainer

LOGGED_TOKENS = 128  # on which a row of metrics compares both places where the Jacobian can be taken
LARGE = 0.01  # |J| above this is counted


class JacobianTrainer(SeveralTrainers):
    """Trains the two SAEs on batches (x, f(x)); does what a `Trainer` does."""

    described = "input, output"

    @classmethod
    def of_job(cls, inputs: Inputs) -> "JacobianTrainer":
        assert isinstance(inputs.config, JacobianPairConfig)
        given, block = (inputs.specs, inputs.config, inputs.training, inputs.statistics), inputs.block()
        if inputs.config.jacobian_norm == "ignored":
            block = without_norm(block, "dictionary.jacobian_norm")
        return cls(*given, block, inputs.device, inputs.on_row)

    def __init__(
        self,
        specs: Sequence[Spec],
        dictionary: JacobianPairConfig,
        training: TrainingConfig,
        statistics: Sequence[HookStatistics],
        block: Block | ModuleBlock,
        device: str = "cpu",
        on_row: Callable[[dict[str, float]], None] = lambda row: None,
    ) -> None:
        """`specs` and `statistics` of both SAEs; `block` is on the device. `on_row` gets the rows of the input SAE,
        with those of the pair added."""
        self.training, self.block, self.device, self.on_row = training, block, device, on_row
        self.coefficient, self.at = dictionary.jacobian_coefficient or 0.0, dictionary.jacobian_at
        self.penalty = PENALTIES[dictionary.jacobian_penalty]
        sides = zip(specs, statistics, strict=True)
        self.input, self.output = (Trainer(spec, training, of, of, device) for spec, of in sides)
        scales = self.input.scale_in, self.output.scale_in
        assert isinstance(scales[0], float) and isinstance(scales[1], float)  # an MLP's sites have no heads
        self.scale_in, self.units = scales[0], scales[1] / scales[0]
        """`units`: a Jacobian for raw activations, over one for those that the SAEs see."""
        self.workspace = Workspace()
        self.rows: list[dict[str, float]] = []
        """About the Jacobian, one for each row of the SAEs' metrics."""
        few = min(LOGGED_TOKENS, training.batch_size)
        self.histograms = JacobianHistograms(self.n_steps, training.log_every, few)

    @property
    def parts(self) -> dict[str, Trainer]:
        return {"input": self.input, "output": self.output}

    def tables(self) -> Tables:
        found = self.histograms.rows(self.training.batch_size)
        return {"jacobian": self.rows} | ({"jacobian_histogram": found} if found else {})

    def text(self) -> str:
        if not self.histograms.counts:
            return ""
        hooks = " to ".join(part.spec.hook_name for part in self.parts.values())
        k = self.input.objective.k
        return self.histograms.table(f"{hooks}, k = {k}, Jacobian coefficient {self.coefficient:g}, while trained")

    def summary(self) -> str:
        sides = "; ".join(f"{name}: {side.summary()}" for name, side in self.parts.items())
        return f"{sides}; mean |J| {self.rows[-1]['jacobian_l1']:.2g}"

    # ------------------------------------------------------------------------------------------------ one step
    @torch.no_grad()
    def train_step(self, batch: tuple[Tensor, ...]) -> None:
        """One step on batch number `self.step`: x (N, d) and f(x) (N, d), raw.

        Raises `TrainingError`, at the next row of metrics, when a loss stops being finite.
        """
        raw = batch[0].to(self.device, non_blocking=True)
        (x, _), (y, _) = self.input._scaled((raw,)), self.output._scaled(batch[1:])
        found_in, found_out = self.input.loss_and_gradients(x, x), self.output.loss_and_gradients(y, y)
        coefficient, logged = self._coefficient(), self.input._logged()
        cost = self._penalise(raw, x, found_in, found_out, coefficient) if coefficient else None
        if logged:
            self._add_row(raw, x, found_in, found_out, coefficient, cost)
        self.input.apply_gradients(found_in, x)
        self.output.apply_gradients(found_out, y)
        if logged:
            self.on_row(self.input.metrics.rows[-1] | self.rows[-1])

    def _coefficient(self) -> float:
        """Of this step: it rises linearly from 0."""
        steps = self.training.jacobian_warm_up_steps
        return self.coefficient * (min(self.step / steps, 1.0) if steps else 1.0)

    def _penalise(self, raw: Tensor, x: Tensor, found_in: Step, found_out: Step, coefficient: float) -> Tensor:
        """Adds the penalty's gradients to those found; returns what it adds to the loss."""
        kept_in, kept_out = _top_latents(found_in), _top_latents(found_out)
        some = self._some_tokens(len(x))
        if some is not None:
            raw, x = raw[some], x[some]
            kept_in, kept_out = (TopLatents(k.values[some], k.latents[some]) for k in (kept_in, kept_out))
        weight = coefficient / (len(x) * kept_in.values.shape[1] * kept_out.values.shape[1])

        def penalty(J: Tensor) -> tuple[Tensor, Tensor]:
            costs, slope = self.penalty(J.mul_(self.units))
            return weight * costs, slope.mul_(weight * self.units)

        weights_in, weights_out = self.input.weights, self.output.weights
        of_input = Side(weights_in.W_dec, kept_in, found_in.gradients.W_dec)
        of_output = Side(weights_out.encoder, kept_out, found_out.gradients.encoder)
        if self.at == "input":
            if isinstance(self.block, ModuleBlock):
                return add_penalty_by_jvp(self.block, raw, of_input, of_output, penalty)
            block, linearisation = self.block.weights(), self.block.linearise_in_chunks(raw)
            return add_penalty(block, linearisation, of_input, of_output, penalty, workspace=self.workspace)[0]
        assert isinstance(self.block, Block)
        with torch.enable_grad():
            leaves = Weights(*(None if t is None else t.detach().requires_grad_() for t in weights_in))  # type: ignore[arg-type]
            at = self._reconstruction(leaves, x, kept_in)
            linearisation = self.block.linearise(at)
        of_output = of_output._replace(kept=self._top_latents_of_output(self.block(at.detach())))
        detached = Linearisation(*(None if t is None else t.detach() for t in linearisation))  # type: ignore[arg-type]
        block = self.block.weights()
        cost, towards = add_penalty(block, detached, of_input, of_output, penalty, True, self.workspace)
        assert towards is not None
        pairs = [(t, g) for t, g in zip(linearisation, towards, strict=True) if t is not None]
        more = torch.autograd.grad([t for t, _ in pairs], leaves.parameters(), [g for _, g in pairs])
        for gradient, extra in zip(found_in.gradients.parameters(), more, strict=True):
            gradient += extra
        return cost

    def _some_tokens(self, N: int) -> Tensor | None:
        """Those on which this step's penalty is taken, by the seed and the step; None: all."""
        count = max(1, round(self.training.jacobian_fraction * N))
        if count == N:
            return None
        generator = torch.Generator().manual_seed((self.input.spec.seed or 0) * 1_000_003 + self.step)
        return torch.randperm(N, generator=generator)[:count].sort().values.to(self.device)

    def _reconstruction(self, weights: Weights, x: Tensor, kept: TopLatents) -> Tensor:
        """What the input SAE makes of x, raw; differentiable."""
        starts = torch.arange(0, kept.values.numel() + 1, kept.values.shape[1], device=x.device)
        active = Active(kept.values.flatten(), kept.latents.flatten(), starts)
        centre = weights.b_dec if self.input.objective.centred else None
        values, pattern = encode(x, weights.encoder, weights.b_enc, lambda *_: active, centre)
        return (decode(values, pattern, weights.W_dec) + weights.b_dec) / self.scale_in

    def _top_latents_of_output(self, y: Tensor) -> TopLatents:
        """What the output SAE keeps of raw y."""
        weights, objective = self.output.weights, self.output.objective
        y = y * self.output.scale_in
        found = top_k(y - weights.b_dec if objective.centred else y, weights.encoder, weights.b_enc, objective.k)
        return TopLatents(found.values.view(len(y), -1), found.latents.view(len(y), -1))

    # ------------------------------------------------------------------------------------------------ metrics
    def _add_row(
        self, raw: Tensor, x: Tensor, found_in: Step, found_out: Step, coefficient: float, cost: Tensor | None
    ) -> None:
        loss = 0.0 if cost is None else cost.item()
        if not math.isfinite(loss):
            raise TrainingError(
                f"the Jacobian's penalty became {loss} at step {self.step + 1}: lower training.lr or "
                "dictionary.jacobian_coefficient, or lengthen training.jacobian_warm_up_steps"
            )
        row = {
            "step": self.step + 1,
            "tokens": (self.step + 1) * self.training.batch_size,
            "jacobian_scheduled": coefficient,
            "jacobian_loss": loss,
        }
        few, both = slice(0, LOGGED_TOKENS), (_top_latents(found_in), _top_latents(found_out))
        kept_in, kept_out = (TopLatents(kept.values[few], kept.latents[few]) for kept in both)
        at = self._reconstruction(self.input.weights, x[few], kept_in)
        points = {"": (raw[few], kept_out), "_at_reconstruction": (at, self._top_latents_of_output(self.block(at)))}
        drawn, counts = self.histograms.wants(len(self.rows), self.step == self.n_steps - 1), []
        for name, (point, kept) in points.items():
            J = self._jacobians(point, kept_in, kept) * self.units
            if drawn:
                counts.append(count_entries(J, (kept.values[:, :, None] > 0) & (kept_in.values[:, None] > 0)))
            size = J.abs()
            row[f"jacobian_l1{name}"] = size.mean().item()
            row[f"jacobian_above_{LARGE}{name}"] = (size > LARGE).float().mean().item()
        if drawn:
            self.histograms.add(self.step + 1, counts)
        self.rows.append(row)

    def _jacobians(self, x: Tensor, kept_in: TopLatents, kept_out: TopLatents) -> Tensor:
        """(N, k_out, k_in) at x (N, d)."""
        D, E = self.input.weights.W_dec, self.output.weights.encoder
        if isinstance(self.block, ModuleBlock):
            J = jacobian_by_jvp(self.block, x, D[kept_in.latents], E[kept_out.latents])
        else:
            rows, A = torch.unique(kept_in.latents, return_inverse=True)
            others, B = torch.unique(kept_out.latents, return_inverse=True)
            products = make_products(D[rows], E[others], self.block.weights())
            J = jacobian_blocks(products, self.block.linearise(x), A, B)
        return mask_inactive(J, kept_in.values, kept_out.values)

    # ------------------------------------------------------------------------------------------------ the rest
    def resample(self, batches: Batches) -> None:
        """As `Trainer.resample`, of each SAE."""
        self.input.resample(PartOfBatches(batches, lambda batch: batch[:1]))
        self.output.resample(PartOfBatches(batches, lambda batch: batch[1:]))

    def state(self) -> dict[str, Tensor]:
        text = torch.frombuffer(bytearray(json.dumps(self.rows).encode()), dtype=torch.uint8)
        return super().state() | {"rows": text} | self.histograms.state()

    def restore(self, state: dict[str, Tensor]) -> None:
        super().restore(state)
        self.rows = json.loads(state["rows"].numpy().tobytes())
        self.histograms.restore(state)


def _top_latents(result: Step) -> TopLatents:
    assert result.active_pairs is not None
    N = len(result.squared_norms)
    return TopLatents(result.active_pairs.values.view(N, -1), result.active_pairs.latents.view(N, -1))
