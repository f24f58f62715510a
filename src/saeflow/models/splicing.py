"""Running a model with the value at one hook replaced, at the cost of only the layers above that hook.

One clean pass over a batch of rows keeps what the splices need; each splice then resumes from there
(`start_at_layer`). Additions are in the model's own order, so that the result is bit for bit that
of a full pass with a hook. A splice replaces every position of a row, BOS too.

Passes end at the unembedding's input ("final"), so that logits can be made a few positions at a time
(`saeflow.kernels.next_token`). Shapes: B rows, P positions, D model width.
"""

import functools
import operator
import re
from collections.abc import Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from saeflow.models.folder import hook_layer
from saeflow.models.protocol import LanguageModel, full, hooked, rounded


class CleanPass(NamedTuple):
    """The clean pass of one batch."""

    tokens: Tensor
    """(B, P)"""
    final: Tensor
    """(B, P, D): what the unembedding reads."""
    values: dict[str, Tensor]
    """By hook: (B, P, d) or (B, P, head, d_head)."""


@torch.no_grad()
def run_clean(model: LanguageModel, tokens: Tensor, hooks: Iterable[str], splices: Iterable[str]) -> CleanPass:
    """Runs the model on `tokens` (B, P); keeps the values at `hooks`, and what resuming at `splices` takes."""
    kept = {*hooks, *splices}.union(*(_resume(model, splice)[1] for splice in splices))
    values: dict[str, Tensor] = {}

    def keep(value: Tensor, hook: Any) -> None:
        values[hook.name] = value

    with hooked(model, [(name, keep) for name in sorted(kept)]):
        final = _final(model, tokens)
    return CleanPass(tokens, final, values)


@torch.no_grad()
def run_spliced(
    model: LanguageModel, clean: CleanPass, hook_name: str, value: Tensor, head: int | None = None
) -> Tensor:
    """The final value (B, P, D) with the value at the hook replaced by `value`, of its shape or flattened to (N, d).

    With `head` the value of that head alone is replaced, by `value` (N, d_head).
    """
    layer, base, adds = _resume(model, hook_name)
    if head is None:
        value = value.reshape(clean.values[hook_name].shape)
    else:
        all_heads = clean.values[hook_name].clone()
        all_heads[:, :, head] = value.view(*all_heads.shape[:2], -1)
        value = all_heads
    parts = [clean.values[name] for name in base] + ([value] if adds else [])
    hooks: list[tuple[str, Any]] = [] if adds else [(hook_name, lambda _, hook: value)]
    residual = functools.reduce(operator.add, [rounded(model, part) for part in parts]) if parts else None
    return run_hooked(model, clean.tokens, hooks, residual, layer)


@torch.no_grad()
def run_hooked(
    model: LanguageModel, tokens: Tensor, hooks: list[tuple[str, Any]], residual: Tensor | None, layer: int
) -> Tensor:
    """The final value (B, P, D) of a pass with `hooks`, from `residual` (B, P, D) before block `layer` on.

    Without a residual the pass starts at `tokens` (B, P). Functions at one hook are called in the order of the list.
    """
    with hooked(model, hooks):
        return _final(model, tokens) if residual is None else _final(model, residual, layer)


def flattened(value: Tensor, head: int | None = None) -> Tensor:
    """(B, P, d) or (B, P, head, d_head) to (N, d), or with `head` to (N, d_head)."""
    return (value if head is None else value[:, :, head]).flatten(2).flatten(0, 1)


def _resume(model: LanguageModel, hook_name: str) -> tuple[int, tuple[str, ...], bool]:
    """How a splice resumes, (layer, base, adds): the residual stream before block `layer` is the sum of `base`, then
    the value if `adds`; otherwise the value is put in by a hook during the pass. With no `base` and no `adds` the pass
    starts at the tokens.

    Hooks whose value is a term of the residual stream are added to the other terms, and their block is not run.
    """
    if hook_name.startswith("ln_final"):
        last = model.cfg.n_layers - 1
        return last + 1, (f"blocks.{last}.hook_resid_post",), False
    found = re.fullmatch(r"blocks\.(\d+)\.(.+)", hook_name)
    if not found:  # the embedding
        return 0, (), False
    layer, block = int(found[1]), f"blocks.{found[1]}."
    if found[2] == "hook_resid_pre":
        return layer, (), True
    if found[2] == "hook_resid_post":
        return layer + 1, (), True
    if found[2] == "hook_mlp_out":
        terms = ("hook_resid_pre", "hook_attn_out") if model.cfg.parallel_attn_mlp else ("hook_resid_mid",)
        return layer + 1, tuple(block + term for term in terms), True
    return layer, (block + "hook_resid_pre",), False


def _final(model: LanguageModel, given: Tensor, layer: int | None = None) -> Tensor:
    """What the unembedding reads after tokens, or after the residual stream before block `layer`."""
    residual = model(
        given if layer is None else rounded(model, given), start_at_layer=layer, stop_at_layer=model.cfg.n_layers
    )
    if model.cfg.normalization_type is None:
        return full(residual.to(model.cfg.device))
    return full(model.ln_final(residual))


def run_until(model: LanguageModel, tokens: Tensor, hooks: list[str]) -> None:
    """A pass over `tokens` (B, P) that ends when the highest of the hooks has fired; no logits are made."""
    if any(name.startswith("ln_final") for name in hooks):
        _final(model, tokens)
    else:
        model(tokens, stop_at_layer=max(hook_layer(name, model.cfg.n_layers) for name in hooks))


@torch.no_grad()
def read_hooks(model: LanguageModel, tokens: Tensor, hooks: list[str]) -> list[Tensor]:
    """Values at `hooks` of a clean pass over `tokens` (B, P) that stops above the highest of them."""
    values: dict[str, Tensor] = {}

    def keep(value: Tensor, hook: Any) -> None:
        values[hook.name] = value

    with hooked(model, [(name, keep) for name in hooks]):
        run_until(model, tokens, hooks)
    return [values[name] for name in hooks]
