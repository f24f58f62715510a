"""Which node of a trained model stands for which variable, and how far that is so.

A node on the circuit stands for the variables that the compiled model's sublayer of the same layer makes: a head for
one variable, an MLP for all of that MLP. On a base row with the node's value from a source row, the model should say
what the program says on the base row with those variables from the source row (*interchange-intervention accuracy*).
With a node off the circuit it should say what it says without (*strict* accuracy; Gupta et al. 2024, section 4).
Position 0, BOS, is left out, as in InterpBench's code.
"""

import dataclasses
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from saeflow.groundtruth.cases import Case
from saeflow.groundtruth.network import Network, Node
from saeflow.groundtruth.program import SelectorWidth, run

ALL_PAIRS_UP_TO = 1 << 17
PAIRS_AT_ONCE = 1024


@dataclasses.dataclass(frozen=True)
class Alignment:
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
    def worst(self) -> float:
        return min(self.accuracy, *self.iia.values(), *self.strict.values())


class Truth:
    """A case's rows with every variable on them, and what the program says on a base row with variables of a source."""

    def __init__(self, case: Case, rows: np.ndarray) -> None:
        self.case, self.rows = case, rows
        self.values = run(case.program, rows)

    def output(self, base: np.ndarray, source: np.ndarray, variables: tuple[str, ...]) -> np.ndarray:
        """`base` and `source` (N,) are numbers of rows; (N, P) codes or numbers."""
        given = {name: self.values[name][source] for name in variables}
        return run(self.case.program, self.rows[base], given)[self.case.program.output]

    def correct(self, output: Tensor, labels: np.ndarray) -> np.ndarray:
        """Whether `output` (N, P, d_vocab_out) is what `labels` (N, P) say, at the positions that count: (M,) bool."""
        if self.case.program.output_variable.numerical:
            error = np.abs(output[:, 1:, 0].numpy().astype(np.float64) - labels[:, 1:])
            return (error < self.case.tolerance).ravel()
        counts = labels[:, 1:] >= 0
        return (output[:, 1:].argmax(-1).numpy() == labels[:, 1:])[counts]


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
        for some in _chunks(len(base)):
            b, s = base[some], source[some]
            output = network.patched(clean, node, clean.value(node)[torch.from_numpy(s)], torch.from_numpy(b))
            wanted = labels[b] if variables is None else truth.output(b, s, variables)
            correct.append(truth.correct(output, wanted))
        return float(np.concatenate(correct).mean())

    accuracy = float(truth.correct(clean.output, labels).mean())
    iia = {node.name: share(node, variables) for node, variables in alignment.on_circuit.items()}
    return Quality(accuracy, iia, {node.name: share(node, None) for node in alignment.off_circuit})


def _chunks(n: int) -> Iterator[slice]:
    return (slice(start, start + PAIRS_AT_ONCE) for start in range(0, n, PAIRS_AT_ONCE))
