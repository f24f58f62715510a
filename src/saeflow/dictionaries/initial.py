"""Weights that training starts from, drawn from a seed.

An SAE's encoder starts as the transpose of its decoder, up to a factor; a transcoder's encoder reads another space than
its decoder writes, so its rows are drawn on their own. Directions are random, `b_enc` is 0, and `b_dec` the mean of the
target (SAELens: 0), which the statistics of the activations give for nothing.

The norms of the rows decide how many latents ever live, and what is best differs:

* ReLU: 0.1, SAELens's `decoder_init_norm`, from Anthropic's April 2024 update; training soon sets its own scale.
* TopK and BatchTopK: latents compete, so pre-activations must be large beside what Adam adds to `b_enc` in the first
  steps, or a few early winners take every token: from 0.1 an SAE with a small k ends with many dead latents. A
  transcoder starts with no relation between the latents that win and what they write, so they begin by writing little.
* Where decoder rows are kept at norm 1, they start there.
"""

import torch
from torch import Tensor

from saeflow.dictionaries.spec import DictionaryError, Spec
from saeflow.kernels.step import Weights, normalise_rows_

NORMS = {("sae", "relu"): (0.1, 0.1), ("transcoder", "relu"): (0.1, 0.1)}
NORMS |= {("sae", "topk"): (0.5, 0.5), ("transcoder", "topk"): (1.0, 0.1)}  # of encoder rows and of decoder rows


def initial_weights(spec: Spec, target_mean: Tensor, seed: int, initial: str = "saeflow") -> Weights:
    """`target_mean` (p,), in the units that training sees. On the CPU, so that the draw is the same on any device.

    `initial=saelens`: what SAELens's training classes start from: every norm 0.1, and `b_dec` 0. `initial=jsae`: what
    the JSAE paper's code starts from (arXiv 2502.18147): a decoder of entries uniform within sqrt(6 / p), whose
    transpose is the encoder before its rows get norm 1, and `b_dec` 0. `initial=kaiming`: what notebook 002 starts from
    (SAELens 3 without `init_encoder_as_decoder_transpose`): encoder and decoder drawn independently by PyTorch's
    `kaiming_uniform_`, uniform within sqrt(6 / n) and sqrt(6 / p); `b_dec` is then to be set to the `geometric_median`
    of the target. A skip starts at 0.
    """
    generator = torch.Generator().manual_seed(seed)
    if initial == "jsae":
        if spec.kind != "sae":
            raise DictionaryError("training.initial=jsae is for SAEs: a transcoder's encoder is no transposed decoder")
        rows = (6 / spec.d_out) ** 0.5 * (2 * torch.rand(spec.d_sae, spec.d_out, generator=generator) - 1)
        return Weights(rows, torch.zeros(spec.d_sae), normalise_rows_(rows.clone()), torch.zeros(spec.d_out))

    if initial == "kaiming":
        decoder, encoder = (2 * torch.rand(spec.d_sae, d, generator=generator) - 1 for d in (spec.d_out, spec.d_in))
        decoder, encoder = decoder * (6 / spec.d_out) ** 0.5, encoder * (6 / spec.d_sae) ** 0.5
        if spec.sparsity == "unit_norm":
            normalise_rows_(decoder)
        W_skip = torch.zeros(spec.d_out, spec.d_in) if spec.skip else None
        return Weights(encoder, torch.zeros(spec.d_sae), decoder, target_mean.float().clone(), W_skip)

    def directions(width: int) -> Tensor:
        return normalise_rows_(torch.randn(spec.d_sae, width, generator=generator))

    competing = "relu" if spec.activation == "relu" or initial == "saelens" else "topk"
    encoder_norm, decoder_norm = NORMS[spec.kind, competing]
    decoder = directions(spec.d_out)
    encoder = decoder.clone() if spec.kind == "sae" else directions(spec.d_in)
    if spec.sparsity != "unit_norm":
        decoder.mul_(decoder_norm)
    b_dec = torch.zeros(spec.d_out) if initial == "saelens" else target_mean.float().clone()
    W_skip = torch.zeros(spec.d_out, spec.d_in) if spec.skip else None
    return Weights(encoder.mul_(encoder_norm), torch.zeros(spec.d_sae), decoder, b_dec, W_skip)


def geometric_median(points: Tensor, n_steps: int = 1000, tolerance: float = 1e-9) -> Tensor:
    """The point (d,) with the least sum of distances to `points` (N, d), in float64, by Weiszfeld's iteration.

    It ends when a step is shorter than `tolerance` times the mean distance, or after `n_steps`.
    """
    points = points.double()
    median = points.mean(dim=0)
    for _ in range(n_steps):
        distances = (points - median).norm(dim=1)
        weights = 1 / distances.clamp(min=1e-12)
        next_one = weights @ points / weights.sum()
        moved, median = (next_one - median).norm(), next_one
        if moved <= tolerance * distances.mean():
            break
    return median
