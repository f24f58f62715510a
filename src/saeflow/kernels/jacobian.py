"""The Jacobian of a TopK pair of SAEs around a block, in closed form, for each token's active latents; its penalty.

After Farnik, Lawson, Houghton, Aitchison (2025), "Jacobian Sparse Autoencoders" (arXiv 2502.18147). D is the input
SAE's decoder, E the output SAE's encoder, f the block between them. The map from the input SAE's latents to the output
SAE's pre-activations has, for the active input latents A_t and output latents B_t of token t, the block

    J_t[i, j] = E[B_i] . f'(x_t) D[A_j]

For an MLP, f'(x) D_j = (M_j) W_out with M_j = (D_j W_in) * slope. A gated MLP adds a second branch of this form. A norm
before the MLP takes from D_j what it has along the normalised input y_t, times what that does to the hidden units, and
divides by the norm's scale; the latter is part of the slope. The residual stream beside the MLP adds D_j itself:

    M_j = sum_b slope_b * (D_j W_b - (D_j . direction) drift_b),   J_t[i, j] = (E[B_i] W_out^T) . M_j (+ E[B_i] . D_j)

with direction y_t / d and drift_b = y_t W_b (`models.blocks`). Both products, D W_b and E W_out^T, keep latents as
rows, so that those of a token are contiguous.

`add_penalty` is the term of the training loss, sum_t penalty(J_t), with its gradients, in passes over tokens that keep
nothing of size N k m: J itself is kept, N k k. Gradients are sums in a fixed order.

Shapes: N tokens, d model width, m = d_mlp, n latents, k active ones.
"""

from collections.abc import Callable, Iterable, Iterator
from functools import partial
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from saeflow.kernels import jacobian_loops, loops
from saeflow.kernels.memory import Workspace, empty, give_back_freed_memory
from saeflow.kernels.rows import inner_products, sum_rows
from saeflow.kernels.sparse import Pattern

CHUNK_ELEMENTS = 1 << 20  # of J on a CPU: 4 MiB in float32
CHUNK_ELEMENTS_ON_GPU = 1 << 24  # of one gathered (tokens, k, m) operand
JVP_TOKENS = 512  # whose passes through a block without closed form are kept for the way back
COLUMNS = 512  # hidden units whose gradients are added up first; then as many as were done before
TOO_LARGE_FOR_PIECES = 1 << 24  # numbers of the products that memory freed by others does not hold: 64 MiB in float32
WORTH_LEAVING_OUT = 0.9  # share of latents that are active below which the others' rows are left out of the products

Task = Callable[[int, int], None]
"""Work on a run of columns."""
Penalty = Callable[[Tensor], tuple[Tensor, Tensor]]
"""J (N, k_out, k_in) -> what each token's costs (N,), and its derivative, of J's shape, perhaps in J's memory; see
`kernels.penalties`."""


class Linearisation(NamedTuple):
    """What a block does around N inputs: its derivative there, but for its weights."""

    slopes: Tensor
    """(branches, N, m)"""
    drifts: Tensor | None = None
    """(branches, N, m), where a norm is part of the block."""
    direction: Tensor | None = None
    """(N, d), likewise."""


class BlockWeights(NamedTuple):
    """Constants of a block."""

    W_in: Tensor
    """(branches, d, m)"""
    W_out: Tensor
    """(m, d)"""
    skip: bool = False
    """Whether the block's output includes its input."""


class Products(NamedTuple):
    """Of one pair, for any tokens."""

    D: Tensor
    """(n, d): decoder rows of the input SAE."""
    E: Tensor
    """(n, d): encoder rows of the output SAE, which is W_enc transposed."""
    WD: Tensor
    """(branches, n, m): how each input latent moves the hidden units."""
    WE: Tensor
    """(n, m): how the hidden units move each output latent."""
    block: BlockWeights


@torch.no_grad()
def make_products(D: Tensor, E: Tensor, block: BlockWeights, workspace: Workspace | None = None) -> Products:
    """In `workspace`, they are those of this step only."""
    branches, _, m = block.W_in.shape
    workspace = workspace or Workspace()
    WD, WE = workspace.empty("WD", D, branches, len(D), m), workspace.empty("WE", E, len(E), m)
    for out, W in zip(WD, block.W_in, strict=True):
        torch.mm(D, W, out=out)
    return Products(D, E, WD, torch.mm(E, block.W_out.T, out=WE), block)


@torch.no_grad()
def jacobian_blocks(products: Products, linearisation: Linearisation, A: Tensor, B: Tensor) -> Tensor:
    """J (N, k_out, k_in) of all tokens at once; `A` (N, k_in) and `B` (N, k_out) are the active latents.

    On a GPU it takes memory for a few times N k m numbers: for many tokens use `jacobian_chunks`.
    """
    projections = _input_projections(products, linearisation, A)
    if loops.supports(products.WE):
        J = products.WE.new_empty(len(A), B.shape[1], A.shape[1])
        arrays = _arrays(products.WD, products.WE, linearisation.slopes, _drifts(linearisation), projections, A, B, J)
        loops.in_threads(partial(jacobian_loops.blocks, *arrays), len(A), A.numel() * products.WE.shape[1])
    else:
        J = products.WE[B] @ _hidden_tangents(products, linearisation, projections, A).transpose(1, 2)
    return J.baddbmm_(products.E[B], products.D[A].transpose(1, 2)) if products.block.skip else J


def jacobian_chunks(
    products: Products, linearisation: Linearisation, A: Tensor, B: Tensor
) -> Iterator[tuple[slice, Tensor]]:
    """Yields (tokens, J of these tokens) over all N tokens, a few at a time."""
    for some in _chunks(A, B, products.WE):
        yield some, jacobian_blocks(products, _at(linearisation, some), A[some], B[some])


def mask_inactive(J: Tensor, values_in: Tensor, values_out: Tensor) -> Tensor:
    """Zeroes, in place, the rows and columns of latents that TopK kept and the ReLU then silenced: derivative 0.

    `values_in` (N, k_in) and `values_out` (N, k_out) are activations after the ReLU.
    """
    return J.mul_((values_out > 0)[:, :, None]).mul_((values_in > 0)[:, None, :])


class TopLatents(NamedTuple):
    """Latents that TopK kept."""

    values: Tensor
    """(N, k), after the ReLU."""
    latents: Tensor
    """(N, k)"""


class Side(NamedTuple):
    """One SAE of the pair, as its penalty sees it."""

    rows: Tensor
    """(n, d): the decoder of the input SAE, or the encoder of the output SAE."""
    kept: TopLatents
    gradient: Tensor
    """(n, d): of the rows; what is found is added to it."""


@torch.no_grad()
def add_penalty(
    block: BlockWeights,
    linearisation: Linearisation,
    input: Side,
    output: Side,
    penalty: Penalty,
    linearisation_too: bool = False,
    workspace: Workspace | None = None,
) -> tuple[Tensor, Linearisation | None]:
    """The sum () of what the tokens' Jacobians cost; adds its gradients to those of both sides.

    Where a latent is silent J is 0. With `linearisation_too` also the gradients towards `linearisation`, for a Jacobian
    that is taken where parameters decide. Which latents are active, and the block's own weights, are constants.
    `workspace`: for the products, which the next step may then have.
    """
    sides = input, output
    (needed_in, input), (needed_out, output) = _only_active(input), _only_active(output)
    n_rows = len(input.rows) + len(output.rows)
    if loops.supports(input.rows) and n_rows * block.W_out.shape[0] >= TOO_LARGE_FOR_PIECES:
        give_back_freed_memory()
    products = make_products(input.rows, output.rows, block, workspace)
    A, B = input.kept.latents, output.kept.latents
    G, costs = products.WE.new_empty(len(A), B.shape[1], A.shape[1]), []
    for some, J in jacobian_chunks(products, linearisation, A, B):
        values = input.kept.values[some], output.kept.values[some]
        cost, slope = penalty(mask_inactive(J, *values))
        G[some] = mask_inactive(slope, *values)
        costs.append(cost)
    g_linearisation = None
    if loops.supports(input.rows) and not linearisation_too:  # the loops have no gradient of `linearisation`
        _in_loops(products, linearisation, input, output, G)
    else:
        g_linearisation = _on_device(products, linearisation, input, output, G, linearisation_too)
    for all_of, needed, active in zip(sides, (needed_in, needed_out), (input, output), strict=True):
        if needed is not None:
            all_of.gradient.index_put_((needed,), active.gradient, accumulate=True)  # each row once
    return torch.cat(costs).sum(), g_linearisation


def _only_active(side: Side) -> tuple[Tensor | None, Side]:
    """Which rows the latents need, and the side with those rows alone and a gradient of its own; None: all.

    Only where few tokens make it likely that many are left out: to know waits for a GPU.
    """
    rows, (values, latents), _ = side
    if latents.numel() > 2 * len(rows):
        return None, side
    needed, places = torch.unique(latents, return_inverse=True)
    if len(needed) > WORTH_LEAVING_OUT * len(rows):
        return None, side
    return needed, Side(rows[needed], TopLatents(values, places), torch.zeros_like(rows[needed]))


def _in_loops(products: Products, linearisation: Linearisation, input: Side, output: Side, G: Tensor) -> None:
    """Overwrites `products`: the sums of some columns take the place of columns that are done."""
    A, B, g_D, g_E = input.kept.latents, output.kept.latents, input.gradient, output.gradient
    projections, drifts = _input_projections(products, linearisation, A), _drifts(linearisation)
    block, m = products.block, products.WE.shape[1]
    if linearisation.direction is not None:
        starts = torch.arange(0, A.numel() + 1, A.shape[1])
        tokens, order, starts = Pattern(A.flatten(), starts, len(products.D)).by_latent
        g_projections = _projection_gradients(products, linearisation, B, G).flatten()
        g_D += sum_rows(linearisation.direction, tokens, starts, g_projections[order])
    G, targets_in, targets_out = _padded(G), _padded_latents(A), _padded_latents(B)
    flat = drifts[:, :0, :0], projections[:0]  # of the output SAE's rows nothing is taken

    def toward_D(E: Tensor, slope: Tensor, start: int, out: Tensor) -> Task:
        arrays = _arrays(E[None], slope[None], *flat, B, targets_in, G)
        return partial(jacobian_loops.add_rows, *arrays, G.shape[2], 1, start, out.numpy())

    def toward_E(D: Tensor, slopes: Tensor, drifts: Tensor, start: int, out: Tensor) -> Task:
        arrays = _arrays(D, slopes, drifts, projections, A, targets_out, G)
        return partial(jacobian_loops.add_rows, *arrays, 1, G.shape[2], start, out.numpy())

    def add(start: int, size: int, g_WD: Iterable[Tensor], g_WE: Iterable[Tensor]) -> None:
        """What columns from `start` on add, in the first columns of the memory given for each branch, and for WE."""
        tasks = [toward_D(products.WE, slope, start, g) for slope, g in zip(linearisation.slopes, g_WD, strict=False)]
        tasks += [toward_E(products.WD, linearisation.slopes, drifts, start, g) for g in g_WE]
        for g in (*g_WD, *g_WE):
            g[:, :size].zero_()
        loops.all_in_threads(tasks, size)
        columns = slice(start, start + size)
        for g, W in zip(g_WD, block.W_in, strict=False):
            g_D.addmm_(g[:, :size], W[:, columns].T)
        for g in g_WE:
            g_E.addmm_(g[:, :size], block.W_out[columns])

    done = min(COLUMNS, m)
    add(0, done, [], [empty(g_E, len(g_E), done)])
    add(0, done, products.WD, [])  # which that was the last to read
    while done < m:
        size = min(done, m - done)
        add(done, size, products.WD, [products.WE])
        done += size
    if products.block.skip:
        D, E, ones = products.D, products.E, torch.ones_like(products.D[:1]).expand(len(A), -1).contiguous()
        loops.all_in_threads([toward_D(E, ones, 0, g_D), toward_E(D[None], ones[None], flat[0], 0, g_E)], D.shape[1])


def _on_device(
    products: Products, linearisation: Linearisation, input: Side, output: Side, G: Tensor, linearisation_too: bool
) -> Linearisation | None:
    """The same by torch's operations, some tokens at a time."""
    A, B, g_D, g_E = input.kept.latents, output.kept.latents, input.gradient, output.gradient
    g_WD, g_WE = torch.zeros_like(products.WD), torch.zeros_like(products.WE)
    parts = []
    for some in _chunks(A, B, products.WE):
        here, a, b, g = _at(linearisation, some), A[some], B[some], G[some]
        projections = _input_projections(products, here, a)
        _scatter(g_WE, b, g @ _hidden_tangents(products, here, projections, a))
        g_tangents = g.transpose(1, 2) @ products.WE[b]
        for out, slope in zip(g_WD, here.slopes, strict=True):
            _scatter(out, a, g_tangents * slope[:, None])
        g_direction = None
        if here.direction is not None:
            g_projections = _projection_gradients(products, here, b, g)
            _scatter(g_D, a, g_projections[..., None] * here.direction[:, None])
            g_direction = (g_projections[..., None] * products.D[a]).sum(dim=1)
        if products.block.skip:
            _scatter(g_D, a, g.transpose(1, 2) @ products.E[b])
            _scatter(g_E, b, g @ products.D[a])
        if linearisation_too:
            parts.append((*_linearisation_gradients(products, here, projections, a, g_tangents), g_direction))
    for g_branch, W in zip(g_WD, products.block.W_in, strict=True):
        g_D.addmm_(g_branch, W.T)
    g_E.addmm_(g_WE, products.block.W_out)
    if not linearisation_too:
        return None
    slopes, drifts, direction = zip(*parts, strict=True)
    if linearisation.direction is None:
        return Linearisation(torch.cat(slopes, dim=1))
    return Linearisation(torch.cat(slopes, dim=1), torch.cat(drifts, dim=1), torch.cat(direction))


def _linearisation_gradients(
    products: Products, linearisation: Linearisation, projections: Tensor, A: Tensor, g_tangents: Tensor
) -> tuple[Tensor, Tensor | None]:
    """Gradients towards slopes and drifts, from those towards M (N, k_in, m)."""
    drifts = [None] * len(linearisation.slopes) if linearisation.drifts is None else list(linearisation.drifts)
    g_slopes, g_drifts = [], []
    for WD, slope, drift in zip(products.WD, linearisation.slopes, drifts, strict=True):
        tangents = WD[A] if drift is None else WD[A] - projections[..., None] * drift[:, None]
        g_slopes.append((g_tangents * tangents).sum(dim=1))
        g_drifts.append(-slope * (g_tangents * projections[..., None]).sum(dim=1))
    return torch.stack(g_slopes), None if linearisation.drifts is None else torch.stack(g_drifts)


def _hidden_tangents(products: Products, linearisation: Linearisation, projections: Tensor, A: Tensor) -> Tensor:
    """M (N, k_in, m): how active input latents move the hidden units' activations."""
    total = None
    for b, (WD, slope) in enumerate(zip(products.WD, linearisation.slopes, strict=True)):
        rows = WD[A]
        if linearisation.drifts is not None:
            rows.addcmul_(projections[..., None], linearisation.drifts[b][:, None], value=-1)
        total = rows.mul_(slope[:, None]) if total is None else total.addcmul_(rows, slope[:, None])
    assert total is not None
    return total


def _input_projections(products: Products, linearisation: Linearisation, A: Tensor) -> Tensor:
    """What active decoder rows have along the normalised input, over d: (N, k_in); 0 without a norm."""
    if linearisation.direction is None:
        return products.D.new_zeros(A.shape)
    starts = torch.arange(0, A.numel() + 1, A.shape[1], device=A.device)
    return inner_products(linearisation.direction, products.D, A.flatten(), starts).view(A.shape)


def _projection_gradients(products: Products, linearisation: Linearisation, B: Tensor, G: Tensor) -> Tensor:
    """Of the same (N, k_in)."""
    assert linearisation.drifts is not None
    starts = torch.arange(0, B.numel() + 1, B.shape[1], device=B.device)
    pulls = inner_products((linearisation.slopes * linearisation.drifts).sum(dim=0), products.WE, B.flatten(), starts)
    return -torch.einsum("tij,ti->tj", G, pulls.view(B.shape))


def _scatter(out: Tensor, latents: Tensor, rows: Tensor) -> None:
    """out[latents[t, j]] += rows[t, j]; deterministic, on a GPU by sorting."""
    out.index_put_((latents.flatten(),), rows.flatten(0, 1), accumulate=True)


def _drifts(linearisation: Linearisation) -> Tensor:
    """For the loops, which take an empty tensor for none."""
    return linearisation.slopes[:, :0, :0].contiguous() if linearisation.drifts is None else linearisation.drifts


def _at(linearisation: Linearisation, some: slice) -> Linearisation:
    drifts = None if linearisation.drifts is None else linearisation.drifts[:, some]
    direction = None if linearisation.direction is None else linearisation.direction[some]
    return Linearisation(linearisation.slopes[:, some], drifts, direction)


def _chunks(A: Tensor, B: Tensor, WE: Tensor) -> Iterator[slice]:
    """Runs of tokens: in the loops only J takes memory."""
    each = A.shape[1] * B.shape[1] if loops.supports(WE) else max(A.shape[1], B.shape[1]) * WE.shape[1]
    size = max(1, (CHUNK_ELEMENTS if WE.device.type == "cpu" else CHUNK_ELEMENTS_ON_GPU) // each)
    return (slice(start, start + size) for start in range(0, len(A), size))


def _padded(G: Tensor) -> Tensor:
    """(N, i, j), with zeros added until both are multiples of what the loops take at once."""
    more = [-size % jacobian_loops.TILE for size in G.shape[1:]]
    return torch.nn.functional.pad(G, (0, more[1], 0, more[0])) if any(more) else G.contiguous()


def _padded_latents(latents: Tensor) -> Tensor:
    """(N, k), the first repeated to a multiple of what the loops take at once; nothing is added to it."""
    more = -latents.shape[1] % jacobian_loops.TILE
    return torch.cat([latents, latents[:, :1].expand(-1, more)], dim=1) if more else latents


def _arrays(*tensors: Tensor) -> list[np.ndarray]:
    return [t.contiguous().numpy() for t in tensors]


# ---------------------------------------------------------------- any block
Map = Callable[[Tensor], Tensor]
"""f: (N, d) to (N, d), each token by itself, of operations that torch differentiates forwards."""


def jacobian_by_jvp(f: Map, x: Tensor, D_rows: Tensor, E_rows: Tensor) -> Tensor:
    """J (N, k_out, k_in) of any block around x (N, d), by forward-mode differentiation: k_in passes through f.

    D_rows (N, k_in, d), E_rows (N, k_out, d): the rows of each token's active latents.
    """
    tangents = [torch.func.jvp(f, (x,), (D_rows[:, j].contiguous(),))[1] for j in range(D_rows.shape[1])]
    return E_rows @ torch.stack(tangents, dim=2)


def add_penalty_by_jvp(f: Map, x: Tensor, input: Side, output: Side, penalty: Penalty) -> Tensor:
    """`add_penalty` of any block, at x (N, d)."""
    total = x.new_zeros(())
    for start in range(0, len(x), JVP_TOKENS):
        some = slice(start, start + JVP_TOKENS)
        with torch.enable_grad():
            rows = [side.rows.detach()[side.kept.latents[some]].requires_grad_() for side in (input, output)]
            J = mask_inactive(jacobian_by_jvp(f, x[some], *rows), input.kept.values[some], output.kept.values[some])
        costs, G = penalty(J.detach())
        for side, g in zip((input, output), torch.autograd.grad(J, rows, G), strict=True):
            _scatter(side.gradient, side.kept.latents[some], g)
        total += costs.sum()
    return total


def jacobian_blocks_slow(products: Products, linearisation: Linearisation, A: Tensor, B: Tensor) -> Tensor:
    """The definition of `jacobian_blocks`, for tests."""
    D, (N, k_in) = products.D[A], A.shape
    J = products.E.new_zeros(N, B.shape[1], k_in)
    for b in range(len(products.WD)):
        tangents = products.WD[b][A]
        if linearisation.drifts is not None and linearisation.direction is not None:
            tangents = tangents - torch.einsum("tjd,td,tm->tjm", D, linearisation.direction, linearisation.drifts[b])
        J = J + torch.einsum("tim,tm,tjm->tij", products.WE[B], linearisation.slopes[b], tangents)
    return J + torch.einsum("tid,tjd->tij", products.E[B], D) if products.block.skip else J
