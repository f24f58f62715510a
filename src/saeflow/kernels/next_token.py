"""Cross-entropy and Kullback-Leibler divergence of next-token predictions, without ever holding a batch of logits.

Logits are the largest tensor of an evaluation (a row of V for every position), so they are made for a few positions at
a time, and stay in cache through all passes over them. The clean model's log-probabilities are made once and serve
every variant. Shapes: N predictions, D model width, V vocabulary.
"""

from collections.abc import Iterable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

CHUNK_POSITIONS = 128  # times V=4,096 in float32: 2 MiB. Larger chunks fall out of cache, smaller starve the product


class Losses(NamedTuple):
    """Nats, float32."""

    ce: Tensor
    """(N,) of the variant."""
    kl: Tensor
    """(N,): KL(clean || variant)."""


@torch.no_grad()
def next_token_losses(
    W_U: Tensor, b_U: Tensor, softcap: float, targets: Tensor, clean: Tensor, variants: Iterable[Tensor]
) -> tuple[Tensor, list[Losses]]:
    """Returns the cross-entropy (N,) of the clean model and `Losses` of each variant.

    `clean` and each of `variants` (N, D) are what the unembedding `W_U` (D, V), `b_U` (V,) reads; `targets` (N,) are
    the tokens to predict; `softcap` bounds the logits as in Gemma where it is above 0.
    """
    variants = list(variants)
    n = len(targets)
    clean_ce = torch.empty(n, device=clean.device)
    losses = [Losses(torch.empty_like(clean_ce), torch.empty_like(clean_ce)) for _ in variants]
    for start in range(0, n, CHUNK_POSITIONS):
        some = slice(start, start + CHUNK_POSITIONS)
        target = targets[some, None]
        log_p = _log_probabilities(clean[some], W_U, b_U, softcap)
        clean_ce[some] = -log_p.gather(1, target)[:, 0]
        p = log_p.exp()
        negative_entropy = torch.linalg.vecdot(p, log_p)
        for variant, (ce, kl) in zip(variants, losses, strict=True):
            log_q = _log_probabilities(variant[some], W_U, b_U, softcap)
            ce[some] = -log_q.gather(1, target)[:, 0]
            kl[some] = negative_entropy - torch.linalg.vecdot(p, log_q)
    return clean_ce, losses


@torch.no_grad()
def cross_entropy(W_U: Tensor, b_U: Tensor, softcap: float, targets: Tensor, final: Tensor) -> Tensor:
    """(N,) of `final` (N, D) and `targets` (N,), as in `next_token_losses`; where nothing else is asked. The last chunk
    is filled up, so that what one prediction gives does not depend on how many others there are."""
    ce = torch.empty(len(targets), device=final.device)
    for start in range(0, len(targets), CHUNK_POSITIONS):
        some, target = final[start : start + CHUNK_POSITIONS], targets[start : start + CHUNK_POSITIONS]
        logits = _logits(F.pad(some, (0, 0, 0, CHUNK_POSITIONS - len(some))), W_U, b_U, softcap)[: len(some)]
        ce[start : start + CHUNK_POSITIONS] = logits.logsumexp(1) - logits.gather(1, target[:, None])[:, 0]
    return ce


def _log_probabilities(final: Tensor, W_U: Tensor, b_U: Tensor, softcap: float) -> Tensor:
    return F.log_softmax(_logits(final, W_U, b_U, softcap), dim=1)


def _logits(final: Tensor, W_U: Tensor, b_U: Tensor, softcap: float) -> Tensor:
    logits = torch.addmm(b_U, final, W_U)
    return softcap * torch.tanh(logits / softcap) if softcap > 0 else logits


def next_token_losses_slow(logits_clean: Tensor, logits: Tensor, targets: Tensor) -> Losses:
    """The definition, for tests: logits (N, V) of the clean model and of one variant."""
    p, log_q = logits_clean.softmax(1), logits.log_softmax(1)
    return Losses(F.cross_entropy(logits, targets, reduction="none"), (p * (p.log() - log_q)).sum(1))
