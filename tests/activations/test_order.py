import itertools

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from saeflow.activations.order import PIECE_TOKENS, BufferedOrder, UniformOrder

NONE = np.zeros(0, dtype=np.int64)


def stream(order, n_steps):
    return np.concatenate([order.rows(s) for s in range(n_steps)])


@given(st.integers(1, 3000), st.integers(1, 400), st.integers(1, 2000), st.integers(0, 100), st.data())
@settings(deadline=None, max_examples=40)
def test_every_epoch_of_the_buffered_order_has_every_kept_token_once(n, batch_size, buffer_tokens, seed, data):
    spans = data.draw(st.lists(st.tuples(st.integers(0, n - 1), st.integers(1, 600)), max_size=3))
    left_out = np.unique([t for start, length in spans for t in range(start, min(n, start + length))]).astype(np.int64)
    kept = np.setdiff1d(np.arange(n), left_out)
    if not len(kept):
        return
    order = BufferedOrder(n, left_out, batch_size, seed, buffer_tokens)
    found = stream(order, -(-2 * len(kept) // batch_size))
    for epoch in range(2):
        assert np.array_equal(np.sort(found[epoch * len(kept) : (epoch + 1) * len(kept)]), kept)


@given(st.integers(1, 3000), st.integers(1, 400), st.integers(300, 2000), st.integers(0, 100))
@example(n=257, batch_size=33, buffer_tokens=300, seed=34)  # ends in the next epoch
@settings(deadline=None, max_examples=30)
def test_a_batch_is_of_the_pieces_that_are_named_for_it_or_before(n, batch_size, buffer_tokens, seed):
    order = BufferedOrder(n, NONE, batch_size, seed, buffer_tokens)
    most = 2 * (buffer_tokens // PIECE_TOKENS) + batch_size // PIECE_TOKENS + 2
    for s in (0, 1, 7):
        pieces = order.pieces(s)
        assert np.isin(order.rows(s) // PIECE_TOKENS, pieces).all()
        epochs = ((s + 1) * batch_size - 1) // n - s * batch_size // n + 1  # that it reaches into
        assert pieces.max() <= (n - 1) // PIECE_TOKENS and len(pieces) <= most * epochs


def test_pieces_are_named_once_an_epoch_and_a_buffer_ahead():
    n, batch = 64 * PIECE_TOKENS, PIECE_TOKENS
    order = BufferedOrder(n, NONE, batch, seed=1, buffer_tokens=8 * PIECE_TOKENS)
    told, before = [], NONE
    for s in range(64):
        told += np.setdiff1d(order.pieces(s), before).tolist()
        before = order.pieces(s)
        assert len(before) == 8 + 1 + s % 8  # its buffer, and as much of the next as is used of it
    assert sorted(told[:64]) == list(range(64))
    assert len(told) <= 64 + 8  # those of the next epoch's first buffer that are in memory are not told again


def test_a_buffer_mixes_the_tokens_of_all_of_its_pieces():
    """Of the 4 batches of a buffer, each has about a quarter of every piece."""
    order = BufferedOrder(100 * PIECE_TOKENS, NONE, 4 * PIECE_TOKENS, seed=2, buffer_tokens=16 * PIECE_TOKENS)
    for s in range(4):
        pieces, counts = np.unique(order.rows(s) // PIECE_TOKENS, return_counts=True)
        assert len(pieces) == 16
        assert abs(counts - PIECE_TOKENS / 4).max() < 6 * np.sqrt(PIECE_TOKENS * 3 / 16)


def test_seeds_epochs_and_buffers_have_orders_of_their_own():
    orders = [BufferedOrder(4 * PIECE_TOKENS, NONE, 4 * PIECE_TOKENS, seed, 2 * PIECE_TOKENS) for seed in range(3)]
    assert len({tuple(order.rows(s)) for order, s in itertools.product(orders, range(3))}) == 9
    first, second = orders[0].rows(0)[: 2 * PIECE_TOKENS], orders[0].rows(0)[2 * PIECE_TOKENS :]
    assert not np.array_equal(first % PIECE_TOKENS, second % PIECE_TOKENS)


@pytest.mark.parametrize("buffer_pieces", [4, 16, 64])
def test_pairs_of_a_batch_are_of_one_piece_as_often_as_is_documented(buffer_pieces):
    """(c - 1) / (M - 1); for one buffer of all tokens, as in the uniform order."""
    n, batch = 64 * PIECE_TOKENS, 512
    orders = [BufferedOrder(n, NONE, batch, seed, buffer_pieces * PIECE_TOKENS) for seed in range(8)]
    found = [share_of_one_piece(order.rows(s)) for order in orders for s in range(n // batch)]
    expected = (PIECE_TOKENS - 1) / (buffer_pieces * PIECE_TOKENS - 1)
    assert np.mean(found) == pytest.approx(expected, abs=5 * np.std(found) / np.sqrt(len(found)))
    uniform = [share_of_one_piece(UniformOrder(n, NONE, batch, seed).rows(0)) for seed in range(200)]
    assert np.mean(uniform) == pytest.approx((PIECE_TOKENS - 1) / (n - 1), abs=5 * np.std(uniform) / np.sqrt(200))


def share_of_one_piece(rows):
    counts = np.unique(rows // PIECE_TOKENS, return_counts=True)[1]
    return (counts * (counts - 1)).sum() / (len(rows) * (len(rows) - 1))


def test_the_variance_of_a_batch_mean_is_what_is_documented():
    """Values x = a of the piece + b of the token, of correlation r within pieces; many stores, one batch of each."""
    pieces, batch, r, rng = 257, 256, 0.5, np.random.default_rng(0)
    n, buffer_tokens = pieces * PIECE_TOKENS, 8 * PIECE_TOKENS
    means = {"buffered": [], "uniform": []}
    for seed in range(400):
        x = np.sqrt(r) * rng.standard_normal(pieces).repeat(PIECE_TOKENS) + np.sqrt(1 - r) * rng.standard_normal(n)
        for name, order in (
            ("buffered", BufferedOrder(n, NONE, batch, seed, buffer_tokens)),
            ("uniform", UniformOrder(n, NONE, batch, seed)),
        ):
            means[name].append(x[order.rows(0)].mean())
    for name, m in (("buffered", buffer_tokens), ("uniform", n)):
        documented = (1 + (batch - 1) * r * (PIECE_TOKENS - 1) / (m - 1)) / batch
        assert np.var(means[name]) == pytest.approx(documented, rel=5 * np.sqrt(2 / 400))


def test_any_token_is_as_likely_at_the_beginning_of_an_epoch():
    n = 8 * PIECE_TOKENS
    first = np.concatenate([BufferedOrder(n, NONE, 128, seed, 2 * PIECE_TOKENS).rows(0) for seed in range(400)])
    counts = np.bincount(first // 64, minlength=n // 64)
    # of one order the 128 tokens are of 2 of the 8 pieces: their counts vary as those of 800 draws of a piece
    by_piece = counts.reshape(8, -1).sum(1)
    assert abs(by_piece - len(first) / 8).max() < 5 * 64 * np.sqrt(800 * 7 / 64)
    within = counts.reshape(8, -1) / by_piece[:, None]
    assert abs(within - 1 / 4).max() < 5 * np.sqrt(3 / 16 / by_piece.min())
