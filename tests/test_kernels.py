"""The closed-form training steps against autograd of the loss as it is written, in float64."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from saeflow.kernels.adam import Adam
from saeflow.kernels.relu_step import relu_loss, relu_step
from saeflow.kernels.step import Weights, normalise_rows_, remove_parallel_, token_weights
from saeflow.kernels.topk_step import topk_loss, topk_step

ERRORS = ("sum", "mean", "target_norm")
sizes = st.integers(1, 9)


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


def random_problem(seed, N, d, p, n, whole=False):
    """Weights, inputs (N, d) and targets (N, p). `whole`: small whole numbers, so that pre-activations tie exactly."""
    g = torch.Generator().manual_seed(seed)

    def draw(*shape):
        if whole:
            return torch.randint(-2, 3, shape, generator=g).double()
        return torch.randn(*shape, generator=g, dtype=torch.float64)

    return Weights(draw(n, d), draw(n), draw(n, p), draw(p)), draw(N, d), draw(N, p)


def autograd(loss_function, weights, *arguments):
    leaves = Weights(*(t.clone().requires_grad_() for t in weights))
    loss = loss_function(leaves, *arguments)
    return loss.detach(), torch.autograd.grad(loss, leaves)


def assert_gradients_close(found, wanted):
    for name, mine, theirs in zip(Weights._fields, found, wanted, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-10, atol=1e-10, msg=lambda m, name=name: f"{name}: {m}")


@settings(deadline=None, max_examples=60)
@given(
    seed=st.integers(0, 10**6),
    N=sizes,
    d=sizes,
    p=sizes,
    n=sizes,
    squared_error=st.sampled_from(ERRORS),
    by_norm=st.booleans(),
    centred=st.booleans(),
    dead=st.booleans(),
)
def test_relu_step_matches_autograd_float64(seed, N, d, p, n, squared_error, by_norm, centred, dead):
    weights, x, y = random_problem(seed, N, d, d if centred else p, n)
    if dead:
        weights.b_enc.sub_(100.0)  # nothing is active: rows of the pattern are empty
    w = token_weights(y, squared_error)
    loss, gradients = autograd(relu_loss, weights, x, y, w, 0.3, by_norm, centred)
    step = relu_step(weights, x, y, w, 0.3, by_norm, centred, count=True)
    torch.testing.assert_close(step.squared_error + 0.3 * step.sparsity, loss, rtol=1e-12, atol=1e-12)
    assert_gradients_close(step.gradients, gradients)
    f = torch.relu((x - weights.b_dec if centred else x) @ weights.encoder.T + weights.b_enc)
    assert step.active == (f > 0).sum()
    assert torch.equal(step.activity > 0, (f > 0).any(dim=0))


@settings(deadline=None, max_examples=60)
@given(
    seed=st.integers(0, 10**6),
    N=sizes,
    d=sizes,
    p=sizes,
    n=sizes,
    k=sizes,
    squared_error=st.sampled_from(ERRORS),
    by_norm=st.booleans(),
    centred=st.booleans(),
    shift=st.sampled_from((0.0, -2.0, -100.0)),
)
def test_topk_step_matches_autograd_float64(seed, N, d, p, n, k, squared_error, by_norm, centred, shift):
    weights, x, y = random_problem(seed, N, d, d if centred else p, n)
    weights.b_enc.add_(shift)  # then some or all of the k kept latents are below 0, so not active
    w = token_weights(y, squared_error)
    arguments = (weights, x, y, w, min(k, n), by_norm, centred)
    loss, gradients = autograd(topk_loss, *arguments)
    step = topk_step(*arguments)
    torch.testing.assert_close(step.squared_error, loss, rtol=1e-12, atol=1e-12)
    assert_gradients_close(step.gradients, gradients)


@settings(deadline=None, max_examples=40)
@given(seed=st.integers(0, 10**6), N=sizes, d=st.integers(1, 3), n=st.integers(2, 12), k=st.integers(1, 12))
def test_topk_step_matches_autograd_where_latents_tie(seed, N, d, n, k):
    weights, x, y = random_problem(seed, N, d, d, n, whole=True)
    arguments = (weights, x, y, token_weights(y, "sum"), min(k, n), False, True)
    _, gradients = autograd(topk_loss, *arguments)
    step = topk_step(*arguments)
    assert_gradients_close(step.gradients, gradients)
    assert step.active <= N * min(k, n)


def test_latents_compete_by_norm_only_if_asked():
    """One latent reads 1.0 and writes 3.0, the other reads 2.0 and writes 1.0."""
    weights = Weights(torch.eye(2), torch.zeros(2), torch.diag(torch.tensor([3.0, 1.0])), torch.zeros(2))
    x = torch.tensor([[1.0, 2.0]])
    w = token_weights(x, "sum")
    assert topk_step(weights, x, x, w, 1, False, False).activity.tolist() == [0.0, 2.0]
    assert topk_step(weights, x, x, w, 1, True, False).activity.tolist() == [1.0, 0.0]


def test_token_weights_are_the_named_normalisations():
    y = torch.randn(5, 3, dtype=torch.float64)
    error = torch.randn(5, 3, dtype=torch.float64)
    squares = error.square()
    wanted = {
        "sum": squares.sum(dim=1).mean(),
        "mean": squares.mean(),
        "target_norm": (squares / y.norm(dim=1, keepdim=True)).mean(),
    }
    for name in ERRORS:
        torch.testing.assert_close((token_weights(y, name) * squares).sum(), wanted[name])


@pytest.mark.parametrize("squared_error", ERRORS)
def test_a_target_of_zeros_makes_no_infinity(squared_error):
    assert token_weights(torch.zeros(4, 3), squared_error).isfinite().all()


def test_gradient_without_its_parallel_part_leaves_norms_unchanged_to_first_order():
    rows = normalise_rows_(torch.randn(6, 4, dtype=torch.float64))
    gradient = torch.randn(6, 4, dtype=torch.float64)
    wanted = torch.stack([g - (g @ r) * r for g, r in zip(gradient, rows, strict=True)])
    remove_parallel_(gradient, rows)
    torch.testing.assert_close(gradient, wanted)
    torch.testing.assert_close((gradient * rows).sum(dim=1), torch.zeros(6, dtype=torch.float64))


def test_rows_of_zeros_stay_zeros():
    rows = torch.stack([torch.zeros(3), torch.full((3,), 2.0)])
    assert torch.equal(normalise_rows_(rows)[0], torch.zeros(3))
    torch.testing.assert_close(rows[1].norm(), torch.tensor(1.0))


def test_adam_is_torchs_adam():
    g = torch.Generator().manual_seed(0)
    mine = [torch.randn(7, 3, generator=g), torch.randn(5, generator=g)]
    theirs = [p.clone().requires_grad_() for p in mine]
    adam = Adam(mine, 0.8, 0.99)
    reference = torch.optim.Adam(theirs, betas=(0.8, 0.99), fused=True)
    for step in range(20):
        gradients = [torch.randn(p.shape, generator=g) for p in mine]
        lr = 1e-2 * (step + 1)
        adam.step(gradients, lr)
        for parameter, gradient in zip(theirs, gradients, strict=True):
            parameter.grad = gradient
        reference.param_groups[0]["lr"] = lr
        reference.step()
    assert all(torch.equal(a, b) for a, b in zip(mine, theirs, strict=True))


def test_adam_refuses_a_gradient_in_another_order_of_memory():
    parameter = torch.zeros(3, 4)
    with pytest.raises(ValueError, match="strides"):
        Adam([parameter], 0.9, 0.999).step([torch.zeros(4, 3).T], 1e-3)
