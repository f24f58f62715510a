"""How much of a latent of a dictionary on all heads belongs to each head, by six measures.

Kissane et al. (2406.17759) rank heads by the norms of a latent's decoder, and find that its activation may come from
another head ("head 5"). For a latent and a head h, with w and d the parts of encoder column and decoder row on head h:

* `decoder`: |d|;  `decoder_squared`: |d|^2;  `encoder`: |w|;  `lifted`: |d W_O[h]|, what it writes to the stream
* `dfa`: mean of z_h . w over the tokens on which the latent is active: direct feature attribution
* `dfa_centred`: the same with z_h less its mean over all tokens: what is not there at every token anyway

A share divides by the sum over heads of absolute values, so that shares of one sign add up to 1. Ranks go by the signed
value. The sum over heads of `dfa` is the mean pre-activation less b_enc and what b_dec takes from it.
"""

import itertools

import numpy as np
import scipy.sparse as sp
import xarray as xr

MEASURES = ("decoder", "decoder_squared", "encoder", "lifted", "dfa", "dfa_centred")
AGREEING = ("decoder", "encoder", "lifted", "dfa", "dfa_centred")  # squares rank as norms do


class ActiveSums:
    """Sums over the tokens on which each latent is active, of activations at hook_z; added a batch at a time."""

    def __init__(self, W_enc: np.ndarray) -> None:
        """`W_enc` (H, d, n), by head."""
        self.W_enc = W_enc
        n_heads, d, n = W_enc.shape
        self.n_tokens = 0
        self.count = np.zeros(n, dtype=np.int64)
        self.sum = np.zeros((n, n_heads, d))
        self.sum_all = np.zeros((n_heads, d))

    def add(self, f: sp.csr_array, z: np.ndarray) -> None:
        """`f` (N, n) activations, `z` (N, H, d)."""
        n_heads, d, n = self.W_enc.shape
        active = (f > 0).astype(np.float64).T.tocsr()
        self.n_tokens += len(z)
        self.count += np.diff(active.indptr)
        self.sum += (active @ z.reshape(len(z), -1).astype(np.float64)).reshape(n, n_heads, d)
        self.sum_all += z.sum(0, dtype=np.float64)

    def dataset(self, W_dec: np.ndarray, W_O: np.ndarray) -> xr.Dataset:
        """`W_dec` (n, H, d), `W_O` (H, d, D): every measure of every latent, NaN where it was never active."""
        with np.errstate(invalid="ignore", divide="ignore"):
            mean = self.sum / self.count[:, None, None]
        decoder = np.linalg.norm(W_dec, axis=2)
        values = {
            "decoder": decoder,
            "decoder_squared": decoder**2,
            "encoder": np.linalg.norm(self.W_enc, axis=1).T,
            "lifted": np.linalg.norm(np.einsum("nhd,hde->nhe", W_dec, W_O), axis=2),
            "dfa": np.einsum("nhd,hdn->nh", mean, self.W_enc),
            "dfa_centred": np.einsum("nhd,hdn->nh", mean - self.sum_all / self.n_tokens, self.W_enc),
        }
        stacked = np.stack([values[name] for name in MEASURES], axis=2)
        n, n_heads, _ = stacked.shape
        return xr.Dataset(
            {
                "value": (("latent", "head", "measure"), stacked, {"description": "see saeflow.heads.shares"}),
                "share": (("latent", "head", "measure"), shares(stacked), {"units": "1"}),
                "active": ("latent", self.count, {"units": "tokens"}),
            },
            {"latent": np.arange(n), "head": np.arange(n_heads), "measure": list(MEASURES)},
            {"n_tokens": self.n_tokens},
        )


def shares(values: np.ndarray) -> np.ndarray:
    """(n, H, measures) over the sum of absolute values over heads."""
    with np.errstate(invalid="ignore", divide="ignore"):
        return values / np.abs(values).sum(1, keepdims=True)


def ranks(values: np.ndarray) -> np.ndarray:
    """(n, H) -> (n, H): 0 for the smallest. Of equal values the lower head comes first."""
    return values.argsort(axis=1, kind="stable").argsort(axis=1, kind="stable")


def compare_measures(dataset: xr.Dataset, min_active: int = 1) -> xr.Dataset:
    """Of every two measures: Spearman's rank correlation over heads and agreement on the top head, by latent, averaged
    over the latents active on `min_active` tokens or more; and each head's mean share.

    With H heads two independent orders agree on the top with probability 1 / H.
    """
    live = dataset["active"].values >= min_active
    values = dataset["value"].values[live]
    share = dataset["share"].values[live]
    n_heads = values.shape[1]
    correlation, top = np.full((2, len(AGREEING), len(AGREEING)), np.nan)
    mean_share, first = np.full((2, *share.shape[1:]), np.nan)
    if len(values):
        ordered = [ranks(values[:, :, MEASURES.index(name)]) for name in AGREEING]
        for (a, one), (b, other) in itertools.product(enumerate(ordered), repeat=2) if n_heads > 1 else ():
            squares = np.square(one - other).sum(1)
            correlation[a, b] = (1 - 6 * squares / (n_heads * (n_heads**2 - 1))).mean()
            top[a, b] = (one.argmax(1) == other.argmax(1)).mean()
        mean_share = share.mean(0)
        first = np.stack([(values.argmax(1) == head).mean(0) for head in range(n_heads)])
    between = {name: list(AGREEING) for name in ("measure_a", "measure_b")}
    return xr.Dataset(
        {
            "rank_correlation": (("measure_a", "measure_b"), correlation, {"description": "Spearman, over heads"}),
            "top_agreement": (("measure_a", "measure_b"), top, {"description": "share of latents, same top head"}),
            "mean_share": (("head", "measure"), mean_share, {"units": "1"}),
            "top_share": (("head", "measure"), first, {"description": "share of latents of which it is the top head"}),
        },
        {**between, "head": dataset["head"].values, "measure": list(MEASURES)},
        {"n_latents": int(live.sum()), "min_active": min_active, "chance_of_top": 1 / n_heads},
    )
