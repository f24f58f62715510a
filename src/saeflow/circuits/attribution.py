"""What makes a latent active on a text (Dunefsky, Chlenski, Nanda 2024, section 4.1): its pre-activation at a token,
split exactly into features, heads and their sources, embedding, biases, and what the transcoders miss (`error`).

A latent's pre-activation is linear in everything that its layer's input sums up, once attention patterns and the scale
of each norm are taken as constants, and a transcoder's features make the MLPs above piecewise linear. The norm: x =
centre(r) / scale, with `scale` the norm's own at that token, so that v.x = r.(centre(v) / scale). Weights must have the
norms' gain and bias folded in (`model.fold_ln=true`). Blocks may be sequential or parallel.

Shapes: P positions, D model width, n latents, H heads.
"""

from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import pandas as pd
import torch
from torch import Tensor

from saeflow.circuits.weights import as_read, ov
from saeflow.dictionaries import Dictionary, DictionaryError

if TYPE_CHECKING:
    from transformer_lens import HookedTransformer


class Target(NamedTuple):
    """A direction read at one token: v.x, where x is what the norm before `part` of `layer` gives there."""

    layer: int
    part: Literal["attn", "mlp", "final"]
    token: int
    direction: Tensor
    """v (D,)"""


class Node(NamedTuple):
    """What contributes to a target: `unit` is a feature or a head, `token` where it reads (a head: the source)."""

    kind: Literal["feature", "head", "embedding", "target"]
    layer: int
    unit: int
    token: int


class CircuitRun:
    """One clean pass over a text, with what transcoders make of its MLPs.

    `transcoders` by layer; an MLP without one contributes as a whole. Raises `DictionaryError` for one that does not
    go from the norm before an MLP to that MLP's output, and `ValueError` for a model whose norms are not folded.
    """

    @torch.no_grad()
    def __init__(self, model: "HookedTransformer", transcoders: dict[int, Dictionary], tokens: Tensor) -> None:
        """`tokens` (P,)"""
        self.check(model, transcoders)
        self.model, self.transcoders, self.tokens = model, transcoders, tokens
        self.parallel = bool(model.cfg.parallel_attn_mlp)
        kept = ("hook_pattern", "hook_v", "hook_mlp_out", "hook_scale", "hook_normalized", "hook_resid_pre")
        _, self._cache = model.run_with_cache(tokens[None], names_filter=lambda name: name.endswith(kept))
        self.features: dict[int, Tensor] = {}
        """(P, n) by layer."""
        self.errors: dict[int, Tensor] = {}
        """(P, D) by layer: what the MLP writes and its transcoder does not."""
        for layer, transcoder in transcoders.items():
            x = self.read(layer, "mlp")
            self.features[layer] = transcoder.encode(x)
            self.errors[layer] = self._at(f"blocks.{layer}.hook_mlp_out") - transcoder.decode(self.features[layer], x)

    @staticmethod
    def check(model: "HookedTransformer", transcoders: dict[int, Dictionary]) -> None:
        """Raises what the class says."""
        if model.cfg.normalization_type not in ("LNPre", "RMSPre"):
            raise ValueError("circuits need the norms' gain and bias folded into the weights: set model.fold_ln=true")
        for layer, transcoder in transcoders.items():
            wanted = (f"blocks.{layer}.ln2.hook_normalized", f"blocks.{layer}.hook_mlp_out")
            if (transcoder.spec.hook_name, transcoder.spec.hook_name_out) != wanted:
                raise DictionaryError(f"circuits need a transcoder of layer {layer} from {wanted[0]} to {wanted[1]}")
            if not hasattr(transcoder, "W_enc"):
                raise DictionaryError(
                    f"SAELens's {transcoder.spec.saelens} has no encoder whose columns could be followed; circuits "
                    "take transcoders of one encoder and one decoder matrix"
                )

    def read(self, layer: int, part: str) -> Tensor:
        """x (P, D): what the norm before `part` of `layer` gives."""
        return self._at(_norm(layer, part) + "hook_normalized")

    def of_feature(self, layer: int, feature: int, token: int) -> Target:
        """The pre-activation, but for b_enc, of a transcoder's feature."""
        return Target(layer, "mlp", token, self.transcoders[layer].W_enc[:, feature])

    def of_logit(self, direction: Tensor, token: int) -> Target:
        """A direction of the unembedding, such as the difference of two columns of W_U."""
        return Target(self.model.cfg.n_layers, "final", token, direction)

    def in_stream(self, target: Target) -> Tensor:
        """u (D,): the target's direction in the residual stream, the norm's scale at that token taken as a constant."""
        v = as_read(self.model, target.direction)
        return v / self._at(_norm(target.layer, target.part) + "hook_scale")[target.token]

    @torch.no_grad()
    def attribute(self, target: Target) -> pd.DataFrame:
        """Everything that the target sums up; contributions add to v.x exactly.

        Columns: `kind` (feature, head, embedding, error, mlp, skip, bias), `layer`, `unit` (feature or head), `token`
        (where it reads: of a head the source), `contribution`. Features that are 0 are left out.
        """
        u, t = self.in_stream(target), target.token
        rows = [("embedding", -1, -1, t, float(self._at("blocks.0.hook_resid_pre")[t] @ u))]
        attention_up_to = target.layer + (target.part == "mlp" and not self.parallel)
        for layer in range(attention_up_to):
            attention: Any = self.model.blocks[layer].attn
            written = torch.einsum(
                "hs,shd,hde,e->hs", self._pattern(layer)[:, t], self._values(layer), attention.W_O, u
            )
            for head, of_head in enumerate(written.tolist()):
                rows += [("head", layer, head, source, value) for source, value in enumerate(of_head[: t + 1])]
            rows.append(("bias", layer, -1, t, float(attention.b_O @ u)))
        for layer in range(target.layer):
            transcoder = self.transcoders.get(layer)
            if transcoder is None:
                rows.append(("mlp", layer, -1, t, float(self._at(f"blocks.{layer}.hook_mlp_out")[t] @ u)))
                continue
            f = self.features[layer][t]
            active = f.nonzero()[:, 0]
            values = f[active] * (transcoder.W_dec[active] @ u)
            rows += [("feature", layer, i, t, v) for i, v in zip(active.tolist(), values.tolist(), strict=True)]
            rows.append(("error", layer, -1, t, float(self.errors[layer][t] @ u)))
            rows.append(("bias", layer, -1, t, float(transcoder.b_dec @ u)))
            if transcoder.W_skip is not None:
                rows.append(("skip", layer, -1, t, float(transcoder.W_skip @ self.read(layer, "mlp")[t] @ u)))
        return pd.DataFrame(rows, columns=["kind", "layer", "unit", "token", "contribution"])

    def step(self, target: Target, node: Node) -> Target:
        """The target that `node` is to be explained by: the same root, seen from what the node reads."""
        u = self.in_stream(target)
        if node.kind == "feature":
            transcoder = self.transcoders[node.layer]
            weight = transcoder.W_dec[node.unit] @ u
            return Target(node.layer, "mlp", node.token, weight * transcoder.W_enc[:, node.unit])
        weight = self._pattern(node.layer)[node.unit, target.token, node.token]
        return Target(node.layer, "attn", node.token, weight * (ov(self.model, node.layer, node.unit) @ u))

    def bias(self, target: Target, node: Node) -> float:
        """What a node adds to the root whatever it reads: b_enc of a feature, b_V of a head, times the path."""
        u = self.in_stream(target)
        if node.kind == "feature":
            transcoder = self.transcoders[node.layer]
            return float(transcoder.W_dec[node.unit] @ u * transcoder.b_enc[node.unit])
        attention: Any = self.model.blocks[node.layer].attn
        weight = self._pattern(node.layer)[node.unit, target.token, node.token]
        return float(weight * (attention.b_V[node.unit] @ attention.W_O[node.unit] @ u))

    def _at(self, hook: str) -> Tensor:
        value: Tensor = self._cache[hook]
        return value[0]

    def _pattern(self, layer: int) -> Tensor:
        """(H, P, P)"""
        return self._at(f"blocks.{layer}.attn.hook_pattern")

    def _values(self, layer: int) -> Tensor:
        """(P, H, d_head)"""
        v = self._at(f"blocks.{layer}.attn.hook_v")
        return v.repeat_interleave(self.model.cfg.n_heads // v.shape[1], dim=1)


def _norm(layer: int, part: str) -> str:
    return "ln_final." if part == "final" else f"blocks.{layer}.{'ln1' if part == 'attn' else 'ln2'}."
