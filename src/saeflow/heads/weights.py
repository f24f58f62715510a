"""What an attention layer reads and writes, by query head, and a dictionary's weights cut by head.

A layer's output is  attn_out = sum over h of z_h W_O[h] + b_O,  with z (N, H, d) the values at `attn.hook_z`. In models
with fewer key and value heads (GQA) query head h mixes the values of head h // (H / G), and has that head's W_V.

Shapes here and in the package: N tokens, P positions, D model width, H query heads, G key and value heads,
d = `d_head`, n = `d_sae` (of a per-head dictionary: of one head), V vocabulary.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from saeflow.dictionaries import Dictionary, DictionaryError
from saeflow.models.attention import read_values
from saeflow.models.protocol import LanguageModel, full


class Attention(NamedTuple):
    """The value and output weights of one layer. The gain and bias of the norm before it are folded in."""

    layer: int
    W_V: Tensor
    """(H, D, d): head h reads (centre(r) / scale) W_V[h] from the residual stream r."""
    b_V: Tensor
    """(H, d)"""
    W_O: Tensor
    """(H, d, D)"""
    b_O: Tensor
    """(D,)"""
    centred: bool
    """Whether the norm takes out the mean (LayerNorm)."""

    def to(self, device: str | torch.device) -> "Attention":
        return self._replace(**{name: getattr(self, name).to(device) for name in ("W_V", "b_V", "W_O", "b_O")})


def read_attention(model: LanguageModel, layer: int) -> Attention:
    """The weights of a layer, the norm's folded in whether or not the model was loaded with `fold_ln`."""
    attention: Any = model.blocks[layer].attn
    centred = str(model.cfg.normalization_type).startswith("LN")
    W_O, b_O = full(attention.W_O.detach()), full(attention.b_O.detach())
    return Attention(layer, *read_values(model, layer), W_O, b_O, centred)


def head_outputs(z: Tensor, W_O: Tensor) -> Tensor:
    """What each head adds to the residual stream, but for b_O: z (N, H, d), W_O (H, d, D) -> (N, H, D)."""
    return torch.einsum("nhd,hde->nhe", z, W_O)


def encoder_by_head(dictionary: Dictionary, n_heads: int) -> Tensor:
    """W_enc of a dictionary on concatenated heads, (H, d, n)."""
    return _check_all_heads(dictionary, n_heads).W_enc.view(n_heads, -1, dictionary.d_sae)


def decoder_by_head(dictionary: Dictionary, n_heads: int) -> Tensor:
    """W_dec of a dictionary on concatenated heads, (n, H, d)."""
    return _check_all_heads(dictionary, n_heads).W_dec.view(dictionary.d_sae, n_heads, -1)


def _check_all_heads(dictionary: Dictionary, n_heads: int) -> Dictionary:
    if dictionary.spec.hook_head_index is not None or dictionary.d_in % n_heads:
        raise DictionaryError(
            f"this needs a dictionary on all {n_heads} heads of a layer, flattened; that of "
            f"{dictionary.spec.hook_name} is {dictionary.d_in} wide and of head {dictionary.spec.hook_head_index}"
        )
    return dictionary


def lifted(heads: Sequence[Dictionary], W_O: Tensor) -> list[Tensor]:
    """Decoder rows of each head's dictionary after W_O, (n, D) each, float64: what a latent writes to the stream."""
    return [one.W_dec.double() @ W.double() for one, W in zip(heads, W_O, strict=True)]


def random_rotations(n: int, size: int, seed: int) -> Tensor:
    """(n, size, size) independent rotations and reflections, uniform (Haar), float64."""
    generator = torch.Generator().manual_seed(seed)
    Q, R = torch.linalg.qr(torch.randn(n, size, size, generator=generator, dtype=torch.float64))
    return Q * R.diagonal(dim1=-2, dim2=-1).sign()[:, None, :]  # without the signs QR is not uniform
