"""Language models that were never trained, for comparison: the same architecture, tokens and loading, other weights.

Both change every weight matrix, embedding and unembedding included (TransformerLens's parameters whose names have
`W_` in them), before TransformerLens processes any; biases and the norms' gains and biases stay those of the trained
model, as in the JSAE paper (arXiv 2502.18147).

* `reinit`: numbers from N(0, initializer_range^2), as `HookedTransformer.init_weights` draws them; that is 0.8 /
  sqrt(d_model) where the model does not say.
* `permuted`: the trained matrices with their rows and their columns (and heads) in random orders, every axis on its
  own. Entries and singular values are kept, so the scale of everything is; what one layer writes is no longer what the
  next one reads.
"""

from collections.abc import Mapping
from typing import Literal

import torch
from torch import Tensor


def randomise(
    state: Mapping[str, Tensor], kind: Literal["reinit", "permuted"], seed: int, initializer_range: float
) -> dict[str, Tensor]:
    """`state`, TransformerLens's parameters by name, with other weight matrices. The draw depends on the seed and the
    names alone."""
    generator = torch.Generator().manual_seed(seed)
    out = dict(state)
    for name in sorted(name for name in state if "W_" in name):
        weights = state[name]
        if kind == "reinit":
            draw = torch.randn(weights.shape, generator=generator, dtype=torch.float32)
            out[name] = (initializer_range * draw).to(weights)
        else:
            for axis, size in enumerate(weights.shape):
                weights = weights.index_select(axis, torch.randperm(size, generator=generator).to(weights.device))
            out[name] = weights
    return out
