"""One pass over held-out tokens: everything that the heads stage measures on activations.

BOS, whose activations are unlike any other's, is left out of latents and means. Tokens that are kept are numbered in
order, row by row.
"""

from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import pandas as pd
import scipy.sparse as sp
import torch
import xarray as xr
from torch import Tensor

from saeflow.config import HeadsConfig
from saeflow.dictionaries import Dictionary
from saeflow.dictionaries.heads import BlockDiagonal
from saeflow.evaluation.sums import token_batches
from saeflow.heads.cross_terms import MODEL, CrossTerms
from saeflow.heads.geometry import HeadCosines
from saeflow.heads.shares import ActiveSums
from saeflow.heads.weights import Attention, encoder_by_head, random_rotations
from saeflow.models.attention import fused_attention
from saeflow.models.splicing import CleanPass, flattened, run_clean
from saeflow.text.tokens import spread

if TYPE_CHECKING:
    from transformer_lens import HookedTransformer

ENCODED = 1 << 22  # activations that are held dense at once


class HeadMeasurements(NamedTuple):
    """What the pass finds; dictionaries by key."""

    rows: np.ndarray
    """(rows, P) token ids."""
    first: int
    """Position of a row's first token that is kept: 1 where there is a BOS."""
    cosines: xr.Dataset
    latents: dict[str, sp.csc_array]
    """(N, d_sae) activations."""
    active: dict[str, ActiveSums]
    """Of the dictionaries that are no `BlockDiagonal`."""
    cross_terms: pd.DataFrame


def measure(
    model: "HookedTransformer",
    attention: Attention,
    dictionaries: dict[str, Dictionary],
    rows: np.ndarray,
    document: np.ndarray,
    prepend_bos: bool,
    config: HeadsConfig,
) -> HeadMeasurements:
    """`rows` and `document` (rows, P): token ids, and the document of each."""
    if prepend_bos:  # a BOS belongs to the document whose token it predicts
        document = np.concatenate([document[:, 1:2], document[:, 1:]], axis=1)
    hook, first = f"blocks.{attention.layer}.attn.hook_z", int(prepend_bos)
    n_heads, d_head, _ = attention.W_O.shape
    cosines = HeadCosines(attention.W_O, rotations_of(attention, config), first)
    cross_terms = CrossTerms(attention, prepend_bos, config.seed)
    latents: dict[str, list[sp.csr_array]] = {key: [] for key in dictionaries}
    active: dict[str, ActiveSums] = {}
    constant: dict[str, Tensor] = {}
    for key, one in dictionaries.items():
        if isinstance(one, BlockDiagonal):
            constant[key] = torch.einsum("hd,hde->e", one.b_dec.view(n_heads, d_head), attention.W_O) + attention.b_O
        else:
            active[key] = ActiveSums(encoder_by_head(one, n_heads).cpu().numpy())
    n_loss_rows = min(len(rows), -(-config.loss_tokens // rows.shape[1]))
    loss_rows = spread(len(rows), n_loss_rows, config.seed)
    start = 0
    for tokens, _ in token_batches(rows, prepend_bos, config.batch_rows, model.cfg.device, "heads"):
        with fused_attention(model):
            clean = run_clean(model, tokens, [hook], [f"blocks.{attention.layer}.hook_attn_out"])
            z = clean.values[hook]
            cosines.add(z)
            kept = z[:, first:].flatten(0, 1)
            for key, one in dictionaries.items():
                f = _sparse(one, kept.flatten(1))
                latents[key].append(f)
                if key in active:
                    active[key].add(f, kept.cpu().numpy())
            here = loss_rows[(loss_rows >= start) & (loss_rows < start + len(tokens))]
            if len(here):
                some = torch.from_numpy(here - start).to(tokens.device)
                values = {name: value[some] for name, value in clean.values.items()}
                clean_rows = CleanPass(tokens[some], clean.final[some], values)
                x = flattened(z[some])
                sources = {MODEL: (x.view(len(x), n_heads, d_head), attention.b_O)}
                for key, rest in constant.items():
                    one = dictionaries[key]
                    decoded = torch.cat([one.forward(part) - one.b_dec for part in x.split(ENCODED // one.d_sae or 1)])
                    sources[key] = (decoded.view(len(x), n_heads, d_head), rest)
                cross_terms.add(model, clean_rows, document[here], sources)
        start += len(tokens)
    joined = {key: sp.vstack(parts, format="csc").astype(np.float64) for key, parts in latents.items()}
    return HeadMeasurements(rows, first, cosines.dataset(), joined, active, cross_terms.table(config.resamples))


def rotations_of(attention: Attention, config: HeadsConfig) -> Tensor:
    """(R, H, D, D), float64: of the nulls, a rotation of each head for each draw."""
    n_heads, _, D = attention.W_O.shape
    return random_rotations(config.rotations * n_heads, D, config.seed).view(-1, n_heads, D, D)


@torch.no_grad()
def _sparse(dictionary: Dictionary, x: Tensor) -> sp.csr_array:
    """Activations of x (N, d), those that are not 0."""
    parts = (dictionary.encode(some) for some in x.split(max(1, ENCODED // dictionary.d_sae)))
    return sp.vstack([sp.csr_array(part.cpu().numpy()) for part in parts], format="csr")


def by_head(latents: sp.csc_array, n_heads: int) -> list[sp.csc_array]:
    """Activations of a `BlockDiagonal` (N, H n) as those of each head (N, n)."""
    size = latents.shape[1] // n_heads
    return [latents[:, head * size : (head + 1) * size] for head in range(n_heads)]
