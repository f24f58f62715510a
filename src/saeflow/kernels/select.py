"""Which latents are active: the encoder's product, and at once the few pairs of it that are worth keeping.

The product of a batch is N n numbers, of which a step needs P. On a CPU it is taken some tokens at a time into one
workspace: memory stays small, and what is selected from is still near the processor. On a GPU it is one product, and
nothing waits for the device, but for `positive`, whose number of pairs only the device knows.

Selection on a CPU goes through numpy, whose vectorised sort of short rows beats `torch.topk` several times; elsewhere,
and in float64, `torch.topk` does it, with the same result but for which of equal values are taken.

With `bfloat16` the product only decides which pairs are kept; their values are computed anew in the weights' precision.
"""

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from saeflow.kernels.rows import inner_products

SHORT = 256  # numpy sorts rows up to this long with networks; in longer ones a number costs several times as much
WORKSPACE = 1 << 23  # numbers of the product that a CPU keeps at a time
FEWEST_TOKENS = 512  # in a part of the product; with fewer a dense product is slow


class Active(NamedTuple):
    """The kept pairs (token, latent) of a batch, ordered by token. P pairs, N tokens."""

    values: Tensor
    """(P,): max(pre-activation, 0)."""
    latents: Tensor
    """(P,) int64"""
    starts: Tensor
    """(N + 1,) int64: where each token's pairs start."""


def top_k(x: Tensor, encoder: Tensor, b_enc: Tensor, k: int, scale: Tensor | None = None, bf16: bool = False) -> Active:
    """The k largest of relu(x encoder^T + b_enc) of every token; exactly k pairs each, some with value 0.

    x (N, d), encoder (n, d), b_enc (n,). `scale` (n,), positive: latents compete by value times scale.
    """
    parts = [_top_k_of(part, k) for part in _products(x, encoder, b_enc, scale, bf16)]
    values, latents = (torch.cat([part[i] for part in parts]).view(-1) for i in (0, 1))
    starts = torch.arange(0, len(x) * k + 1, k, device=x.device)
    return _valued(Active(values, latents, starts), x, encoder, b_enc, scale, bf16)


def positive(x: Tensor, encoder: Tensor, b_enc: Tensor, bf16: bool = False) -> Active:
    """All pairs with x encoder^T + b_enc above 0."""
    found = _joined([_above(part, 0.0) for part in _products(x, encoder, b_enc, None, bf16)])
    return _valued(found, x, encoder, b_enc, None, bf16)


def batch_top_k(
    x: Tensor, encoder: Tensor, b_enc: Tensor, k: int, scale: Tensor | None = None, bf16: bool = False
) -> Active:
    """The N k largest of relu(x encoder^T + b_enc) of the batch, none below 0 (on a GPU some with value 0).

    Latents compete by value times `scale` (n,). On a CPU a few tokens give a threshold that is probably too low, what
    is above it is collected, and the best of that are kept; where the threshold was too high, it is 0 the second time.
    """
    wanted = len(x) * k
    if x.device.type != "cpu":
        (product,) = _products(x, encoder, b_enc, scale, bf16)
        values, flat = torch.topk(product.view(-1), min(wanted, product.numel()), sorted=False)
        flat, order = torch.sort(flat)
        tokens = torch.div(flat, len(b_enc), rounding_mode="floor")
        found = Active(values[order], flat - tokens * len(b_enc), _starts(tokens, len(x)))
        return _valued(found, x, encoder, b_enc, scale, bf16)
    threshold = _low_threshold(x, encoder, b_enc, k, scale, bf16)
    found = _joined([_above(part, threshold) for part in _products(x, encoder, b_enc, scale, bf16)])
    if len(found.values) < wanted and threshold > 0:
        found = _joined([_above(part, 0.0) for part in _products(x, encoder, b_enc, scale, bf16)])
    if len(found.values) > wanted:
        kept = torch.topk(found.values, wanted, sorted=False).indices.sort().values
        tokens = torch.searchsorted(found.starts, kept, right=True) - 1
        found = Active(found.values[kept], found.latents[kept], _starts(tokens, len(x)))
    return _valued(found, x, encoder, b_enc, scale, bf16)


def _products(x: Tensor, encoder: Tensor, b_enc: Tensor, scale: Tensor | None, bf16: bool) -> Iterator[Tensor]:
    """relu(x encoder^T + b_enc), times `scale`, some tokens at a time (C, n). The next overwrites the last."""
    if scale is not None:
        encoder, b_enc = encoder * scale[:, None], b_enc * scale
    if bf16:
        x, encoder = x.bfloat16(), encoder.bfloat16()
    N, n = len(x), len(b_enc)
    step = N if x.device.type != "cpu" else max(WORKSPACE // n, FEWEST_TOKENS)
    workspace = torch.empty(min(step, N), n, dtype=b_enc.dtype, device=x.device)
    for start in range(0, N, step):
        rows = x[start : start + step]
        out = workspace[: len(rows)]
        if bf16:
            torch.add(rows @ encoder.T, b_enc, out=out)
        else:
            torch.addmm(b_enc, rows, encoder.T, out=out)
        yield out.relu_()


def _valued(found: Active, x: Tensor, encoder: Tensor, b_enc: Tensor, scale: Tensor | None, bf16: bool) -> Active:
    """With the values that the pairs have before scaling, and in full precision."""
    if bf16:
        exact = inner_products(x, encoder, found.latents, found.starts).add_(b_enc[found.latents]).relu_()
        return found._replace(values=exact)
    return found if scale is None else found._replace(values=found.values / scale[found.latents])


def _starts(tokens: Tensor, n_tokens: int) -> Tensor:
    """Where each token begins in a sorted list of tokens, (N + 1,)."""
    return torch.searchsorted(tokens, torch.arange(n_tokens + 1, device=tokens.device))


def _low_threshold(
    x: Tensor, encoder: Tensor, b_enc: Tensor, k: int, scale: Tensor | None, bf16: bool, n_tokens: int = 64
) -> float:
    """A value that about 1.5 k latents a token exceed, among some tokens of the batch."""
    some = x[:: max(len(x) // n_tokens, 1)]
    product = next(_products(some, encoder, b_enc, scale, bf16))
    rank = product.numel() - min(3 * k * len(product) // 2 + 1, product.numel())
    found = float(np.partition(product.numpy().reshape(-1), rank)[rank])
    return found if found > 0 else 0.0  # also for NaN


# ---------------------------------------------------------------- selection from a part of the product, on a CPU
def _top_k_of(part: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """part (C, n), nonnegative -> the k largest of each row: values (C, k) and columns (C, k), in no order."""
    if part.device.type != "cpu" or part.dtype != torch.float32:
        values, columns = torch.topk(part, k, dim=1, sorted=False)
        return values, columns
    found = _in_threads(lambda rows: _largest(rows, None, k), part.numpy())
    values, columns = (torch.from_numpy(np.concatenate([f[i] for f in found])) for i in (0, 1))
    return values, columns


def _largest(values: np.ndarray, columns: np.ndarray | None, k: int) -> tuple[np.ndarray, np.ndarray]:
    """Of each row of `values` (C, c), float32 and nonnegative: the k largest, and their `columns` (or 0 to c - 1).

    A row is cut into m strided blocks. Its k largest numbers lie in the k blocks with the largest maxima, so only those
    are looked at further, until rows are short enough to sort.
    """
    c = values.shape[1]
    shorter = (m for m in range(4 * k, min(SHORT, c // 2) + 1) if c % m == 0)  # so many blocks leave a quarter
    m = min(shorter, key=lambda m: m + k * c // m, default=0)
    if c <= SHORT or not m:
        keys = _keys(values, np.arange(c) if columns is None else columns)
        keys = np.sort(keys, axis=1)[:, c - k :] if c <= SHORT else np.partition(keys, c - k, axis=1)[:, c - k :]
        return (keys >> 32).astype(np.int32).view(np.float32), keys & 0xFFFFFFFF
    blocks = values.reshape(len(values), c // m, m)
    best = np.sort(_keys(blocks.max(axis=1), np.arange(m)), axis=1)[:, m - k :] & 0xFFFFFFFF
    inside = (best[:, None, :] + np.arange(0, c, m)[None, :, None]).reshape(len(values), -1)
    flat = inside + np.arange(0, values.size, c)[:, None]
    candidates = values.reshape(-1).take(flat)
    return _largest(candidates, inside if columns is None else columns.reshape(-1).take(flat), k)


def _keys(values: np.ndarray, columns: np.ndarray) -> np.ndarray:
    """Numbers (C, c) int64 that sort as the nonnegative float32 `values` do, with the column below."""
    keys = values.view(np.int32).astype(np.int64)
    keys <<= 32
    keys |= columns
    return keys


def _above(part: Tensor, threshold: float) -> tuple[Tensor, Tensor, Tensor]:
    """part (C, n) -> values (P,) above the threshold, their columns (P,), and how many each row has (C,)."""
    if part.device.type != "cpu":
        mask = part > threshold
        flat = mask.view(-1).nonzero().view(-1)
        return part.view(-1)[flat], flat % part.shape[1], mask.sum(dim=1)

    def of(rows: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        mask = rows > threshold
        if np.isnan(rows.max()):
            mask.reshape(-1)[rows.argmax()] = True  # it compares as false; one is enough for the loss to show it
        flat = np.flatnonzero(mask)
        return rows.reshape(-1).take(flat), flat % rows.shape[1], np.count_nonzero(mask, axis=1)

    found = _in_threads(of, part.numpy())
    values, columns, counts = (torch.from_numpy(np.concatenate([f[i] for f in found])) for i in (0, 1, 2))
    return values, columns, counts


def _joined(parts: list[tuple[Tensor, Tensor, Tensor]]) -> Active:
    values, latents, counts = (torch.cat([part[i] for part in parts]) for i in (0, 1, 2))
    return Active(values, latents, torch.cat([counts.new_zeros(1), counts.cumsum(0)]))


def _in_threads(work: Callable[[np.ndarray], Any], rows: np.ndarray) -> list[Any]:
    """`work` on as many slices of the rows as torch uses threads; numpy lets them run at once."""
    threads = torch.get_num_threads()
    if threads == 1 or rows.size < 1 << 16:
        return [work(rows)]
    return list(_pool(threads).map(work, np.array_split(rows, threads)))


@cache
def _pool(threads: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(threads, thread_name_prefix="select")
