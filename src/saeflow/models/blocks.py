"""The MLP of one block as a function f, with its derivative in closed form.

`MLP` maps `blocks.L.ln2.hook_normalized` to `blocks.L.hook_mlp_out`. TransformerLens 3 puts the first before the norm's
gain and bias (version 2 put it after them), so with unfolded weights they are the first step of f, and they are folded
into its weights here. With `fold_ln` TransformerLens has done the same, so f has the same values. Its derivative is the
same only along directions of mean 0: after a LayerNorm nothing has another mean, so `fold_ln` also takes out of the
weights what reads the mean. From `blocks.L.mlp.hook_in`, after gain and bias, f is the MLP with its own weights.

    plain:  f(x) = phi(x W_in + b_in) W_out + b_out
    gated:  f(x) = (phi(x W_gate + b_gate) * (x W_in + b_in) + b_mid) W_out + b_out

`Block` may begin before the norm, and may add its input, the residual stream, to what the MLP gives. A norm divides
x (less its mean, in a LayerNorm) by a scale s that depends on x: y = x / s. Along a direction D the derivative of y is
(D - y (y . D) / d) / s, with D too less its mean; that mean is taken out of the weights instead, once.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor
from torch.nn import functional as F

from saeflow.config import ConfigError
from saeflow.kernels import loops
from saeflow.kernels.jacobian import BlockWeights, Linearisation
from saeflow.kernels.memory import empty
from saeflow.models.folder import Span, block_of_hooks
from saeflow.models.protocol import LanguageModel, full, hooked, norms_of, rounded

CHUNK_TOKENS = 512  # that are linearised at a time


def _gelu_slope(z: Tensor, approximate: str = "none") -> Tensor:
    """Phi(z) + z pdf(z), by torch's own derivative: one pass, and differentiable once more."""
    slope: Tensor = torch.ops.aten.gelu_backward(z.new_ones(()).expand_as(z), z, approximate=approximate)
    return slope


def _silu_slope(z: Tensor) -> Tensor:
    s = torch.sigmoid(z)
    return s * (1 + z * (1 - s))


_GELU_TANH = (lambda z: F.gelu(z, approximate="tanh"), lambda z: _gelu_slope(z, "tanh"))
ACTIVATIONS: dict[str, tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]]] = {
    "gelu": (F.gelu, _gelu_slope),
    "gelu_new": _GELU_TANH,
    "gelu_fast": _GELU_TANH,
    "gelu_pytorch_tanh": _GELU_TANH,
    "silu": (F.silu, _silu_slope),
    "relu": (F.relu, lambda z: (z > 0).to(z.dtype)),
}
"""phi and phi' by TransformerLens's name."""


@dataclass(frozen=True)
class MLP:
    """Weights of f, any norm's gain and bias folded in. Without a gate, `W_gate`, `b_gate` and `b_mid` are None."""

    activation: str
    W_in: Tensor
    """(d, m)"""
    b_in: Tensor
    """(m,)"""
    W_out: Tensor
    """(m, d)"""
    b_out: Tensor
    """(d,)"""
    W_gate: Tensor | None = None
    b_gate: Tensor | None = None
    b_mid: Tensor | None = None

    def __post_init__(self) -> None:
        if self.activation not in ACTIVATIONS:
            raise ConfigError(
                f"the MLP's activation {self.activation!r} has no closed-form Jacobian here; "
                f"these have: {', '.join(ACTIVATIONS)}"
            )

    def __call__(self, x: Tensor) -> Tensor:
        """f(x): (N, d) to (N, d)."""
        phi, _ = ACTIVATIONS[self.activation]
        linear = torch.addmm(self.b_in, x, self.W_in)
        if self.W_gate is None or self.b_gate is None or self.b_mid is None:
            return torch.addmm(self.b_out, phi(linear), self.W_out)
        gate = torch.addmm(self.b_gate, x, self.W_gate)
        return torch.addmm(self.b_out, phi(gate) * linear + self.b_mid, self.W_out)

    def slopes(self, x: Tensor) -> list[Tensor]:
        """(N, m), one a branch: the Jacobian of f at x is the sum over branches of W_branch diag(slope) W_out."""
        phi, dphi = ACTIVATIONS[self.activation]
        linear = torch.addmm(self.b_in, x, self.W_in)
        if self.W_gate is None or self.b_gate is None:
            return [dphi(linear)]
        gate = torch.addmm(self.b_gate, x, self.W_gate)
        return [dphi(gate) * linear, phi(gate)]


@dataclass(frozen=True)
class Block:
    """f between the two hooks of a pair."""

    mlp: MLP
    eps: float | None = None
    """Of the norm that the block begins with; None without one."""
    centred: bool = False
    """Whether that is a LayerNorm; otherwise an RMSNorm."""
    skip: bool = False
    """Whether the block's output includes its input."""

    def __call__(self, x: Tensor) -> Tensor:
        """f(x): (N, d) to (N, d)."""
        y = self.mlp(self._normalised(x)[0])
        return x + y if self.skip else y

    def weights(self) -> BlockWeights:
        """For the kernels."""
        return self._weights

    @cached_property
    def _weights(self) -> BlockWeights:
        """Made once: every step of a training asks for them."""
        W_in = _together([W for W in (self.mlp.W_gate, self.mlp.W_in) if W is not None])  # in the order of `slopes`
        if self.centred:
            W_in = W_in - W_in.mean(dim=1, keepdim=True)  # directions lose their mean
        return BlockWeights(W_in, self.mlp.W_out, self.skip)

    def linearise(self, x: Tensor) -> Linearisation:
        """What the block does around x (N, d); differentiable."""
        y, scale = self._normalised(x)
        slopes = _together(self.mlp.slopes(y))
        if scale is None:
            return Linearisation(slopes)
        drifts = torch.stack([y @ W for W in self.weights().W_in])
        return Linearisation(slopes / scale, drifts, y / x.shape[1])

    @torch.no_grad()
    def linearise_in_chunks(self, x: Tensor) -> Linearisation:
        """`linearise` for the loops, some tokens at a time: nothing but the result takes memory."""
        if not loops.supports(x):
            return self.linearise(x)
        chunk = self.linearise(x[:CHUNK_TOKENS])
        shapes = (None if t is None else (*t.shape[:-2], len(x), t.shape[-1]) for t in chunk)
        result = Linearisation(*(None if shape is None else empty(x, *shape) for shape in shapes))  # type: ignore[arg-type]
        for start in range(0, len(x), CHUNK_TOKENS):
            chunk = self.linearise(x[start : start + CHUNK_TOKENS]) if start else chunk
            for out, values in zip(result, chunk, strict=True):
                if out is not None and values is not None:
                    out[..., start : start + CHUNK_TOKENS, :] = values
        return result

    def _normalised(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        """The MLP's input and the norm's scale (N, 1)."""
        if self.eps is None:
            return x, None
        if self.centred:
            x = x - x.mean(dim=1, keepdim=True)
        scale = (x.square().mean(dim=1, keepdim=True) + self.eps).sqrt()
        return x / scale, scale


def _together(branches: list[Tensor]) -> Tensor:
    """As one tensor, without a copy of a single branch."""
    return branches[0][None] if len(branches) == 1 else torch.stack(branches)


class ModuleBlock:
    """f by the model's own modules, for MLPs and norms that have no closed form here; the kernels differentiate it."""

    def __init__(self, model: LanguageModel, layer: int, norm: bool, skip: bool, gain: bool = True) -> None:
        """`norm`, `gain`, `skip`: whether f begins with the norm, or else with its gain and bias, and includes its
        input."""
        self.model, self.layer, self.norm, self.skip, self.gain = model, layer, norm, skip, gain

    def __call__(self, x: Tensor) -> Tensor:
        """f(x): (N, d) to (N, d)."""
        block, x = self.model.blocks[self.layer], rounded(self.model, x[None])
        if self.norm:
            y = block.apply_mlp(block.ln2(x))
        elif not self.gain:
            y = block.apply_mlp(x)
        else:  # the hook is between the norm's division and its gain
            name = f"blocks.{self.layer}.ln2.hook_normalized"
            with hooked(self.model, [(name, lambda _, hook: x)]):
                y = block.apply_mlp(block.ln2(torch.zeros_like(x)))
        return full(x + y if self.skip else y)[0]


def read_span(model: LanguageModel, hook_name: str, hook_name_out: str) -> Span:
    """`models.block_of_hooks` of a model."""
    return block_of_hooks(hook_name, hook_name_out, bool(model.cfg.parallel_attn_mlp), norms_of(model))


def read_block(model: LanguageModel, hook_name: str, hook_name_out: str) -> Block | ModuleBlock:
    """The block between two hooks (see `models.block_of_hooks`), in closed form where there is one."""
    span = read_span(model, hook_name, hook_name_out)
    kind = str(model.cfg.normalization_type)
    known = kind in ("LN", "LNPre", "RMS", "RMSPre") and not model.cfg.use_normalization_before_and_after
    if not known or model.cfg.act_fn not in ACTIVATIONS or not hasattr(model.blocks[span.layer].mlp, "W_in"):
        return ModuleBlock(model, span.layer, span.norm, span.skip, gain=span.begins != "mlp")
    mlp = read_mlp(model, span.layer, with_gain=span.begins != "mlp")
    return Block(mlp, float(model.cfg.eps), kind.startswith("LN"), span.skip) if span.norm else Block(mlp)


def without_norm(block: Block | ModuleBlock, setting: str) -> Block:
    """The block with its norm left out, but for the gain and the bias. Raises `ConfigError`, which names the setting
    that asks for it, for a block without a closed form."""
    if not isinstance(block, Block):
        raise ConfigError(f"{setting}=ignored needs an MLP with a closed form; set {setting}=inside")
    return Block(block.mlp, skip=block.skip)


def input_gain(model: LanguageModel, span: Span) -> Tensor | None:
    """(d,): by what the values where f begins are multiplied before the MLP reads them, but for the norm's division,
    which depends on the token; None where that is part of f."""
    if span.norm:
        return None
    gain = getattr(model.blocks[span.layer].ln2, "w", None)  # none where it was folded into the weights
    if gain is None or span.begins == "mlp":
        return torch.ones(model.cfg.d_model, device=model.cfg.device)
    return full(torch.as_tensor(gain))


def read_mlp(model: LanguageModel, layer: int, with_gain: bool = True) -> MLP:
    """The MLP of block `layer`, with the gain and bias of its norm folded in, or without them."""
    block = model.blocks[layer]
    mlp, norm = block.mlp, block.ln2 if with_gain else None
    gain, bias = (None if (t := getattr(norm, name, None)) is None else full(t) for name in ("w", "b"))

    def folded(W: Tensor, b: Tensor | None) -> tuple[Tensor, Tensor]:
        W = full(W)
        zero = W.new_zeros(W.shape[1]) if b is None else full(b)
        return W if gain is None else gain[:, None] * W, zero if bias is None else zero + bias @ W

    activation, W_out, b_out = str(model.cfg.act_fn), full(mlp.W_out), full(mlp.b_out)

    if not hasattr(mlp, "W_gate"):
        return MLP(activation, *folded(mlp.W_in, mlp.b_in), W_out, b_out)
    # HookedTransformer adds a gated MLP's b_in after the product, and has none for the gate
    b_in, b_gate, b_mid = (
        (mlp.b_in, mlp.b_gate, torch.zeros_like(mlp.b_in)) if hasattr(mlp, "b_gate") else (None, None, mlp.b_in)
    )
    (W_in, b_in), (W_gate, b_gate) = folded(mlp.W_in, b_in), folded(mlp.W_gate, b_gate)
    return MLP(activation, W_in, b_in, W_out, b_out, W_gate, b_gate, full(b_mid))
