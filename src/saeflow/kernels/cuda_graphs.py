"""Steps as CUDA graphs: recorded once, then launched as one. A processor takes longer for the many launches of a step
than a GPU for their work."""

import gc
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from saeflow.kernels.select import Active, sieve_on_gpu
from saeflow.kernels.step import Objective, Step, Weights


class CudaGraph:
    """`work(*tensors)`, launched as one. It must not wait for the GPU, and must have been done with such tensors
    before, as compiling cannot be recorded. What it changes in place must stay where it is."""

    def __init__(self, work: Callable[..., Any], *tensors: Tensor) -> None:
        self.inputs = [t.clone() for t in tensors]
        self.graph = torch.cuda.CUDAGraph()
        gc.collect()
        gc.disable()  # a graph that is thrown away meanwhile would break the recording
        try:
            with torch.cuda.graph(self.graph, capture_error_mode="thread_local"):  # other threads may read batches
                self.outputs = work(*self.inputs)
        finally:
            gc.enable()

    def __call__(self, *tensors: Tensor) -> Any:
        """What `work` returns; the next call writes over its tensors."""
        for static, new in zip(self.inputs, tensors, strict=True):
            static.copy_(new)
        self.graph.replay()
        return self.outputs


class GraphedStep:
    """A dictionary's `update(x, y, lr, l1, active=...)`, which takes a step and changes the weights in place.

    All is one recording, but with relu: there the GPU must first say how many pairs there are, so that the step has
    room for them. It is recorded anew when they outgrow that room, or have become far fewer.
    """

    def __init__(self, objective: Objective, weights: Weights) -> None:
        self.objective, self.weights = objective, weights
        self.selection: CudaGraph | None = None
        self.step: CudaGraph | None = None
        self.capacity = 0

    def __call__(self, update: Callable[..., Step], x: Tensor, y: Tensor, lr: Tensor, l1: Tensor) -> Step:
        """As `update`, the same at each call, which is not kept: then nothing keeps the memory of a recording alive.
        The next call writes over the tensors of what this returns."""
        relu = self.objective.activation == "relu"
        batch = (x,) if y is x else (x, y)
        other_shapes = self.step is not None and [t.shape for t in batch] != [t.shape for t in self.step.inputs[:-2]]
        if other_shapes or (relu and sieve_on_gpu(x, self.weights.encoder) is None):
            return update(x, y, lr, l1)
        if relu:
            if self.selection is None:
                self.selection = CudaGraph(self._maybe_active, x)
            _, starts = self.selection(x)
            pairs = int(starts[-1])  # waits
            if not pairs <= self.capacity <= 2 * pairs + len(x):
                self.capacity, self.step = pairs + pairs // 4 + 1, None
        if self.step is None:
            self.step = CudaGraph(partial(self._step, update), *batch, lr, l1)
        result: Step = self.step(*batch, lr, l1)
        return result

    def _maybe_active(self, x: Tensor) -> Any:
        sieve = sieve_on_gpu(x, self.weights.encoder)
        assert sieve is not None
        return sieve.maybe_positive(self._centred(x), self.weights.encoder, self.weights.b_enc)

    def _step(self, update: Callable[..., Step], *tensors: Tensor) -> Step:
        x, y, (lr, l1) = tensors[0], tensors[-3], tensors[-2:]
        active = None
        if self.selection is not None and (sieve := sieve_on_gpu(x, self.weights.encoder)) is not None:
            listed, starts = self.selection.outputs
            encoder, b_enc = self.weights.encoder, self.weights.b_enc
            values, latents = sieve.positive(listed, starts, self._centred(x), encoder, b_enc, self.capacity)
            active = Active(values, latents, starts)
        return update(x, y, lr, l1, active=active)

    def _centred(self, x: Tensor) -> Tensor:
        return x - self.weights.b_dec if self.objective.centred else x
