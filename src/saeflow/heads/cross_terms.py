"""What cross terms between heads do to the model's predictions: the loss when they are taken out.

With o_h = z_h W_O[h] the squared norm of what a layer writes is  sum_h |o_h|^2 + sum over g != h of <o_g, o_h>.  The
second sum is the interference. For outputs that dictionaries reconstruct, o_h = sum_i f_i d_i W_O[h], it is the sum of
f_i f_j <d_i W_O, d_j W_O> over pairs of latents of different heads, so that removing it there is removing the
interference of their lifted atoms. Three ways to remove it, each at every token:

* `orthogonal`: the mutually orthogonal outputs of unchanged norms that are nearest to o in the sum of squared distances
  (an orthogonal Procrustes problem: with N = diag(|o_h|) they are N U, U the polar factor of N O). All cross terms are
  0 exactly, and the squared norm of the layer's output is the sum of the heads'.
* `others`: o_h less its projection on the sum of the other heads' outputs. What a head adds along what the others
  together add is gone; the results are not orthogonal to each other.
* `row_spaces`: o_h less its projection on the span of the other heads' W_O row spaces. This is a fixed linear map: what
  is left of a head is what no other head could have written. Where H d = D little is left, whatever the model.

Each is compared with a change of the layer's output by a vector of the same norm at each token, in a random direction
(seeded): a loss beyond that one's is due to the direction.

The loss is added up a batch at a time. `source` is whose cross terms: those of the model's own heads, or those of what
a dictionary of heads reconstructs; that then stands in the layer's place before and after. Predictions made from BOS
are left out. Intervals are over documents.
"""

from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from saeflow.evaluation.baseline import at_positions, drop_last_position, model_losses
from saeflow.evaluation.intervals import interval, resampled_sums
from saeflow.evaluation.metrics import squared_norm
from saeflow.evaluation.sums import SumAccumulator
from saeflow.heads.weights import Attention, head_outputs
from saeflow.models.splicing import CleanPass, run_spliced

if TYPE_CHECKING:
    from transformer_lens import HookedTransformer

WAYS = ("orthogonal", "others", "row_spaces")
MODEL = "model"
NO_HEADS = "heads_zeroed"
TOKENS = 2048  # whose head outputs are held at once
_VALUES = ("ce", "kl", "squared_change")


class CrossTerms:
    """Adds up, of every source and way of removal and its control, cross-entropy, KL and the size of the change."""

    def __init__(self, attention: Attention, prepend_bos: bool, seed: int) -> None:
        self.attention = attention
        self._ways = removals(attention.W_O)
        self._generator = torch.Generator().manual_seed(seed)
        self._accumulator = SumAccumulator(prepend_bos)
        self._names: list[tuple[str, str, bool]] = []

    @torch.no_grad()
    def add(
        self,
        model: "HookedTransformer",
        clean: CleanPass,
        document: np.ndarray,
        sources: dict[str, tuple[Tensor, Tensor]],
    ) -> None:
        """`sources`: by name z (B P, H, d) of the heads, and what the layer writes besides, (D,). The model's own is
        `MODEL`; `clean` must have been made to splice at the layer's output."""
        tokens, hook = clean.tokens, f"blocks.{self.attention.layer}.hook_attn_out"
        B, P = tokens.shape
        values, names = {"n": at_positions(torch.ones(B * (P - 1), device=tokens.device), B)}, []
        for source, (z, rest) in sources.items():
            variants = self._variants(z, rest)
            unchanged = variants["none", False]
            finals = [
                clean.final
                if (source, way) == (MODEL, "none")
                else run_spliced(model, clean, hook, output.view(B, P, -1))
                for (way, _), output in variants.items()
            ]
            before, *after = (drop_last_position(final) for final in (clean.final, *finals))
            _, losses = model_losses(model, tokens, before, after)
            for ((way, control), output), loss in zip(variants.items(), losses, strict=True):
                names.append((source, way, control))
                change = squared_norm(output - unchanged).view(B, P)
                measures = zip(_VALUES, (at_positions(loss.ce, B), at_positions(loss.kl, B), change), strict=True)
                values |= {f"{name}.{len(names)}": value for name, value in measures}
            values[f"squared.{source}"] = squared_norm(unchanged - self.attention.b_O).view(B, P)
        self._names = names
        self._accumulator.add(document, values)

    def _variants(self, z: Tensor, rest: Tensor) -> dict[tuple[str, bool], Tensor]:
        """The layer's output (B P, D) as it is, without its heads, and by every way of removal, and control."""
        parts: dict[tuple[str, bool], list[Tensor]] = {}
        for some in z.split(TOKENS):
            outputs = head_outputs(some, self.attention.W_O)
            parts.setdefault(("none", False), []).append(outputs.sum(1) + rest)
            parts.setdefault((NO_HEADS, False), []).append(self.attention.b_O.expand(len(some), -1))
            for way, control, output in changes(outputs, rest, self._ways, self._generator):
                parts.setdefault((way, control), []).append(output)
        return {name: torch.cat(chunks) for name, chunks in parts.items()}

    def table(self, n_resamples: int) -> pd.DataFrame:
        """One row a source, way and control, with 95 % intervals over documents.

        CE before and after, its increase, its increase beyond that of the control (paired), KL from the clean model,
        and the size of the change relative to what the heads write (root of the ratio of mean squares).
        """
        rows = [row for row in self._accumulator.sums().documents if row["positions"] == "rest"]
        columns = ["n", *(f"{v}.{i + 1}" for i in range(len(self._names)) for v in _VALUES)]
        columns += [f"squared.{source}" for source in dict.fromkeys(source for source, _, _ in self._names)]
        sums = np.array([[row[name] for name in columns] for row in rows])
        total = sums.sum(0)
        resampled = resampled_sums(sums, n_resamples)
        at = {name: i for i, name in enumerate(columns)}
        number = {name: i + 1 for i, name in enumerate(self._names)}

        def mean(of: np.ndarray, name: str, i: int, before: int | None = None) -> np.ndarray:
            value = of[..., at[f"{name}.{i}"]] - (of[..., at[f"{name}.{before}"]] if before else 0)
            return np.asarray(value / of[..., at["n"]])

        table = []
        for (source, way, control), i in number.items():
            before = number[source, "none", False]
            entry = {"source": source, "way": way, "control": control, "n_predictions": int(total[at["n"]])}
            entry |= {"n_documents": len(rows), "ce_before": float(mean(total, "ce", before))}
            entry |= {"ce_after": float(mean(total, "ce", i))}
            compared = [("ce_increase", "ce", before), ("kl", "kl", None)]
            if (source, way, True) in number:
                compared.append(("ce_beyond_control", "ce", number[source, way, True]))
            for name, value, less in compared:
                entry[name] = float(mean(total, value, i, less))
                ends = interval(entry[name], mean(resampled, value, i, less), least=0.0 if name == "kl" else -np.inf)
                entry[f"{name}_low"], entry[f"{name}_high"] = map(float, ends)
            relative = total[at[f"squared_change.{i}"]] / total[at[f"squared.{source}"]]
            table.append(entry | {"relative_change": float(np.sqrt(relative))})
        return pd.DataFrame(table)


# -------------------------------------------------------------------- ways of removal
def orthogonal(outputs: Tensor) -> Tensor:
    """(N, H, D) -> (N, H, D): the nearest outputs with the same norms and no cross terms, computed in float64.

    Where outputs are linearly dependent, to rounding, the nearest is not unique: that part of them is left, and
    so is a head whose norm is less than 1 / 3000 of the largest.
    """
    exact = outputs.double()
    norms = exact.norm(dim=2, keepdim=True)
    scaled = norms * exact
    size, basis = torch.linalg.eigh(scaled @ scaled.transpose(1, 2))  # (N, H), (N, H, H)
    known = size > 1e-14 * size[:, -1:].clamp(min=1e-300)
    inverse_root = torch.where(known, size.clamp(min=1e-300).rsqrt(), torch.zeros_like(size))
    polar = basis * inverse_root[:, None, :] @ basis.transpose(1, 2) @ scaled
    left = basis * ~known[:, None, :] @ basis.transpose(1, 2) @ exact
    return (norms * polar + left).to(outputs.dtype)


def others(outputs: Tensor) -> Tensor:
    """(N, H, D) -> (N, H, D): each head without its projection on the sum of the others."""
    rest = outputs.sum(1, keepdim=True) - outputs
    along = torch.linalg.vecdot(outputs, rest) / torch.linalg.vecdot(rest, rest).clamp(min=1e-30)
    return outputs - along[..., None] * rest


def row_spaces(W_O: Tensor) -> Tensor:
    """(H, d, D) -> (H, D, D): for each head the projection on the complement of the other heads' row spaces."""
    H, _, D = W_O.shape
    found = []
    for head in range(H):
        rest = W_O[torch.arange(H) != head].flatten(0, 1).double()
        _, size, basis = torch.linalg.svd(rest, full_matrices=False)
        basis = basis[size > size[0] * max(rest.shape) * torch.finfo(torch.float32).eps]
        found.append(torch.eye(D, dtype=torch.float64, device=W_O.device) - basis.T @ basis)
    return torch.stack(found).to(W_O)


def removals(W_O: Tensor) -> dict[str, Callable[[Tensor], Tensor]]:
    """The three ways, by name: (N, H, D) -> (N, H, D)."""
    projections = row_spaces(W_O)
    return {
        "orthogonal": orthogonal,
        "others": others,
        "row_spaces": lambda outputs: torch.einsum("nhd,hde->nhe", outputs, projections),
    }


class Change(NamedTuple):
    """The layer's output with the cross terms removed, and the control of the same size."""

    way: str
    control: bool
    output: Tensor
    """(N, D)"""


def changes(
    outputs: Tensor, rest: Tensor, ways: dict[str, Callable[[Tensor], Tensor]], generator: torch.Generator
) -> Iterable[Change]:
    """`outputs` (N, H, D), `rest` (D,) or (N, D): what is added to it. Controls draw from `generator` (CPU)."""
    unchanged = outputs.sum(1) + rest
    for way, remove in ways.items():
        changed = remove(outputs).sum(1) + rest
        yield Change(way, False, changed)
        direction = torch.randn(unchanged.shape, generator=generator, dtype=torch.float32).to(unchanged)
        direction /= direction.norm(dim=1, keepdim=True)
        yield Change(way, True, unchanged + (changed - unchanged).norm(dim=1, keepdim=True) * direction)
