"""How a process takes memory: glibc's allocator is made for small pieces, and a step takes megabytes, again and again.

Without glibc the first two do nothing.
"""

import ctypes
import gc
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor


def keep_freed_memory() -> None:
    """Lets glibc keep what is freed, for a job that takes and frees the same megabytes at every step.

    Otherwise it gives them back to the system each time, and the page faults of taking them again cost more than many
    of the operations.
    """
    if mallopt := _of_glibc("mallopt"):
        m_trim_threshold, m_mmap_threshold = -1, -3  # of malloc.h
        mallopt(m_mmap_threshold, 32 << 20)  # the largest that it takes
        mallopt(m_trim_threshold, 1 << 30)


def give_back_freed_memory() -> None:
    """Gives the system what was freed and kept, before something is taken that is too large for any of its pieces."""
    if malloc_trim := _of_glibc("malloc_trim"):
        malloc_trim(0)


@contextmanager
def uncollected() -> Iterator[None]:
    """Within it, Python looks for no cycles of garbage: thousands of modules that are imported are none, and it would
    look through all of them again and again, for a sixth of the time."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def _of_glibc(name: str) -> Callable[..., Any] | None:
    return getattr(ctypes.CDLL(None), name, None)


def empty(like: Tensor, *shape: int) -> Tensor:
    """NumPy asks the system for large pages, which torch does not: rows all over a large matrix are found faster."""
    if like.device.type != "cpu" or like.dtype not in (torch.float32, torch.float64):
        return like.new_empty(shape)
    return torch.from_numpy(np.empty(shape, dtype=like.numpy().dtype))


class Workspace:
    """Memory on the CPU that is used again at each step, by name: taken anew, the system would clear it each time."""

    def __init__(self) -> None:
        self.buffers: dict[str, Tensor] = {}

    def empty(self, name: str, like: Tensor, *shape: int) -> Tensor:
        """`empty`, where what had this name before is over."""
        if like.device.type != "cpu":
            return empty(like, *shape)
        size, buffer = math.prod(shape), self.buffers.get(name)
        if buffer is None or buffer.numel() < size or buffer.dtype != like.dtype:
            buffer = self.buffers[name] = empty(like, size)
        return buffer[:size].view(shape)
