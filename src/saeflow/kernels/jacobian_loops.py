"""Loops of `kernels.jacobian` for CPUs, compiled by numba; see `kernels.loops` for what they share with those.

The rows of a token's active latents are read some columns at a time, which stay in the processor's cache for all k x k
inner products, or, on the way back, for all k x k multiples that are added. A, B (N, k_in), (N, k_out): active latents.
`first`, `last`: a run of tokens, or of columns (hidden units) where gradients are added: columns are what threads share
out, so that no two of them add to one number, and sums do not depend on how many threads there are.
"""

import numpy as np

from saeflow.kernels.loops import compiled
from saeflow.kernels.vectors import make_tile, prefetch

STRIP = 512  # columns whose inner products are taken at a time
TILE = 8  # targets, and rows of a buffer, are padded to a multiple of it
_tile, _narrow_tile = make_tile(TILE, 2, wide=True), make_tile(TILE, 1, wide=False)


@compiled
def blocks(WD, WE, slopes, drifts, projections, A, B, J, first, last):
    """J (N, k_out, k_in), where J[t, i, j] = WE[B_i] . sum_b slope_b (WD_b[A_j] - projection_j drift_b), of a run of
    tokens.

    WD (branches, n, m), WE (n, m), slopes (branches, N, m), drifts the same or (branches, 0, 0) for none,
    projections (N, k_in).
    """
    k_in, k_out, m = A.shape[1], B.shape[1], WE.shape[1]
    products = np.empty((_padded(k_out), _padded(k_in)), WE.dtype)
    workspace = np.empty(_padded(k_in) * min(STRIP, m), WE.dtype)
    read = np.empty(len(products), np.int64)
    for t in range(first, last):
        products[:] = 0
        read[:k_out], read[k_out:] = B[t], B[t, 0]
        for start in range(0, m, STRIP):
            width = min(STRIP, m - start)
            tangents = workspace[: _padded(k_in) * width].reshape(-1, width)
            tangents[k_in:] = 0
            _fill_tangents(WD, slopes, drifts, projections, A, t, start, tangents)
            _add_dots(WE, read, start, tangents, products)
        J[t] = products[:k_out, :k_in]


@compiled
def add_rows(W, slopes, drifts, projections, S, T, G, by_source, by_target, start, out, first, last):
    """out[T_j] += sum_i G_ij sum_b slope_b (W_b[S_i] - projection_i drift_b) over all tokens, in columns `first` to
    `last`.

    Sources S (N, k), targets T (N, padded), W (branches, n, m); slopes, drifts, projections as in `blocks`. G_ij of a
    token is number i by_source + j by_target of its part of G. Column 0 of `out` (n, ...) is column `start` of W.
    """
    n, m = W.shape[1:]
    rows, numbers, sums = W.reshape(-1), G.reshape(-1), out.reshape(-1)
    sources, targets = np.empty(S.shape[1], np.int64), np.empty(T.shape[1], np.int64)
    step = 2 * (64 // out.itemsize)
    aligned_end = first + (last - first) // step * step
    for t in range(len(S)):
        targets[:] = T[t] * out.shape[1]
        begin = t * G.shape[1] * G.shape[2]
        for b in range(len(W)):
            sources[:] = (b * n + S[t]) * m + start
            scale = slopes[b, t, start : start + last]
            for c in range(first, aligned_end, step):
                if c + step < aligned_end:
                    _fetch(rows, sources, 1, c + step, step)
                    _fetch(sums, targets, 1, c + step, step)
                elif b + 1 < len(W):
                    _fetch(rows, sources + n * m, 1, first, step)
                elif t + 1 < len(S):
                    _fetch(rows, S[t + 1], m, start + first, step)
                    _fetch(sums, T[t + 1], out.shape[1], first, step)
                for j in range(0, len(targets), TILE):
                    place = begin + j * by_target
                    _tile(sums, targets, j, rows, sources, numbers, place, by_source, by_target, scale, c)
            for c in range(aligned_end, last):
                for j in range(0, len(targets), TILE):
                    place = begin + j * by_target
                    _narrow_tile(sums, targets, j, rows, sources, numbers, place, by_source, by_target, scale, c)
            if drifts.shape[1]:
                drift = drifts[b, t, start:]
                _add_drifts(scale, drift, projections[t], T[t], numbers, begin, by_source, by_target, out, first, last)


@compiled
def _fetch(rows, which, size, column, count):
    """Asks for some columns of rows that are needed next: they are all over memory, and come while others are at work.

    Row `which[i]` begins at number size which[i] of `rows`.
    """
    for i in range(len(which)):
        for c in range(column, column + count, 64 // rows.itemsize):
            prefetch(rows, which[i] * size + c)


@compiled
def _add_drifts(scale, drift, projections, targets, G, place, by_source, by_target, out, first, last):
    """What the norm takes from the rows that `add_rows` adds, for one token and branch."""
    for j in range(len(targets)):
        share, row = drift.dtype.type(0), out[targets[j]]
        for i in range(len(projections)):
            share += G[place + i * by_source + j * by_target] * projections[i]
        for c in range(first, last):
            row[c] -= share * scale[c] * drift[c]


@compiled
def _padded(k):
    return (k + TILE - 1) // TILE * TILE


@compiled
def _fill_tangents(WD, slopes, drifts, projections, A, t, start, rows):
    """rows[j] = sum_b slope_b (WD_b[A_j] - projection_j drift_b), from column `start` on."""
    end = start + rows.shape[1]
    for b in range(len(WD)):
        slope = slopes[b, t, start:end]
        for j in range(A.shape[1]):
            row, source = rows[j], WD[b, A[t, j], start:end]
            if b == 0:
                for c in range(len(slope)):
                    row[c] = slope[c] * source[c]
            else:
                for c in range(len(slope)):
                    row[c] += slope[c] * source[c]
            if drifts.shape[1]:
                drift, share = drifts[b, t, start:end], projections[t, j]
                for c in range(len(slope)):
                    row[c] -= share * slope[c] * drift[c]


@compiled
def _add_dots(x, which, start, y, out):
    """out[i, j] += x[which[i]] . y[j], where the columns of x begin with `start`; sixteen sums at a time, so that each
    number that is read is used four times."""
    zero, end = out.dtype.type(0), start + y.shape[1]
    for i in range(0, len(which), 4):
        x0, x1 = x[which[i], start:end], x[which[i + 1], start:end]
        x2, x3 = x[which[i + 2], start:end], x[which[i + 3], start:end]
        for j in range(0, len(y), 4):
            y0, y1, y2, y3 = y[j], y[j + 1], y[j + 2], y[j + 3]
            p00, p01, p02, p03 = zero, zero, zero, zero
            p10, p11, p12, p13 = zero, zero, zero, zero
            p20, p21, p22, p23 = zero, zero, zero, zero
            p30, p31, p32, p33 = zero, zero, zero, zero
            for c in range(y.shape[1]):
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
            out[i, j] += p00
            out[i, j + 1] += p01
            out[i, j + 2] += p02
            out[i, j + 3] += p03
            out[i + 1, j] += p10
            out[i + 1, j + 1] += p11
            out[i + 1, j + 2] += p12
            out[i + 1, j + 3] += p13
            out[i + 2, j] += p20
            out[i + 2, j + 1] += p21
            out[i + 2, j + 2] += p22
            out[i + 2, j + 3] += p23
            out[i + 3, j] += p30
            out[i + 3, j + 1] += p31
            out[i + 3, j + 2] += p32
            out[i + 3, j + 3] += p33
