"""What a change at one position does to the prediction made there, for many positions of a row in one pass.

The prediction at a position depends on the changed value there and, through attention, on what lies before; nothing
that is changed elsewhere in the row may be seen. So within `each_alone` every attention layer lets a position look at
the keys and values of a clean pass for all earlier positions, and at its own for itself:

    softmax over s <= t of q_t . k_s,  with k_s and v_s clean for s < t, and changed for s = t.

The final value at t is then that of a pass in which t alone was changed (and those at other positions are of other
changes); a pass for each changed position would give the same. Shapes: B rows, P positions, H query heads.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial

import torch
from torch import Tensor

from saeflow.models.attention import fused, is_plain, plain_forward
from saeflow.models.protocol import LanguageModel


class Recorder:
    """Keys and values (B, P, G, d_head) of the last clean pass, by layer; while `clean`, passes are recorded."""

    def __init__(self) -> None:
        self.clean = True
        self.seen: dict[int, tuple[Tensor, Tensor]] = {}

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
        """An `Attend` of a layer."""
        if self.clean:
            self.seen[layer] = k, v
            return fused(q, k, v, scale)
        return _attend(q, self.seen[layer], (k, v), scale)


def can_stand_alone(model: LanguageModel) -> bool:
    """Whether all layers have attention that `each_alone` can compute."""
    return all(is_plain(block.attn) for block in model.blocks)


@contextmanager
def each_alone(model: LanguageModel) -> Iterator[Recorder]:
    """Within it, passes of `model` are clean and recorded, or (`recorder.clean = False`) see the last clean pass at
    earlier positions. All layers must be plain (`can_stand_alone`)."""
    recorder = Recorder()
    for layer, block in enumerate(model.blocks):
        block.attn.forward = plain_forward(block.attn, partial(recorder.attend, layer))
    try:
        yield recorder
    finally:
        for block in model.blocks:
            del block.attn.forward  # uncovers the method of its class


def _attend(q: Tensor, before: tuple[Tensor, Tensor], own: tuple[Tensor, Tensor], scale: float) -> Tensor:
    """q (B, P, H, d), keys and values (B, P, heads, d) -> (B, P, H, d)."""
    n = q.shape[2] // own[0].shape[2]  # query head h reads key and value head h // n
    q = q.transpose(1, 2)
    (k_before, v_before), (k_own, v_own) = (
        [t.repeat_interleave(n, dim=2).transpose(1, 2) for t in pair] for pair in (before, own)
    )
    scores = scale * q @ k_before.transpose(2, 3)  # (B, H, P, P)
    itself = scale * (q * k_own).sum(3)
    later = torch.ones(scores.shape[2:], dtype=torch.bool, device=q.device).triu(1)
    scores = scores.masked_fill(later, -torch.inf)
    scores.diagonal(dim1=2, dim2=3).copy_(itself)
    pattern = scores.softmax(3)
    at_itself = pattern.diagonal(dim1=2, dim2=3)[..., None]
    z = pattern @ v_before + at_itself * (v_own - v_before)
    return z.transpose(1, 2)
