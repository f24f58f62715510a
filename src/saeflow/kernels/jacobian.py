"""The Jacobian of a TopK pair of SAEs around an MLP, in closed form, for the active latents of each token.

After Farnik, Lawson, Houghton, Aitchison (2025), "Jacobian Sparse Autoencoders". With D the input SAE's decoder, E the
output SAE's encoder and f the MLP between them, the map from the input SAE's latents to the output SAE's
pre-activations has, for the active input latents A_t and output latents B_t of token t, the block

    J_t[i, j] = sum_r (W_out E)[r, B_i] phi'(z_t)[r] (D W_in)[A_j, r]

A gated MLP adds a second branch of the same form, so an MLP is here a list of branches: a product WD (n, m) of decoder
and input weights, and the slope (N, m) by which a token scales it (`saeflow.mlp` has both). Both products keep
latents as rows, so that the rows of a token's latents are contiguous; the slope is multiplied into one side only, and
one batched matrix product of a few tokens at a time stays in cache.

Shapes: N tokens, d model width, m = d_mlp, n latents, k active ones.
"""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

CHUNK_ELEMENTS = 1 << 20  # of one gathered (tokens, k, m) operand: 4 MiB in float32


def encoder_rows(W_enc: Tensor, W_out: Tensor) -> Tensor:
    """WE (n, m): how the hidden units move each output latent. `W_enc` (d, n) of the output SAE, `W_out` (m, d)."""
    return W_enc.T @ W_out.T


def decoder_rows(W_dec: Tensor, W_in: Tensor) -> Tensor:
    """WD (n, m): how each input latent moves the hidden units. `W_dec` (n, d) of the input SAE, `W_in` (d, m)."""
    return W_dec @ W_in


def jacobian_blocks(WDs: Sequence[Tensor], slopes: Sequence[Tensor], WE: Tensor, A: Tensor, B: Tensor) -> Tensor:
    """J (N, k_out, k_in) of all tokens at once.

    `WDs` (n, m) and `slopes` (N, m), one a branch; `WE` (n, m); `A` (N, k_in) and `B` (N, k_out), indices of the active
    input and output latents. Memory is a few times N k m: for many tokens use `jacobian_chunks`.
    """
    M = WDs[0][A].mul_(slopes[0][:, None])
    for WD, slope in zip(WDs[1:], slopes[1:], strict=True):
        M.addcmul_(WD[A], slope[:, None])
    return WE[B] @ M.transpose(1, 2)


def jacobian_chunks(
    WDs: Sequence[Tensor], slopes: Sequence[Tensor], WE: Tensor, A: Tensor, B: Tensor
) -> Iterator[tuple[slice, Tensor]]:
    """Yields (tokens, J of these tokens) over all N tokens, as many tokens at a time as fit in cache."""
    size = max(1, CHUNK_ELEMENTS // (max(A.shape[1], B.shape[1]) * WE.shape[1]))
    for start in range(0, len(A), size):
        some = slice(start, start + size)
        yield some, jacobian_blocks(WDs, [slope[some] for slope in slopes], WE, A[some], B[some])


def mask_inactive(J: Tensor, values_in: Tensor, values_out: Tensor) -> Tensor:
    """Zeroes, in place, the rows and columns of latents that TopK kept and the ReLU then silenced: derivative 0.

    `values_in` (N, k_in) and `values_out` (N, k_out) are activations after the ReLU.
    """
    return J.mul_((values_out > 0)[:, :, None]).mul_((values_in > 0)[:, None, :])


def jacobian_blocks_slow(WDs: Sequence[Tensor], slopes: Sequence[Tensor], WE: Tensor, A: Tensor, B: Tensor) -> Tensor:
    """The definition of `jacobian_blocks`, for tests."""
    terms = [torch.einsum("tir,tr,tjr->tij", WE[B], slope, WD[A]) for WD, slope in zip(WDs, slopes, strict=True)]
    return torch.stack(terms).sum(0)
