"""How large the entries of J are while a pair is trained: with their sign, on bins that are the same at every step.

The bins are those of notebook 000's `torch.histc(200, 0, 0.5)` and their mirror images, so that a training compares
with a study of the finished pair, which W&B's bins, another set at each step, do not.
"""

import math
from typing import Any

import numpy as np
import torch
from torch import Tensor

BINS, MOST = 200, 0.5  # on each side of 0, and where they end
KEPT = 100  # of a training, spread evenly over the rows of its metrics; and the last
PLACES = ("input", "reconstruction")
"""Where J is taken."""
EDGES = np.concatenate([[-np.inf], np.linspace(-MOST, MOST, 2 * BINS + 1), [np.inf]])
"""Of the bins, each without its right end; the first and the last hold what is beyond."""


def count_entries(J: Tensor, on: Tensor) -> Tensor:
    """How many of J's entries (N, k_out, k_in) lie in each bin, of those that are `on` (same shape, bool):
    (2 * BINS + 2,) int32, on the CPU."""
    bins = (J[on] * (BINS / MOST)).floor_()
    bins.nan_to_num_(0.0)  # the step's loss is not finite then either, and says so
    counts = torch.bincount(bins.clamp_(-BINS - 1, BINS).long() + (BINS + 1), minlength=2 * BINS + 2)
    return counts.int().cpu()


def words(above: np.ndarray, edges: np.ndarray) -> list[str]:
    """The table of notebook 000, in its words: how many entries of a token exceed each edge."""
    return [f"There are {n:.1f} values and above {edge:.3f}." for n, edge in zip(above, edges, strict=True)]


class JacobianHistograms:
    """Those of one training."""

    def __init__(self, n_steps: int, log_every: int, of_tokens: int) -> None:
        """`of_tokens`: of how many tokens each is."""
        self.every, self.of_tokens = math.ceil(n_steps / log_every / KEPT), of_tokens
        self.steps: list[int] = []
        self.counts: list[Tensor] = []
        """By step: (places, bins)."""

    def wants(self, row: int, last: bool) -> bool:
        """Whether row number `row` of the metrics, counted from 0, has one."""
        return row % self.every == 0 or last

    def add(self, step: int, counts: list[Tensor]) -> None:
        """`step`: how many are done with this one; `counts` by place."""
        self.steps.append(step)
        self.counts.append(torch.stack(counts))

    def rows(self, batch_size: int) -> list[dict[str, Any]]:
        """One row a step, place and bin that has entries."""
        found: list[dict[str, Any]] = []
        for step, counts in zip(self.steps, self.counts, strict=True):
            about = {"step": step, "tokens": step * batch_size}
            for at, of_place in zip(PLACES, counts.tolist(), strict=True):
                bins = ((bin, n) for bin, n in enumerate(of_place) if n)
                found += [
                    about
                    | {"at": at, "bin_left": float(EDGES[bin]), "bin_right": float(EDGES[bin + 1])}
                    | {"count": n, "of_tokens": self.of_tokens}
                    for bin, n in bins
                ]
        return found

    def table(self, title: str) -> str:
        """Of the last step, for the terminal: how many |J| of a token exceed the first 19 edges."""
        text = ""
        for at, of_place in zip(PLACES, self.counts[-1].numpy(), strict=True):
            counts = of_place / self.of_tokens
            sizes = counts[BINS + 1 :] + counts[BINS::-1]  # |J| in bins from 0 up, the last of what is beyond
            above = sizes[::-1].cumsum()[::-1]
            lines = words(above[1:20], torch.linspace(0, MOST, BINS + 1).numpy()[1:20])
            of = f"{self.of_tokens} tokens of step {self.steps[-1]}, with |J| at the {at}"
            beyond = f"{sizes[-1]:.1f} values above {MOST:g} are counted"
            text += "\n".join([f"{title}, {of}; {beyond}", *lines]) + "\n"
        return text

    def state(self) -> dict[str, Tensor]:
        if not self.counts:
            return {}
        return {"histograms": torch.stack(self.counts), "histogram_steps": torch.tensor(self.steps)}

    def restore(self, state: dict[str, Tensor]) -> None:
        """A checkpoint of an earlier release has none: they begin where it goes on, if it does."""
        if "histograms" in state:
            self.counts, self.steps = list(state["histograms"]), state["histogram_steps"].tolist()
