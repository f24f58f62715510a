"""Whether TransformerLens's model of some weights computes what transformers does, at every hook that is relied on.

TransformerLens drops settings of `config.json` that it does not know, such as rope scaling, without a word, and some
show only at a distance: a window of attention changes nothing before its end. So both run one row as long as those that
are to be studied, and are compared in what every block reads and what its attention and MLP write, at every token.
"""

from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from saeflow.kernels.memory import give_back_freed_memory
from saeflow.models.attention import fused_attention
from saeflow.models.folder import Geometry, ModelError, Norms
from saeflow.models.protocol import LanguageModel, Unembedding, full, rounded
from saeflow.models.splicing import run_hooked

SHORT = 64
"""Tokens of a row where nobody says how long the rows are; of a longer one, so many of its last are asked for logits,
which would fill the memory for all."""
FEW = 8  # of those tokens, whose logits are compared at once
TOLERANCE = {torch.float32: (0.01, 0.01), torch.float16: (0.05, 0.1), torch.bfloat16: (0.25, 0.5)}
"""Of a right conversion, in parts of a vector's norm and in nats: it differs by 1e-6 to 1e-4 in float32, and in fewer
bits by what the order of operations changes, on SmolLM2 by up to 0.009 and 0.03 in float16, 0.08 and 0.19 in bfloat16
(a wrong one by about 1)."""


class Expected(NamedTuple):
    """What transformers' model computes on one row."""

    ids: Tensor
    """(1, P)"""
    values: dict[str, Tensor]
    """(1, P, d) by TransformerLens's name of the hook, in the order in which blocks compute them."""
    logits: Tensor
    """(1, <= SHORT, vocabulary): of the last tokens."""


@torch.no_grad()
def expect(original: Any, geometry: Geometry, n_tokens: int) -> Expected:
    """Runs transformers' model on one row of `n_tokens`."""
    generator = torch.Generator().manual_seed(0)  # any row will do
    embeddings = original.get_input_embeddings().weight
    ids = torch.randint(len(embeddings), (1, min(n_tokens, geometry.n_ctx)), generator=generator)
    return _run_original(original, ids.to(embeddings.device), geometry.n_layers, geometry.norms)


@torch.no_grad()
def check_conversion(folder: Path, expected: Expected, hooked: LanguageModel, centred: bool, whole: bool) -> None:
    """Compares `hooked` with what is expected of it.

    `centred`: `center_writing_weights` took the mean out of what `hooked` writes. `whole`: it has all its layers; what
    the first write alone is not for the unembedding, which in bfloat16 makes 0.7 nats of its rounding, and logits are
    not compared. Costs a forward pass.
    Raises `ModelError` where a token's vector at a hook differs by more than the tolerance (in float32 a hundredth of
    its norm), or its log-probabilities by more nats than that on average.
    """
    ids, wanted, logits = expected
    of_norm, of_nats = TOLERANCE[hooked.cfg.dtype]
    differences: dict[str, Tensor] = {}

    def compare(name: str, value: Tensor, hook: Any) -> None:
        differences[name] = _difference(value[0], full(wanted[name][0]), centred)

    with fused_attention(hooked):  # as caching and evaluation do
        final = run_hooked(hooked, ids, [(name, partial(compare, name)) for name in wanted], None, 0)
    assert differences.keys() == wanted.keys(), "every hook that is compared fires"
    for name, by_token in differences.items():
        if not bool((by_token < of_norm).all()):
            what = f"{name} by {by_token.nan_to_num(torch.inf).max():.2g} of its norm"
            raise _disagreement(folder, ids.shape[1], what, by_token, of_norm)
    if not whole:
        give_back_freed_memory()
        return
    softcap = float(hooked.cfg.output_logits_soft_cap or 0.0)
    unembedding = Unembedding(hooked.unembed.W_U, hooked.unembed.b_U, softcap)  # in the model's own bits, as expected
    last = rounded(hooked, final[0, -SHORT:])
    give_back_freed_memory()  # of the pass, before there are logits
    pairs = zip(last.split(FEW), logits[0].split(FEW), strict=True)
    nats = torch.cat([_nats(unembedding.logits(found), wanted) for found, wanted in pairs])
    if not bool((nats < of_nats).all()):
        what = f"log-probabilities by {nats.max():.2g} on average"
        raise _disagreement(folder, ids.shape[1], what, nats, of_nats)


def _run_original(original: Any, ids: Tensor, n_layers: int, norms: Norms) -> Expected:
    blocks = next(
        m for m in original.base_model.children() if isinstance(m, torch.nn.ModuleList) and len(m) == n_layers
    )
    written: dict[str, Tensor] = {}

    def keep(name: str, module: Any, args: Any, output: Any) -> None:
        written[name] = output[0] if isinstance(output, tuple) else output

    handles = []
    for layer, block in enumerate(blocks):
        for part, module in block.named_children():
            if (hook := (_WRITES if norms == "before" else _WRITES_AFTER_NORMS).get(part)) is not None:
                handles.append(module.register_forward_hook(partial(keep, f"blocks.{layer}.{hook}")))
    try:
        output = original(input_ids=ids, output_hidden_states=True, use_cache=False, logits_to_keep=SHORT)
    finally:
        for handle in handles:
            handle.remove()
    assert len(written) == 2 * n_layers, "attention and MLP of every block"
    values: dict[str, Tensor] = {}
    for layer in range(n_layers):
        values[f"blocks.{layer}.hook_resid_pre"] = output.hidden_states[layer]
        for hook in ("hook_attn_out", "hook_mlp_out"):
            values[f"blocks.{layer}.{hook}"] = written[f"blocks.{layer}.{hook}"]
    return Expected(ids, values, output.logits)


_WRITES = dict.fromkeys(("attn", "attention", "self_attn"), "hook_attn_out") | {"mlp": "hook_mlp_out"}
"""Hooks by the names of the modules of a block that write to the residual stream."""
_WRITES_AFTER_NORMS = {
    "post_attention_layernorm": "hook_attn_out",
    "post_feedforward_layernorm": "hook_mlp_out",
}
"""The same where norms stand behind attention and MLP."""


def _difference(found: Tensor, wanted: Tensor, centred: bool) -> Tensor:
    """Norms of differences of vectors (P, d), by the norm of the vector, or the median one where that is more: (P,)."""
    if centred:
        wanted = wanted - wanted.mean(dim=1, keepdim=True)
    norms = wanted.norm(dim=1)
    return (found - wanted).norm(dim=1) / norms.clamp(min=norms.median())


def _nats(found: Tensor, wanted: Tensor) -> Tensor:
    """Mean differences of log-probabilities, of logits (P, V): (P,)."""
    return (full(found).log_softmax(-1) - full(wanted).log_softmax(-1)).abs().mean(dim=1)


def _disagreement(folder: Path, n_tokens: int, what: str, by_token: Tensor, tolerance: float) -> ModelError:
    first = int((~(by_token < tolerance)).nonzero()[0])
    return ModelError(
        f"TransformerLens computes something else from {folder} than transformers does: on a row of {n_tokens} tokens "
        f"they differ from token {first} on, in {what}. Its conversion ignores some settings of config.json, such as "
        "rope scaling or attention biases; this model cannot be used here"
    )
