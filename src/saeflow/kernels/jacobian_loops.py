"""Loops of `kernels.jacobian` for CPUs, compiled by numba; see `kernels.loops` for what they share with those.

The rows of a token's active latents are copied to where they stay in the processor's cache for all k x k inner
products, or, on the way back, for all k x k multiples that are added. A, B (N, k_in), (N, k_out): active latents.
`first`, `last`: a run of tokens, or of columns (hidden units) where gradients are added: columns are what threads share
out, so that no two of them add to one number, and sums do not depend on how many threads there are.
"""

import numpy as np
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from saeflow.kernels.loops import compiled

FETCHED = 128  # numbers at the beginning of a row
TILE = 8  # rows of a buffer are padded with zeros to a multiple of it


@compiled
def blocks(WD, WE, slopes, drifts, along, A, B, J, first, last):
    """J (N, k_out, k_in), where J[t, i, j] = WE[B_i] . sum_b slope_b (WD_b[A_j] - along_j drift_b), of a run of tokens.

    WD (branches, n, m), WE (n, m), slopes (branches, N, m), drifts the same or (branches, 0, 0) for none, along
    (N, k_in).
    """
    k_in, k_out, m = A.shape[1], B.shape[1], WE.shape[1]
    moved = np.zeros((_padded(k_in), m), WE.dtype)
    read = np.zeros((_padded(k_out), m), WE.dtype)
    products = np.empty((len(read), len(moved)), WE.dtype)
    for t in range(first, last):
        _move(WD, slopes, drifts, along, A, t, 0, moved)
        for i in range(k_out):
            read[i, :] = WE[B[t, i]]
        _all_dots(read, moved, products)
        for i in range(k_out):
            for j in range(k_in):
                J[t, i, j] = products[i, j]


@compiled
def toward_decoder(WE, slope, A, B, G, start, out, first, last):
    """out[A_j] += sum_i G[t, i, j] slope WE[B_i] over all tokens t, in columns `first` to `last - 1` of out (n, width).

    Column 0 of `out` is column `start` of WE (n, m) and slope (N, m). G (N, k_out padded, k_in).
    """
    k_in, k_out = A.shape[1], B.shape[1]
    rows = np.zeros((_padded(k_out), last - first), WE.dtype)
    spare = np.empty(last - first, WE.dtype)
    for t in range(len(A)):
        if t + 1 < len(A):
            _fetch(WE, B[t + 1], start + first)
            _fetch(out, A[t + 1], first)
        own = slope[t, start + first : start + last]
        for i in range(k_out):
            row, given = rows[i], WE[B[t, i], start + first : start + last]
            for c in range(len(own)):
                row[c] = own[c] * given[c]
        _add_multiples(G[t], rows, out, A[t], k_in, first, last, spare)


@compiled
def toward_encoder(WD, slopes, drifts, along, A, B, G, start, out, first, last):
    """out[B_i] += sum_j G[t, j, i] M_j over all tokens t, where M_j is what `blocks` takes the product of WE[B_i] with.

    G (N, k_in padded, k_out); the rest as in `toward_decoder` and `blocks`.
    """
    rows = np.zeros((_padded(A.shape[1]), last - first), out.dtype)
    spare = np.empty(last - first, out.dtype)
    for t in range(len(A)):
        if t + 1 < len(A):
            for b in range(len(WD)):
                _fetch(WD[b], A[t + 1], start + first)
            _fetch(out, B[t + 1], first)
        _move(WD, slopes, drifts, along, A, t, start + first, rows)
        _add_multiples(G[t], rows, out, B[t], B.shape[1], first, last, spare)


@compiled
def _fetch(rows, which, start):
    """Asks for the beginnings of rows that the next token needs: they are all over memory, and come while this one is
    at work. What follows a beginning the processor fetches by itself."""
    for latent in which:
        row = rows[latent, start : min(start + FETCHED, rows.shape[1])]
        for c in range(0, len(row), 16):
            _prefetch(row, c)


@intrinsic
def _prefetch(typing_context, row, place):
    """The processor's instruction, which numba does not offer."""

    def generate(context, builder, signature, arguments):
        byte, word = ir.IntType(8).as_pointer(), ir.IntType(32)
        declared = ir.FunctionType(ir.VoidType(), [byte, word, word, word])
        prefetch = cgutils.get_or_insert_function(builder.module, declared, "llvm.prefetch.p0")
        array = context.make_array(signature.args[0])(context, builder, arguments[0])
        address = builder.bitcast(builder.gep(array.data, [arguments[1]]), byte)
        to_read, into_second_level, data = (ir.Constant(word, value) for value in (0, 2, 1))
        builder.call(prefetch, [address, to_read, into_second_level, data])
        return context.get_dummy_value()

    return types.void(row, types.intp), generate


@compiled
def _padded(k):
    return (k + TILE - 1) // TILE * TILE


@compiled
def _move(WD, slopes, drifts, along, A, t, start, rows):
    """rows[j] = sum_b slope_b (WD_b[A_j] - along_j drift_b), from column `start` on."""
    end = start + rows.shape[1]
    for b in range(len(WD)):
        slope = slopes[b, t, start:end]
        for j in range(A.shape[1]):
            row, given = rows[j], WD[b, A[t, j], start:end]
            if b == 0:
                for c in range(len(slope)):
                    row[c] = slope[c] * given[c]
            else:
                for c in range(len(slope)):
                    row[c] += slope[c] * given[c]
            if drifts.shape[1]:
                drift, share = drifts[b, t, start:end], along[t, j]
                for c in range(len(slope)):
                    row[c] -= share * slope[c] * drift[c]


@compiled
def _all_dots(x, y, out):
    """out[i, j] = x[i] . y[j], sixteen at a time, so that each number that is read is used four times."""
    zero = out.dtype.type(0)
    for i in range(0, len(x), 4):
        x0, x1, x2, x3 = x[i], x[i + 1], x[i + 2], x[i + 3]
        for j in range(0, len(y), 4):
            y0, y1, y2, y3 = y[j], y[j + 1], y[j + 2], y[j + 3]
            p00, p01, p02, p03 = zero, zero, zero, zero
            p10, p11, p12, p13 = zero, zero, zero, zero
            p20, p21, p22, p23 = zero, zero, zero, zero
            p30, p31, p32, p33 = zero, zero, zero, zero
            for c in range(x.shape[1]):
                p00 += x0[c] * y0[c]
                p01 += x0[c] * y1[c]
                p02 += x0[c] * y2[c]
                p03 += x0[c] * y3[c]
                p10 += x1[c] * y0[c]
                p11 += x1[c] * y1[c]
                p12 += x1[c] * y2[c]
                p13 += x1[c] * y3[c]
                p20 += x2[c] * y0[c]
                p21 += x2[c] * y1[c]
                p22 += x2[c] * y2[c]
                p23 += x2[c] * y3[c]
                p30 += x3[c] * y0[c]
                p31 += x3[c] * y1[c]
                p32 += x3[c] * y2[c]
                p33 += x3[c] * y3[c]
            out[i, j], out[i, j + 1], out[i, j + 2], out[i, j + 3] = p00, p01, p02, p03
            out[i + 1, j], out[i + 1, j + 1], out[i + 1, j + 2], out[i + 1, j + 3] = p10, p11, p12, p13
            out[i + 2, j], out[i + 2, j + 1], out[i + 2, j + 2], out[i + 2, j + 3] = p20, p21, p22, p23
            out[i + 3, j], out[i + 3, j + 1], out[i + 3, j + 2], out[i + 3, j + 3] = p30, p31, p32, p33


@compiled
def _add_multiples(G, rows, out, targets, n_targets, first, last, spare):
    """out[targets[j], first:last] += sum_i G[i, j] rows[i], two targets and eight rows at a time."""
    for i in range(0, len(rows), TILE):
        r0, r1, r2, r3 = rows[i], rows[i + 1], rows[i + 2], rows[i + 3]
        r4, r5, r6, r7 = rows[i + 4], rows[i + 5], rows[i + 6], rows[i + 7]
        for j in range(0, n_targets, 2):
            two = j + 1 < n_targets
            e = j + 1 if two else j
            a, b = out[targets[j], first:last], out[targets[e], first:last] if two else spare
            g0, g1, g2, g3 = G[i, j], G[i + 1, j], G[i + 2, j], G[i + 3, j]
            g4, g5, g6, g7 = G[i + 4, j], G[i + 5, j], G[i + 6, j], G[i + 7, j]
            h0, h1, h2, h3 = G[i, e], G[i + 1, e], G[i + 2, e], G[i + 3, e]
            h4, h5, h6, h7 = G[i + 4, e], G[i + 5, e], G[i + 6, e], G[i + 7, e]
            for c in range(len(a)):
                a[c] += (
                    g0 * r0[c] + g1 * r1[c] + g2 * r2[c] + g3 * r3[c]
                    + g4 * r4[c] + g5 * r5[c] + g6 * r6[c] + g7 * r7[c]
                )  # fmt: skip
                b[c] += (
                    h0 * r0[c] + h1 * r1[c] + h2 * r2[c] + h3 * r3[c]
                    + h4 * r4[c] + h5 * r5[c] + h6 * r6[c] + h7 * r7[c]
                )  # fmt: skip
