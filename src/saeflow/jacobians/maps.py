"""The maps whose Jacobians are studied, each as an iterator of small dense blocks over the entries that are active.

A *pair* of dictionaries around a block f (an MLP, with what `models.blocks` may add to it): J[i, j] is how output
latent i moves with input latent j through decoder, f and encoder. TopK gives every token the same number of entries,
k_out x k_in, those of latents that TopK kept and the ReLU then silenced included (their derivative is 0); the paper
(arXiv 2502.18147) counts so. Of dictionaries without a fixed number of active latents (ReLU, JumpReLU) the entries are
those of active latents only, and blocks are padded with zeros to the widest token among those that are worked on
together.

A *transcoder* has one set of latents, between its encoder and its decoder, so it has no matrix of output by input
latents. What it approximates is the map from x to y = f(x), and what can be compared, between transcoders and with the
MLP itself, is the Jacobian of that map in the model's own basis:

    dy'/dx = W_dec^T diag(active) W_enc^T + W_skip        (d_out, d_in)

a sum of one outer product of decoder row and encoder column for each active latent: exactly what ReLU, JumpReLU and
TopK let through at x. All d_out x d_in entries count, on every token; of the MLP itself they are all non-zero.

Shapes: N tokens, d and p the widths at the two hooks, n latents, k active ones.
"""

from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from saeflow.dictionaries import Dictionary
from saeflow.kernels.jacobian import jacobian_by_jvp, jacobian_chunks, make_products, mask_inactive
from saeflow.models.blocks import Block

LATENT_ELEMENTS = 1 << 24  # of one (tokens, n) tensor of pre-activations: 64 MiB in float32
GATHERED_ELEMENTS = 1 << 22  # of one (tokens, k, d) or (tokens, p, d) tensor: 16 MiB in float32
TOKENS_THROUGH_MODULES = 64  # at once, whose k decoder rows are pushed through a block without closed form


class JacobianBlocks(NamedTuple):
    """The Jacobians of some tokens. What is not active is 0."""

    tokens: slice
    """Which of the tokens that were asked for."""
    J: Tensor
    """(N, k_out, k_in)"""
    inputs: Tensor
    """(N, k_in), indices"""
    outputs: Tensor
    """(N, k_out), indices"""
    values_in: Tensor
    """(N, k_in), activations"""
    values_out: Tensor
    """(N, k_out), activations"""
    n_entries: Tensor
    """(N,), int64: entries of the token, without padding."""


def active_latents(dictionary: Dictionary, x: Tensor) -> tuple[Tensor, Tensor]:
    """x (N, d) -> values (N, k), at least 0, and indices (N, k); without TopK, k is the largest number of any token."""
    if dictionary.spec.activation == "topk":  # k of every token, those at 0 included
        return dictionary.top_latents(x)
    latents = dictionary.encode(x)
    k = max(1, int((latents > 0).sum(1).max()))
    values, indices = torch.topk(latents, k, dim=1, sorted=False)
    return values, indices


class Pair:
    """Two dictionaries around a block f.

    `at_reconstruction`: everything is evaluated at the input dictionary's reconstruction of x (notebook 000, and the
    evaluation during the paper's training) instead of at x (the paper's training and its analyses): f's derivative and
    output, and with the latter the active output latents. The active input latents are those of x either way.
    `own_output`: the output dictionary reads f(x), not what the model has at its hook, because f is not the model's.
    """

    shared = False
    """Whether the entries are the same for all tokens."""

    def __init__(
        self,
        block: Callable[[Tensor], Tensor],
        input: Dictionary,
        output: Dictionary,
        at_reconstruction: bool = False,
        own_output: bool = False,
        gain: Tensor | None = None,
    ) -> None:
        """`block`: f, (N, d) to (N, p), in closed form, or any function, which is differentiated forward.

        `gain` (d,): what the values at the input SAE's hook are multiplied by before the MLP reads them, where it is
        the same for all tokens (`models.blocks.input_gain`).
        """
        self.f, self.input, self.output = block, input, output
        self.at_reconstruction, self.own_output = at_reconstruction, own_output or at_reconstruction
        self.n_in, self.n_out = input.d_sae, output.d_sae
        self.hooks = [input.spec.hook_name, output.spec.hook_name]  # of the model, whose values `blocks` wants
        self.lengths = None if gain is None else torch.linalg.vector_norm(input.W_dec * gain.to(input.W_dec), dim=1)
        """(n,): how far one unit of an input latent moves what the MLP reads; None where that depends on the token."""
        self.E = output.W_enc.T.contiguous()  # (n, p)
        self.products = None
        if isinstance(block, Block):
            self.products = make_products(input.W_dec, self.E, block.weights())

    def base(self, x: Tensor) -> Tensor:
        """(N, d): where the Jacobian is taken."""
        return self.input.forward(x) if self.at_reconstruction else x

    @torch.no_grad()
    def blocks(self, values: list[Tensor]) -> Iterator[JacobianBlocks]:
        """Yields the Jacobians of all tokens in order, a few at a time; `values` (N, d), one a hook."""
        x, y = values
        step = max(1, LATENT_ELEMENTS // max(self.n_in, self.n_out))
        for start in range(0, len(x), step):
            yield from self._blocks(start, x[start : start + step], y[start : start + step])

    def _blocks(self, start: int, x: Tensor, y: Tensor) -> Iterator[JacobianBlocks]:
        values_in, A = active_latents(self.input, x)
        base = self.base(x)
        values_out, B = active_latents(self.output, self.f(base) if self.own_output else y)
        n_entries = _n_active(self.input, values_in) * _n_active(self.output, values_out)
        for some, J in self._chunks(base, A, B):
            mask_inactive(J, values_in[some], values_out[some])
            there = slice(start + some.start, start + some.start + len(J))
            yield JacobianBlocks(there, J, A[some], B[some], values_in[some], values_out[some], n_entries[some])

    def _chunks(self, x: Tensor, A: Tensor, B: Tensor) -> Iterator[tuple[slice, Tensor]]:
        if isinstance(self.f, Block) and self.products is not None:
            yield from jacobian_chunks(self.products, self.f.linearise(x), A, B)
        else:
            for start in range(0, len(x), TOKENS_THROUGH_MODULES):
                some = slice(start, start + TOKENS_THROUGH_MODULES)
                yield some, jacobian_by_jvp(self.f, x[some], self.input.W_dec[A[some]], self.E[B[some]])


def _n_active(dictionary: Dictionary, values: Tensor) -> Tensor:
    """(N, k) -> (N,): latents whose entries count."""
    if dictionary.spec.activation == "topk":  # as the paper counts
        return torch.full((len(values),), values.shape[1], device=values.device)
    return (values > 0).sum(1)


class TranscoderMap:
    """A transcoder from x to y, as `Pair` is asked; see the top of the file."""

    shared = True

    def __init__(self, transcoder: Dictionary) -> None:
        self.transcoder = transcoder
        self.n_in, self.n_out = transcoder.d_in, transcoder.d_out
        self.lengths = None  # its inputs are no latents
        self.hooks = [transcoder.spec.hook_name]
        self.W_enc_rows = transcoder.W_enc.T.contiguous()  # (n, d)

    @torch.no_grad()
    def blocks(self, values: list[Tensor]) -> Iterator[JacobianBlocks]:
        (x,) = values
        latents, active = active_latents(self.transcoder, x)
        ones = x.new_ones(())
        step = max(1, GATHERED_ELEMENTS // max(active.shape[1] * max(self.n_in, self.n_out), self.n_in * self.n_out))
        for start in range(0, len(x), step):
            some = slice(start, start + step)
            A = active[some]
            into = self.W_enc_rows[A].mul_((latents[some] > 0)[:, :, None])  # (N, k, d)
            J = self.transcoder.W_dec[A].transpose(1, 2) @ into  # (N, p, d)
            if self.transcoder.W_skip is not None:
                J += self.transcoder.W_skip
            inputs, outputs = (torch.arange(n, device=x.device).expand(len(A), n) for n in (self.n_in, self.n_out))
            n_entries = torch.full((len(A),), self.n_in * self.n_out, device=x.device)
            there = slice(start, start + len(A))
            yield JacobianBlocks(
                there, J, inputs, outputs, ones.expand(inputs.shape), ones.expand(outputs.shape), n_entries
            )


JacobianMap = Pair | TranscoderMap
