"""A model whose layers lie on several GPUs, one after the other, as it would not fit on one.

Embeddings, the last norm and the unembedding are on the first, and so is all that comes in or goes out: tokens, values
at hooks (`protocol.hooked`), what the unembedding reads. Block l of L is on device floor(l n / L) of n, which is
TransformerLens's rule, whose passes move the residual stream from block to block; before each block, what it is given
is moved to where it lies. So nothing that runs a model has to know where its layers are. What reads the weights of
layers does, and is not for such models.
"""

from collections.abc import Iterable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only


def place_of(layer: int, n_layers: int, devices: Sequence[torch.device]) -> torch.device:
    """Of a block."""
    return devices[layer * len(devices) // n_layers]


def spread(
    root: nn.Module, blocks: Sequence[nn.Module], last: nn.Module | None, devices: Sequence[torch.device]
) -> None:
    """Moves all of `root` to where it is to lie, and has what its `blocks` and `last`, the norm after them, are given
    follow."""
    inside = [list(block.modules()) for block in blocks]
    known = {id(module) for modules in inside for module in modules}
    moved: Moved = {}
    _move([module for module in root.modules() if id(module) not in known], devices[0], moved)
    for layer, (block, modules) in enumerate(zip(blocks, inside, strict=True)):
        place = place_of(layer, len(blocks), devices)
        _move(modules, place, moved)
        block.register_forward_pre_hook(partial(_bring, place), with_kwargs=True)
    if last is not None:
        last.register_forward_pre_hook(partial(_bring, devices[0]), with_kwargs=True)


Moved = dict[tuple[int, torch.device], tuple[Tensor, Tensor]]
"""What was moved, by its identity and where to: a tensor, which lives as long as its identity is asked for, and itself
there."""


def _move(modules: Iterable[nn.Module], device: torch.device, moved: Moved) -> None:
    """Their own parameters and buffers; what several of them share stays one on each device."""
    for module in modules:
        for name, held in [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]:
            if (id(held), device) not in moved:
                there = held.to(device)
                if isinstance(held, nn.Parameter):
                    there = nn.Parameter(there, held.requires_grad)
                moved[id(held), device] = held, there
            setattr(module, name, moved[id(held), device][1])


def _bring(device: torch.device, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Any]:
    there: tuple[Any, Any] = tree_map_only(Tensor, lambda tensor: tensor.to(device), (args, kwargs))
    return there
