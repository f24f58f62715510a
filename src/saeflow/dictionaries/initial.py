"""Weights that training starts from, drawn from a seed.

As SAELens: decoder rows in random directions with norm 0.1 (its `decoder_init_norm`, the heuristic of Anthropic's
April 2024 update), an SAE's encoder the transpose of its decoder, `b_enc` 0. A transcoder's encoder reads another space
than its decoder writes, so its rows are drawn on their own, with the same norm. SAELens starts `b_dec` at 0; here it
starts at the mean of the target, which the statistics of the activations give for nothing.
"""

import torch
from torch import Tensor

from saeflow.dictionaries.spec import Spec
from saeflow.kernels.step import Weights, normalise_rows_

INITIAL_NORM = 0.1


def initial_weights(spec: Spec, target_mean: Tensor, seed: int) -> Weights:
    """`target_mean` (p,), in the units that training sees. On the CPU, so that the draw is the same on any device."""
    generator = torch.Generator().manual_seed(seed)

    def rows(width: int) -> Tensor:
        return normalise_rows_(torch.randn(spec.d_sae, width, generator=generator))

    decoder = rows(spec.d_out)
    encoder = decoder.clone() if spec.kind == "sae" else rows(spec.d_in)
    if spec.sparsity != "unit_norm":
        decoder.mul_(INITIAL_NORM)
    return Weights(encoder.mul_(INITIAL_NORM), torch.zeros(spec.d_sae), decoder, target_mean.float().clone())
