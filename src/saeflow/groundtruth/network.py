"""Transformers without norms in plain torch: what the compiled and the trained models of the cases are.

The same function as a `HookedTransformer` of the same config and weights (a test holds them together), at a fraction of
its time a pass, with one thing more: a *node*, a head or an MLP, can be given the value that it has on another row.

Shapes: N rows, P positions, d width, H heads of h, m hidden units.
"""

import re
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from saeflow.config import ConfigError
from saeflow.groundtruth.compiler import empty_weights

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {"relu": F.relu, "gelu": F.gelu}
HOOKS = ("hook_resid_pre", "hook_attn_out", "hook_resid_mid", "hook_mlp_out", "hook_resid_post")


class Node(NamedTuple):
    """A head's output (its hook_z: what it adds to the residual stream is a linear map of that), or an MLP's
    hook_post."""

    layer: int
    head: int | None = None
    """None: the MLP."""

    @property
    def name(self) -> str:
        return f"blocks.{self.layer}." + ("mlp" if self.head is None else f"attn.{self.head}")


class Pass(NamedTuple):
    """What a pass leaves for others to resume from."""

    output: Tensor
    """(N, P, d_vocab_out)"""
    z: list[Tensor]
    """(N, P, H, h) a layer"""
    hidden: list[Tensor]
    """(N, P, m) a layer"""
    residual: list[Tensor]
    """(N, P, d) before every layer, and after the last."""
    middle: list[Tensor]
    """(N, P, d) between attention and MLP of every layer."""

    def value(self, node: Node) -> Tensor:
        return self.hidden[node.layer] if node.head is None else self.z[node.layer][:, :, node.head]

    def at(self, hook_name: str) -> Tensor:
        """(N, P, d) of a pass from the tokens, at one of `HOOKS` of a layer."""
        layer, kind = _layer_and_kind(hook_name)
        if kind == "hook_resid_mid":
            return self.middle[layer]
        if kind in ("hook_resid_pre", "hook_resid_post"):
            return self.residual[layer + (kind == "hook_resid_post")]
        if kind == "hook_attn_out":
            return self.middle[layer] - self.residual[layer]
        return self.residual[layer + 1] - self.middle[layer]


class Network:
    """`parameters` are what training changes: TransformerLens's, with the heads of a layer side by side."""

    def __init__(self, config: Mapping[str, Any], weights: Mapping[str, Any], dtype: torch.dtype = torch.float32):
        """`weights` by TransformerLens's names and in its shapes (`saeflow.groundtruth.compiler.empty_weights`)."""
        self.config = dict(config)
        tensors = {name: torch.as_tensor(w).to(dtype, copy=True) for name, w in weights.items()}
        self.parameters: dict[str, Tensor] = {}
        for name, w in tensors.items():
            kind = name.split(".")[-1]
            if kind in ("W_Q", "b_Q"):
                three = [tensors[name[:-1] + letter] for letter in "QKV"]  # (H, d, h) or (H, h) each
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
        return self._from(self._embedded(tokens), 0, {})

    def interchanged(self, base: Tensor, source: Tensor, node: Node) -> Tensor:
        """Output (N, P, d_vocab_out) on `base` (N, P) with the node as it is on `source` (N, P), taken as constant."""
        with torch.no_grad():
            value = self._from(self._embedded(source), 0, {}, node.layer + 1).value(node)
        return self._from(self._embedded(base), 0, {node: value}).output

    def patched(self, base: Pass, node: Node, value: Tensor, rows: Tensor | slice = slice(None)) -> Tensor:
        """Output (N, P, d_vocab_out) on rows `rows` of `base` with the node at `value` (N, P, h) or (N, P, m)."""
        return self._from(base.residual[node.layer][rows].permute(2, 1, 0), node.layer, {node: value}).output

    def spliced(self, base: Pass, hook_name: str, value: Tensor) -> Tensor:
        """Output (N, P, d_vocab_out) with the value at a hook (see `Pass.at`) replaced by `value` (N, P, d)."""
        layer, kind = _layer_and_kind(hook_name)
        if kind in ("hook_resid_pre", "hook_resid_post"):
            return self._from(value.permute(2, 1, 0), layer + (kind == "hook_resid_post"), {}).output
        if kind == "hook_mlp_out":
            return self._from((base.middle[layer] + value).permute(2, 1, 0), layer + 1, {}).output
        middle = value if kind == "hook_resid_mid" else base.residual[layer] + value
        hidden = self._hidden(middle.permute(2, 1, 0), layer)
        return self._from(middle.permute(2, 1, 0) + self._mlp_out(hidden, layer), layer + 1, {}).output

    def _hidden(self, middle: Tensor, layer: int) -> Tensor:
        p, name = self.parameters, f"blocks.{layer}.mlp."
        return self.activation(_affine(middle, p[name + "W_in"], p[name + "b_in"]))

    def _mlp_out(self, hidden: Tensor, layer: int) -> Tensor:
        p, name = self.parameters, f"blocks.{layer}.mlp."
        return _affine(hidden, p[name + "W_out"], p[name + "b_out"])

    def _embedded(self, tokens: Tensor) -> Tensor:
        """(d, P, N)"""
        p = self.parameters
        return p["embed.W_E"].T[:, tokens.T] + p["pos_embed.W_pos"][: tokens.shape[1]].T[:, :, None]

    def _from(self, residual: Tensor, start: int, values: Mapping[Node, Tensor], stop: int | None = None) -> Pass:
        """`residual` (d, P, N): rows come last here, so that operations on a few numbers a row run along all rows."""
        p, c = self.parameters, self.config
        H, h, causal = c["n_heads"], c["d_head"], c["attention_dir"] == "causal"
        zs, hiddens, middles, residuals = [], [], [], [_rows_first(residual)] * start
        for layer in range(start, c["n_layers"] if stop is None else stop):
            name = f"blocks.{layer}."
            residuals.append(_rows_first(residual))
            qkv = _affine(residual, p[name + "attn.W_QKV"], p[name + "attn.b_QKV"])
            z = attend(qkv.unflatten(0, (3, H, h)), causal)
            for node, value in values.items():
                if node.layer == layer and node.head is not None:
                    z = torch.cat([z[: node.head], value.permute(2, 1, 0)[None], z[node.head + 1 :]])
            residual = residual + _affine(z.flatten(0, 1), p[name + "attn.W_O"], p[name + "attn.b_O"])
            middles.append(_rows_first(residual))
            patched_value = values.get(Node(layer))
            hidden = self._hidden(residual, layer) if patched_value is None else patched_value.permute(2, 1, 0)
            residual = residual + self._mlp_out(hidden, layer)
            zs.append(z.permute(3, 2, 0, 1))
            hiddens.append(_rows_first(hidden))
        residuals.append(_rows_first(residual))
        output = _affine(residual, p["unembed.W_U"], p["unembed.b_U"])
        return Pass(_rows_first(output), zs, hiddens, residuals, middles)


def _layer_and_kind(hook_name: str) -> tuple[int, str]:
    found = re.fullmatch(rf"blocks\.(\d+)\.({'|'.join(HOOKS)})", hook_name)
    if not found:
        raise ConfigError(f"{hook_name!r}: dictionaries of a model of a case are used at blocks.L.{', '.join(HOOKS)}")
    return int(found[1]), found[2]


def _rows_first(x: Tensor) -> Tensor:
    return x.permute(2, 1, 0)


def _affine(x: Tensor, W: Tensor, b: Tensor) -> Tensor:
    """x (d, P, N) -> (p, P, N) with W (d, p)."""
    return torch.addmm(b[:, None], W.T, x.flatten(1)).unflatten(1, x.shape[1:])


def attend(qkv: Tensor, causal: bool) -> Tensor:
    """softmax(q k^T / sqrt(h)) v of (3, H, h, P, N), as elementwise products where rows have few positions."""
    q, k, v = qkv
    P = q.shape[2]
    if P > 16:
        q, k, v = (t.permute(3, 0, 2, 1) for t in (q, k, v))
        return F.scaled_dot_product_attention(q, k, v, is_causal=causal).permute(1, 3, 2, 0)
    scores = (q[:, :, :, None] * k[:, :, None] / q.shape[1] ** 0.5).sum(1)  # (H, P, P, N)
    if causal:
        after = torch.ones(P, P, dtype=torch.bool, device=q.device).triu(1)
        scores = scores.masked_fill(after[:, :, None], -torch.inf)
    return (scores.softmax(2)[:, None] * v[:, :, None]).sum(3)


def initial_weights(config: Mapping[str, Any], seed: int) -> dict[str, np.ndarray]:
    """Matrices normal with TransformerLens's standard deviation, 0.8 / sqrt(d_model); biases 0."""
    rng = np.random.default_rng(seed)
    weights = empty_weights(dict(config))
    for name, w in weights.items():
        if ".W_" in name:
            w[...] = rng.standard_normal(w.shape) * 0.8 / config["d_model"] ** 0.5
    return weights
