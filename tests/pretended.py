"""Several devices on a machine that has one: tensors that say they lie on `meta:N`, and hold their values on the CPU.

An operation on tensors of two devices is an error, as it is on GPUs, but for scalars of the CPU and copies.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

COPIES = (torch.ops.aten._to_copy.default, torch.ops.aten.copy_.default)


class Elsewhere(Tensor):
    """A tensor that says it is on another device."""

    held: Tensor

    @staticmethod
    def __new__(cls, held: Tensor, device: torch.device) -> "Elsewhere":
        made: Elsewhere = torch.Tensor._make_wrapper_subclass(  # type: ignore[attr-defined]
            cls,
            held.size(),
            strides=held.stride(),
            storage_offset=held.storage_offset(),
            dtype=held.dtype,
            device=device,
        )
        made.held = held
        return made

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _run(func, args, kwargs or {})


class _Everywhere(TorchDispatchMode):
    """Also what makes tensors."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _run(func, args, kwargs or {})


def _run(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    given = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
    devices = {t.device for t in given if t.dim() or isinstance(t, Elsewhere)}
    if len(devices) > 1 and func not in COPIES:
        raise RuntimeError(f"{func} of tensors on {' and '.join(sorted(map(str, devices)))}")
    asked = kwargs.get("device")
    if asked is not None:
        device = torch.device(asked)
        kwargs = kwargs | {"device": "cpu"}
    else:
        device = given[0].device if func in COPIES else next(iter(devices), torch.device("cpu"))
    args_held, kwargs_held = tree_map_only(Elsewhere, lambda tensor: tensor.held, (args, kwargs))
    found = func(*args_held, **kwargs_held)
    if device.type == "cpu":
        return found
    if func._schema.name.endswith("_"):  # in place
        return args[0]
    return tree_map_only(Tensor, lambda tensor: Elsewhere(tensor, device), found)


def held(tensor: Tensor) -> Tensor:
    """The values of a tensor on a pretended device."""
    assert isinstance(tensor, Elsewhere), tensor.device
    return tensor.held


class _Torch:
    """`torch`, for a module that asks whether the type of a tensor is `torch.Tensor`."""

    Tensor = Elsewhere

    def __getattr__(self, name: str) -> Any:
        return getattr(torch, name)


@contextmanager
def pretended() -> Iterator[None]:
    """Within it, `meta:0`, `meta:1` and so on are devices with values."""
    import importlib

    passes = importlib.import_module("transformer_lens.HookedTransformer")
    passes.torch = _Torch()  # type: ignore[attr-defined]
    try:
        with _Everywhere():
            yield
    finally:
        passes.torch = torch  # type: ignore[attr-defined]
