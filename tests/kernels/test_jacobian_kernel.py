"""Jacobians of a pair and their penalty: closed forms against autograd in float64, on both routes."""

from collections.abc import Iterator
from dataclasses import dataclass

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from jacobian_formulas import AS_WRITTEN
from torch import Tensor

from saeflow.kernels import jacobian as kernel
from saeflow.kernels import loops
from saeflow.kernels.jacobian import Linearisation, Side, TopLatents
from saeflow.kernels.penalties import PENALTIES
from saeflow.models.blocks import CHUNK_TOKENS, MLP, Block

F64 = torch.float64


device = "cpu"


@pytest.fixture(autouse=True, scope="module", params=["loops", "device", *["cuda"] * torch.cuda.is_available()])
def route(request: pytest.FixtureRequest) -> Iterator[str]:
    """Numba's loops, or torch's operations, which a GPU takes; those on a GPU, where there is one."""
    with pytest.MonkeyPatch.context() as patch:
        if request.param == "device":
            patch.setattr(loops, "supports", lambda tensor: False)
        if request.param == "cuda":
            patch.setitem(globals(), "device", "cuda")
        yield request.param


@dataclass
class Problem:
    """Random weights around a block of some kind, in float64."""

    block: Block
    D: Tensor
    E: Tensor
    x: Tensor
    input: TopLatents
    output: TopLatents

    def jacobians(self) -> Tensor:
        """By autograd, differentiable."""
        whole = torch.func.vmap(torch.func.jacrev(lambda v: self.block(v[None])[0]))(self.x)
        J = torch.einsum("tid,tde,tje->tij", self.E[self.output.latents], whole, self.D[self.input.latents])
        return J * (self.output.values > 0)[:, :, None] * (self.input.values > 0)[:, None]

    def penalty(
        self, score: str, linearisation_too: bool = False
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, Linearisation | None]:
        """Value, J, gradients of D and E, and towards what the block does around x."""
        seen = []

        def scored(J: Tensor) -> tuple[Tensor, Tensor]:
            seen.append(J.clone())
            return PENALTIES[score](J)

        g_D, g_E = torch.zeros_like(self.D), torch.zeros_like(self.E)
        linearisation = Linearisation(*(None if t is None else t.detach() for t in self.block.linearise(self.x)))  # type: ignore[arg-type]
        sides = Side(self.D.detach(), self.input, g_D), Side(self.E.detach(), self.output, g_E)
        value, g_linearisation = kernel.add_penalty(
            self.block.weights(), linearisation, *sides, scored, linearisation_too
        )
        return value, torch.cat(seen), g_D, g_E, g_linearisation


def problem(
    gated: bool = False,
    norm: str = "none",
    skip: bool = False,
    tokens: int = 7,
    d: int = 6,
    m: int = 11,
    n: int = 30,
    k_in: int = 5,
    k_out: int = 4,
    seed: int = 0,
    activation: str = "gelu",
) -> Problem:
    g = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=g, dtype=F64).to(device)

    gate = (draw(d, m), draw(m), draw(m)) if gated else ()
    mlp = MLP("silu" if gated else activation, draw(d, m), draw(m), draw(m, d), draw(d), *gate)
    block = Block(mlp) if norm == "none" else Block(mlp, 1e-3, norm == "layer", skip)
    kept = [
        TopLatents(draw(tokens, k).relu(), torch.rand(tokens, n, generator=g).topk(k).indices.to(device))
        for k in (k_in, k_out)
    ]  # half of the values are 0: latents that TopK kept and the ReLU silenced
    return Problem(block, draw(n, d).requires_grad_(), draw(n, d).requires_grad_(), draw(tokens, d), *kept)


KINDS = [(gated, norm, skip) for gated in (False, True) for norm in ("none", "layer", "rms") for skip in (False, True)]
KINDS = [kind for kind in KINDS if kind[1] != "none" or not kind[2]]


@pytest.mark.parametrize("kind", KINDS)
def test_around_in_parts_is_around_at_once(kind: tuple[bool, str, bool]) -> None:
    block = problem(*kind).block
    x = torch.randn(2 * CHUNK_TOKENS + 5, 6, generator=torch.Generator().manual_seed(0), dtype=F64)
    for found, wanted in zip(block.linearise_in_chunks(x), block.linearise(x), strict=True):
        assert (found is None) == (wanted is None)
        if found is not None:
            torch.testing.assert_close(found, wanted, rtol=1e-12, atol=1e-12)


@given(
    kind=st.sampled_from(KINDS),
    tokens=st.integers(1, 9),
    m=st.integers(1, 90),
    n=st.integers(17, 40),
    k_in=st.integers(1, 17),
    k_out=st.integers(1, 17),
    seed=st.integers(0, 2**31),
    columns=st.integers(1, 50),
)
@settings(deadline=None, max_examples=60)
def test_penalty_and_gradients_match_autograd(
    kind: tuple[bool, str, bool], tokens: int, m: int, n: int, k_in: int, k_out: int, seed: int, columns: int
) -> None:
    p = problem(*kind, tokens=tokens, m=m, n=n, k_in=k_in, k_out=k_out, seed=seed)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kernel, "COLUMNS", columns)
        patch.setattr(kernel, "CHUNK_ELEMENTS", 3 * k_in * k_out)
        value, J, g_D, g_E, _ = p.penalty("l1")
    wanted = p.jacobians()
    torch.testing.assert_close(J, wanted.detach(), rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(value, wanted.abs().sum().detach(), rtol=1e-10, atol=1e-10)
    wanted_D, wanted_E = torch.autograd.grad(wanted.abs().sum(), (p.D, p.E))
    torch.testing.assert_close(g_D, wanted_D, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(g_E, wanted_E, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("score", PENALTIES)
def test_gradients_towards_the_input_match_autograd(kind: tuple[bool, str, bool], score: str) -> None:
    """What a Jacobian taken at the reconstruction needs: second derivatives of the block."""
    p = problem(*kind)
    p.x.requires_grad_()
    value, _, g_D, g_E, g_linearisation = p.penalty(score, linearisation_too=True)
    assert g_linearisation is not None
    pairs = [(a, g) for a, g in zip(p.block.linearise(p.x), g_linearisation, strict=True) if a is not None]
    (g_x,) = torch.autograd.grad([a for a, _ in pairs], p.x, [g for _, g in pairs])
    costs = AS_WRITTEN[score](p.jacobians())
    torch.testing.assert_close(value, costs.detach(), rtol=1e-10, atol=1e-10)
    for found, wanted in zip((g_D, g_E, g_x), torch.autograd.grad(costs, (p.D, p.E, p.x)), strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("activation", ["gelu", "gelu_new", "relu", "silu"])
def test_every_activation(activation: str) -> None:
    p = problem(activation=activation)
    torch.testing.assert_close(p.penalty("l1")[1], p.jacobians().detach(), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("name", PENALTIES)
def test_penalties_have_their_derivatives(name: str) -> None:
    J = 1.5 * torch.randn(3, 4, 5, generator=torch.Generator().manual_seed(0), dtype=F64)
    J[0] *= 0.1
    J.requires_grad_()
    wanted = AS_WRITTEN[name](J)
    costs, slope = PENALTIES[name](J.detach().clone())
    assert costs.shape == (3,)
    torch.testing.assert_close(costs.sum(), wanted.detach(), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(slope, torch.autograd.grad(wanted, J)[0], rtol=1e-10, atol=1e-12)
    nothing, flat = PENALTIES[name](torch.zeros(2, 4, 5))
    assert not nothing.any() and not flat.any()


def test_scad_by_its_integral() -> None:
    """Slope 0.5 up to 0.5, falling linearly to 0 at 2.15; the value is the integral of the slope, times 2.2."""
    size = torch.linspace(0, 3, 30_001, dtype=F64)
    value, slope = PENALTIES["scad"](size.view(-1, 1, 1))
    wanted = torch.where(size <= 0.5, 0.5, 0.5 * (2.15 - size) / 1.65).clamp(min=0)
    torch.testing.assert_close(slope.flatten()[1:] / 2.2, wanted[1:], rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(value / 2.2, torch.cumulative_trapezoid(wanted, size).new_tensor(
        [0.0, *torch.cumulative_trapezoid(wanted, size).tolist()]), rtol=1e-6, atol=1e-7)  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
def test_any_block_gives_the_same(kind: tuple[bool, str, bool]) -> None:
    p = problem(*kind)
    value, J, g_D, g_E, _ = p.penalty("l1")
    h_D, h_E = torch.zeros_like(p.D), torch.zeros_like(p.E)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kernel, "JVP_TOKENS", 3)
        sides = Side(p.D, p.input, h_D), Side(p.E, p.output, h_E)
        other = kernel.add_penalty_by_jvp(p.block, p.x, *sides, PENALTIES["l1"])
    same = kernel.jacobian_by_jvp(p.block, p.x, p.D[p.input.latents], p.E[p.output.latents])
    kernel.mask_inactive(same.detach_(), p.input.values, p.output.values)
    for found, wanted in ((other, value), (same, J), (h_D, g_D), (h_E, g_E)):
        torch.testing.assert_close(found, wanted, rtol=1e-10, atol=1e-10)


def test_few_tokens_leave_out_the_rows_of_silent_latents() -> None:
    p = problem(n=400, tokens=3)
    sizes = []
    with pytest.MonkeyPatch.context() as patch:
        make = kernel.make_products
        patch.setattr(
            kernel, "make_products", lambda D, E, *rest: (sizes.append((len(D), len(E))), make(D, E, *rest))[1]
        )
        _, J, g_D, g_E, _ = p.penalty("l1")
    assert sizes == [(len(p.input.latents.unique()), len(p.output.latents.unique()))]
    wanted = p.jacobians()
    torch.testing.assert_close(J, wanted.detach(), rtol=1e-10, atol=1e-10)
    for found, grad in zip((g_D, g_E), torch.autograd.grad(wanted.abs().sum(), (p.D, p.E)), strict=True):
        torch.testing.assert_close(found, grad, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("kind", KINDS)
def test_blocks_equal_the_definition_and_change_nothing(kind: tuple[bool, str, bool]) -> None:
    p = problem(*kind, tokens=9)
    products = kernel.make_products(p.D.detach(), p.E.detach(), p.block.weights())
    linearisation = p.block.linearise(p.x)
    tensors = [t for t in (*products[:4], *linearisation) if t is not None]
    before = [t.clone() for t in tensors]
    A, B = p.input.latents, p.output.latents
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kernel, "CHUNK_ELEMENTS", 50)
        J = torch.cat([part for _, part in kernel.jacobian_chunks(products, linearisation, A, B)])
    torch.testing.assert_close(J, kernel.jacobian_blocks_slow(products, linearisation, A, B), rtol=1e-12, atol=1e-12)
    assert all(torch.equal(a, b) for a, b in zip(before, tensors, strict=True))


def test_gradients_do_not_depend_on_the_number_of_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    p = problem(m=1100, tokens=20)
    monkeypatch.setattr(loops, "FEWEST", 1)
    found = []
    for threads in (1, 2, 5):
        monkeypatch.setattr(torch, "get_num_threads", lambda threads=threads: threads)
        found.append(p.penalty("l1")[:4])
    assert all(torch.equal(a, b) for other in found[1:] for a, b in zip(found[0], other, strict=True))
    torch.testing.assert_close(found[0][1], p.jacobians().detach(), rtol=1e-10, atol=1e-10)


def test_latents_that_the_relu_silenced_have_no_jacobian() -> None:
    J = torch.ones(1, 3, 2)
    kernel.mask_inactive(J, torch.tensor([[1.0, 0.0]]), torch.tensor([[0.5, 0.0, 2.0]]))
    assert J.tolist() == [[[1, 0], [0, 0], [1, 0]]]
