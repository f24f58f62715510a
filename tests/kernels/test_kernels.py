"""The training step and what it is made of against their dense twins: autograd in float64, `torch.topk` in float32."""

import dataclasses
from functools import partial

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from saeflow.config import TrainingConfig
from saeflow.dictionaries import Origin
from saeflow.dictionaries.kinds.sae import SAEConfig
from saeflow.dictionaries.kinds.transcoder import TranscoderConfig
from saeflow.kernels import loops, select, sparse
from saeflow.kernels import rows as rows_module
from saeflow.kernels.adam import Adam
from saeflow.kernels.select import Active, batch_top_k, positive, top_k
from saeflow.kernels.sparse import Pattern, concatenate_heads, decode, dense_decode, dense_encode, encode
from saeflow.kernels.step import (
    Objective,
    Weights,
    clip_norm_,
    loss_slow,
    normalise_rows_,
    remove_parallel_,
    take_step,
    take_steps,
    token_weights,
)
from saeflow.training.protocol import HookStatistics
from saeflow.training.trainer import Trainer

ERRORS = ("sum", "mean", "target_norm")
SPARSE_AND_DENSE = (("topk", True), ("batchtopk", True), ("relu", True), ("relu", False))  # activation, and `sparse`
seeds = st.integers(0, 10**6)
sizes = st.integers(1, 9)
exactly = partial(torch.testing.assert_close, rtol=1e-12, atol=1e-12)


GPU = ["gpu", "triton"] if torch.cuda.is_available() else []
needs_gpu = pytest.mark.skipif(not GPU, reason="needs a GPU")


@pytest.fixture(scope="module", params=["device", "product", "sieve", *GPU], autouse=True)
def route(request):
    """Every test runs by the operations of torch and by the loops of a CPU without and with bfloat16; and where there
    is a GPU, on it, by the operations of torch and by Triton's loops."""
    with pytest.MonkeyPatch.context() as patch:
        if request.param == "device":
            patch.setattr(loops, "supports", lambda tensor: False)
        if request.param == "gpu":
            patch.setattr(loops, "on_gpu", lambda tensor: None)
        patch.setattr(select, "multiplies_bfloat16", lambda: request.param == "sieve")
        torch.set_default_device("cuda" if request.param in GPU else "cpu")
        yield request.param
        torch.set_default_device(None)


def on_cpu(route):
    """Whether this is a CPU's route."""
    return route in ("product", "sieve")


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


@pytest.fixture
def threads():
    """`torch.set_num_threads`, undone afterwards."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


class Operations(TorchDispatchMode):
    """Records every torch operation: its name, its arguments and its result."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        found = function(*args, **(kwargs or {}))
        self.seen.append((function.overloadpacket.__name__, args, found))
        return found


def placed(tensor):
    """On the device of this route."""
    return tensor.to(torch.get_default_device())


def drawing(seed, whole=False, dtype=torch.float64):
    """A function shape -> numbers. `whole`: small whole ones, so that pre-activations tie, and products are exact."""
    g = torch.Generator().manual_seed(seed)

    def draw(*shape):
        if whole:
            return placed(torch.randint(-2, 3, shape, generator=g, device="cpu").to(dtype))
        return placed(torch.randn(*shape, generator=g, dtype=dtype, device="cpu"))

    return draw


def random_problem(seed, N, d, p, n, skip=False, **drawn):
    """Weights, inputs (N, d) and targets (N, p)."""
    draw = drawing(seed, **drawn)
    weights = Weights(draw(n, d), draw(n), draw(n, p), draw(p), draw(p, d) if skip else None)
    return weights, draw(N, d), draw(N, p)


def autograd(loss_function, weights):
    leaves = Weights(*(None if t is None else t.clone().requires_grad_() for t in weights))
    loss = loss_function(leaves)
    return loss.detach(), torch.autograd.grad(loss, leaves.parameters())


def assert_gradients_close(found, wanted, **tolerance):
    tolerance = tolerance or {"rtol": 1e-10, "atol": 1e-10}
    for name, mine, theirs in zip(Weights._fields, found.parameters(), wanted, strict=False):
        torch.testing.assert_close(mine, theirs, msg=lambda m, name=name: f"{name}: {m}", **tolerance)
    assert len(found.parameters()) == len(wanted)


# ------------------------------------------------------------------------------------------------------- the step
@settings(deadline=None, max_examples=300)
@given(
    seed=seeds,
    N=sizes,
    d=sizes,
    p=sizes,
    n=sizes,
    k=sizes,
    kind_of_step=st.sampled_from(SPARSE_AND_DENSE),
    squared_error=st.sampled_from(ERRORS),
    by_norm=st.booleans(),
    centred=st.booleans(),
    skip=st.booleans(),
    shift=st.sampled_from((0.0, -2.0, -100.0)),
)
def test_step_matches_autograd_float64(seed, N, d, p, n, k, kind_of_step, squared_error, by_norm, centred, skip, shift):
    weights, x, y = random_problem(seed, N, d, d if centred else p, n, skip)
    weights.b_enc.add_(shift)  # then some or all latents are below 0: tokens with few active latents or none
    activation, sparse = kind_of_step
    objective = Objective(activation, min(k, n), by_norm, centred, squared_error)
    loss, gradients = autograd(lambda leaves: loss_slow(objective, leaves, x, y, 0.3), weights)
    step = take_step(objective, weights, x, y, 0.3, sparse)
    exactly(step.loss, loss)
    assert_gradients_close(step.gradients, gradients)
    penalty = 0.3 * step.sparsity if activation == "relu" else 0.0
    exactly(step.squared_error + penalty, loss)
    exactly(token_weights(y, squared_error) @ step.squared_norms, step.squared_error)
    assert not any(t.requires_grad for t in (step.loss, step.activity, *weights.parameters()))


@settings(deadline=None, max_examples=60)
@given(
    seed=seeds,
    N=sizes,
    d=st.integers(1, 3),
    n=st.integers(2, 12),
    k=st.integers(1, 12),
    kind_of_step=st.sampled_from(SPARSE_AND_DENSE),
)
def test_step_matches_autograd_where_latents_tie(seed, N, d, n, k, kind_of_step, route):
    weights, x, y = random_problem(seed, N, d, d, n, whole=True)
    activation, sparse = kind_of_step
    objective = Objective(activation, min(k, n), centred=True)
    _, gradients = autograd(lambda leaves: loss_slow(objective, leaves, x, y, 0.3), weights)
    step = take_step(objective, weights, x, y, 0.3, sparse)
    if activation == "batchtopk" or (activation == "topk" and not on_cpu(route)):
        # of equal values any may be kept; how much is active is the same
        f = torch.relu((x - weights.b_dec) @ weights.encoder.T + weights.b_enc)
        kept = torch.topk(
            f.view(1, -1) if activation == "batchtopk" else f, min(k, n) * (N if activation == "batchtopk" else 1)
        ).values
        exactly(step.activity.sum(), kept.sum())
        assert step.n_active == (kept > 0).sum()
    else:
        assert_gradients_close(step.gradients, gradients)


@pytest.mark.parametrize(("activation", "sparse"), SPARSE_AND_DENSE)
@pytest.mark.parametrize("by_norm", [False, True])
@pytest.mark.parametrize("shift", [0.0, -100.0])
def test_step_counts_what_is_active(activation, sparse, by_norm, shift):
    weights, x, y = random_problem(0, 20, 4, 3, 12)
    weights.b_enc.add_(shift)
    f = torch.relu(x @ weights.encoder.T + weights.b_enc)
    rank = f * weights.W_dec.norm(dim=1) if by_norm else f
    lowest = {
        "relu": torch.zeros(1),
        "topk": rank.topk(2).values[:, -1:],
        "batchtopk": rank.view(-1).topk(40).values[-1:],
    }
    f = f * (rank >= lowest[activation])
    step = take_step(Objective(activation, 2, by_norm), weights, x, y, sparse=sparse)
    assert step.n_active == (f > 0).sum()
    exactly(step.activity, f.sum(dim=0))
    exactly(step.sparsity, (f @ (weights.W_dec.norm(dim=1) if by_norm else torch.ones(12).double())).mean())
    if activation == "batchtopk":
        exactly(step.smallest, (rank[f > 0].min() if shift == 0 else torch.tensor(torch.inf)).double())
    else:
        assert step.smallest is None


@pytest.mark.parametrize(("activation", "sparse"), SPARSE_AND_DENSE)
@pytest.mark.parametrize("squared_error", ERRORS)
@pytest.mark.parametrize("centred", [False, True])
def test_steps_of_heads_are_the_steps_of_each(activation, sparse, squared_error, centred):
    objective = Objective(activation, 2, True, centred, squared_error)
    heads = [random_problem(seed, 9, 4, 4, 7, skip=True) for seed in range(3)]
    weights = Weights(*(torch.stack(t) for t in zip(*(h[0] for h in heads), strict=True)))
    x, y = (torch.stack([head[i] for head in heads]) for i in (1, 2))
    l1 = torch.tensor([0.1, 0.0, 0.7], dtype=torch.float64)
    found, gradients = take_steps(objective, weights, x, y, l1, sparse)
    for h, head in enumerate(heads):
        wanted = take_step(objective, *head, float(l1[h]), sparse)
        for field in dataclasses.fields(wanted):
            name, mine, theirs = field.name, getattr(found[h], field.name), getattr(wanted, field.name)
            if isinstance(theirs, torch.Tensor):
                exactly(mine, theirs, msg=lambda m, name=name: f"{name}: {m}")
        assert_gradients_close(found[h].gradients, wanted.gradients.parameters())
        assert_gradients_close(Weights(*(g[h] for g in gradients)), wanted.gradients.parameters())


def test_relu_counts_densely_only_if_asked():
    problem = random_problem(0, 5, 3, 3, 4)
    assert take_step(Objective("relu"), *problem, sparse=False, count=False).n_active is None
    assert take_step(Objective("relu"), *problem, sparse=True, count=False).n_active is not None


@pytest.mark.parametrize(("activation", "sparse"), SPARSE_AND_DENSE)
def test_an_extra_term_adds_its_gradients(activation, sparse):
    weights, x, y = random_problem(0, 7, 4, 4, 10, skip=True)
    objective = Objective(activation, 3, centred=True)

    def term(leaves, centred, error, w):
        silent = torch.relu(-centred @ leaves.encoder.T) @ leaves.W_dec
        return 0.1 * (w[:, None] * (silent + error).square()).sum()

    seen = []

    def extra(situation):
        seen.append(situation.error)
        return term(*situation)

    step = take_step(objective, weights, x, y, 0.3, sparse, auxiliary_loss=extra)
    (error,) = seen  # a constant of the term
    exactly(error.square().sum(dim=1), step.squared_norms)
    loss, gradients = autograd(
        lambda leaves: (
            loss_slow(objective, leaves, x, y, 0.3) + term(leaves, x - leaves.b_dec, error, token_weights(y, "sum"))
        ),
        weights,
    )
    exactly(step.loss, loss)
    assert_gradients_close(step.gradients, gradients)


def test_latents_compete_by_norm_only_if_asked():
    """One latent reads 1.0 and writes 3.0, the other reads 2.0 and writes 1.0."""
    weights = Weights(torch.eye(2), torch.zeros(2), torch.diag(torch.tensor([3.0, 1.0])), torch.zeros(2))
    x = torch.tensor([[1.0, 2.0]])
    for activation in ("topk", "batchtopk"):
        assert take_step(Objective(activation, 1), weights, x, x).activity.tolist() == [0.0, 2.0]
        assert take_step(Objective(activation, 1, by_norm=True), weights, x, x).activity.tolist() == [1.0, 0.0]


@pytest.mark.parametrize("squared_error", ERRORS)
@pytest.mark.parametrize("centred", [False, True])
def test_sparse_and_dense_relu_agree_in_float32(squared_error, centred):
    problem = random_problem(0, 50, 16, 16, 64, skip=True, dtype=torch.float32)
    objective = Objective("relu", by_norm=True, centred=centred, squared_error=squared_error)
    sparse, dense = (take_step(objective, *problem, 0.3, is_sparse) for is_sparse in (True, False))
    torch.testing.assert_close(sparse.loss, dense.loss)
    torch.testing.assert_close(sparse.activity, dense.activity, rtol=1e-5, atol=1e-4)
    assert_gradients_close(sparse.gradients, dense.gradients.parameters(), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("activation", "sparse"), SPARSE_AND_DENSE)
def test_gradients_lie_in_memory_as_the_weights_do(activation, sparse):
    weights, x, y = random_problem(0, 7, 4, 3, 10, skip=True, dtype=torch.float32)
    step = take_step(Objective(activation, 2), weights, x, y, 0.3, sparse)
    Adam(weights.parameters(), 0.9, 0.999).step(step.gradients.parameters(), 1e-3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("by_norm", [False, True])
def test_a_topk_step_never_waits_for_the_device(dtype, by_norm, route):
    if on_cpu(route) or route == "triton":
        pytest.skip("these are not torch's operations")
    weights, x, y = random_problem(0, 7, 4, 4, 10, skip=True, dtype=dtype)
    adam = Adam(weights.parameters(), 0.9, 0.999)
    objective = Objective("topk", 3, by_norm, centred=True, squared_error="target_norm")
    with Operations() as operations:
        gradients = take_step(objective, weights, x, y, 0.3).gradients.parameters()
        clip_norm_(gradients, 1.0)
        adam.step(gradients, 1e-3)
    waiting = {"_local_scalar_dense", "nonzero", "masked_select", "bincount", "is_nonzero", "equal", "_unique2"}
    names = {name for name, *_ in operations.seen}
    assert {"_embedding_bag_forward_only", "topk", "_fused_adam_"} <= names
    assert not waiting & names
    indexing = [args[1] for name, args, _ in operations.seen if name in ("index", "index_put", "index_put_")]
    assert not any(i is not None and i.dtype == torch.bool for indices in indexing for i in indices)


def test_a_topk_step_allocates_nothing_of_all_tokens_and_latents(monkeypatch, route):
    if not on_cpu(route):
        pytest.skip("on a GPU the product is there as a whole")
    N, n = 64, 4096
    monkeypatch.setattr(select, "WORKSPACE", 8 * n)
    monkeypatch.setattr(select, "FEWEST_TOKENS", 8)
    weights, x, y = random_problem(0, N, 8, 8, n, skip=True, dtype=torch.float32)
    with Operations() as operations:
        take_step(Objective("topk", 4, centred=True), weights, x, y)
    found = [t for _, _, out in operations.seen for t in (out if isinstance(out, tuple | list) else [out])]
    largest = max(t.numel() for t in found if isinstance(t, torch.Tensor))
    assert n * 8 <= largest < N * n // 4


# --------------------------------------------------------------------------------------------- encoder and decoder
def keeping(latents, starts):
    """A selection that always keeps the same pairs."""
    tokens = torch.repeat_interleave(starts.diff())

    def chosen(x, encoder, b_enc):
        return Active(torch.relu(x @ encoder.T + b_enc)[tokens, latents], latents, starts)

    return chosen


PATTERNS = {
    "some tokens and latents without pairs": ([0, 2, 4, 1, 2], [0, 3, 3, 5, 5]),
    "a token with all latents": ([0, 1, 2, 3, 4, 3], [0, 0, 5, 6, 6]),
    "no pairs": ([], [0, 0, 0, 0, 0]),
}
patterns = pytest.mark.parametrize("pattern", PATTERNS.values(), ids=PATTERNS.keys())


def fixed(pattern):
    return torch.tensor(pattern[0], dtype=torch.int64), torch.tensor(pattern[1])


def leaves(*tensors):
    return [t.requires_grad_() for t in tensors]


@patterns
@pytest.mark.parametrize("centred", [False, True])
def test_encode_equals_its_dense_twin_and_its_finite_differences(pattern, centred):
    draw, kept = drawing(3), fixed(pattern)
    inputs = leaves(draw(4, 3), draw(5, 3), draw(5), *([draw(3)] if centred else []))

    def sparse(x, encoder, b_enc, centre=None):
        values, found = encode(x, encoder, b_enc, keeping(*kept), centre)
        return found.dense(values)

    def dense(x, encoder, b_enc, centre=None):
        return dense_encode(x, encoder, b_enc, centre, Pattern(*kept, 5))

    weight = draw(4, 5)
    exactly(sparse(*inputs), dense(*inputs))
    for mine, theirs in zip(
        torch.autograd.grad((sparse(*inputs) * weight).sum(), inputs),
        torch.autograd.grad((dense(*inputs) * weight).sum(), inputs),
        strict=True,
    ):
        exactly(mine, theirs)
    assert torch.autograd.gradcheck(sparse, inputs)


@patterns
def test_decode_equals_its_dense_twin_and_its_finite_differences(pattern):
    draw, kept = drawing(0), Pattern(*fixed(pattern), 5)
    inputs = leaves(draw(len(kept.latents)), draw(5, 3))
    mine, theirs = (function(inputs[0], kept, inputs[1]) for function in (decode, dense_decode))
    exactly(mine, theirs)
    for a, b in zip(*(torch.autograd.grad(out.sum(), inputs) for out in (mine, theirs)), strict=True):
        exactly(a, b)  # where the gradient that arrives is not contiguous
    assert torch.autograd.gradcheck(lambda values, W_dec: decode(values, kept, W_dec), inputs)


@settings(deadline=None, max_examples=40)
@given(
    seed=seeds, n=st.sampled_from((1, 7, 300, 1 << 16, (1 << 16) + 1)), counts=st.lists(st.integers(0, 5), min_size=1)
)
def test_the_transposed_pattern_has_the_same_pairs_by_latent(seed, n, counts):
    starts = torch.tensor([0, *counts]).cumsum(0)
    generator = torch.Generator().manual_seed(seed)
    latents = placed(torch.randint(0, n, (int(starts[-1]),), generator=generator, device="cpu"))
    if len(latents):
        latents[0] = n - 1
    found = Pattern(latents, starts, n).by_latent
    tokens = torch.repeat_interleave(starts.diff())
    order = sorted(range(len(latents)), key=lambda j: (int(latents[j]), j))
    assert found.order.tolist() == order
    assert torch.equal(found.tokens, tokens[order])
    assert torch.equal(found.starts.diff(), torch.bincount(latents, minlength=n)) and found.starts[0] == 0


@pytest.mark.parametrize("asked", [False, True])
def test_the_inputs_gradient_is_taken_only_if_asked(asked, monkeypatch):
    draw = drawing(0)
    encoder, b_enc = leaves(draw(5, 3), draw(5))
    x = draw(4, 3).requires_grad_(asked)
    values, _ = encode(x, encoder, b_enc, partial(top_k, k=2))
    summed = []

    def recording(rows, *args):
        summed.append(rows.data_ptr())
        return rows_module.sum_rows(rows, *args)

    monkeypatch.setattr(sparse, "sum_rows", recording)
    values.sum().backward()
    assert summed
    assert (encoder.data_ptr() in summed) == asked
    assert (x.grad is not None) == asked


# ------------------------------------------------------------------------------------------------------ selection
LENGTHS = (1, 2, 7, 31, 255, 256, 257, 509, 512, 1000, 1009, 1024, 4096)


@st.composite
def selections(draw):
    """N, n and k, k small or any up to n."""
    n = draw(st.sampled_from(LENGTHS))
    return draw(st.integers(1, 9)), n, draw(st.one_of(st.integers(1, min(n, 33)), st.integers(1, n), st.just(n)))


def selection_problem(seed, N, n, whole, scaled, shift=0.0):
    """x, encoder, b_enc, a scale or None, and relu(x encoder^T + b_enc); exact if whole."""
    draw = drawing(seed, whole, torch.float32)
    x, encoder, b_enc = draw(N, 3), draw(n, 3), draw(n) + shift
    scale = 2.0 ** drawing(seed, True, torch.float32)(n) if scaled else None
    return x, encoder, b_enc, scale, torch.relu(x @ encoder.T + b_enc)


def assert_pairs_of(found, f):
    """Values are those of f (N, n) at their pairs; pairs are different, and starts delimit tokens."""
    N, n = f.shape
    assert found.latents.dtype == found.starts.dtype == torch.int64
    assert found.starts.shape == (N + 1,) and found.starts[0] == 0 and found.starts[-1] == len(found.latents)
    tokens = torch.repeat_interleave(found.starts.diff())
    assert ((found.latents >= 0) & (found.latents < n)).all()
    assert len(torch.unique(tokens * n + found.latents)) == len(tokens)
    torch.testing.assert_close(found.values, f[tokens, found.latents], rtol=1e-5, atol=1e-5)


def assert_same_numbers(found, wanted, whole):
    """In any order along the last dimension; exactly, if the problem is of whole numbers."""
    tolerance = {"rtol": 0.0, "atol": 0.0} if whole else {"rtol": 1e-5, "atol": 1e-6}
    torch.testing.assert_close(found.sort(dim=-1).values, wanted.sort(dim=-1).values, **tolerance)


def parts_of(patch, tokens, n):
    """The product of a batch is taken so many tokens at a time, on a CPU."""
    patch.setattr(select, "WORKSPACE", tokens * n)
    patch.setattr(select, "FEWEST_TOKENS", 1)


@settings(deadline=None, max_examples=150)
@given(seed=seeds, shape=selections(), whole=st.booleans(), scaled=st.booleans(), tokens=st.integers(1, 9))
def test_top_k_keeps_the_largest(seed, shape, whole, scaled, tokens):
    N, n, k = shape
    x, encoder, b_enc, scale, f = selection_problem(seed, N, n, whole, scaled)
    with pytest.MonkeyPatch.context() as patch:
        parts_of(patch, tokens, n)
        found = top_k(x, encoder, b_enc, k, scale)
    assert_pairs_of(found, f)
    assert torch.equal(found.starts.diff(), torch.full((N,), k))
    scale = torch.ones(n) if scale is None else scale
    assert_same_numbers((found.values * scale[found.latents]).view(N, k), torch.topk(f * scale, k).values, whole)


@settings(deadline=None, max_examples=150)
@given(
    seed=seeds,
    shape=selections(),
    whole=st.booleans(),
    scaled=st.booleans(),
    tokens=st.integers(1, 9),
    shift=st.sampled_from((0.0, -2.0, -100.0)),
    guess=st.sampled_from((None, 0.0, 1e9)),
)
def test_batch_top_k_keeps_the_largest_of_the_batch(seed, shape, whole, scaled, tokens, shift, guess, route):
    """Where fewer than N k are positive it keeps those (on a GPU zeros too). A guess of the threshold that is too high
    costs only time."""
    N, n, k = shape
    x, encoder, b_enc, scale, f = selection_problem(seed, N, n, whole, scaled, shift)
    with pytest.MonkeyPatch.context() as patch:
        parts_of(patch, tokens, n)
        if guess is not None:
            patch.setattr(select, "_low_threshold", lambda *_: guess)
        found = batch_top_k(x, encoder, b_enc, k, scale)
    assert_pairs_of(found, f)
    scale = torch.ones(n) if scale is None else scale
    wanted = torch.topk((f * scale).view(-1), N * k).values
    kept = (found.values * scale[found.latents])[found.values > 0]
    assert_same_numbers(kept, wanted[wanted > 0], whole)
    assert len(found.values) == (len(kept) if on_cpu(route) else N * k)


@settings(deadline=None, max_examples=60)
@given(
    seed=seeds, shape=selections(), whole=st.booleans(), tokens=st.integers(1, 9), shift=st.sampled_from((0, -2, -100))
)
def test_positive_keeps_all_above_zero(seed, shape, whole, tokens, shift, route):
    N, n, _ = shape
    x, encoder, b_enc, _, f = selection_problem(seed, N, n, whole, False, shift)
    with pytest.MonkeyPatch.context() as patch:
        parts_of(patch, tokens, n)
        found = positive(x, encoder, b_enc)
    assert_pairs_of(found, f)
    assert_same_numbers(found.values[found.values > 0], f[f > 0], whole)
    assert route == "triton" or (found.values > 0).all()  # the sieve on a GPU keeps what it was not sure of


@pytest.mark.parametrize("n", [1000, 1009, 1024])
def test_many_tokens_in_parts_of_the_default_size_are_selected_from_alike(n, monkeypatch):
    monkeypatch.setattr(select, "WORKSPACE", 1)
    x, encoder, b_enc, _, f = selection_problem(0, 2 * select.FEWEST_TOKENS + 1, n, True, False)
    assert_same_numbers(top_k(x, encoder, b_enc, 5).values.view(-1, 5), torch.topk(f, 5).values, True)
    assert_same_numbers(batch_top_k(x, encoder, b_enc, 5).values, torch.topk(f.view(-1), 5 * len(x)).values, True)


@pytest.mark.parametrize("n", [509, 1000, 4096])
@pytest.mark.parametrize("chosen", [partial(top_k, k=17), partial(top_k, k=300), partial(batch_top_k, k=17), positive])
def test_selection_does_not_depend_on_threads(n, chosen, threads):
    x, encoder, b_enc, _, _ = selection_problem(0, 201, n, True, False)
    found = []
    for count in (1, 2):
        threads(count)
        found.append(chosen(x, encoder, b_enc))
    assert all(torch.equal(one, two) for one, two in zip(*found, strict=True))


@pytest.mark.parametrize("scaled", [False, True])
@pytest.mark.parametrize("which", [top_k, batch_top_k, positive])
def test_bf16_decides_what_is_kept_but_not_its_value(which, scaled):
    N, d, n, k = 33, 32, 512, 8
    draw = drawing(0, dtype=torch.float32)
    x, encoder, b_enc = draw(N, d), draw(n, d), draw(n)
    scale = torch.rand(n) + 0.5 if scaled and which is not positive else torch.ones(n)
    f = torch.relu(x @ encoder.T + b_enc)
    found = which(x, encoder, b_enc, bf16=True, **({} if which is positive else {"k": k, "scale": scale}))
    assert_pairs_of(found, f)
    wrong = float((2**-7 * (x.abs() @ encoder.abs().T + b_enc.abs()) * scale).max())  # as far as bfloat16 may err
    ranked = f * scale
    lowest = {top_k: ranked.topk(k).values[:, -1:], batch_top_k: ranked.view(-1).topk(N * k).values[-1:]}
    lowest = lowest.get(which, torch.zeros(1)).expand(N, n)
    kept = Pattern(found.latents, found.starts, n).dense(torch.ones_like(found.values)) > 0
    assert (ranked - lowest)[kept].min() >= -2 * wrong
    assert (ranked - lowest)[~kept].max() <= 2 * wrong
    if which is not positive:
        assert len(found.values) == N * k
        assert (kept & (ranked >= lowest)).sum() > 0.95 * N * k


@pytest.mark.parametrize(("activation", "sparse"), SPARSE_AND_DENSE)
def test_a_bf16_step_is_nearly_the_exact_one(activation, sparse):
    problem = random_problem(0, 64, 16, 16, 128, dtype=torch.float32)
    exact, rough = (take_step(Objective(activation, 8, bf16=b), *problem, 0.3, sparse) for b in (False, True))
    torch.testing.assert_close(rough.loss, exact.loss, rtol=0.02, atol=0.0)
    for a, b in zip(rough.gradients.parameters(), exact.gradients.parameters(), strict=True):
        assert a.dtype == torch.float32
        assert (a - b).norm() < 0.1 * b.norm()


@settings(deadline=None, max_examples=100)
@given(
    seed=seeds,
    d=st.sampled_from((1, 3, 16, 100, 512)),
    tail=st.sampled_from((0.0, 2.0**-9, -(2.0**-9), 2.0**-8 - 2.0**-20)),
    size=st.sampled_from((1e-20, 1.0, 1e15)),
    bias=st.sampled_from((0.0, 1.0, -1e4)),
)
def test_bounds_from_the_bfloat16_product_hold(seed, d, tail, size, bias, route):
    """Where all terms have one sign and all are rounded the same way, the error is the largest that there can be."""
    if route != "sieve":
        pytest.skip("nothing is rounded")
    draw = drawing(seed, dtype=torch.float32)
    x, encoder = (torch.exp2(draw(m, d).round()) * (1 + tail) * size**0.5 for m in (5, 7))
    x[:2], encoder[:3] = draw(2, d) * size**0.5, draw(3, d)
    b_enc = draw(7) * bias * size
    wanted = (x.double() @ encoder.double().T + b_enc).numpy()
    (part,) = select._products(x, encoder, b_enc, None, False)
    _, norms, rests, _, *latents = (array[0] for array in part.sieve[:-1])
    for t, (x_norm, x_rest) in enumerate(zip(norms, rests, strict=True)):
        lower, upper = torch.empty(2, 7).numpy()
        loops._bounds(part.product[0, t], x_norm, x_rest, *latents, d, lower, upper)
        assert (lower <= wanted[t]).all() and (wanted[t] <= upper).all()
        assert (upper - lower).max() <= 0.05 * (x[t].norm() * encoder.norm(dim=1) + b_enc.abs()).max()


@pytest.mark.parametrize("spread", [0.0, 1.0])
@pytest.mark.parametrize("share", [0.02, 0.6])
def test_latents_that_a_guessed_bound_leaves_are_those_of_their_own_bounds(spread, share, route):
    """Or so many that none are listed. `spread`: of the norms, by which all latents are ruled out at once first."""
    if route != "sieve":
        pytest.skip("nothing is rounded")
    draw = drawing(0, dtype=torch.float32)
    x, encoder, b_enc = draw(6, 100), draw(333, 100) * torch.exp(spread * draw(333, 1)), draw(333)
    (part,) = select._products(x, encoder, b_enc, None, False)
    _, norms, rests, _, *latents = (array[0] for array in part.sieve[:-1])
    most = tuple(np.abs(array).max() for array in latents)
    lower, upper = torch.empty(2, 333).numpy()
    listed = 0
    for t, (x_norm, x_rest) in enumerate(zip(norms, rests, strict=True)):
        row = part.product[0, t], x_norm, x_rest, *latents, 100
        loops._bounds(*row, lower, upper)
        bound = np.quantile(upper, 1 - share).astype(np.float32)
        mask, columns = np.zeros(384, bool), np.empty(333 + loops.LISTED, np.int64)
        possible, certain = loops._list_possible(*row, most, bound, mask, columns)
        if possible:
            assert columns[:possible].tolist() == mask.nonzero()[0].tolist() == (upper > bound).nonzero()[0].tolist()
            assert certain == (lower > bound).sum()
        else:
            assert certain > 333 // 8
        listed += possible > 0
    assert listed == (0 if share > 0.5 else 6)


@pytest.mark.parametrize("d", [7, 64, 100])
@pytest.mark.parametrize("k", [3, 8, 21])
def test_what_is_selected_does_not_depend_on_how_rows_were_sliced(d, k, route):
    if route != "sieve":
        pytest.skip("only the sieve takes inner products of its own")
    draw = drawing(0, dtype=torch.float32)
    x, encoder, b_enc = draw(40, d), draw(333, d), draw(333)
    (part,) = select._products(x, encoder, b_enc, None, False)
    values, columns = part.top_k(k)
    alone, their_columns = torch.empty_like(values), torch.empty_like(columns)
    for row in range(40):
        arrays = alone.numpy()[None], their_columns.numpy()[None]
        loops.sieved_top_k(part.product, *part.sieve, k, *arrays, row, row + 1)
    assert torch.equal(values, alone) and torch.equal(columns, their_columns)


# --------------------------------------------------------------------------------------------- weights and updates
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
        torch.testing.assert_close(token_weights(y, name) @ squares.sum(dim=1), wanted[name])


@pytest.mark.parametrize("squared_error", ERRORS)
def test_targets_of_zeros_alone_make_no_infinity(squared_error):
    assert token_weights(torch.zeros(4, 3), squared_error).isfinite().all()


@pytest.mark.parametrize("size", [0.0, 1e-12])
@pytest.mark.parametrize(("activation", "sparse"), [("topk", True), ("relu", True), ("relu", False)])
def test_a_target_of_zero_has_no_scale_and_moves_nothing(activation, sparse, size):
    """The gradients are those of the other tokens alone; it counts in the mean."""
    N, objective = 24, Objective(activation, 3, squared_error="target_norm")
    weights, x, y = random_problem(0, N, 5, 6, 40, dtype=torch.float32)
    y[-1] *= size
    both, others = (take_step(objective, weights, x[:n], y[:n], 0.0, sparse) for n in (N, N - 1))
    torch.testing.assert_close(both.loss, others.loss * ((N - 1) / N))
    for mine, theirs in zip(both.gradients.parameters(), others.gradients.parameters(), strict=True):
        theirs = theirs * ((N - 1) / N)
        assert (mine - theirs).norm() < 1e-5 * theirs.norm()
    heads = torch.stack([y, y + 1])
    assert torch.equal(token_weights(heads, "target_norm")[0], token_weights(y, "target_norm"))
    assert token_weights(heads, "target_norm").count_nonzero() == 2 * N - 1


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


@pytest.mark.parametrize("largest", [1e-3, 1.0, 1e3])
def test_clip_norm_is_torchs(largest):
    mine = [torch.randn(7, 3), torch.randn(5), torch.randn(())]
    theirs = [torch.zeros_like(g).requires_grad_() for g in mine]
    for parameter, gradient in zip(theirs, mine, strict=True):
        parameter.grad = gradient.clone()
    clip_norm_(mine, largest)
    torch.nn.utils.clip_grad_norm_(theirs, largest)
    assert all(torch.equal(gradient, parameter.grad) for gradient, parameter in zip(mine, theirs, strict=True))


def test_adam_is_torchs_adam():
    draw = drawing(0, dtype=torch.float32)
    mine = [draw(7, 3), draw(5)]
    theirs = [p.clone().requires_grad_() for p in mine]
    adam = Adam(mine, 0.8, 0.99)
    reference = torch.optim.Adam(theirs, betas=(0.8, 0.99), fused=True)
    for step in range(20):
        gradients = [draw(*p.shape) for p in mine]
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


# ----------------------------------------------------------------------------------------------------- on any device
@pytest.mark.parametrize(("activation", "sparse"), SPARSE_AND_DENSE)
@pytest.mark.parametrize("by_norm", [False, True])
def test_a_float32_step_matches_autograd_in_float64(activation, sparse, by_norm):
    """With tokens of several tiles, and latents that are active for none, few and all of them."""
    N, d, p, n = 300, 150, 130, 700
    problem = random_problem(0, N, d, p, n, skip=True, dtype=torch.float32)
    weights, x, y = problem
    weights.b_enc[:20] -= 1000.0
    weights.b_enc[20:25] += 100.0
    weights.b_enc[25:] -= 10.0
    objective = Objective(activation, 40, by_norm, squared_error="target_norm")
    double = Weights(*(t.double() for t in weights))
    loss, gradients = autograd(lambda leaves: loss_slow(objective, leaves, x.double(), y.double(), 0.3), double)
    step = take_step(objective, weights, x, y, 0.3, sparse)
    torch.testing.assert_close(step.loss.double(), loss, rtol=1e-5, atol=0.0)
    for mine, theirs in zip(step.gradients.parameters(), gradients, strict=True):
        assert (mine - theirs).norm() < 1e-5 * theirs.norm()
    again = take_step(objective, weights, x, y, 0.3, sparse)
    assert all(torch.equal(a, b) for a, b in zip(step.gradients, again.gradients, strict=True))


@pytest.mark.parametrize(("activation", "sparse"), SPARSE_AND_DENSE)
@pytest.mark.parametrize("of", ["x", "encoder", "b_enc"])
def test_what_is_no_number_shows_in_the_loss(activation, sparse, of):
    weights, x, y = random_problem(0, 20, 4, 4, 300, dtype=torch.float32)
    {"x": x, "encoder": weights.encoder, "b_enc": weights.b_enc}[of][3] = torch.nan
    assert take_step(Objective(activation, 2), weights, x, y, 0.3, sparse).loss.isnan()


TRAININGS = {
    "topk": (SAEConfig("sae", "topk", k=4, expansion=8), {"clip_grad_norm": 1.0}),
    "topk of unit norm": (SAEConfig("sae", "topk", k=4, expansion=8, sparsity="unit_norm"), {}),
    "topk with auxk": (SAEConfig("sae", "topk", k=2, expansion=8), {"revive": "auxk"}),
    "batchtopk": (SAEConfig("sae", "batchtopk", k=4, expansion=8), {}),
    "relu": (SAEConfig("sae", "relu", l1_coefficient=0.3, expansion=8), {"clip_grad_norm": 1.0}),
    "relu with ghosts": (SAEConfig("sae", "relu", l1_coefficient=2.0, expansion=8), {"revive": "ghost"}),
    "skip transcoder": (TranscoderConfig("transcoder", "topk", k=4, expansion=8, skip=True), {}),
}


def trainer_of(name, device, **fields):
    config, more = TRAININGS[name]
    options = TrainingConfig(256 * 60, 256, lr=3e-3, dead_after_tokens=256 * 10, **{"log_every": 20} | more | fields)
    hooks = ("in", "in" if config.kind == "sae" else "out")
    side = HookStatistics(torch.zeros(16, device="cpu"), 1.5)
    with torch.device("cpu"):
        return Trainer(config.spec(16, 16, *hooks, 0, Origin()), options, side, side, device)


def trained(trainer, first=0, last=60):
    """After steps on batches of sparse sums of atoms."""
    draw = drawing(1, dtype=torch.float32)
    atoms = draw(24, 16)
    for step in range(last):
        f = torch.relu(draw(256, 24) - 1.2)
        if step >= first:
            trainer.train_step((f @ atoms, f @ atoms.roll(1, 0)))
    return trainer


@needs_gpu
@pytest.mark.parametrize("name", TRAININGS)
def test_training_on_a_gpu_follows_training_on_a_cpu(name, route):
    if route not in GPU:
        pytest.skip("compares with the CPU anyway")
    mine = trained(trainer_of(name, "cuda"))
    with torch.device("cpu"):
        theirs = trained(trainer_of(name, "cpu"))
    assert len(mine.metrics.rows) == 4
    for a, b in zip(mine.metrics.rows, theirs.metrics.rows, strict=True):
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-2)
        assert a["l0"] == pytest.approx(b["l0"], rel=1e-2)
    assert mine.metrics.rows[0]["loss"] == pytest.approx(theirs.metrics.rows[0]["loss"], rel=1e-5)
    assert mine.metrics.rows[-1]["loss"] < 0.7 * mine.metrics.rows[0]["loss"]


@needs_gpu
@pytest.mark.parametrize("name", TRAININGS)
def test_training_on_a_gpu_goes_on_with_identical_bytes(name, route):
    if route not in GPU:
        pytest.skip("test_resume does so on a CPU")
    whole = trained(trainer_of(name, "cuda"))
    resumed = trainer_of(name, "cuda")
    resumed.restore(trained(trainer_of(name, "cuda"), last=33).state())
    trained(resumed, first=33)
    assert all(torch.equal(held, whole.state()[key]) for key, held in resumed.state().items())


@needs_gpu
@pytest.mark.parametrize("name", ["topk", "topk of unit norm", "batchtopk", "skip transcoder"])
def test_a_step_never_waits_for_the_gpu(name, route):
    if route not in GPU:
        pytest.skip("a CPU is not waited for")
    trainer = trained(trainer_of(name, "cuda", log_every=1000), last=5)  # then its steps are recorded
    x = torch.randn(256, 16)
    torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in range(3):
            trainer.train_step((x, x))
    finally:
        torch.cuda.set_sync_debug_mode("default")


@needs_gpu
def test_a_recorded_relu_step_has_room_for_more_and_for_fewer_pairs(route):
    if route != "triton":
        pytest.skip("not recorded")
    mine, theirs = (trainer_of("relu", "cuda", log_every=1000) for _ in range(2))
    theirs.n_steady_steps = -1000  # never recorded
    rooms = set()
    for step, shift in enumerate([0.0] * 10 + [0.5, -1.0, -1.0, 0.5, -10.0, -10.0, 0.0]):
        x = drawing(step, dtype=torch.float32)(256, 16)
        for trainer in (mine, theirs):
            trainer.sparse = True
            trainer.weights.b_enc.add_(shift)
            trainer.train_step((x,))
        rooms.add(mine.graphed_step.capacity if mine.graphed_step else 0)
    assert len(rooms) > 3
    assert all(torch.equal(a, b) for a, b in zip(mine.weights.parameters(), theirs.weights.parameters(), strict=True))


# -------------------------------------------------------------------- heads at once
@settings(deadline=None, max_examples=60)
@given(
    seed=seeds,
    H=st.integers(1, 5),
    N=st.integers(1, 20),
    n=st.integers(2, 40),
    k=st.sampled_from((None, 1, 2)),
    scaled=st.booleans(),
    several=st.integers(2, 5),
    threads=st.integers(1, 3),
)
def test_selecting_from_heads_at_once_is_selecting_from_each(seed, H, N, n, k, scaled, several, threads, route):
    """Whichever heads share a product, and however rows are dealt out to threads."""
    if route != "sieve":
        pytest.skip("heads are taken at once only there")
    draw = drawing(seed, dtype=torch.float32)
    x, encoder, b_enc = draw(H, N, 6), draw(H, n, 6), draw(H, n)
    scale = draw(H, n).abs() + 0.1 if scaled and k else None
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(select, "WORKSPACE", several * N * n)
        patch.setattr(loops, "FEWEST", 8)
        patch.setattr(torch, "get_num_threads", lambda: threads)
        assert select.at_once(x, encoder)
        found = select.active_of_heads(x, encoder, b_enc, k, scale)
        heads = [
            positive(x[h], encoder[h], b_enc[h])
            if k is None
            else top_k(x[h], encoder[h], b_enc[h], k, None if scale is None else scale[h])
            for h in range(H)
        ]
    wanted = concatenate_heads(heads, n)
    for mine, theirs in zip(found, wanted, strict=True):
        assert torch.equal(mine, theirs) if mine.dtype == torch.int64 else torch.allclose(mine, theirs, rtol=1e-6)
