"""Loops along a sparse pattern for GPUs, compiled by Triton: twins of those of `loops`, which explains what they do.

They take contiguous tensors of one GPU. Nothing waits for the device, except `positive`, whose number of pairs only the
device knows. No number is added atomically: every sum has one order, and two runs give identical bytes.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
import triton
import triton.language as tl
from torch import Tensor

MOST_LATENTS = 1 << 16  # whose numbers fit into 16 bits
ROWS, WIDTH = 4, 128  # of the tile that a program gathers at a time
WARPS = 1
LONG = 256  # pairs of a latent, from which on it is summed by larger programs
LONG_ROWS, LONG_WIDTH, LONG_WARPS = 128, 32, 4
SIEVED = 2048  # numbers of the product that a program looks at at a time


# ------------------------------------------------------------------------------------------------ sums and products
def sum_rows(rows: Tensor, indices: Tensor, starts: Tensor, values: Tensor) -> Tensor:
    """See `rows.sum_rows`."""
    rows = rows.contiguous()
    bags, width = len(starts) - 1, rows.shape[1]
    out = rows.new_empty(bags, width)
    grid = bags, triton.cdiv(width, WIDTH)
    _sum_rows[grid](rows, indices, starts, values.contiguous(), out, width, ROWS, WIDTH, num_warps=WARPS)
    return out


def inner_products(g: Tensor, rows: Tensor, indices: Tensor, starts: Tensor) -> Tensor:
    """See `rows.inner_products`."""
    out = rows.new_empty(len(indices))
    tensors = g.contiguous(), rows.contiguous(), indices, starts, out
    _inner_products[(len(g),)](*tensors, rows.shape[1], ROWS, WIDTH, num_warps=WARPS)
    return out


def reconstruct(
    values: Tensor, latents: Tensor, starts: Tensor, W_dec: Tensor, double_w: Tensor, penalty: Tensor, error: Tensor
) -> tuple[Tensor, Tensor]:
    """See `loops.reconstruct`; changes `error`. Returns squares (N,) and g_values (P,)."""
    squares, g_values = torch.empty_like(double_w), torch.empty_like(values)
    tensors = values, latents, starts, W_dec.contiguous(), double_w, penalty, error, squares, g_values
    _reconstruct[(len(error),)](*tensors, error.shape[1], ROWS, WIDTH, num_warps=WARPS)
    return squares, g_values


def gradients(
    values: Tensor,
    g_values: Tensor,
    error: Tensor,
    double_w: Tensor,
    x: Tensor,
    tokens: Tensor,
    order: Tensor,
    starts: Tensor,
) -> tuple[Tensor, ...]:
    """See `loops.gradients`: of encoder (n, d), b_enc (n,) and W_dec (n, p); the sums of the values (n,)."""
    n, d, p = len(starts) - 1, x.shape[1], error.shape[1]
    found = x.new_empty(n, d), x.new_empty(n), x.new_empty(n, p), x.new_empty(n)
    tensors = values, g_values, error, double_w, x.contiguous(), tokens, order, starts, *found
    _gradients[n, triton.cdiv(max(d, p), WIDTH)](*tensors, d, p, LONG, ROWS, WIDTH, num_warps=WARPS)
    grid = triton.cdiv(n, 64), triton.cdiv(max(d, p), LONG_WIDTH)
    _long_gradients[grid](*tensors, n, d, p, LONG, LONG_ROWS, LONG_WIDTH, num_warps=LONG_WARPS)
    return found


@triton.jit
def _weighted_rows(rows, index, value, there, columns, width):
    """value[j] rows[index[j], columns] of a tile, 0 where it is not there: (R, W)."""
    inside = there[:, None] & (columns < width)[None, :]
    place = index.to(tl.int64)[:, None] * width + columns[None, :]
    return value[:, None] * tl.load(rows + place, mask=inside, other=0)


@triton.jit
def _dots(x, rows, index, there, width, R: tl.constexpr, W: tl.constexpr):
    """x . rows[index[j]], (R,), with x (width,)."""
    total = tl.zeros((R, W), rows.dtype.element_ty)
    for c in range(0, width, W):
        columns = c + tl.arange(0, W)
        inside = there[:, None] & (columns < width)[None, :]
        place = index.to(tl.int64)[:, None] * width + columns[None, :]
        own = tl.load(x + columns, mask=columns < width, other=0)
        total += own[None, :] * tl.load(rows + place, mask=inside, other=0)
    return tl.sum(total, axis=1)


@triton.jit
def _sum_rows(rows, indices, starts, values, out, width, R: tl.constexpr, W: tl.constexpr):
    bag = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * W + tl.arange(0, W)
    last = tl.load(starts + bag + 1)
    total = tl.zeros((R, W), rows.dtype.element_ty)
    for j in range(tl.load(starts + bag), last, R):
        pairs = j + tl.arange(0, R)
        there = pairs < last
        index = tl.load(indices + pairs, mask=there, other=0)
        total += _weighted_rows(rows, index, tl.load(values + pairs, mask=there, other=0), there, columns, width)
    tl.store(out + bag * width + columns, tl.sum(total, axis=0), mask=columns < width)


@triton.jit
def _inner_products(g, rows, indices, starts, out, width, R: tl.constexpr, W: tl.constexpr):
    bag = tl.program_id(0).to(tl.int64)
    last = tl.load(starts + bag + 1)
    for j in range(tl.load(starts + bag), last, R):
        pairs = j + tl.arange(0, R)
        there = pairs < last
        index = tl.load(indices + pairs, mask=there, other=0)
        tl.store(out + pairs, _dots(g + bag * width, rows, index, there, width, R, W), mask=there)


@triton.jit
def _reconstruct(
    values, latents, starts, W_dec, double_w, penalty, error, squares, g_values, width, R: tl.constexpr, W: tl.constexpr
):
    token = tl.program_id(0).to(tl.int64)
    first, last = tl.load(starts + token), tl.load(starts + token + 1)
    square = tl.zeros((W,), error.dtype.element_ty)
    for c in range(0, width, W):
        columns = c + tl.arange(0, W)
        total = tl.zeros((R, W), error.dtype.element_ty)
        for j in range(first, last, R):
            pairs = j + tl.arange(0, R)
            there = pairs < last
            index = tl.load(latents + pairs, mask=there, other=0)
            total += _weighted_rows(W_dec, index, tl.load(values + pairs, mask=there, other=0), there, columns, width)
        place = error + token * width + columns
        own = tl.load(place, mask=columns < width, other=0) + tl.sum(total, axis=0)
        tl.store(place, own, mask=columns < width)
        square += own * own
    tl.store(squares + token, tl.sum(square, axis=0))
    tl.debug_barrier()  # other threads have written what comes now
    weight = tl.load(double_w + token)
    for j in range(first, last, R):
        pairs = j + tl.arange(0, R)
        there = pairs < last
        index = tl.load(latents + pairs, mask=there, other=0)
        g = _dots(error + token * width, W_dec, index, there, width, R, W) * weight
        g += tl.load(penalty + index, mask=there, other=0)
        positive = tl.load(values + pairs, mask=there, other=0) > 0
        tl.store(g_values + pairs, tl.where(positive, g, 0), mask=there)


@triton.jit
def _gradients(
    values,
    g_values,
    error,
    double_w,
    x,
    tokens,
    order,
    starts,
    encoder,
    b_enc,
    W_dec,
    activity,
    d,
    p,
    LONG: tl.constexpr,
    R: tl.constexpr,
    W: tl.constexpr,
):
    latent = tl.program_id(0).to(tl.int64)
    given = values, g_values, error, double_w, x, tokens, order, starts, encoder, b_enc, W_dec, activity
    if tl.load(starts + latent + 1) - tl.load(starts + latent) <= LONG:
        _gradients_of(latent, given, d, p, R, W)


@triton.jit
def _long_gradients(
    values,
    g_values,
    error,
    double_w,
    x,
    tokens,
    order,
    starts,
    encoder,
    b_enc,
    W_dec,
    activity,
    n,
    d,
    p,
    LONG: tl.constexpr,
    R: tl.constexpr,
    W: tl.constexpr,
):
    """Those that `_gradients` leaves out, among 64 latents."""
    first = tl.program_id(0).to(tl.int64) * 64
    latents = first + tl.arange(0, 64)
    there = latents < n
    counts = tl.load(starts + latents + 1, mask=there, other=0) - tl.load(starts + latents, mask=there, other=0)
    given = values, g_values, error, double_w, x, tokens, order, starts, encoder, b_enc, W_dec, activity
    if tl.max(counts, axis=0) > LONG:
        for latent in range(first, tl.minimum(first + 64, n)):
            if tl.load(starts + latent + 1) - tl.load(starts + latent) > LONG:
                _gradients_of(latent, given, d, p, R, W)


@triton.jit
def _gradients_of(latent, given, d, p, R: tl.constexpr, W: tl.constexpr):
    values, g_values, error, double_w, x, tokens, order, starts, encoder, b_enc, W_dec, activity = given
    columns = tl.program_id(1) * W + tl.arange(0, W)
    last = tl.load(starts + latent + 1)
    read, written = tl.zeros((R, W), x.dtype.element_ty), tl.zeros((R, W), x.dtype.element_ty)
    bias, active = tl.zeros((R,), x.dtype.element_ty), tl.zeros((R,), x.dtype.element_ty)
    for j in range(tl.load(starts + latent), last, R):
        pairs = j + tl.arange(0, R)
        there = pairs < last
        token = tl.load(tokens + pairs, mask=there, other=0)
        pair = tl.load(order + pairs, mask=there, other=0)
        value, g = tl.load(values + pair, mask=there, other=0), tl.load(g_values + pair, mask=there, other=0)
        weight = value * tl.load(double_w + token, mask=there, other=0)
        written += _weighted_rows(error, token, weight, there, columns, p)
        read += _weighted_rows(x, token, g, there, columns, d)
        bias += g
        active += value
    tl.store(W_dec + latent * p + columns, tl.sum(written, axis=0), mask=columns < p)
    tl.store(encoder + latent * d + columns, tl.sum(read, axis=0), mask=columns < d)
    if tl.program_id(1) == 0:
        tl.store(b_enc + latent, tl.sum(bias, axis=0))
        tl.store(activity + latent, tl.sum(active, axis=0))


# --------------------------------------------------------------------------------------------------------- selection
def top_k(x: Tensor, encoder: Tensor, b_enc: Tensor, k: int, scale: Tensor | None) -> tuple[Tensor, Tensor]:
    """Values (N, k) before scaling and latents (N, k) of `select.top_k`, in float32; n <= MOST_LATENTS."""
    x, encoder = x.contiguous(), encoder.contiguous()
    N, d = x.shape
    listed, counts = _sieved(x, encoder, b_enc, scale, k)
    values, latents = x.new_empty(N, k), counts.new_empty((N, k), dtype=torch.int64)
    size = max(triton.next_power_of_2(3 * k), 16)
    spare = x.new_empty(N, size)
    tensors = listed, counts, x, encoder, b_enc, scale, spare, values, latents
    _keep_largest[(N,)](*tensors, len(b_enc), d, k, size, ROWS, WIDTH, num_warps=min(max(size // 256, WARPS), 16))
    return values, latents


def maybe_positive(x: Tensor, encoder: Tensor, b_enc: Tensor) -> tuple[Tensor, Tensor]:
    """Of each token the latents that can be above 0, ascending, the first of a row (N, n) int16, which holds unsigned
    numbers; and starts (N + 1,) of the pairs that these are. n <= MOST_LATENTS."""
    listed, counts = _sieved(x.contiguous(), encoder.contiguous(), b_enc, None, 0)
    starts = torch.zeros(len(x) + 1, dtype=torch.int64, device=x.device)
    torch.cumsum(counts, 0, out=starts[1:])
    return listed, starts


def positive(
    listed: Tensor, starts: Tensor, x: Tensor, encoder: Tensor, b_enc: Tensor, room: int
) -> tuple[Tensor, Tensor]:
    """After `maybe_positive`: values and latents of its pairs. `room`: how many there are or more; what is too much
    follows as pairs of latent n and of no token."""
    x, encoder = x.contiguous(), encoder.contiguous()
    values, latents = x.new_zeros(room), starts.new_full((room,), len(b_enc))
    tensors = listed, starts, x, encoder, b_enc, values, latents
    _collect[(len(x),)](*tensors, len(b_enc), x.shape[1], ROWS, WIDTH, num_warps=WARPS)
    return values, latents


def _sieved(x: Tensor, encoder: Tensor, b_enc: Tensor, scale: Tensor | None, k: int) -> tuple[Tensor, Tensor]:
    """Of each token the latents that can be among the k largest (k > 0), or above 0: ascending, the first of a row
    (N, n) int16, which holds unsigned numbers; and how many they are (N,) int32, with k > 0 fewer than k only where all
    others are at most 0."""
    x16, *x_norms = _rounded(x, None)
    encoder16, *norms = _rounded(encoder, scale)
    with _summing_in_float32():
        products = x16 @ encoder16.T
    N, n = products.shape
    counts = torch.empty(N, dtype=torch.int32, device=x.device)
    groups = min(max(triton.next_power_of_2(8 * k), 128), 8192)
    tokens = max(SIEVED // groups, 1)
    listed = products.view(torch.int16)
    tensors = products, listed, *x_norms, *norms, b_enc, scale, counts
    _sieve[(triton.cdiv(N, tokens),)](*tensors, N, n, x.shape[1], k, tokens, groups, num_warps=max(groups // 512, 4))
    return listed, counts


@contextmanager
def _summing_in_float32() -> Iterator[None]:
    """The bound on a bfloat16 product's error holds where sums are rounded once, at the end."""
    flags = torch.backends.cuda.matmul
    before = flags.allow_bf16_reduced_precision_reduction
    flags.allow_bf16_reduced_precision_reduction = False
    try:
        yield
    finally:
        flags.allow_bf16_reduced_precision_reduction = before


def _rounded(rows: Tensor, scale: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """rows (m, d) times scale (m,), in bfloat16; their norms, and those of what rounding left over."""
    m, d = rows.shape
    found = torch.empty_like(rows, dtype=torch.bfloat16), rows.new_empty(m), rows.new_empty(m)
    _round_rows[(m,)](rows, scale, *found, d, 512, num_warps=WARPS)
    return found


@triton.jit
def _round_rows(rows, scale, rounded, norms, rests, d, W: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    factor = 1.0
    if scale is not None:
        factor = tl.load(scale + row)
    squares, left = tl.zeros((W,), tl.float32), tl.zeros((W,), tl.float32)
    for c in range(0, d, W):
        columns = c + tl.arange(0, W)
        number = tl.load(rows + row * d + columns, mask=columns < d, other=0) * factor
        short = number.to(tl.bfloat16)
        tl.store(rounded + row * d + columns, short, mask=columns < d)
        rest = number - short.to(tl.float32)
        squares += number * number
        left += rest * rest
    tl.store(norms + row, tl.sqrt(tl.sum(squares, axis=0)))
    tl.store(rests + row, tl.sqrt(tl.sum(left, axis=0)))


@triton.jit
def _bisected(rows, k, slack):
    """Of each row (T, m) of numbers no larger than 3.4e38: numbers low < high, and how many of the row exceed low: k to
    k + slack of them if possible, else low and high are adjacent and fewer than k exceed high; or 0, the largest, and
    fewer than k."""
    high = tl.maximum(tl.max(rows, axis=1), 0.0)
    low = high * 0.0
    exceed = tl.sum((rows > low[:, None]).to(tl.int32), axis=1)
    middle = 0.5 * high
    going = (exceed > k + slack) & (low < middle) & (middle < high)
    while tl.max(going.to(tl.int32), axis=0) > 0:
        count = tl.sum((rows > middle[:, None]).to(tl.int32), axis=1)
        low, high = tl.where(going & (count >= k), middle, low), tl.where(going & (count < k), middle, high)
        exceed = tl.where(going & (count >= k), count, exceed)
        middle = 0.5 * low + 0.5 * high
        going = (exceed > k + slack) & (low < middle) & (middle < high)
    return low, high, exceed


@triton.jit
def _bounds(products, norm, rest, norms, rests, b_enc, scale, token, columns, there, n, d):
    """Of a tile (T, G): the middles of what `loops._bounds` gives, and how far off they may be."""
    inside = columns < n
    place = token[:, None] * n + columns[None, :]
    product = tl.load(products + place, mask=there[:, None] & inside[None, :], other=0).to(tl.float32)
    bias = tl.load(b_enc + columns, mask=inside, other=0)
    if scale is not None:
        bias *= tl.load(scale + columns, mask=inside, other=0)
    a = 1.001 * rest + (2.0 * d + 32.0) * 1.1920929e-7 * norm
    error = a[:, None] * tl.load(norms + columns, mask=inside, other=0)[None, :]
    error += (1.005 * norm)[:, None] * tl.load(rests + columns, mask=inside, other=0)[None, :]
    error += 0.00393 * tl.abs(product) + 5e-7 * tl.abs(bias)[None, :]
    return product + bias[None, :], error


@triton.jit
def _sieve(
    products,
    listed,
    x_norms,
    x_rests,
    norms,
    rests,
    b_enc,
    scale,
    counts,
    N,
    n,
    d,
    k,
    TOKENS: tl.constexpr,
    GROUPS: tl.constexpr,
):
    """`listed` is the same memory as `products`. The k-th largest of the largest of groups of latents is at most the
    k-th largest of all, and where groups are many it is little less."""
    token = tl.program_id(0).to(tl.int64) * TOKENS + tl.arange(0, TOKENS)
    there = token < N
    norm, rest = tl.load(x_norms + token, mask=there, other=0), tl.load(x_rests + token, mask=there, other=0)
    bound = norm * 0.0
    if k > 0:
        largest = tl.zeros((TOKENS, GROUPS), tl.float32)
        for c in range(0, n, GROUPS):
            columns = c + tl.arange(0, GROUPS)
            middle, error = _bounds(products, norm, rest, norms, rests, b_enc, scale, token, columns, there, n, d)
            lower = tl.where(columns[None, :] < n, middle - error, 0.0)
            largest = tl.maximum(largest, tl.where(lower == lower, tl.minimum(lower, 3.4e38), 3.4e38))
        bound, _, _ = _bisected(largest, k, k // 8)
    count = tl.zeros((TOKENS,), tl.int32)
    for c in range(0, n, GROUPS):
        columns = c + tl.arange(0, GROUPS)
        middle, error = _bounds(products, norm, rest, norms, rests, b_enc, scale, token, columns, there, n, d)
        found = (columns < n)[None, :] & ~(middle + error <= bound[:, None]) & there[:, None]
        place = count[:, None] + tl.cumsum(found.to(tl.int32), axis=1) - 1
        tl.debug_barrier()  # all have read what is written over now
        tl.store(listed + token[:, None] * n + place, columns.to(tl.int16)[None, :], mask=found)
        count += tl.sum(found.to(tl.int32), axis=1)
    tl.store(counts + token, count, mask=there)


@triton.jit
def _keep_largest(
    listed,
    counts,
    x,
    encoder,
    b_enc,
    scale,
    spare,
    values,
    latents,
    n,
    d,
    k,
    SIZE: tl.constexpr,
    R: tl.constexpr,
    W: tl.constexpr,
):
    """The k largest of the listed. Where they are many, the best so far (in `values` and `latents`) compete with the
    next of them, SIZE at a time. Where they are fewer than k, the first latents of all others follow, with value 0."""
    token = tl.program_id(0).to(tl.int64)
    listed, values, latents, spare = listed + token * n, values + token * k, latents + token * k, spare + token * SIZE
    count = tl.load(counts + token)
    if count < k:
        slots = tl.arange(0, SIZE)
        other = slots - count
        for i in range(0, count):  # before listed latent number i there are i listed ones, and so many others
            other += ((tl.load(listed + i).to(tl.int32) & 0xFFFF) - i <= slots - count).to(tl.int32)
        tl.store(latents + slots, other.to(tl.int64), mask=(slots >= count) & (slots < k))
        tl.store(values + slots, tl.zeros((SIZE,), tl.float32), mask=(slots >= count) & (slots < k))
    done, held = count * 0, count * 0
    while done < count:
        end = tl.minimum(held + count - done, SIZE)
        for j in range(held, end, R):
            slots = j + tl.arange(0, R)
            there = slots < end
            index = tl.load(listed + done + slots - held, mask=there, other=0).to(tl.int32) & 0xFFFF
            value = _dots(x + token * d, encoder, index, there, d, R, W)
            tl.store(spare + slots, value + tl.load(b_enc + index, mask=there, other=0), mask=there)
        tl.debug_barrier()
        slots = tl.arange(0, SIZE)
        old, new = slots < held, (slots >= held) & (slots < end)
        index = tl.load(listed + done + slots - held, mask=new, other=0).to(tl.int32) & 0xFFFF
        index = tl.where(old, tl.load(latents + slots, mask=old, other=0).to(tl.int32), index)
        value = tl.where(old, tl.load(values + slots, mask=old, other=0), tl.load(spare + slots, mask=new, other=0))
        value = tl.where(value <= 0, 0.0, value)
        rank = value
        if scale is not None:
            rank *= tl.load(scale + index)
        rank = tl.where(slots < end, tl.where(rank == rank, tl.minimum(rank, 3.4e38), 3.4e38), -1.0)
        low, high, exceed = _bisected(rank[None, :], k, 0)
        low, high, exceed = tl.max(low, axis=0), tl.max(high, axis=0), tl.max(exceed, axis=0)  # of one row
        bound = tl.where(exceed == k, low, tl.where(exceed > k, high, 0.0))
        ties = rank == bound
        missing = k - tl.sum((rank > bound).to(tl.int32), axis=0)
        kept = (rank > bound) | (ties & (tl.cumsum(ties.to(tl.int32), axis=0) <= missing))
        place = tl.cumsum(kept.to(tl.int32), axis=0) - 1
        tl.debug_barrier()
        tl.store(values + place, value, mask=kept)
        tl.store(latents + place, index.to(tl.int64), mask=kept)
        tl.debug_barrier()
        done += end - held
        held = k + 0 * held


@triton.jit
def _collect(listed, starts, x, encoder, b_enc, values, latents, n, d, R: tl.constexpr, W: tl.constexpr):
    token = tl.program_id(0).to(tl.int64)
    first = tl.load(starts + token)
    count = tl.load(starts + token + 1) - first
    for j in range(0, count, R):
        slots = j + tl.arange(0, R)
        there = slots < count
        index = tl.load(listed + token * n + slots, mask=there, other=0).to(tl.int32) & 0xFFFF
        value = _dots(x + token * d, encoder, index, there, d, R, W) + tl.load(b_enc + index, mask=there, other=0)
        tl.store(values + first + slots, tl.where(value <= 0, 0.0, value), mask=there)
        tl.store(latents + first + slots, index.to(tl.int64), mask=there)
