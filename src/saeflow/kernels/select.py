"""Which latents are active: the encoder's product, and at once the few pairs of it that are worth keeping.

The product of a batch is N n numbers, of which a step needs P. On a CPU it is taken some tokens at a time into one
workspace: memory stays small, and what is selected from is still near the processor. On a GPU it is one product, and
nothing waits for the device, but for `positive`, whose number of pairs only the device knows.

A processor that multiplies bfloat16 does so much faster than float32. There the float32 product is never taken: its
bfloat16 twin rules out, by a bound on their difference (`loops._bounds`), nearly all pairs that cannot be among the
kept, and the inner products of the others are taken in float32. The result is that of the float32 product, but for the
order in which an inner product's terms are added. A GPU does so too where Triton is installed, but not for
`batch_top_k`. Where it does not, `bf16=True` lets the bfloat16 product alone decide which pairs are kept; their values
are then computed anew in the weights' precision.
"""

import platform
from collections.abc import Iterator
from functools import cache, partial
from types import ModuleType
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from saeflow.kernels import loops
from saeflow.kernels.rows import inner_products

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
    starts = torch.arange(0, len(x) * k + 1, k, device=x.device)
    if (sieve := sieve_on_gpu(x, encoder)) is not None:
        values, latents = sieve.top_k(x, encoder, b_enc, k, scale)
        return Active(values.view(-1), latents.view(-1), starts)
    parts = [part.top_k(k) for part in _products(x, encoder, b_enc, scale, bf16)]
    values, latents = (_cat([part[i] for part in parts]).view(-1) for i in (0, 1))
    return _valued(Active(values, latents, starts), x, encoder, b_enc, scale, bf16)


def positive(x: Tensor, encoder: Tensor, b_enc: Tensor, bf16: bool = False) -> Active:
    """All pairs with x encoder^T + b_enc above 0 (on a GPU some with value 0)."""
    if (sieve := sieve_on_gpu(x, encoder)) is not None:
        listed, starts = sieve.maybe_positive(x, encoder, b_enc)
        values, latents = sieve.positive(listed, starts, x, encoder, b_enc, int(starts[-1]))
        return Active(values, latents, starts)
    found = _joined([part.above(0.0) for part in _products(x, encoder, b_enc, None, bf16)])
    return _valued(found, x, encoder, b_enc, None, bf16)


def batch_top_k(
    x: Tensor, encoder: Tensor, b_enc: Tensor, k: int, scale: Tensor | None = None, bf16: bool = False
) -> Active:
    """The N k largest of relu(x encoder^T + b_enc) of the batch, none below 0 (on a GPU some with value 0).

    Latents compete by value times `scale` (n,). On a CPU a few tokens give a threshold that is probably too low, what
    is above it is collected, and the best of that are kept; where the threshold was too high, it is 0 the second time.
    """
    wanted = len(x) * k
    if not loops.supports(x):
        (part,) = _products(x, encoder, b_enc, scale, bf16)
        assert isinstance(part, _OnDevice)
        values, flat = torch.topk(part.product.view(-1), min(wanted, part.product.numel()), sorted=False)
        flat, order = torch.sort(flat)
        tokens = torch.div(flat, len(b_enc), rounding_mode="floor")
        found = Active(values[order], flat - tokens * len(b_enc), _starts(tokens, len(x)))
        return _valued(found, x, encoder, b_enc, scale, bf16)
    threshold = _low_threshold(x, encoder, b_enc, k, scale)
    found = _joined([part.above(threshold) for part in _products(x, encoder, b_enc, scale, bf16)])
    if len(found.values) < wanted and threshold > 0:
        found = _joined([part.above(0.0) for part in _products(x, encoder, b_enc, scale, bf16)])
    if len(found.values) > wanted:
        kept = torch.topk(found.values, wanted, sorted=False).indices.sort().values
        tokens = torch.searchsorted(found.starts, kept, right=True) - 1
        found = Active(found.values[kept], found.latents[kept], _starts(tokens, len(x)))
    return _valued(found, x, encoder, b_enc, scale, bf16)


def at_once(x: Tensor, encoder: Tensor) -> bool:
    """Whether `active_of_heads` takes several of the heads of x (H, N, d) and encoder (H, n, d) at once: small ones."""
    fit = 2 * x.shape[1] * encoder.shape[1] <= WORKSPACE
    return fit and loops.supports(x) and x.dtype == torch.float32 and multiplies_bfloat16()


def active_of_heads(x: Tensor, encoder: Tensor, b_enc: Tensor, k: int | None, scale: Tensor | None = None) -> Active:
    """`top_k` of H heads as one pattern, or, without k, `positive`. Only `at_once`.

    x (H, N, d), encoder (H, n, d), b_enc and scale (H, n). Row t of head h is row h N + t, its latent i column h n + i.
    """
    (H, N, _), n = x.shape, b_enc.shape[1]
    weighed, bias = (encoder, b_enc) if scale is None else (encoder * scale[..., None], b_enc * scale)
    x16, x_norms = _rounded(x.flatten(0, 1))
    encoder16, norms = _rounded(weighed.flatten(0, 1))
    sieve = (
        x.numpy(),
        *(t.reshape(H, N) for t in x_norms),
        weighed.numpy(),
        *(t.reshape(H, n) for t in norms),
        bias.numpy(),
    )
    several = WORKSPACE // (N * n)
    parts: list[tuple[Tensor, Tensor, Tensor]] = []
    for start in range(0, H, several):
        some = slice(start, start + several)
        product = torch.bmm(x16.view(x.shape)[some], encoder16.view(encoder.shape)[some].mT)
        part = _InLoops(product, (*(t[some] for t in sieve), start * n))
        if k is None:
            parts.append(part.above(0.0))
        else:
            values, columns = part.top_k(k)
            parts.append((values.view(-1), columns.view(-1), torch.full((len(values),), k)))
    found = _joined(parts)
    return found if scale is None else found._replace(values=found.values / scale.view(-1)[found.latents])


# ---------------------------------------------------------------------------------- the product and selection from it
class _OnDevice:
    """By operations of torch. `product` (C, n) of C tokens has no negative numbers."""

    def __init__(self, product: Tensor) -> None:
        self.product = product

    def top_k(self, k: int) -> tuple[Tensor, Tensor]:
        """Values (C, k) and columns (C, k) of each row's k largest, negative ones as 0."""
        values, columns = torch.topk(self.product, k, dim=1, sorted=False)
        return values, columns

    def above(self, threshold: float) -> tuple[Tensor, Tensor, Tensor]:
        """Values (P,) above a threshold of 0 or more, their columns (P,), and how many each row has (C,)."""
        mask = ~(self.product <= threshold)
        flat = mask.view(-1).nonzero().view(-1)
        return self.product.view(-1)[flat], flat % self.product.shape[1], mask.sum(dim=1)


class _InLoops:
    """By loops over the product (C, n), or over its bfloat16 twin (H, C, n) where `sieve` says what else that needs."""

    def __init__(self, product: Tensor, sieve: tuple[Any, ...] | None = None) -> None:
        self.sieve = sieve
        self.product = (product if sieve is None else product.view(torch.uint16)).numpy()
        self.dtype = self.product.dtype if sieve is None else np.dtype(np.float32)
        self.n = self.product.shape[-1]
        self.n_rows = self.product.size // self.n

    def _loop(self, plain: Any, sieved: Any) -> Any:
        return partial(plain, self.product) if self.sieve is None else partial(sieved, self.product, *self.sieve)

    def top_k(self, k: int) -> tuple[Tensor, Tensor]:
        shape = *self.product.shape[:-1], k
        values, columns = np.empty(shape, self.dtype), np.empty(shape, np.int64)
        loop = self._loop(loops.top_k, loops.sieved_top_k)
        loops.in_threads(partial(loop, k, values, columns), self.n_rows, self.product.size)
        return torch.from_numpy(values).view(-1, k), torch.from_numpy(columns).view(-1, k)

    def above(self, threshold: float) -> tuple[Tensor, Tensor, Tensor]:
        loop, counts = self._loop(loops.above, loops.sieved_above), np.empty(self.n_rows, np.int64)
        found: dict[int, tuple[np.ndarray, np.ndarray]] = {}

        def of(first: int, last: int) -> None:
            size = (last - first) * self.n + loops.LISTED
            values, columns = np.empty(size, self.dtype), np.empty(size, np.int64)
            total = loop(self.dtype.type(threshold), values, columns, counts, first, last)
            found[first] = values[:total], columns[:total]

        loops.in_threads(of, self.n_rows, self.product.size)
        values, columns = (_cat([torch.from_numpy(found[first][i]) for first in sorted(found)]) for i in (0, 1))
        return values, columns, torch.from_numpy(counts)


def _products(
    x: Tensor, encoder: Tensor, b_enc: Tensor, scale: Tensor | None, bf16: bool
) -> Iterator[_OnDevice | _InLoops]:
    """x encoder^T + b_enc, times `scale`, some tokens at a time. The next overwrites the last."""
    if scale is not None:
        encoder, b_enc = encoder * scale[:, None], b_enc * scale
    if not loops.supports(x):
        product = x.bfloat16() @ encoder.bfloat16().T + b_enc if bf16 else torch.addmm(b_enc, x, encoder.T)
        yield _OnDevice(product.relu_())
        return
    N, n = len(x), len(b_enc)
    step = max(WORKSPACE // n, FEWEST_TOKENS)
    sieved = x.dtype == torch.float32 and multiplies_bfloat16()
    workspace = torch.empty(min(step, N), n, dtype=torch.bfloat16 if sieved else x.dtype)
    if sieved:
        encoder16, encoder_norms = _rounded(encoder)
        x16, x_norms = _rounded(x)
    for start in range(0, N, step):
        rows = slice(start, start + step)
        out = workspace[: len(x[rows])]
        if sieved:
            torch.mm(x16[rows], encoder16.T, out=out)
            sieve = x[rows].numpy(), *(t[rows] for t in x_norms), encoder.numpy(), *encoder_norms, b_enc.numpy()
            yield _InLoops(out[None], (*(t[None] for t in sieve), 0))
        else:
            yield _InLoops(torch.addmm(b_enc, x[rows], encoder.T, out=out))


def sieve_on_gpu(x: Tensor, encoder: Tensor) -> ModuleType | None:
    """The loops that select by the bfloat16 product, where x and encoder are for them."""
    gpu = loops.on_gpu(x)
    return gpu if gpu is not None and x.dtype == torch.float32 and len(encoder) <= gpu.MOST_LATENTS else None


@cache
def multiplies_bfloat16() -> bool:
    """Whether the processor has instructions for it (AVX512-BF16): emulation would be slow."""
    if platform.machine().lower() not in ("x86_64", "amd64") or not torch.backends.mkldnn.is_available():
        return False
    return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported() and torch.cpu._is_avx512_bf16_supported())


def _rounded(rows: Tensor) -> tuple[Tensor, tuple[np.ndarray, np.ndarray]]:
    """rows (m, d) in bfloat16; the norms of rows, and of what rounding left over."""
    rounded = rows.bfloat16()
    norms, rests = np.empty(len(rows), np.float32), np.empty(len(rows), np.float32)
    arrays = rows.numpy(), rounded.view(torch.uint16).numpy(), norms, rests
    loops.in_threads(partial(loops.norms_and_rests, *arrays), len(rows), rows.numel())
    return rounded, (norms, rests)


def _valued(found: Active, x: Tensor, encoder: Tensor, b_enc: Tensor, scale: Tensor | None, bf16: bool) -> Active:
    """With the values that the pairs have before scaling, and in full precision."""
    if bf16 and not loops.supports(x):
        exact = inner_products(x, encoder, found.latents, found.starts).add_(b_enc[found.latents]).relu_()
        return found._replace(values=exact)
    return found if scale is None else found._replace(values=found.values / scale[found.latents])


def _starts(tokens: Tensor, n_tokens: int) -> Tensor:
    """Where each token begins in a sorted list of tokens, (N + 1,)."""
    return torch.searchsorted(tokens, torch.arange(n_tokens + 1, device=tokens.device))


def _low_threshold(x: Tensor, encoder: Tensor, b_enc: Tensor, k: int, scale: Tensor | None) -> float:
    """A value that about 1.5 k latents a token exceed, among 64 tokens of the batch or more."""
    some = x[:: max(len(x) // 64, 1)]
    product = torch.addmm(b_enc, some, encoder.T)
    if scale is not None:
        product *= scale
    rank = product.numel() - min(3 * k * len(product) // 2 + 1, product.numel())
    found = float(np.partition(product.numpy().reshape(-1), rank)[rank])
    return found if found > 0 else 0.0  # also for NaN


def _joined(parts: list[tuple[Tensor, Tensor, Tensor]]) -> Active:
    values, latents, counts = (_cat([part[i] for part in parts]) for i in (0, 1, 2))
    return Active(values, latents, torch.cat([counts.new_zeros(1), counts.cumsum(0)]))


def _cat(tensors: list[Tensor]) -> Tensor:
    return tensors[0] if len(tensors) == 1 else torch.cat(tensors)
