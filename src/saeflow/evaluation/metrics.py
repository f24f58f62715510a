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
    ce_increase                   ce_replaced - ce_clean
    loss_recovered_zero           (ce_zero - ce_replaced) / (ce_zero - ce_clean), and so for mean ablation
    dead_fraction                 latents that fire on no token
    dense_fraction                latents that fire on more than a tenth of the tokens

Shapes: N tokens, d and p the widths that a dictionary reads and writes, n latents.
"""

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from saeflow.dictionaries import Dictionary

CHUNK_ELEMENTS = 1 << 20  # of one (tokens, n) tensor of latents: 4 MiB in float32, so that passes over it stay in cache
DENSE = 0.1
SMALLEST_RISE = 1e-4  # nats by which an ablation must raise the loss for a recovered fraction to mean anything


class Target(NamedTuple):
    """The values of one batch where dictionaries write, and what they share of the measurement."""

    value: Tensor
    """(N, p)"""
    squared_norm: Tensor
    """(N,), float64."""
    from_batch: Tensor
    """(N,), float64: |y - mean_batch(y)|^2."""


class Reconstruction(NamedTuple):
    """What a dictionary makes of N tokens."""

    output: Tensor
    """(N, p)"""
    fired: Tensor
    """(2, n), int64: on how many tokens each latent is not 0; first those of BOS, then the others."""
    per_token: dict[str, Tensor]
    """(N,) each, float64."""


def target(y: Tensor) -> Target:
    """Of one batch `y` (N, p)."""
    return Target(y, squared_norm(y), squared_norm(y - y.mean(0)))


@torch.no_grad()
def reconstruct(dictionary: Dictionary, x: Tensor, y: Target, is_bos: Tensor) -> Reconstruction:
    """Encodes and decodes `x` (N, d), a few tokens at a time where there are many latents; `is_bos` (N,)."""
    output = torch.empty_like(y.value)
    l0 = torch.empty(len(x), dtype=torch.float64, device=x.device)
    fired = torch.zeros(2, dictionary.d_sae, dtype=torch.int64, device=x.device)
    size = max(1, CHUNK_ELEMENTS // dictionary.d_sae)
    for start in range(0, len(x), size):
        some = slice(start, start + size)
        if dictionary.spec.activation == "topk":  # decoding k of n latents takes a fraction of the time
            values, indices = dictionary.top_latents(x[some])
            output[some] = dictionary.decode_top(values, indices, x[some])
            l0[some] = (values > 0).sum(1).double()
            for part, chosen in enumerate((is_bos[some], ~is_bos[some])):
                fired[part] += torch.bincount(indices[chosen][values[chosen] > 0], minlength=dictionary.d_sae)
            continue
        latents = dictionary.encode(x[some])
        output[some] = dictionary.decode(latents, x[some])
        active = (latents != 0).to(latents.dtype)  # sums of booleans are four times slower, and these are as exact
        l0[some] = active.sum(1).double()
        at_bos = active[is_bos[some]].sum(0)
        fired += torch.stack([at_bos, active.sum(0) - at_bos]).long()
    error, output_norm = squared_norm(y.value - output), squared_norm(output)
    dot = (y.value * output).sum(1, dtype=torch.float64)
    per_token = {
        "l0": l0,
        "squared_error": error,
        "squared_output": output_norm,
        "dot": dot,
        "cosine": dot / (y.squared_norm * output_norm).sqrt().clamp(min=torch.finfo(torch.float64).tiny),
        "explained_legacy": 1 - error / y.from_batch,
    }
    return Reconstruction(output, fired, per_token)


def squared_norm(v: Tensor) -> Tensor:
    """(N, p) to (N,), float64."""
    return v.square().sum(1, dtype=torch.float64)


class Ratio(NamedTuple):
    """Of sums, or of as many resampled sums."""

    numerator: Any
    denominator: Any
    smallest: Any = 0.0
    """The ratio has a meaning only where the denominator exceeds this."""

    def value(self) -> np.ndarray:
        """NaN where it has no meaning."""
        with np.errstate(divide="ignore", invalid="ignore"):
            found = np.true_divide(self.numerator, self.denominator)
        return np.where((np.asarray(self.denominator) > self.smallest) & np.isfinite(found), found, np.nan)


def loss_ratios(sums: Mapping[str, Any]) -> dict[str, Ratio]:
    """The metrics that compare what the model predicts."""
    n_predictions = sums["n_predictions"]
    names = ("ce_clean", "ce_replaced", "ce_zero", "ce_mean", "kl", "kl_zero", "kl_mean")
    found = {name: Ratio(sums[name], n_predictions) for name in names}
    found["ce_increase"] = Ratio(sums["ce_replaced"] - sums["ce_clean"], n_predictions)
    for ablation in ("zero", "mean"):
        recovered = sums[f"ce_{ablation}"] - sums["ce_replaced"]
        lost = sums[f"ce_{ablation}"] - sums["ce_clean"]
        found[f"loss_recovered_{ablation}"] = Ratio(recovered, lost, SMALLEST_RISE * n_predictions)
    return found


def ratios(sums: Mapping[str, Any]) -> dict[str, Ratio]:
    """Every metric, from sums over tokens; `centred` is |sum of the centred target|^2."""
    n_tokens = sums["n_tokens"]
    variance = sums["squared_centred"] - sums["centred"] / np.maximum(n_tokens, 1)
    error = sums["squared_error"]
    return {
        "l0": Ratio(sums["l0"], n_tokens),
        **loss_ratios(sums),
        "fvu": Ratio(error, variance),
        "explained_variance": Ratio(variance - error, variance),
        "explained_variance_legacy": Ratio(sums["explained_legacy"], n_tokens),
        "relative_error": Ratio(error, sums["squared_norm"]),
        "relative_reconstruction_bias": Ratio(sums["squared_output"], sums["dot"]),
        "cosine": Ratio(sums["cosine"], n_tokens),
    }


def limits(name: str) -> tuple[float, float]:
    """What a metric cannot be below, and above."""
    name = name.removesuffix("_without_bos")
    if name == "cosine":
        return -1.0, 1.0
    if name in ("explained_variance", "explained_variance_legacy"):
        return -math.inf, 1.0
    signed = name == "ce_increase" or name.startswith("loss_recovered_") or name == "relative_reconstruction_bias"
    return (-math.inf if signed else 0.0), math.inf


def summarise(sums: Mapping[str, Any]) -> dict[str, Any]:
    """Metrics from sums over tokens. One that has no meaning is None, and `<metric>_reason` says why."""
    out: dict[str, Any] = {"n_tokens": int(sums["n_tokens"]), "n_predictions": int(sums["n_predictions"])}
    for name, ratio in ratios(sums).items():
        value = float(ratio.value())
        out[name] = value if math.isfinite(value) else None
        if out[name] is None:
            out[f"{name}_reason"] = why_undefined(name, out)
    return out


def why_undefined(name: str, out: Mapping[str, Any]) -> str:
    """Why a ratio has no meaning; `out` holds the losses."""
    if name.startswith("loss_recovered_"):
        ablation = name.removeprefix("loss_recovered_")
        return (
            f"{ablation} ablation does not raise the loss: {out[f'ce_{ablation}']} against {out['ce_clean']} nats clean"
        )
    if name in ("fvu", "explained_variance"):
        return "the target is the same on every token"
    reasons = {
        "explained_variance_legacy": "a token's target is its batch's mean",
        "relative_error": "the target is 0 on every token",
        "relative_reconstruction_bias": "output and target do not correlate",
    }
    return reasons.get(name, "no predictions" if name.startswith(("ce", "kl")) else "no tokens")


def firing(fired: np.ndarray, n_tokens: int) -> dict[str, float]:
    """Fractions of the n latents, from `fired` (n,)."""
    return {"dead_fraction": float((fired == 0).mean()), "dense_fraction": float((fired > DENSE * n_tokens).mean())}
