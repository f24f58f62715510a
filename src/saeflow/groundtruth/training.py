"""Training small transformers on a case: to be right, and (IIT, SIIT) to be right for the program's reasons.

Interchange intervention training (Geiger et al. 2022; strict: Gupta et al. 2024), each loss with an Adam step of its
own, on base rows b and source rows s, in this order:

    IIT        a node of the circuit gets its value on s: the output should be the program's with its variables from s
    strict     a node off the circuit gets its value on s: the output should be the program's on b
    behaviour  the output on b should be the program's

Values from source rows are constants. The loss is the mean squared error of a number, or the cross-entropy of a
category, over all positions but BOS's where the program says something. `supervised` is behaviour alone, `iit` is
without strict. Every 50 steps the model is judged on pairs; the best one is kept: the learning rate falls to
0, but losses with steps of their own do not fall together.

A node on the circuit stands for the variables that the compiled model's sublayer of the same layer makes: a head for
one variable, an MLP for all of that MLP. On a base row with the node's value from a source row, the model should say
what the program says on the base row with those variables from the source row (*interchange-intervention accuracy*).
With a node off the circuit it should say what it says without (*strict* accuracy; Gupta et al. 2024, section 4).
Position 0, BOS, is left out, as in InterpBench's code.
"""

import math
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from saeflow.config import TracrConfig
from saeflow.groundtruth.cases import Case, small_config
from saeflow.groundtruth.network import Network, Node, initial_weights
from saeflow.groundtruth.program import PAD, SelectorWidth
from saeflow.jobs.progress import progress

ALL_PAIRS_UP_TO = 1 << 17
PAIRS_AT_ONCE = 1024
CHECK_PAIRS, CHECK_EVERY = 2048, 50
BETAS = (0.9, 0.9)


class Recipe(NamedTuple):
    """What `model.tracr.recipe` decides."""

    clip_grad_norm: float
    strict_weight: float
    """Of the strict loss."""
    decays: bool
    """Whether the learning rate falls to 0, and the best checkpoint is kept; else it stays, and the last is."""
    drawn: bool
    """Whether pairs are drawn anew at each step, of all rows; else each row without PAD has one source for good, and
    every epoch goes through them once."""
    enough: float
    """Mean accuracies at which training ends."""


RECIPES = {"saeflow": Recipe(1.0, 1.0, True, True, math.inf), "interpbench": Recipe(0.1, 100.0, False, False, 0.995)}


# -------------------------------------------------------------------- alignment
@dataclass(frozen=True)
class Alignment:
    """Which node of a trained model stands for which variable."""

    on_circuit: dict[Node, tuple[str, ...]]
    """Nodes of the circuit, and the variables that they stand for."""
    off_circuit: tuple[Node, ...]


class Quality(NamedTuple):
    """Shares of right outputs, over positions that have one."""

    accuracy: float
    iia: dict[str, float]
    """By node of the circuit."""
    strict: dict[str, float]
    """By node off the circuit."""

    @property
    def row(self) -> dict[str, float]:
        worst_strict = min(self.strict.values(), default=1.0)
        return {"accuracy": self.accuracy, "worst_iia": min(self.iia.values()), "worst_strict": worst_strict}

    @property
    def means(self) -> tuple[float, float, float]:
        """Of outputs, nodes on the circuit, and nodes off it."""
        iia, strict = (float(np.mean([*of.values()] or [1.0])) for of in (self.iia, self.strict))
        return self.accuracy, iia, strict

    @property
    def worst(self) -> float:
        return min(self.accuracy, *self.iia.values(), *self.strict.values())


class Truth:
    """A case's rows with every variable on them, and what the program says on a base row with variables of a source."""

    def __init__(self, case: Case, rows: np.ndarray) -> None:
        self.case, self.rows = case, rows
        self.values = case.program.run(rows)

    def output(self, base: np.ndarray, source: np.ndarray, variables: tuple[str, ...]) -> np.ndarray:
        """`base` and `source` (N,) are numbers of rows; (N, P) codes or numbers."""
        given = {name: self.values[name][source] for name in variables}
        return self.case.program.run(self.rows[base], given)[self.case.program.output]

    def correct(self, output: Tensor, labels: np.ndarray) -> np.ndarray:
        """Whether `output` (N, P, d_vocab_out) is what `labels` (N, P) say, at the positions that count: (M,) bool."""
        if self.case.program.output_variable.numerical:
            error = np.abs(output[:, 1:, 0].numpy().astype(np.float64) - labels[:, 1:])
            return (error < self.case.tolerance).ravel()
        return (output[:, 1:].argmax(-1).numpy() == labels[:, 1:])[labels[:, 1:] >= 0]


def align(case: Case, config: dict[str, Any]) -> Alignment:
    """The alignment of a model of that config, which has as many layers and heads as the compiled one or more."""
    on_circuit: dict[Node, tuple[str, ...]] = {}
    for block in case.program.blocks:
        location = case.compiled.locations[block.output]
        layer = location.sublayer // 2
        if location.head is not None:
            on_circuit[Node(layer, case.heads.get(block.output, location.head))] = (block.output,)
        if location.sublayer % 2:
            on_circuit[Node(layer)] = (*on_circuit.get(Node(layer), ()), block.output)
        assert location.head is None or isinstance(block, SelectorWidth) or location.sublayer % 2 == 0
    every = [Node(layer, head) for layer in range(config["n_layers"]) for head in (*range(config["n_heads"]), None)]
    return Alignment(on_circuit, tuple(node for node in every if node not in on_circuit))


def pairs(n_rows: int, most: int = ALL_PAIRS_UP_TO, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Numbers of base and source rows: all pairs where they are at most `most`, else so many drawn at random."""
    if n_rows**2 <= most:
        base, source = np.divmod(np.arange(n_rows**2), n_rows)
        return base, source
    base, source = np.random.default_rng(seed).integers(0, n_rows, (2, most))
    return base, source


@torch.no_grad()
def quality(network: Network, truth: Truth, alignment: Alignment, base: np.ndarray, source: np.ndarray) -> Quality:
    """Accuracy on all rows of `truth`; IIA and strict accuracy over pairs of them."""
    clean = network(torch.from_numpy(truth.rows))
    labels = truth.values[truth.case.program.output]

    def share(node: Node, variables: tuple[str, ...] | None) -> float:
        correct = []
        for start in range(0, len(base), PAIRS_AT_ONCE):
            b, s = (rows[start : start + PAIRS_AT_ONCE] for rows in (base, source))
            output = network.patched(clean, node, clean.value(node)[torch.from_numpy(s)], torch.from_numpy(b))
            wanted = labels[b] if variables is None else truth.output(b, s, variables)
            correct.append(truth.correct(output, wanted))
        return float(np.concatenate(correct).mean())

    accuracy = float(truth.correct(clean.output, labels).mean())
    iia = {node.name: share(node, variables) for node, variables in alignment.on_circuit.items()}
    return Quality(accuracy, iia, {node.name: share(node, None) for node in alignment.off_circuit})


# -------------------------------------------------------------------- training
@dataclass(frozen=True)
class Trained:
    network: Network
    alignment: Alignment
    quality: Quality
    curve: list[dict[str, Any]]
    """A row a check."""


def train_small(case: Case, rows: np.ndarray, recipe: TracrConfig, n_pairs: int = ALL_PAIRS_UP_TO) -> Trained:
    """Trains a model of `small_config(case)` on `rows` (N, P) of token ids; on the CPU, in float32, from a seed.

    By saeflow's own recipe rows of a batch are drawn from all of `rows`, and `recipe.lr` falls linearly to 0; by
    InterpBench's as `RECIPES` says. In the end it is judged on all pairs of rows, or on `n_pairs` of them where there
    are more.
    """
    config = small_config(case)
    alignment, truth = align(case, config), Truth(case, rows)
    network = Network(config, initial_weights(config, recipe.seed))
    steps = _Steps(network, truth, alignment, recipe)
    check = pairs(len(rows), CHECK_PAIRS, seed=recipe.seed + 1)
    best: tuple[tuple[float, float], dict[str, Tensor]] | None = None
    curve = []
    for step in progress(range(recipe.n_steps), f"{recipe.method} {recipe.seed}", unit="steps"):
        losses = steps.train_step(step)
        if (step + 1) % CHECK_EVERY == 0 or step + 1 == recipe.n_steps:
            current = quality(network, truth, alignment, *check)
            curve.append({"step": step + 1} | losses | current.row)
            worst = current.accuracy if recipe.method == "supervised" else current.worst
            score = (worst, -losses["behaviour"])
            if best is None or score >= best[0] or not steps.how.decays:
                best = score, {name: p.detach().clone() for name, p in network.parameters.items()}
            if min(current.means) >= steps.how.enough:
                break
    assert best is not None
    network.parameters = best[1]
    return Trained(network, alignment, quality(network, truth, alignment, *pairs(len(rows), n_pairs)), curve)


class _Steps:
    def __init__(self, network: Network, truth: Truth, alignment: Alignment, recipe: TracrConfig) -> None:
        self.network, self.truth, self.alignment, self.recipe = network, truth, alignment, recipe
        self.how = RECIPES[recipe.recipe]
        self.tokens = torch.from_numpy(truth.rows)
        self.labels = truth.values[truth.case.program.output]
        self.rng = np.random.default_rng(recipe.seed)
        whole = np.flatnonzero((truth.rows != truth.case.program.token_id(PAD)).all(1))
        self.epoch = whole, np.random.default_rng([recipe.seed, 1]).permutation(whole)
        self.parameters = [p.requires_grad_() for p in network.parameters.values()]
        self.optimiser = torch.optim.Adam(self.parameters, recipe.lr, BETAS, foreach=True)

    def train_step(self, step: int) -> dict[str, float]:
        """One batch; returns its losses."""
        r, n = self.recipe, len(self.tokens)
        for group in self.optimiser.param_groups:
            group["lr"] = r.lr * (1 - step / r.n_steps if self.how.decays else 1)
        losses = {}
        if r.method == "supervised":
            base = self.rng.permutation(n)[: r.batch_rows]
        else:
            base, source = self.rng.integers(0, n, (2, r.batch_rows)) if self.how.drawn else self._next(step)
            node, variables = self._one_of(list(self.alignment.on_circuit.items()))
            wanted = self.truth.output(base, source, variables)
            rows = self.tokens[base], self.tokens[source]
            losses["iit"] = self._descend(self.network.interchanged(*rows, node), wanted)
            if r.method == "siit" and self.alignment.off_circuit:
                node = self._one_of(self.alignment.off_circuit)
                output = self.network.interchanged(*rows, node)
                losses["strict"] = self._descend(output, self.labels[base], self.how.strict_weight)
        losses["behaviour"] = self._descend(self.network(self.tokens[base]).output, self.labels[base])
        return losses

    def _one_of(self, some: Any) -> Any:
        return some[int(self.rng.integers(len(some)))]

    def _next(self, step: int) -> tuple[np.ndarray, np.ndarray]:
        """Base rows of a batch, the next of those of an epoch, and the source of each."""
        base, source = self.epoch
        batches = -(-len(base) // self.recipe.batch_rows)
        if step % batches == 0:
            self.order = self.rng.permutation(len(base))
        some = self.order[step % batches :: batches]
        return base[some], source[some]

    def _descend(self, output: Tensor, labels: np.ndarray, weight: float = 1.0) -> float:
        loss = loss_of(output, labels, self.truth.case.program.output_variable.numerical)
        self.optimiser.zero_grad()
        (weight * loss).backward()
        torch.nn.utils.clip_grad_norm_(self.parameters, self.how.clip_grad_norm)
        self.optimiser.step()
        return loss.item()


def loss_of(output: Tensor, labels: np.ndarray, numerical: bool) -> Tensor:
    """Of `output` (N, P, d_vocab_out) against `labels` (N, P), without position 0 and what is none."""
    wanted = torch.from_numpy(labels[:, 1:])
    if numerical:
        return F.mse_loss(output[:, 1:, 0], wanted.to(output.dtype))
    return F.cross_entropy(output[:, 1:].flatten(0, 1), wanted.flatten(), ignore_index=-1)
