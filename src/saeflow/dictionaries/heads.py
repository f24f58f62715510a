"""The dictionaries of all heads of a hook as one: a dictionary of the concatenated heads whose weights are blocks.

Latent i of head h is latent h n + i of the whole; its encoder column and its decoder row are 0 outside head h, so that
every head is encoded and decoded by itself, at 1/H of a dense dictionary's arithmetic. On disk it is a folder with
`head_0`, `head_1`, ..., each a dictionary in SAELens's format, which opens there by itself.

Shapes: N tokens, H heads, d = H * `d_head`, n latents a head.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from saeflow.dictionaries.sae import Dictionary, Scale
from saeflow.dictionaries.spec import DictionaryError, Spec


class BlockDiagonal(Dictionary):
    """All heads of a hook, each by its own SAE. `spec` is of the whole, but that `k` and the like are of each head.

    W_enc (d, H n), b_enc (H n,), W_dec (H n, d), b_dec (d,) and threshold (H n,) are made when first asked for, which
    neither encoding nor decoding does.
    """

    def __init__(self, heads: Sequence[Dictionary]) -> None:
        """Raises `DictionaryError` unless these are SAEs of one kind and size, of head 0, head 1, ... of one hook."""
        _check([head.spec for head in heads])
        self.heads, first = list(heads), heads[0].spec
        sizes = {name: len(heads) * getattr(first, name) for name in ("d_in", "d_out", "d_sae")}
        self.spec = dataclasses.replace(first, kind="heads", hook_head_index=None, **sizes)
        self.W_skip = None

    def __getattr__(self, name: str) -> Any:
        """A tensor of the whole that is not there yet."""
        if name not in ("W_enc", "b_enc", "W_dec", "b_dec", "threshold"):
            raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")
        parts = [part for head in self.heads if (part := getattr(head, name)) is not None]
        whole = (torch.block_diag(*parts) if name.startswith("W") else torch.cat(parts)) if parts else None
        setattr(self, name, whole)
        return whole

    def latent(self, index: int) -> tuple[int, int]:
        """Of a latent of the whole: the head, and the number there."""
        return divmod(index, self.heads[0].d_sae)

    def pre_activations(self, x: Tensor) -> Tensor:
        """x (N, d) -> (N, H n), before the activation function."""
        return self._of_each(x, "pre_activations")

    def encode(self, x: Tensor) -> Tensor:
        """x (N, d) -> activations of all latents (N, H n), zeros included. With TopK every head keeps its k."""
        return self._of_each(x, "encode")

    def forward(self, x: Tensor) -> Tensor:
        """x (N, d) -> its reconstruction (N, d)."""
        return self._of_each(x, "forward")

    def decode(self, f: Tensor, x: Tensor | None = None) -> Tensor:
        """f (N, H n) -> (N, d)."""
        parts = f.tensor_split(len(self.heads), dim=1)
        return torch.cat([head.decode(part) for head, part in zip(self.heads, parts, strict=True)], dim=1)

    def top_latents(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """x (N, d) -> values and indices (N, H k), those of head h in columns h k to (h + 1) k. Only with TopK."""
        found = [head.top_latents(part) for head, part in zip(self.heads, self._split(x), strict=True)]
        indices = [latents + h * self.heads[0].d_sae for h, (_, latents) in enumerate(found)]
        return torch.cat([values for values, _ in found], dim=1), torch.cat(indices, dim=1)

    def decode_top(self, values: Tensor, indices: Tensor, x: Tensor | None = None) -> Tensor:
        """`decode` of what `top_latents` gives: values and indices (N, H k) -> (N, d)."""
        parts = zip(*(t.tensor_split(len(self.heads), dim=1) for t in (values, indices)), strict=True)
        outputs = [self.heads[h].decode_top(v, i - h * self.heads[0].d_sae) for h, (v, i) in enumerate(parts)]
        return torch.cat(outputs, dim=1)

    def _of_each(self, x: Tensor, method: str) -> Tensor:
        parts = zip(self.heads, self._split(x), strict=True)
        return torch.cat([getattr(head, method)(part) for head, part in parts], dim=1)

    def _split(self, x: Tensor) -> tuple[Tensor, ...]:
        """x (N, d) -> (N, d_head) of each head."""
        if x.shape[-1] != self.d_in:
            raise DictionaryError(
                f"this dictionary of the {len(self.heads)} heads of {self.spec.hook_name} takes activations "
                f"{self.d_in} wide, heads side by side, got {tuple(x.shape)}; are they from another hook or model?"
            )
        return x.tensor_split(len(self.heads), dim=-1)

    def to(self, device: str | torch.device) -> "BlockDiagonal":
        return BlockDiagonal([head.to(device) for head in self.heads])

    def with_scaling_folded(self, scale_in: Scale, scale_out: Scale) -> "BlockDiagonal":
        """As `Dictionary.with_scaling_folded`; a scale is a number or a vector (d,)."""
        vectors = (torch.as_tensor(s, dtype=torch.float32).expand(self.d_in) for s in (scale_in, scale_out))
        scales = [vector.tensor_split(len(self.heads)) for vector in vectors]
        return BlockDiagonal([head.with_scaling_folded(*s) for head, *s in zip(self.heads, *scales, strict=True)])

    def with_unit_decoder(self) -> "BlockDiagonal":
        return BlockDiagonal([head.with_unit_decoder() for head in self.heads])


def _check(specs: list[Spec]) -> None:
    if not specs or any(spec.kind != "sae" for spec in specs):
        raise DictionaryError("a dictionary of heads is made of one SAE a head")
    heads = [spec.hook_head_index for spec in specs]
    if heads != list(range(len(specs))):
        raise DictionaryError(f"a dictionary of heads needs those of head 0 to {len(specs) - 1} in order, got {heads}")

    def shared(spec: Spec) -> tuple[Any, ...]:
        return spec.activation, spec.d_in, spec.d_sae, spec.hook_name, spec.k, spec.apply_b_dec_to_input, spec.origin

    for spec in specs[1:]:
        if shared(spec) != shared(specs[0]):
            raise DictionaryError(
                f"the dictionaries of head {spec.hook_head_index} and head 0 of {specs[0].hook_name} are not alike: "
                f"{shared(spec)} and {shared(specs[0])}"
            )
