"""Transformers without norms in plain torch: what the compiled and the trained models of the cases are.

The same function as a `HookedTransformer` of the same config and weights (a test holds them together), at a fraction of
its time a pass, with one thing more: a *node*, a head or an MLP, can be given the value that it has on another row.

Shapes: N rows, P positions, d width, H heads of h, m hidden units.
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {"relu": F.relu, "gelu": F.gelu}


class Node(NamedTuple):
    """A head's output (its hook_z: what it adds to the residual stream is a linear map of that), or an MLP's
    hook_post."""

    layer: int
    head: int | None = None
    """None: the MLP."""

    @property
    def name(self) -> str:
        where = "mlp" if self.head is None else f"attn.{self.head}"
        return f"blocks.{self.layer}.{where}"


class Pass(NamedTuple):
    """What a pass leaves for others to resume from."""

    output: Tensor
    """(N, P, d_vocab_out)"""
    z: list[Tensor]
    """(N, P, H, h) a layer"""
    hidden: list[Tensor]
    """(N, P, m) a layer"""
    residual: list[Tensor]
    """(N, P, d) before every layer."""

    def value(self, node: Node) -> Tensor:
        return self.hidden[node.layer] if node.head is None else self.z[node.layer][:, :, node.head]


class Network:
    """`parameters` are what training changes: TransformerLens's, with the heads of a layer side by side."""

    def __init__(self, config: Mapping[str, Any], weights: Mapping[str, Any], dtype: torch.dtype = torch.float32):
        """`weights` by TransformerLens's names and in its shapes (`saeflow.groundtruth.compiler.empty_weights`)."""
        self.config = dict(config)
        held = {name: torch.as_tensor(w).to(dtype, copy=True) for name, w in weights.items()}
        self.parameters: dict[str, Tensor] = {}
        for name, w in held.items():
            kind = name.split(".")[-1]
            if kind in ("W_Q", "b_Q"):
                three = [held[name[:-1] + letter] for letter in "QKV"]  # (H, d, h) or (H, h) each
                packed = torch.cat([t.movedim(0, -2).flatten(-2) for t in three], -1)
                self.parameters[name[:-1] + "QKV"] = packed.contiguous()
            elif kind == "W_O":
                self.parameters[name] = w.flatten(0, 1)
            elif kind not in ("W_K", "W_V", "b_K", "b_V"):
                self.parameters[name] = w
        self.activation = ACTIVATIONS[self.config["act_fn"]]

    def weights(self) -> dict[str, Tensor]:
        """By TransformerLens's names and in its shapes."""
        H, h = self.config["n_heads"], self.config["d_head"]
        found: dict[str, Tensor] = {}
        for name, p in self.parameters.items():
            p = p.detach()
            if name.endswith("QKV"):
                three = p.unflatten(-1, (3, H, h)).unbind(-3)
                found |= {name[:-3] + c: t.movedim(-2, 0).contiguous() for c, t in zip("QKV", three, strict=True)}
            else:
                found[name] = p.unflatten(0, (H, h)) if name.endswith("W_O") else p
        return found

    def __call__(self, tokens: Tensor) -> Pass:
        """tokens (N, P) int64."""
        p = self.parameters
        residual = F.embedding(tokens, p["embed.W_E"]) + p["pos_embed.W_pos"][: tokens.shape[1]]
        return self._from(residual, 0, {})

    def patched(self, base: Pass, node: Node, value: Tensor, rows: Tensor | slice = slice(None)) -> Tensor:
        """Output (N, P, d_vocab_out) on rows `rows` of `base` with the node at `value` (N, P, h) or (N, P, m)."""
        return self._from(base.residual[node.layer][rows], node.layer, {node: value}).output

    def _from(self, residual: Tensor, start: int, values: Mapping[Node, Tensor]) -> Pass:
        p, c = self.parameters, self.config
        H, h, causal = c["n_heads"], c["d_head"], c["attention_dir"] == "causal"
        zs, hiddens, residuals = [], [], [residual] * start
        for layer in range(start, c["n_layers"]):
            name = f"blocks.{layer}."
            residuals.append(residual)
            qkv = F.linear(residual, p[name + "attn.W_QKV"].T, p[name + "attn.b_QKV"])
            q, k, v = qkv.unflatten(-1, (3, H, h)).permute(2, 0, 3, 1, 4)  # (N, H, P, h) each
            z = F.scaled_dot_product_attention(q, k, v, is_causal=causal).transpose(1, 2)
            for node, value in values.items():
                if node.layer == layer and node.head is not None:
                    z = torch.cat([z[:, :, : node.head], value[:, :, None], z[:, :, node.head + 1 :]], 2)
            residual = residual + F.linear(z.flatten(2), p[name + "attn.W_O"].T, p[name + "attn.b_O"])
            if Node(layer) in values:
                hidden = values[Node(layer)]
            else:
                hidden = self.activation(F.linear(residual, p[name + "mlp.W_in"].T, p[name + "mlp.b_in"]))
            residual = residual + F.linear(hidden, p[name + "mlp.W_out"].T, p[name + "mlp.b_out"])
            zs.append(z)
            hiddens.append(hidden)
        residuals.append(residual)
        output = F.linear(residual, p["unembed.W_U"].T, p["unembed.b_U"])
        return Pass(output, zs, hiddens, residuals)


def initial_weights(config: Mapping[str, Any], seed: int) -> dict[str, np.ndarray]:
    """Matrices normal with TransformerLens's standard deviation, 0.8 / sqrt(d_model); biases 0."""
    from saeflow.groundtruth.compiler import empty_weights

    rng = np.random.default_rng(seed)
    weights = empty_weights(dict(config))
    for name, w in weights.items():
        if ".W_" in name:
            w[...] = rng.standard_normal(w.shape) * 0.8 / config["d_model"] ** 0.5
    return weights
