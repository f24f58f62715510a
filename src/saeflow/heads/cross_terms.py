"""The loss of the model when the cross terms between heads are removed, added up a batch at a time.

`source` is whose cross terms: those of the model's own heads, or those of what a dictionary of heads reconstructs; that
then stands in the layer's place before and after. Predictions made from BOS are left out. Intervals are over documents.
"""

from typing import TYPE_CHECKING

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from saeflow.evaluation.baseline import at_positions, drop_last_position, model_losses
from saeflow.evaluation.bootstrap import central_interval, resampled_sums
from saeflow.evaluation.metrics import squared_norm
from saeflow.evaluation.sums import SumAccumulator
from saeflow.heads.removal import changes, removals
from saeflow.heads.weights import Attention, head_outputs
from saeflow.models.splicing import CleanPass, run_spliced

if TYPE_CHECKING:
    from transformer_lens import HookedTransformer

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
        tokens = clean.tokens
        B, P = tokens.shape
        ones = at_positions(torch.ones(B * (P - 1), device=tokens.device), B)
        values = {"n": ones}
        names = []
        for source, (z, rest) in sources.items():
            variants = self._variants(z, rest)
            unchanged = variants["none", False]
            finals = [
                clean.final if (source, way) == (MODEL, "none") else self._spliced(model, clean, output)
                for (way, _), output in variants.items()
            ]
            _, losses = model_losses(
                model, tokens, drop_last_position(clean.final), [drop_last_position(f) for f in finals]
            )
            for ((way, control), output), loss in zip(variants.items(), losses, strict=True):
                names.append((source, way, control))
                measures = (
                    at_positions(loss.ce, B),
                    at_positions(loss.kl, B),
                    squared_norm(output - unchanged).view(B, P),
                )
                values |= {f"{_VALUES[i]}.{len(names)}": value for i, value in enumerate(measures)}
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

    def _spliced(self, model: "HookedTransformer", clean: CleanPass, output: Tensor) -> Tensor:
        value = output.view(*clean.tokens.shape, -1)
        return run_spliced(model, clean, f"blocks.{self.attention.layer}.hook_attn_out", value)

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
        drawn = resampled_sums(sums, n_resamples) if len(rows) > 1 else None
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
            for name, value, less in (("ce_increase", "ce", before), ("kl", "kl", None)):
                entry[name] = float(mean(total, value, i, less))
                ends = central_interval(mean(drawn, value, i, less)) if drawn is not None else (np.nan, np.nan)
                entry[f"{name}_low"], entry[f"{name}_high"] = map(float, ends)
            if (source, way, True) in number:
                other = number[source, way, True]
                entry["ce_beyond_control"] = float(mean(total, "ce", i, other))
                ends = central_interval(mean(drawn, "ce", i, other)) if drawn is not None else (np.nan, np.nan)
                entry["ce_beyond_control_low"], entry["ce_beyond_control_high"] = map(float, ends)
            relative = total[at[f"squared_change.{i}"]] / total[at[f"squared.{source}"]]
            table.append(entry | {"relative_change": float(np.sqrt(relative))})
        return pd.DataFrame(table)
