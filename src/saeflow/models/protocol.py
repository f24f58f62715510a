"""What the library asks of a language model, whatever runs it.

TransformerLens's `HookedTransformer` runs what it converts rightly; `bridge.BridgedModel` transformers' own modules.
Both give values at hooks by TransformerLens's names, passes that stop early or begin at a layer, what the unembedding
multiplies, so that logits can be made a few positions at a time, and the weights of attention and MLP by role, in
TransformerLens's shapes. Shapes: B rows, P positions, D model width, V vocabulary.
"""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from functools import partial
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from saeflow.models.folder import Norms

HALF = (torch.bfloat16, torch.float16)
HookFunction = Callable[..., Tensor | None]
"""Of a value and `hook`, whose `name` is the hook's; what it returns, if anything, replaces the value."""


class Unembedding(NamedTuple):
    """logits = final W_U + b_U, and softcap tanh(logits / softcap) of those where softcap is above 0."""

    W_U: Tensor
    """(D, V)"""
    b_U: Tensor
    """(V,)"""
    softcap: float

    def logits(self, final: Tensor) -> Tensor:
        """(..., D) to (..., V)."""
        logits = final @ self.W_U + self.b_U
        return self.softcap * torch.tanh(logits / self.softcap) if self.softcap > 0 else logits


class LanguageModel(Protocol):
    """A model; see the top of the file."""

    cfg: Any
    """Sizes, `device`, `act_fn`, `eps`, `normalization_type`, `output_logits_soft_cap`, by TransformerLens's names."""
    blocks: Sequence[Any]
    """By layer, with `attn` (`W_V`, `b_V`, `W_O`, `b_O`), `mlp` (`W_in`, `b_in`, `W_out`, `b_out`, and `W_gate` where
    it is gated; a mixture of experts has none), `ln1` and `ln2` (`w`, `b`), and `apply_mlp`."""
    embed: Any
    """`W_E` (V, D), as it is added to the residual stream."""
    unembed: Any
    ln_final: Any

    def hooks(self, fwd_hooks: list[tuple[str, HookFunction]]) -> AbstractContextManager[Any]:
        """Within it, the functions are called with the values at the hooks, in the order of the list."""

    def __call__(self, given: Tensor, *, start_at_layer: int | None = None, stop_at_layer: int | None = None) -> Tensor:
        """From tokens (B, P), or the residual stream (B, P, D) before block `start_at_layer`, to the residual stream
        before block `stop_at_layer`, or to logits (B, P, V)."""


def hooked(model: LanguageModel, hooks: list[tuple[str, HookFunction]]) -> AbstractContextManager[Any]:
    """`model.hooks`, whose functions see float32 where the model has fewer bits, on the model's first device, and what
    they give is rounded and brought to where the layer is."""
    device = torch.device(model.cfg.device)
    return model.hooks(fwd_hooks=[(name, partial(_outside, function, device)) for name, function in hooks])


def _outside(function: HookFunction, device: torch.device, value: Tensor, hook: Any) -> Tensor | None:
    new = function(full(value.to(device)), hook=hook)
    return None if new is None else new.to(value.device, value.dtype)


def full(value: Tensor) -> Tensor:
    """A value or weights that a model has in fewer bits, as float32; others as they are."""
    return value.float() if value.dtype in HALF else value


def rounded(model: LanguageModel, value: Tensor) -> Tensor:
    """A value for a model that computes in fewer bits; for others as it is."""
    dtype: torch.dtype = model.cfg.dtype
    return value.to(dtype) if dtype in HALF else value


def unembedding(model: LanguageModel) -> Unembedding:
    """What makes logits of a model's final values; its matrix in an order that a product reads without a copy."""
    W_U, softcap = full(model.unembed.W_U), float(model.cfg.output_logits_soft_cap or 0.0)
    return Unembedding(W_U if W_U.T.is_contiguous() else W_U.contiguous(), full(model.unembed.b_U), softcap)


def norms_of(model: LanguageModel) -> Norms:
    """Where the blocks normalise (`Geometry.norms`)."""
    return getattr(model.cfg, "norms", "before")
