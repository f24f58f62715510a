"""Loops along a sparse pattern for CPUs, compiled by numba: what torch has no fast operation for. `on_gpu` finds their
twins for GPUs.

They take NumPy arrays, fill arrays that the caller made, and release the GIL, so `in_threads` runs slices of one call
at once; a result does not depend on how it was sliced. NaN is treated as larger than any number, so that it is kept and
shows in the loss. Compiled code is cached beside this file, or in the user's cache where that is not writable.
"""

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache, partial
from importlib.util import find_spec
from itertools import pairwise
from types import ModuleType

import numba
import numpy as np
import torch
from llvmlite import ir
from numba import types
from numba.extending import intrinsic
from torch import Tensor

from saeflow.kernels.vectors import bits_of, count_bits, make_adder, make_dots, trailing_zeros

compiled = numba.njit(nogil=True, cache=True, fastmath={"reassoc", "contract", "nsz"}, error_model="numpy")
FEWEST = 1 << 18  # numbers worth a thread
LISTED = 8  # columns that are listed at a time: lists need room for so many more
DOTS = 8  # inner products that are taken at a time
TRIES = 3  # bounds that are guessed before one is searched for
TOO_MANY = 1 << 40  # more than any k
ROUNDED = np.float32(0.00393)  # what rounding to bfloat16 changes of a number, at most: 2^-8, and a little
_add_wide, _add_narrow, _add_number = make_adder(8, True), make_adder(1, True), make_adder(1, False)
_eight_dots, _one_dot = make_dots(DOTS), make_dots(1)


def supports(tensor: Tensor) -> bool:
    """Whether these loops work on such a tensor."""
    return tensor.device.type == "cpu" and tensor.dtype in (torch.float32, torch.float64, torch.int64)


def on_gpu(tensor: Tensor) -> ModuleType | None:
    """`triton_loops`, where they work on such a tensor; where neither they nor these do, torch's operations do."""
    if tensor.device.type != "cuda" or tensor.dtype not in (torch.float32, torch.float64):
        return None
    return _triton_loops() if tensor.device.index == torch.cuda.current_device() else None


@cache
def _triton_loops() -> ModuleType | None:
    if find_spec("triton") is None or torch.cuda.get_device_capability() < (8, 0):
        return None
    from saeflow.kernels import triton_loops

    return triton_loops


def in_threads(work: Callable[[int, int], None], n_rows: int, size: int, starts: np.ndarray | None = None) -> None:
    """`work(first, last)` on slices of `n_rows` rows, as many as torch uses threads. `size` numbers are at work.

    `starts` (n_rows + 1,): where each row's pairs begin; then slices have about as many pairs.
    """
    threads = min(torch.get_num_threads(), size // FEWEST + 1, n_rows)
    if threads <= 1:
        return work(0, n_rows)
    bounds = np.linspace(0, n_rows, threads + 1).astype(np.int64)
    if starts is not None:
        bounds[1:-1] = np.searchsorted(starts, np.linspace(0, starts[-1], threads + 1)[1:-1])
    _all_of([partial(work, *run) for run in pairwise(bounds.tolist())], threads)


def all_in_threads(works: Sequence[Callable[[int, int], None]], n_columns: int) -> None:
    """`work(first, last)` of each of `works`, which add to different numbers, on all columns 0 to `n_columns`.

    Where there are fewer than threads, each is cut into runs of columns.
    """
    threads = torch.get_num_threads()
    runs = max(1, min(threads // len(works), n_columns // 64))
    cuts = np.linspace(0, n_columns, runs + 1).astype(np.int64).tolist()
    _all_of([partial(work, *run) for work in works for run in pairwise(cuts)], threads)


def _all_of(calls: list[Callable[[], None]], threads: int) -> None:
    others = [_pool(threads - 1).submit(call) for call in calls[1:]] if threads > 1 else []
    for call in calls[: len(calls) - len(others)]:
        call()
    for other in others:
        other.result()


@cache
def _pool(threads: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(threads, thread_name_prefix="saeflow-loops")


@compiled
def top_k(rows, k, values, columns, first, last):
    """rows (C, n) -> the k largest of max(row, 0) of rows `first` to `last - 1`: values (C, k), columns (C, k).

    Of equal values those with the lowest columns; zeros come last.
    """
    n = rows.shape[1]
    found_columns, found_values = np.empty(n + LISTED, np.int64), np.empty(n, rows.dtype)
    mask = np.zeros(_in_words(n), np.bool_)
    bound = rows.dtype.type(0)
    for r in range(first, last):
        bound = _bound_for(rows[r], k, bound)
        _mark_above(rows[r], bound, mask)
        count = _list_marked(mask, found_columns)
        for j in range(count):
            found_values[j] = rows[r, found_columns[j]]
        _keep_largest(found_columns, found_values, count, k, bound, mask, values[r], columns[r])


@compiled
def sieved_top_k(products, x, x_norms, x_rests, encoder, norms, rests, b_enc, base, k, values, columns, first, last):
    """As `top_k`, of x encoder^T + b_enc, in float32, without that product: `products` (H, C, n) is it in bfloat16.

    See `_bounds` for what rules a latent out; the others' inner products are taken, and the k largest of them kept. All
    arrays have heads in front; row t of head h is row h C + t, and columns of head h are numbered from `base` + h n.
    """
    C, n = products.shape[1:]
    d, wanted = x.shape[2], k + k // 8 + 1
    found_columns, found_values = np.empty(n + LISTED, np.int64), np.empty(n, np.float32)
    lower, upper = np.empty(n, np.float32), np.empty(n, np.float32)
    mask = np.zeros(_in_words(n), np.bool_)
    share = np.float32(0)
    for h in range(first // C, (last + C - 1) // C):
        W, w_norms, w_rests, b = encoder[h], norms[h], rests[h], b_enc[h]
        most = _largest(w_norms), _largest(w_rests), _largest(b)
        for t in range(max(first - h * C, 0), min(last - h * C, C)):
            norm, rest, row = x_norms[h, t], x_rests[h, t], products[h, t]
            bound, count, certain = share * norm, 0, 0
            for _ in range(TRIES if bound > 0 else 0):  # the bounds of neighbours are alike, by the norms of the rows
                count, certain = _list_possible(
                    row, norm, rest, w_norms, w_rests, b, d, most, bound, mask, found_columns
                )
                if k <= certain <= k + k // 4 + 2:
                    break
                bound *= _correction(certain, wanted)
            else:
                _bounds(row, norm, rest, w_norms, w_rests, b, d, lower, upper)
                bound, certain = _bound_for(lower, k, bound), wanted
                _mark_above(upper, bound, mask)
                count = _list_marked(mask, found_columns)
            share = bound / norm * _correction(certain, wanted) if norm > 0 else np.float32(0)
            _dots(x[h, t], W, found_columns, 0, count, found_values)
            for j in range(count):
                found_values[j] += b[found_columns[j]]
            _keep_largest(found_columns, found_values, count, k, bound, mask, values[h, t], columns[h, t])
            columns[h, t] += base + h * n


@compiled
def above(rows, threshold, values, columns, counts, first, last):
    """rows (C, n) -> what exceeds `threshold` in rows `first` to `last - 1`, in values and columns; counts (C,).

    Returns how many that are. `values` and `columns` must have room for all, and for `LISTED` more; what is not written
    to takes no memory.
    """
    mask = np.zeros(_in_words(rows.shape[1]), np.bool_)
    total = 0
    for r in range(first, last):
        _mark_above(rows[r], threshold, mask)
        counts[r] = _list_marked(mask, columns[total:])
        for j in range(total, total + counts[r]):
            values[j] = rows[r, columns[j]]
        total += counts[r]
    return total


@compiled
def sieved_above(
    products, x, x_norms, x_rests, encoder, norms, rests, b_enc, base, threshold, values, columns, counts, first, last
):
    """As `above`, of x encoder^T + b_enc, in float32, and with heads, as `sieved_top_k`; counts (H C,)."""
    C, n = products.shape[1:]
    mask = np.zeros(_in_words(n), np.bool_)
    total = 0
    for h in range(first // C, (last + C - 1) // C):
        W, w_norms, w_rests, w_bias = encoder[h], norms[h], rests[h], b_enc[h]
        for t in range(max(first - h * C, 0), min(last - h * C, C)):
            a, b = _rates(x_norms[h, t], x_rests[h, t], x.shape[2])
            row = products[h, t]
            for i in range(n):
                product = _from_bfloat16(row[i])
                error = _error(product, a, b, w_norms[i], w_rests[i], w_bias[i])
                mask[i] = not product + w_bias[i] + error <= threshold
            count = _list_marked(mask, columns[total:])
            _dots(x[h, t], W, columns, total, total + count, values)
            kept = total
            for j in range(total, total + count):
                value = values[j] + w_bias[columns[j]]
                values[kept], columns[kept] = value, columns[j] + base + h * n
                kept += not value <= threshold
            counts[h * C + t] = kept - total
            total = kept
    return total


@compiled
def _bounds(products, x_norm, x_rest, norms, rests, b_enc, d, lower, upper):
    """Bounds of what x . w_i + b_i is in float32, given the product of both rounded to bfloat16, for every latent i.

    With x = x' + r and w = w' + s, where x' and w' are rounded, x . w - x' . w' = r . w + x' . s, which is at most
    |r| |w| + |x'| |s| (Cauchy-Schwarz). To that come the rounding of the product to bfloat16, by at most 2^-8, and
    rounding in float32: of sums of d numbers, and of adding the bias.
    """
    a, b = _rates(x_norm, x_rest, d)
    for i in range(len(products)):
        product = _from_bfloat16(products[i])
        error = _error(product, a, b, norms[i], rests[i], b_enc[i])
        lower[i] = product + b_enc[i] - error
        upper[i] = product + b_enc[i] + error


@compiled
def _list_possible(products, x_norm, x_rest, norms, rests, b_enc, d, most, bound, mask, columns):
    """Lists, and marks, the latents whose upper bound (`_bounds`) exceeds `bound`. Returns how many these are, and of
    how many of them the lower one does too; 0 and `TOO_MANY` where so many are left that it gives up.

    `most`: the largest norm, rest and bias, by which nearly all latents are ruled out in few operations.
    """
    a, b = _rates(x_norm, x_rest, d)
    slack = _error(np.float32(0), a, b, most[0], most[1], most[2])
    for i in range(len(products)):
        product = _from_bfloat16(products[i])
        mask[i] = not product + b_enc[i] + (slack + ROUNDED * abs(product)) <= bound
    total = _list_marked(mask, columns)
    if total > len(products) // 8:
        return 0, TOO_MANY
    possible, certain = 0, 0
    for j in range(total):
        i = columns[j]
        product = _from_bfloat16(products[i])
        error = _error(product, a, b, norms[i], rests[i], b_enc[i])
        is_possible = not product + b_enc[i] + error <= bound
        columns[possible], mask[i] = i, is_possible
        possible += is_possible
        certain += not product + b_enc[i] - error <= bound
    return possible, certain


@compiled
def _largest(numbers):
    """The largest of the absolute values; NaN aside, as a product of such a row is NaN, and never ruled out."""
    found = numbers.dtype.type(0)
    for number in numbers:
        if abs(number) > found:
            found = abs(number)
    return found


@compiled
def _correction(found, wanted):
    """By what to multiply a bound that `found` numbers exceed, so that about as many do as are `wanted`: numbers that
    are spread as a normal distribution's are an eighth of that rarer in its tail."""
    return np.float32(min(max(1 + 0.125 * (found - wanted) / wanted, 0.8), 1.25))


@compiled
def _rates(x_norm, x_rest, d):
    """By how much the error grows with |w|, and with |s|."""
    rounding = np.float32((2 * d + 32) * 2.0**-24)
    # |x'| is at most |x| (1 + 2^-8)
    return np.float32(1.001) * x_rest + np.float32(2) * rounding * x_norm, np.float32(1.005) * x_norm


@compiled
def _error(product, a, b, norm, rest, bias):
    return a * norm + b * rest + ROUNDED * abs(product) + np.float32(5e-7) * abs(bias)


@compiled
def norms_and_rests(rows, rounded, norms, rests, first, last):
    """Norms of rows (m, d) float32, and of what rounding them to bfloat16 (m, d) left over."""
    for r in range(first, last):
        squares, left = np.float32(0), np.float32(0)
        for c in range(rows.shape[1]):
            rest = rows[r, c] - _from_bfloat16(rounded[r, c])
            squares += rows[r, c] * rows[r, c]
            left += rest * rest
        norms[r], rests[r] = np.sqrt(squares), np.sqrt(left)


@compiled
def _bound_for(row, k, guess):
    """A number that k of the row exceed, or few more; 0 if fewer exceed 0. `guess`: where to start counting."""
    number = row.dtype.type
    low, high, factor = number(0), number(np.inf), number(1.1)
    for _ in range(24):
        count = _count_above(row, guess)
        if count < k:
            if guess <= 0:
                break
            high = guess
            guess = number(0.5) * (low + high) if low > 0 else high / factor
        elif count > k + k // 4 + 2:
            low = guess
            guess = number(0.5) * (low + high) if high < np.inf else max(low * factor, number(1e-6))
        else:
            return guess
        factor *= factor if factor < 16 else number(1)
    return low


@compiled
def _in_words(n):
    return (n + 63) // 64 * 64


@compiled
def _mark_above(row, bound, mask):
    for c in range(len(row)):
        mask[c] = not row[c] <= bound


@compiled
def _list_marked(mask, columns):
    """Writes where a mask, of some multiple of 64, is set, and up to `LISTED` numbers after that; returns how many
    places that are. Several are written without asking whether there are so many: a wrong guess costs more."""
    total = 0
    for start in range(0, len(mask), 64):
        word = bits_of(mask, start)
        end = total + count_bits(word)
        while total < end:
            for i in range(LISTED):
                columns[total + i] = start + trailing_zeros(word)
                word &= word - np.uint64(1)
            total += LISTED
        total = end
    return total


@compiled
def _keep_largest(columns, values, count, k, bound, mask, kept_values, kept_columns):
    """The k largest of `count` values, and their columns; where fewer than k are above 0, some columns with 0.

    `mask` holds exactly what is in `columns`. Bisection: a number is looked for that exactly k exceed, from `bound`,
    which probably k or more exceed.
    """
    number = values.dtype.type
    low, high, above = bound, bound, _count_above(values[:count], bound)
    if above < k:
        low, above = number(0), _count_above(values[:count], number(0))
    for j in range(count):
        high = max(high, values[j]) if values[j] == values[j] else high
    if above < k:
        kept = 0
        for j in range(count):
            if not values[j] <= 0:
                kept_values[kept], kept_columns[kept] = values[j], columns[j]
                kept += 1
            else:
                mask[columns[j]] = False
        c = 0
        for j in range(kept, k):
            while mask[c]:
                c += 1
            kept_values[j], kept_columns[j] = 0, c
            c += 1
        return
    while above != k:
        middle = number(0.5) * (low + high)
        if not low < middle < high:
            break
        exceed = _count_above(values[:count], middle)
        if exceed >= k:
            low, above = middle, exceed
        else:
            high = middle
    bound, ties = low, 0  # from here on what the kept exceed
    if above != k:  # then several equal `high`, and not all of them are kept
        bound, ties = high, k - _count_above(values[:count], high)
    kept = 0
    for j in range(count):  # in place, and without branches that are hard to guess
        value = values[j]
        tie = ties > 0 and value == bound
        ties -= tie
        values[kept], columns[kept] = value, columns[j]
        kept += tie or not value <= bound
    kept_values[:], kept_columns[:] = values[:k], columns[:k]


@compiled
def _count_above(row, bound):
    count = 0
    for c in range(len(row)):
        if not row[c] <= bound:
            count += 1
    return count


@intrinsic
def _from_bfloat16(typing_context, bits):
    """The float32 that has these bits, and then zeros."""

    def generate(context, builder, signature, arguments):
        wide = builder.zext(arguments[0], ir.IntType(32))
        return builder.bitcast(builder.shl(wide, ir.Constant(ir.IntType(32), 16)), ir.FloatType())

    return types.float32(types.uint16), generate


@compiled
def _count_by_latent(latents, latent_starts):
    """Fills latent_starts (n + 1,): where each latent's pairs begin, once they are sorted; returns a copy of that."""
    latent_starts[:] = 0
    for latent in latents:
        latent_starts[latent + 1] += 1
    for i in range(len(latent_starts) - 1):
        latent_starts[i + 1] += latent_starts[i]
    return latent_starts[:-1].copy()


@compiled
def transpose(latents, starts, tokens, order, latent_starts):
    """A pattern by latent: fills tokens (P,), order (P,) and latent_starts (n + 1,), by counting."""
    free = _count_by_latent(latents, latent_starts)
    for t in range(len(starts) - 1):
        for j in range(starts[t], starts[t + 1]):
            place = free[latents[j]]
            free[latents[j]] += 1
            tokens[place] = t
            order[place] = j


@compiled
def sum_rows(rows, indices, starts, values, out, first, last):
    """out[b] = sum over the pairs j of bag b of values[j] rows[indices[j]], for bags `first` to `last - 1`."""
    for b in range(first, last):
        out[b, :] = 0
        _add_rows(rows, indices, values, starts[b], starts[b + 1], out[b])


@compiled
def inner_products(g, rows, indices, starts, out, first, last):
    """out[j] = g[b] . rows[indices[j]] for the pairs j of bags `first` to `last - 1`."""
    for b in range(first, last):
        _dots(g[b], rows, indices, starts[b], starts[b + 1], out)


@compiled
def sum_bags(values, starts, out):
    """out[b] = the sum of the values of bag b."""
    for b in range(len(out)):
        out[b] = _sum(values[starts[b] : starts[b + 1]])


@compiled
def reconstruct(values, latents, starts, W_dec, double_w, penalty, error, squares, g_values, first, last):
    """For tokens `first` to `last - 1`: error (N, p), which comes as b_dec - y, becomes y_hat - y; squares (N,) its
    squared norms; g_values (P,) the gradient of sum_t w_t |error_t|^2 + penalty . f_t towards the pre-activations.

    `double_w` (N,): 2 w_t. `penalty` (n,).
    """
    for t in range(first, last):
        error_row = error[t]
        _add_rows(W_dec, latents, values, starts[t], starts[t + 1], error_row)
        total = error.dtype.type(0)
        for c in range(len(error_row)):
            total += error_row[c] * error_row[c]
        squares[t] = total
        _dots(error_row, W_dec, latents, starts[t], starts[t + 1], g_values)
        for j in range(starts[t], starts[t + 1]):
            g_value = g_values[j] * double_w[t] + penalty[latents[j]]
            g_values[j] = g_value if values[j] > 0 else 0


@compiled
def transpose_values(values, g_values, latents, starts, tokens, sorted_values, sorted_g, latent_starts):
    """As `transpose`, with the pairs' numbers instead of their places: fills sorted_values (P,), sorted_g (P,)."""
    free = _count_by_latent(latents, latent_starts)
    for t in range(len(starts) - 1):
        for j in range(starts[t], starts[t + 1]):
            latent = np.uint64(latents[j])  # numba asks of what has a sign whether it counts from the end
            place = np.uint64(free[latent])
            free[latent] += 1
            tokens[place], sorted_values[place], sorted_g[place] = t, values[j], g_values[j]


@compiled
def gradients(tokens, sorted_values, sorted_g, starts, error, x, encoder, W_dec, sums, first, last):
    """Gradients of latents `first` to `last - 1`, from the pairs by latent: encoder (n, d), W_dec (n, p), where error
    (N, p) is the gradient of y_hat; sums (2, n) of values and of their gradients."""
    for i in range(first, last):  # two loops: the rows of one matrix may fit into the cache
        W_dec[i, :] = 0
        _add_rows(error, tokens, sorted_values, starts[i], starts[i + 1], W_dec[i])
        sums[0, i] = _sum(sorted_values[starts[i] : starts[i + 1]])
    for i in range(first, last):
        encoder[i, :] = 0
        _add_rows(x, tokens, sorted_g, starts[i], starts[i + 1], encoder[i])
        sums[1, i] = _sum(sorted_g[starts[i] : starts[i + 1]])


@compiled
def _sum(values):
    total = values.dtype.type(0)
    for value in values:
        total += value
    return total


@compiled
def _dots(x, rows, indices, start, end, out):
    """out[j] = x . rows[indices[j]] for j from `start` to `end - 1`. Each adds its terms in one order, whatever others
    are taken with it: which others these are depends on how rows were sliced."""
    width = rows.shape[1]
    aligned_width = width // (64 // rows.itemsize) * (64 // rows.itemsize)
    j = start
    while j + DOTS <= end:
        _eight_dots(x, rows, width, indices, j, aligned_width, out)
        j += DOTS
    while j < end:
        _one_dot(x, rows, width, indices, j, aligned_width, out)
        j += 1
    for i in range(start, end if aligned_width < width else start):
        for c in range(aligned_width, width):
            out[i] += x[c] * rows[indices[i], c]


@compiled
def _add_rows(rows, indices, values, start, end, total):
    """total += sum of values[j] rows[indices[j]] for j from `start` to `end - 1`."""
    width, lanes = rows.shape[1], 64 // rows.itemsize
    column = 0
    while column + 8 * lanes <= width:
        _add_wide(total, rows, width, indices, values, start, end, column)
        column += 8 * lanes
    while column + lanes <= width:
        _add_narrow(total, rows, width, indices, values, start, end, column)
        column += lanes
    while column < width:
        _add_number(total, rows, width, indices, values, start, end, column)
        column += 1
