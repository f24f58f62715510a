"""What each node of a model does, as InterpBench's evaluation measures it.

A node's *effect* is the share of outputs that change when its value is replaced: by its value on another row
(`resample`; of pairs of rows, the outputs about which the program says something else on the two), by its mean over all
rows and positions (`mean`), or by zeros (`zero`). An output changes where its category is another, or its number
differs by the case's tolerance or more. On a model that computes as the program does, nodes of the circuit have
effects, and all others have none (InterpBench, arXiv 2407.14494, section 4). Position 0, BOS, is left out.
"""

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from saeflow.groundtruth.network import Network, Node
from saeflow.groundtruth.training import PAIRS_AT_ONCE, Alignment, Truth


@torch.no_grad()
def node_effects(
    network: Network, truth: Truth, alignment: Alignment, base: np.ndarray, source: np.ndarray
) -> pd.DataFrame:
    """A row a node: `node`, `on_circuit`, `variables`, and its effects `resample` (on pairs of row numbers `base` and
    `source`), `mean` and `zero` (on all rows of `truth`)."""
    clean, numerical = network(torch.from_numpy(truth.rows)), truth.case.program.output_variable.numerical
    labels = truth.values[truth.case.program.output][:, 1:]
    said = np.ones_like(labels, dtype=bool) if numerical else labels >= 0
    least = truth.case.tolerance if numerical else 1  # between two outputs of the program

    def changed(output: Tensor, rows: np.ndarray) -> np.ndarray:
        """(N, P - 1) bool, of the outputs on `rows`."""
        before = clean.output[torch.from_numpy(rows)][:, 1:]
        if numerical:
            return ((output[:, 1:, 0] - before[:, :, 0]).abs() >= truth.case.tolerance).numpy()
        return (output[:, 1:].argmax(-1) != before.argmax(-1)).numpy()

    def resampled(node: Node) -> float:
        n_changed = n_counted = 0
        for start in range(0, len(base), PAIRS_AT_ONCE):
            b, s = (rows[start : start + PAIRS_AT_ONCE] for rows in (base, source))
            output = network.patched(clean, node, clean.value(node)[torch.from_numpy(s)], torch.from_numpy(b))
            counted = (np.abs(labels[b] - labels[s]) >= least) & said[b] & said[s]
            n_changed += int((changed(output, b) & counted).sum())
            n_counted += int(counted.sum())
        return n_changed / max(1, n_counted)

    every = np.arange(len(truth.rows))
    rows = []
    for node in (*alignment.on_circuit, *alignment.off_circuit):
        value = clean.value(node)
        row = {"node": node.name, "on_circuit": node in alignment.on_circuit}
        row |= {"variables": list(alignment.on_circuit.get(node, ())), "resample": resampled(node)}
        for name, constant in (("mean", value.mean((0, 1))), ("zero", torch.zeros(value.shape[-1]))):
            output = network.patched(clean, node, constant.expand_as(value))
            row[name] = float(changed(output, every)[said].mean())
        rows.append(row)
    return pd.DataFrame(rows)
