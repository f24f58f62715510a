"""Training small transformers on a case: to be right, and (IIT, SIIT) to be right for the program's reasons.

Interchange intervention training (Geiger et al. 2022; strict: Gupta et al. 2024), each loss with an Adam step of its
own, on base rows b and source rows s, in this order:

    IIT        a node of the circuit gets its value on s: the output should be the program's with its variables from s
    strict     a node off the circuit gets its value on s: the output should be the program's on b
    behaviour  the output on b should be the program's

Values from source rows are constants. The loss is the mean squared error of a number, or the cross-entropy of a
category, over all positions but BOS's where the program says something. `supervised` is behaviour alone, `iit` is
without strict. Every `check_every` steps the model is judged on pairs; the best one is kept: the learning rate falls to
0, but losses with steps of their own do not fall together.
"""

from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from saeflow.config import ConfigError
from saeflow.groundtruth.alignment import (
    ALL_PAIRS_UP_TO,
    Alignment,
    Quality,
    Truth,
    align,
    pairs,
    quality,
)
from saeflow.groundtruth.cases import Case, small_config
from saeflow.groundtruth.network import Network, initial_weights
from saeflow.jobs.log import progress

CHECK_PAIRS = 2048


@dataclass(frozen=True)
class Recipe:
    """Rows of a batch are drawn from all rows of the case. `lr` falls linearly to 0."""

    method: Literal["supervised", "iit", "siit"] = "siit"
    seed: int = 0
    n_steps: int = 400
    batch_rows: int = 128
    lr: float = 1e-2
    beta1: float = 0.9
    beta2: float = 0.9
    clip_grad_norm: float = 1.0
    iit_weight: float = 1.0
    strict_weight: float = 1.0
    behaviour_weight: float = 1.0
    check_every: int = 50

    def __post_init__(self) -> None:
        for name in ("n_steps", "batch_rows", "check_every"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name}={getattr(self, name)} is out of range: it must be 1 or more")


@dataclass(frozen=True)
class Trained:
    network: Network
    alignment: Alignment
    quality: Quality
    curve: list[dict[str, Any]]
    """A row a check."""


def train_small(case: Case, rows: np.ndarray, recipe: Recipe, n_pairs: int = ALL_PAIRS_UP_TO) -> Trained:
    """Trains a model of `small_config(case)` on `rows` (N, P) of token ids; on the CPU, in float32, from a seed.

    In the end it is judged on all pairs of rows, or on `n_pairs` of them where there are more.
    """
    config = small_config(case)
    alignment, truth = align(case, config), Truth(case, rows)
    network = Network(config, initial_weights(config, recipe.seed))
    steps = _Steps(network, truth, alignment, recipe)
    check = pairs(len(rows), CHECK_PAIRS, seed=recipe.seed + 1)
    best: tuple[tuple[float, float], dict[str, Tensor]] | None = None
    curve = []
    for step in progress(range(recipe.n_steps), f"{recipe.method} {recipe.seed}"):
        losses = steps.train_step(step)
        if (step + 1) % recipe.check_every == 0 or step + 1 == recipe.n_steps:
            current = quality(network, truth, alignment, *check)
            curve.append({"step": step + 1} | losses | _row(current))
            worst = current.accuracy if recipe.method == "supervised" else current.worst
            score = (worst, -losses["behaviour"])
            if best is None or score >= best[0]:
                best = score, {name: p.detach().clone() for name, p in network.parameters.items()}
    assert best is not None
    network.parameters = best[1]
    return Trained(network, alignment, quality(network, truth, alignment, *pairs(len(rows), n_pairs)), curve)


class _Steps:
    def __init__(self, network: Network, truth: Truth, alignment: Alignment, recipe: Recipe) -> None:
        self.network, self.truth, self.alignment, self.recipe = network, truth, alignment, recipe
        self.tokens = torch.from_numpy(truth.rows)
        self.labels = truth.values[truth.case.program.output]
        self.rng = np.random.default_rng(recipe.seed)
        self.parameters = [p.requires_grad_() for p in network.parameters.values()]
        self.optimiser = torch.optim.Adam(self.parameters, recipe.lr, (recipe.beta1, recipe.beta2), foreach=True)

    def train_step(self, step: int) -> dict[str, float]:
        """One batch; returns its losses."""
        r, n = self.recipe, len(self.tokens)
        for group in self.optimiser.param_groups:
            group["lr"] = r.lr * (1 - step / r.n_steps)
        losses = {}
        size = min(r.batch_rows, n)
        if r.method == "supervised":
            base = self.rng.permutation(n)[:size]
        else:
            base, source = self.rng.integers(0, n, (2, r.batch_rows))
            node, variables = self._one_of(list(self.alignment.on_circuit.items()))
            wanted = self.truth.output(base, source, variables)
            rows = self.tokens[base], self.tokens[source]
            losses["iit"] = self._descend(r.iit_weight, self.network.interchanged(*rows, node), wanted)
            if r.method == "siit" and self.alignment.off_circuit:
                node = self._one_of(self.alignment.off_circuit)
                output = self.network.interchanged(*rows, node)
                losses["strict"] = self._descend(r.strict_weight, output, self.labels[base])
        output = self.network(self.tokens[base]).output
        losses["behaviour"] = self._descend(r.behaviour_weight, output, self.labels[base])
        return losses

    def _one_of(self, some: Any) -> Any:
        return some[int(self.rng.integers(len(some)))]

    def _descend(self, weight: float, output: Tensor, labels: np.ndarray) -> float:
        loss = loss_of(output, labels, self.truth.case.program.output_variable.numerical)
        self.optimiser.zero_grad()
        (weight * loss).backward()
        torch.nn.utils.clip_grad_norm_(self.parameters, self.recipe.clip_grad_norm)
        self.optimiser.step()
        return loss.item()


def loss_of(output: Tensor, labels: np.ndarray, numerical: bool) -> Tensor:
    """Of `output` (N, P, d_vocab_out) against `labels` (N, P), without position 0 and what is none."""
    wanted = torch.from_numpy(labels[:, 1:])
    if numerical:
        return F.mse_loss(output[:, 1:, 0], wanted.to(output.dtype))
    return F.cross_entropy(output[:, 1:].flatten(0, 1), wanted.flatten(), ignore_index=-1)


def _row(found: Quality) -> dict[str, float]:
    return {
        "accuracy": found.accuracy,
        "worst_iia": min(found.iia.values()),
        "worst_strict": min(found.strict.values(), default=1.0),
    }
