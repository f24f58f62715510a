"""What makes a latent of attention outputs active, and what it does: direct attributions, exact in both directions.

The pre-activation of a latent with encoder w (w_h on head h) at token t is linear in z, and z_h is a mixture of values
by head h's attention pattern A_h, which is taken as it is:

    pre = sum_h z_h[t] . w_h + bias = sum_h sum_s A_h[t, s] v_kv(h)[s] . w_h + bias,   kv(h) = h // (H / G)

with bias = b_enc less what the dictionary subtracts from its input. `by_head` and `by_source` are the terms (Kissane et
al. 2406.17759, DFA). Further back, `de_embedding` asks which tokens' embeddings w_h reads through W_V[h]; forward,
`saeflow.features.logits` which tokens d W_O promotes directly. Both leave out a norm's scale, which depends on the
text (as `saeflow.circuits` does), but have its gain and centring.
"""

import torch
from torch import Tensor

from saeflow.dictionaries import Dictionary
from saeflow.heads.weights import Attention
from saeflow.models.protocol import LanguageModel, full


def by_head(z: Tensor, w: Tensor) -> Tensor:
    """z (N, H, d), w (H, d, m) the encoders of m latents -> (N, H, m)."""
    return torch.einsum("nhd,hdm->nhm", z, w)


def by_source(pattern: Tensor, v: Tensor, w: Tensor) -> Tensor:
    """One row of text: pattern (H, P, P) from token to source, v (P, G, d), w (H, d) -> (H, P, P): token, source."""
    values = v.repeat_interleave(pattern.shape[0] // v.shape[1], dim=1)  # query head h reads kv head h // (H / G)
    return pattern * torch.einsum("shd,hd->hs", values, w)[:, None, :]


def bias(dictionary: Dictionary) -> Tensor:
    """What a latent's pre-activation has beside z . w, (n,): b_enc, less b_dec W_enc where the spec says so."""
    if dictionary.spec.apply_b_dec_to_input:
        return dictionary.b_enc - dictionary.b_dec @ dictionary.W_enc
    return dictionary.b_enc


def de_embedding(model: LanguageModel, attention: Attention, w: Tensor) -> Tensor:
    """How strongly each token's embedding, at the source, makes latents active: w (H, d, m) -> (H, m, V).

    But for the scale of the norm before the layer, and for what later positions and layers add.
    """
    embedding = full(model.embed.W_E)
    if attention.centred:
        embedding = embedding - embedding.mean(dim=1, keepdim=True)
    return torch.einsum("ve,hed,hdm->hmv", embedding, attention.W_V, w)
