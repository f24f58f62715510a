"""Models that transformers' own modules run, with TransformerLens's `TransformerBridge` for the hooks between them.

What a `BridgedModel` adds to the bridge, so that it is a `protocol.LanguageModel`:

* functions at hooks are told the name that they were asked for, and not that of the module;
* a value that is replaced at `hook_resid_mid` goes into the sum after the MLP too, and not into the MLP alone. The
  bridge has a hook where the norm reads, which the sum does not pass;
* a pass begins at a layer: earlier blocks hand on what they are given, and that one reads the residual stream instead,
  with the masks and the rotations that the model makes for it. It ends before a layer in the same way.

Where a block normalises what it writes (`norms` is "both" or "after"), `hook_attn_out` and `hook_mlp_out` are what is
added to the residual stream, after those norms. `attn.hook_q` and `attn.hook_k` are before norms of queries and keys.
Shapes: B rows, P positions, D model width, H query heads, G key and value heads, d = `d_head`, m = `d_mlp`.
"""

import re
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from saeflow.models.folder import Geometry, Norms
from saeflow.models.protocol import HookFunction
from saeflow.models.spreading import spread

_MID = re.compile(r"blocks\.(\d+)\.hook_resid_mid")


@dataclass(frozen=True)
class Sizes:
    """What `HookedTransformer.cfg` says, of a bridged model."""

    n_layers: int
    d_model: int
    n_heads: int
    n_key_value_heads: int
    d_head: int
    d_mlp: int
    n_ctx: int
    d_vocab: int
    act_fn: str
    eps: float
    norms: Norms
    output_logits_soft_cap: float
    device: torch.device
    dtype: torch.dtype
    normalization_type: str = "RMS"
    parallel_attn_mlp: bool = False

    @property
    def use_normalization_before_and_after(self) -> bool:
        """Whether a block normalises what it writes."""
        return self.norms != "before"


class Stopped(Exception):
    """Ends a pass; carries the residual stream (B, P, D) there."""

    def __init__(self, residual: Tensor) -> None:
        self.residual = residual


class BridgedModel:
    """A transformers model as a `protocol.LanguageModel`; see the top of the file."""

    def __init__(self, original: Any, geometry: Geometry) -> None:
        """Takes over the model: the bridge puts its modules between those of `original`."""
        from transformer_lens.model_bridge.sources._bridge_builder import build_bridge_from_module

        # It says so whenever a value after a norm's division is replaced; the values are right, up to rounding.
        warnings.filterwarnings("ignore", "A forward hook edited hook_scale/hook_normalized")
        bridge = build_bridge_from_module(original, geometry.architecture, hf_config=original.config)
        original.eval().requires_grad_(False)
        self._base, self._points = original.base_model, bridge.hook_dict
        self._stations = [*bridge.blocks, bridge.ln_final]
        self.cfg = _sizes(original, geometry, float(bridge.cfg.output_logits_soft_cap or 0.0))
        offset = 1.0 if getattr(bridge.cfg, "rmsnorm_uses_offset", False) else 0.0  # Gemma's gains are 1 + weight
        self._original, self._bridge, self._offset = original, bridge, offset
        self._find_roles()

    def _find_roles(self) -> None:
        """Weights by role, where they lie now."""
        bridge, offset = self._bridge, self._offset
        self.blocks: Sequence[Any] = [_Block(block, self.cfg, offset) for block in bridge.blocks]
        self.embed = SimpleNamespace(W_E=_embeddings(bridge.embed.original_component))
        self.unembed, self.ln_final = bridge.unembed, _Norm(bridge.ln_final, offset)

    def spread(self, devices: Sequence[torch.device]) -> "BridgedModel":
        """Moves its layers to several devices (`saeflow.models.spreading`)."""
        spread(self._original, self._stations[:-1], self._stations[-1], devices)
        self.cfg = replace(self.cfg, device=devices[0])
        self._find_roles()
        return self

    @contextmanager
    def hooks(self, fwd_hooks: list[tuple[str, HookFunction]]) -> Iterator["BridgedModel"]:
        """Within it, the functions are called with the values at the hooks, in the order of the list.

        Raises `KeyError` for a hook that the model does not have.
        """
        first: list[tuple[str, HookFunction]] = []
        last: list[tuple[str, HookFunction]] = []
        for name, function in fwd_hooks:
            if found := _MID.fullmatch(name):
                sums = _Sums(partial(function, hook=SimpleNamespace(name=name)))
                block = f"blocks.{found[1]}."
                first += [(name, sums.at_mid), (block + "hook_resid_post", sums.at_end)]
                last.append((block + "hook_mlp_out", sums.at_mlp))
        inner: list[tuple[str, HookFunction]] = [
            (name, partial(_named, function, SimpleNamespace(name=name)))
            for name, function in fwd_hooks
            if not _MID.fullmatch(name)
        ]
        points = [(self._points[name], function) for name, function in (*first, *inner, *last)]
        before = {id(point): list(point.fwd_hooks) for point, _ in points}
        try:
            for point, function in points:
                point.add_hook(function)
            yield self
        finally:
            for point, _ in points:
                for handle in point.fwd_hooks:
                    if handle not in before[id(point)]:
                        handle.hook.remove()
                point.fwd_hooks = before[id(point)]

    def __call__(self, given: Tensor, *, start_at_layer: int | None = None, stop_at_layer: int | None = None) -> Tensor:
        """From tokens (B, P), or the residual stream (B, P, D) before block `start_at_layer`, to the residual stream
        before block `stop_at_layer`, or to logits (B, P, V)."""
        if stop_at_layer is None:
            final = self.ln_final(self(given, start_at_layer=start_at_layer, stop_at_layer=self.cfg.n_layers))
            logits: Tensor = self.unembed(final)
            cap = self.cfg.output_logits_soft_cap
            return cap * torch.tanh(logits / cap) if cap > 0 else logits
        if start_at_layer is not None and start_at_layer >= stop_at_layer:
            return given
        tokens = given if start_at_layer is None else given.new_zeros(given.shape[:2], dtype=torch.int64)
        instead: dict[int, Any] = dict.fromkeys(range(start_at_layer or 0), _hand_on)
        if start_at_layer is not None:
            instead[start_at_layer] = partial(_read_instead, self._stations[start_at_layer].forward, given)
        instead[stop_at_layer] = _stop
        for layer, forward in instead.items():
            vars(self._stations[layer])["forward"] = forward  # setattr would give it to the module that is wrapped
        try:
            self._base(input_ids=tokens, use_cache=False)
        except Stopped as stopped:
            return stopped.residual
        finally:
            for layer in instead:
                del vars(self._stations[layer])["forward"]  # uncovers the method of its class
        raise AssertionError("no pass leaves out the norm after the last block")


def _named(function: HookFunction, named: Any, value: Tensor, hook: Any) -> Tensor | None:
    return function(value, hook=named)


def _hand_on(hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    return hidden_states


def _read_instead(forward: Any, residual: Tensor, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
    return forward(residual.to(hidden_states.device), *args, **kwargs)


def _stop(hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    raise Stopped(hidden_states)


class _Sums:
    """The residual stream after a block whose value between attention and MLP is replaced."""

    def __init__(self, function: Any) -> None:
        self.function = function
        self.mid: Tensor | None = None
        self.written: Tensor | None = None

    def at_mid(self, value: Tensor, hook: Any) -> Tensor | None:
        self.mid = self.function(value)
        return self.mid

    def at_mlp(self, value: Tensor, hook: Any) -> None:
        self.written = value

    def at_end(self, value: Tensor, hook: Any) -> Tensor | None:
        mid, written, self.mid, self.written = self.mid, self.written, None, None
        if mid is None:
            return None
        assert written is not None, "the MLP's hook fires before the block's last"
        return mid + written


class _Norm:
    """A norm by the root mean square, or none."""

    def __init__(self, norm: Any, offset: float) -> None:
        self._norm = norm
        self.w = None if norm is None else norm.original_component.weight + offset
        """(D,)"""
        self.b = None

    def __call__(self, x: Tensor) -> Tensor:
        return x if self._norm is None else self._norm(x)


class _Block:
    """Attention and MLP of one block by role."""

    def __init__(self, block: Any, cfg: Sizes, offset: float) -> None:
        reads = cfg.norms != "after"
        self.ln1, self.ln2 = (_Norm(getattr(block, name) if reads else None, offset) for name in ("ln1", "ln2"))
        self.attn = _Attention(block.attn, cfg)
        self.mlp = _GatedMLP(block.mlp) if hasattr(block.mlp, "gate") and hasattr(block.mlp, "out") else None
        self._mlp, self._after = block.mlp, {"both": "ln2_post", "after": "ln2"}.get(cfg.norms)
        self._block = block

    def apply_mlp(self, x: Tensor) -> Tensor:
        """What the MLP adds to the residual stream, after its norm if it has one: (B, P, D) to (B, P, D)."""
        written = self._mlp(x)
        written = written[0] if isinstance(written, tuple) else written  # of experts, with the router's scores
        return written if self._after is None else getattr(self._block, self._after)(written)


class _Attention:
    """Weights of one layer, by query head, made when they are asked for."""

    def __init__(self, attention: Any, cfg: Sizes) -> None:
        self._v, self._o = attention.v.original_component, attention.o.original_component
        self._cfg = cfg

    @property
    def W_V(self) -> Tensor:
        """(H, D, d)"""
        cfg = self._cfg
        by_group = self._v.weight.view(cfg.n_key_value_heads, cfg.d_head, cfg.d_model).transpose(1, 2)
        return by_group.repeat_interleave(cfg.n_heads // cfg.n_key_value_heads, dim=0)

    @property
    def b_V(self) -> Tensor:
        """(H, d)"""
        cfg = self._cfg
        by_group = _bias(self._v).view(cfg.n_key_value_heads, cfg.d_head)
        return by_group.repeat_interleave(cfg.n_heads // cfg.n_key_value_heads, dim=0)

    @property
    def W_O(self) -> Tensor:
        """(H, d, D)"""
        return self._o.weight.T.view(self._cfg.n_heads, self._cfg.d_head, self._cfg.d_model)

    @property
    def b_O(self) -> Tensor:
        """(D,)"""
        return _bias(self._o)


class _GatedMLP:
    """(phi(x W_gate + b_gate) * (x W_in + b_in)) W_out + b_out"""

    def __init__(self, mlp: Any) -> None:
        gate, linear, out = (getattr(mlp, role).original_component for role in ("gate", "in", "out"))
        self.W_gate, self.W_in, self.W_out = gate.weight.T, linear.weight.T, out.weight.T
        """(D, m), (D, m), (m, D)"""
        self.b_gate, self.b_in, self.b_out = _bias(gate), _bias(linear), _bias(out)
        """(m,), (m,), (D,)"""


def _bias(linear: Any) -> Tensor:
    bias: Tensor | None = getattr(linear, "bias", None)
    return linear.weight.new_zeros(len(linear.weight)) if bias is None else bias


def _embeddings(embedding: Any) -> Tensor:
    """(V, D), with Gemma's factor."""
    scale = getattr(embedding, "embed_scale", None)
    weight: Tensor = embedding.weight
    return weight if scale is None else weight * torch.as_tensor(scale, dtype=weight.dtype, device=weight.device)


def _sizes(original: Any, geometry: Geometry, softcap: float) -> Sizes:
    config, weight = original.config, original.get_output_embeddings().weight
    g = geometry
    return Sizes(
        n_layers=g.n_layers,
        d_model=g.d_model,
        n_heads=g.n_heads,
        n_key_value_heads=g.n_key_value_heads,
        d_head=g.d_head,
        d_mlp=g.d_mlp,
        n_ctx=g.n_ctx,
        d_vocab=len(weight),
        act_fn=getattr(config, "hidden_activation", None) or config.hidden_act,
        eps=float(config.rms_norm_eps),
        norms=g.norms,
        output_logits_soft_cap=softcap,
        device=weight.device,
        dtype=weight.dtype,
    )
