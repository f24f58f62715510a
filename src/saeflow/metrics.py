"""What an evaluation measures: values per token, and metrics that are ratios of their sums.

No metric is a mean of means, so the sums of any batches can be added before the ratio is taken. The one exception is so
by definition: `explained_variance_legacy`. Of a target y (what a token has where the dictionary writes) and its
reconstruction y':

    l0                            latents above 0, per token
    explained_variance            1 - sum |y - y'|^2 / sum |y - mean(y)|^2, mean over all tokens (R^2; SAELens)
    explained_variance_legacy     mean over tokens of 1 - |y - y'|^2 / |y - mean_batch(y)|^2 (SAELens's name; JSAE)
    fvu                           1 - explained_variance
    relative_error                sum |y - y'|^2 / sum |y|^2
    relative_reconstruction_bias  sum |y'|^2 / sum y.y' (below 1: shrinkage; equation 10 of arXiv 2404.16014)
    cosine                        mean over tokens of y.y' / |y||y'|, 0 where either is 0
    ce_*, kl, kl_*                nats per prediction; KL is from the clean model to the other
    loss_recovered_zero           (ce_zero - ce_replaced) / (ce_zero - ce_clean), and so for mean ablation
    dead_fraction                 latents that fire on no token
    dense_fraction                latents that fire on more than a tenth of the tokens

Shapes: N tokens, d and p the widths that a dictionary reads and writes, n latents.
"""

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

if TYPE_CHECKING:
    from saeflow.dictionaries import Dictionary

CHUNK_ELEMENTS = 1 << 20  # of one (tokens, n) tensor of latents: 4 MiB in float32, so that passes over it stay in cache
DENSE = 0.1
SMALLEST_RISE = 1e-4  # nats by which an ablation must raise the loss for a recovered fraction to mean anything


class Target(NamedTuple):
    """The values at the hook where dictionaries write, and what they share of the measurement."""

    value: Tensor
    """(N, p)"""
    centred: Tensor
    """(N, p): minus a fixed centre, so that the variance is no difference of two large numbers."""
    from_batch: Tensor
    """(N,): |y - mean_batch(y)|^2."""


class Reconstruction(NamedTuple):
    """What a dictionary makes of N tokens."""

    output: Tensor
    """(N, p)"""
    fired: Tensor
    """(n,), int64: on how many tokens each latent is not 0."""
    per_token: dict[str, Tensor]
    """(N,) each, float64."""


def target(y: Tensor, centre: Tensor) -> Target:
    """Of one batch `y` (N, p); `centre` (p,), any fixed vector near the mean."""
    return Target(y, y - centre, _squared_norm(y - y.mean(0)))


@torch.no_grad()
def reconstruct(dictionary: "Dictionary", x: Tensor, y: Target) -> Reconstruction:
    """Encodes and decodes `x` (N, d), a few tokens at a time where there are many latents."""
    output = torch.empty_like(y.value)
    l0 = torch.empty(len(x), dtype=torch.float64, device=x.device)
    fired = torch.zeros(dictionary.d_sae, dtype=torch.int64, device=x.device)
    size = max(1, CHUNK_ELEMENTS // dictionary.d_sae)
    for start in range(0, len(x), size):
        some = slice(start, start + size)
        latents = dictionary.encode(x[some])
        output[some] = dictionary.decode(latents, x[some])
        active = (latents != 0).to(latents.dtype)  # sums of booleans are four times slower, and these are as exact
        l0[some] = active.sum(1).double()
        fired += active.sum(0).long()
    error, norm, output_norm = _squared_norm(y.value - output), _squared_norm(y.value), _squared_norm(output)
    dot = (y.value * output).sum(1, dtype=torch.float64)
    per_token = {
        "l0": l0,
        "squared_error": error,
        "squared_norm": norm,
        "squared_centred": _squared_norm(y.centred),
        "squared_output": output_norm,
        "dot": dot,
        "cosine": dot / (norm * output_norm).sqrt().clamp(min=torch.finfo(torch.float64).tiny),
        "explained_legacy": 1 - error / y.from_batch,
    }
    return Reconstruction(output, fired, per_token)


def _squared_norm(v: Tensor) -> Tensor:
    """(N, p) to (N,), float64."""
    return v.square().sum(1, dtype=torch.float64)


def summarise(sums: Mapping[str, Any]) -> dict[str, Any]:
    """Metrics from sums over tokens. One that has no meaning is None, and `<metric>_reason` says why."""
    out: dict[str, Any] = {}
    n_tokens, n_predictions = sums["n_tokens"], sums["n_predictions"]

    def ratio(name: str, numerator: float, denominator: float, reason: str, smallest: float = 0.0) -> None:
        defined = denominator > smallest and math.isfinite(numerator / denominator)
        out[name] = float(numerator / denominator) if defined else None
        if not defined:
            out[f"{name}_reason"] = reason

    out |= {"n_tokens": int(n_tokens), "n_predictions": int(n_predictions)}
    ratio("l0", sums["l0"], n_tokens, "no tokens")
    for name in ("ce_clean", "ce_replaced", "ce_zero", "ce_mean", "kl", "kl_zero", "kl_mean"):
        ratio(name, sums[name], n_predictions, "no predictions")
    for ablation in ("zero", "mean"):
        reason = (
            f"{ablation} ablation does not raise the loss: {out[f'ce_{ablation}']} against {out['ce_clean']} nats clean"
        )
        recovered = sums[f"ce_{ablation}"] - sums["ce_replaced"]
        lost = sums[f"ce_{ablation}"] - sums["ce_clean"]
        ratio(f"loss_recovered_{ablation}", recovered, lost, reason, SMALLEST_RISE * n_predictions)

    shift = np.asarray(sums["centred"], dtype=np.float64)
    variance = sums["squared_centred"] - float(shift @ shift) / n_tokens if n_tokens else 0.0
    constant = "the target is the same on every token"
    ratio("fvu", sums["squared_error"], variance, constant)
    ratio("explained_variance", variance - sums["squared_error"], variance, constant)
    ratio("explained_variance_legacy", sums["explained_legacy"], n_tokens, "a token's target is its batch's mean")
    ratio("relative_error", sums["squared_error"], sums["squared_norm"], "the target is 0 on every token")
    ratio("relative_reconstruction_bias", sums["squared_output"], sums["dot"], "output and target do not correlate")
    ratio("cosine", sums["cosine"], n_tokens, "no tokens")
    return out


def firing(fired: Tensor, n_tokens: int) -> dict[str, float]:
    """Fractions of the n latents, from `fired` (n,)."""
    return {
        "dead_fraction": float((fired == 0).double().mean()),
        "dense_fraction": float((fired > DENSE * n_tokens).double().mean()),
    }
