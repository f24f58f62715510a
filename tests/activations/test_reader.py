import itertools
import shutil
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import zarr
from hypothesis import given, settings
from hypothesis import strategies as st
from stores import write_store

from saeflow.activations import reader as reader_module
from saeflow.activations.order import permute
from saeflow.activations.reader import BatchReader, MappedRows, ZarrRows, open_rows
from saeflow.activations.shards import PAGE, Shard, ShardError, row_checksums_of
from saeflow.activations.store import StoreError

GEOMETRY = {"chunk_tokens": 16, "shard_tokens": 64}
N = 200  # three whole shards and one with half of its second chunk


@pytest.fixture
def values():
    generator = torch.Generator().manual_seed(0)
    return {
        "blocks.0.hook_mlp_out": torch.randn(N, 6, generator=generator),
        "blocks.0.attn.hook_z": torch.randn(N, 2, 5, generator=generator),
    }


@pytest.fixture
def columns(tmp_path, values):
    return write_store(tmp_path / "store", values, **GEOMETRY)


@pytest.fixture
def in_files(monkeypatch):
    """However small, columns are read from their files."""
    monkeypatch.setattr(reader_module, "IN_MEMORY_BYTES", 0)


@given(st.integers(1, 5000), st.integers(0, 2**40), st.integers(0, 1000))
@settings(deadline=None)
def test_every_epoch_is_a_permutation_of_all_tokens(n, seed, epoch):
    assert np.array_equal(np.sort(permute(np.arange(n), n, seed, epoch)), np.arange(n))


def test_permutation_looks_random():
    """Counts of (index, result) on a coarse grid, and of neighbours' distances, are as for random permutations."""
    n, cells = 100_000, 20
    for seed, epoch in itertools.product((0, 1), (0, 1)):
        found = permute(np.arange(n), n, seed, epoch)
        grid = np.histogram2d(np.arange(n), found, bins=cells)[0]
        expected = n / cells**2
        chi_squared = ((grid - expected) ** 2 / expected).sum()
        degrees = (cells - 1) ** 2
        assert abs(chi_squared - degrees) < 5 * np.sqrt(2 * degrees)
        assert abs(np.abs(np.diff(found)).mean() / n - 1 / 3) < 0.01


def test_seeds_and_epochs_give_different_orders():
    orders = {tuple(permute(np.arange(50), 50, seed, epoch)) for seed in range(5) for epoch in range(5)}
    assert len(orders) == 25


class Unread:
    """A column of which nothing but the length is asked."""

    def __init__(self, n_tokens):
        self.n_tokens, self.store, self.size = n_tokens, Path(), (1,)


@given(st.integers(1, 300), st.integers(1, 100), st.integers(0, 100), st.data())
@settings(deadline=None, max_examples=50)
def test_batches_are_the_stream_of_epochs_of_the_tokens_that_are_kept(n, batch_size, seed, data):
    left_out = data.draw(st.sets(st.integers(0, n - 1), max_size=n - 1))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(reader_module, "open_rows", lambda column: SimpleNamespace(column=column))
        reader = BatchReader([Unread(n)], batch_size, seed, np.array(sorted(left_out), dtype=np.int64))
        whole = BatchReader([Unread(n)], batch_size, seed)
    kept = np.array([t for t in range(n) if t not in left_out])
    n_steps = -(-2 * len(kept) // batch_size)
    stream = np.concatenate([reader.rows(s) for s in range(n_steps)])
    assert all(len(reader.rows(s)) == batch_size for s in range(n_steps))
    for epoch in range(2):
        assert np.array_equal(np.sort(stream[epoch * len(kept) : (epoch + 1) * len(kept)]), kept)
    if not left_out:
        assert np.array_equal(stream, np.concatenate([whole.rows(s) for s in range(n_steps)]))


def test_leaving_out_does_not_change_the_remembered_order_of_whole_epochs(columns):
    before = [BatchReader(columns, 48, seed=0).rows(s) for s in range(9)]
    without = BatchReader(columns, 48, seed=0, left_out=np.array([0, 7, 8, 199]))
    assert not np.isin(np.concatenate([without.rows(s) for s in range(9)]), [0, 7, 8, 199]).any()
    # an epoch of as many tokens as are kept there has its order in the same cache
    again = [BatchReader(columns, 48, seed=0).rows(s) for s in range(9)]
    assert all(map(np.array_equal, before, again))


@pytest.mark.parametrize("buffer_tokens", [None, 64])
def test_batch_is_a_pure_function_of_seed_and_step(columns, in_files, buffer_tokens):
    first, second = (BatchReader(columns, 48, seed=3, buffer_tokens=buffer_tokens) for _ in range(2))
    in_order = [first.batch(s) for s in range(10)]
    backwards = [second.batch(s) for s in reversed(range(10))][::-1]
    for a, b in zip(in_order, backwards, strict=True):
        assert all(torch.equal(x, y) for x, y in zip(a, b, strict=True))
    other = BatchReader(columns, 48, seed=4, buffer_tokens=buffer_tokens).batch(0)
    assert not torch.equal(other[0], in_order[0][0])


@pytest.mark.parametrize("buffer_tokens", [None, 64])
def test_iterating_from_any_step_continues_exactly(columns, in_files, buffer_tokens):
    reader = BatchReader(columns, 48, seed=0, buffer_tokens=buffer_tokens)
    whole = list(reader.iterate(0, 12))
    for start in (0, 5, 11):
        rest = list(BatchReader(columns, 48, seed=0, buffer_tokens=buffer_tokens).iterate(start, 12 - start))
        assert len(rest) == 12 - start
        for a, b in zip(whole[start:], rest, strict=True):
            assert all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


@pytest.mark.parametrize("buffer_tokens", [None, 100])
def test_rows_of_all_columns_are_the_same_tokens(columns, values, buffer_tokens):
    reader = BatchReader(columns, 77, seed=1, buffer_tokens=buffer_tokens)
    for s in range(5):
        rows = torch.from_numpy(reader.rows(s))
        for found, held in zip(reader.batch(s), values.values(), strict=True):
            assert found.dtype == torch.float32
            assert torch.equal(found, held[rows].flatten(1))


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_values_are_those_stored(tmp_path, values, dtype):
    columns = write_store(tmp_path / dtype, values, dtype=dtype, **GEOMETRY)
    rows = np.random.default_rng(0).integers(0, N, 500)
    for column, held in zip(columns, values.values(), strict=True):
        expected = held[rows].flatten(1).to(getattr(torch, dtype)).float()
        assert isinstance(open_rows(column), MappedRows)
        assert torch.equal(open_rows(column).take(rows), expected)
        assert torch.equal(ZarrRows(column).take(rows), expected)


def test_a_row_of_odd_size_reads_right(tmp_path):
    """Rows of 2 x 3 bytes and chunks with a checksum between: nothing is aligned to more than two bytes."""
    held = torch.randn(N, 3)
    (column,) = write_store(tmp_path / "odd", {"blocks.0.hook_mlp_out": held}, dtype="float16", **GEOMETRY)
    assert torch.equal(open_rows(column).take(np.arange(N)), held.half().float())


@pytest.mark.parametrize("where", ["values", "checksum", "index", "padding"])
def test_a_flipped_byte_is_found_before_its_values_are_used(columns, where):
    column = columns[0]
    shard = column.array / "c" / "3" / "0"  # holds 8 rows of its only chunk
    data = bytearray(shard.read_bytes())
    chunk = 16 * 6 * 4
    data[{"values": 5, "checksum": chunk + 1, "index": len(data) - 20, "padding": chunk - 3}[where]] ^= 1
    shard.write_bytes(data)
    with pytest.raises(ShardError) as error:
        BatchReader(columns, 64, seed=0).columns[0].take(np.arange(190, N))
    assert f"{shard} is damaged" in str(error.value) and "run the workflow again" in str(error.value)


@pytest.mark.parametrize("by_row", [True, False])
def test_undamaged_parts_of_a_damaged_shard_can_still_be_read(columns, values, by_row):
    """Checksums are compared row by row, or, where rows have none, chunk by chunk when a chunk is first touched."""
    shard = columns[0].array / "c" / "0" / "0"
    data = bytearray(shard.read_bytes())
    data[16 * 6 * 4 + 4 + 7] ^= 0x80  # in the second chunk
    shard.write_bytes(data)
    if not by_row:
        row_checksums_of(shard).unlink()
    rows = open_rows(columns[0])
    assert torch.equal(rows.take(np.arange(16)), values["blocks.0.hook_mlp_out"][:16])
    if by_row:
        assert torch.equal(rows.take(np.array([17])), values["blocks.0.hook_mlp_out"][[17]])
    with pytest.raises(ShardError, match="chunk 1"):
        rows.take(np.array([16 if by_row else 17]))


@pytest.mark.parametrize("damage", ["missing", "short", "flipped"])
def test_checksums_of_rows_are_a_help_and_their_damage_none(columns, values, damage):
    file = row_checksums_of(columns[0].array / "c" / "1" / "0")
    held = bytearray(file.read_bytes())
    held[4 * 3] ^= 1  # of row 64 + 3
    file.write_bytes(held[:-4] if damage == "short" else held) if damage != "missing" else file.unlink()
    rows = np.array([67, 68])
    assert torch.equal(open_rows(columns[0]).take(rows), values["blocks.0.hook_mlp_out"][rows])


def test_checksums_of_rows_are_those_of_their_bytes(columns, values):
    """Of all rows of a shard, and of the NaN that its last chunk is padded with."""
    from google_crc32c import value as crc32c

    held = values["blocks.0.hook_mlp_out"][192:].numpy()
    rows = [*held, *np.full((8, 6), np.nan, dtype=np.float32)]
    found = np.fromfile(row_checksums_of(columns[0].array / "c" / "3" / "0"), dtype="<u4")
    assert found.tolist() == [crc32c(row.tobytes()) for row in rows]


@pytest.mark.parametrize("buffer_tokens", [None, 64])
def test_a_flipped_bit_is_found_by_the_first_batch_that_has_its_row(columns, in_files, buffer_tokens):
    shard = columns[0].array / "c" / "0" / "0"
    data = bytearray(shard.read_bytes())
    data[16 * 6 * 4 + 4 + 7] ^= 1  # row 16
    shard.write_bytes(data)
    reader = BatchReader(columns, 8, seed=0, buffer_tokens=buffer_tokens)
    first = next(s for s in range(25) if 16 in reader.rows(s))
    for s in range(first):
        reader.batch(s)
    with pytest.raises(ShardError, match="chunk 1"):
        reader.batch(first)


def test_a_batch_checks_its_own_rows_and_no_others(columns, in_files):
    reader = BatchReader(columns, 8, seed=0)
    reader.batch(0)
    checked = np.concatenate([shard._checked for shard in reader.columns[0].shards])
    assert np.array_equal(np.flatnonzero(checked), np.sort(reader.rows(0)))


def test_all_is_checked_beside_the_batches_where_it_fits_into_memory(columns, in_files, monkeypatch):
    """Damage that no batch has is left to who reads it."""
    shard = columns[0].array / "c" / "2" / "0"
    data = bytearray(shard.read_bytes())
    data[0] ^= 1
    shard.write_bytes(data)
    reader = BatchReader(columns[:1], 4, seed=0, left_out=np.arange(128, 144))
    batches = reader.iterate(0, 10)
    next(batches)
    for thread in threading.enumerate():
        if thread.name == "batch-checker":
            thread.join()
    found = [shard.is_checked(c) for shard in reader.columns[0].shards for c in range(shard.n_chunks)]
    assert found == [number != 8 for number in range(13)]
    batches.close()

    monkeypatch.setattr(reader_module, "machine_memory", lambda: 2 * 200 * 24 - 1)
    larger = BatchReader(columns[:1], 4, seed=0)
    batches = larger.iterate(0, 1)
    next(batches)
    assert not any(shard.is_checked(0) for shard in larger.columns[0].shards) and larger.columns[0].evicts
    batches.close()


def test_the_kernel_is_told_of_the_rows_of_a_batch_and_of_the_pieces_of_a_buffer(tmp_path, monkeypatch):
    """Whole pages, each once."""
    (column,) = write_store(tmp_path / "s", {"blocks.0.hook_mlp_out": torch.randn(1024, 512)}, chunk_tokens=256,
                            shard_tokens=1024)  # fmt: skip
    monkeypatch.setattr(reader_module, "IN_MEMORY_BYTES", 0)
    told = []
    monkeypatch.setattr(Shard, "_advise", lambda self, start, stop: told.append((start, stop)))
    reader = BatchReader([column], 16, seed=0)
    reader.batch(0)
    starts = np.sort(reader.rows(0)) // 256 * (256 * 2048 + 4) + np.sort(reader.rows(0)) % 256 * 2048
    wanted = {page for start in starts for page in range(start // PAGE, (start + 2047) // PAGE + 1)}
    found = [page for start, stop in told for page in range(start // PAGE, stop // PAGE)]
    assert set(found) == wanted and len(found) == len(wanted)
    told.clear()
    reader.batch(0)
    assert not told

    buffered = BatchReader([column], 16, seed=0, buffer_tokens=256)
    for s in range(16):
        buffered.batch(s)
    assert len({row // 256 for s in range(16) for row in buffered.rows(s)}) == 1  # and the next piece is read meanwhile
    assert 2 * 256 * 2048 <= sum(stop - start for start, stop in told) <= 2 * (256 * 2048 + 2 * PAGE)


def test_a_missing_or_short_shard_is_an_error_not_fill_values(columns):
    shard = columns[0].array / "c" / "1" / "0"
    whole = shard.read_bytes()
    shard.write_bytes(whole[:-7])
    with pytest.raises(ShardError, match=r"c/1/0"):
        open_rows(columns[0])
    shard.write_bytes(b"")
    with pytest.raises(ShardError, match="too few"):
        open_rows(columns[0])
    shard.unlink()
    with pytest.raises(ShardError, match="missing"):
        open_rows(columns[0])
    with pytest.raises(ShardError, match="missing"):
        ZarrRows(columns[0]).take(np.arange(100))


def test_a_shard_that_ends_early_is_an_error(columns):
    """A whole shard in place of which a shorter, undamaged one lies, as after a mixed-up copy."""
    shutil.copy(columns[0].array / "c" / "3" / "0", columns[0].array / "c" / "0" / "0")
    with pytest.raises(ShardError, match="1 chunks where 64 rows need 4"):
        open_rows(columns[0])


def test_another_layout_is_read_through_zarr(columns, values):
    """The same array written by zarr, compressed and in other chunks."""
    column = columns[1]
    attributes = dict(zarr.open_array(column.array, mode="r").attrs)
    held = zarr.open_array(column.array, mode="r")[:]
    shutil.rmtree(column.array)
    array = zarr.create_array(
        column.array, shape=held.shape, chunks=(10, 2, 5), dtype=held.dtype, attributes=attributes, fill_value=np.nan
    )
    array[:] = held
    reader = BatchReader([column], 64, seed=0)
    assert isinstance(reader.columns[0].rows, ZarrRows)
    assert torch.equal(reader.batch(0)[0], values["blocks.0.attn.hook_z"][reader.rows(0)].flatten(1))


def test_chunks_in_another_order_are_read_through_zarr(columns, values):
    """The specification promises no order of the chunks in a shard; the index says where they are."""
    from google_crc32c import value as crc32c

    shard = columns[0].array / "c" / "0" / "0"
    data = shard.read_bytes()
    length = 16 * 6 * 4 + 4
    index = np.frombuffer(data[4 * length : -4], dtype="<u8").reshape(4, 2).copy()
    index[[0, 1], 0] = index[[1, 0], 0]
    swapped = data[length : 2 * length] + data[:length] + data[2 * length : 4 * length] + index.tobytes()
    shard.write_bytes(swapped + crc32c(index.tobytes()).to_bytes(4, "little"))
    rows = open_rows(columns[0])
    assert isinstance(rows, ZarrRows)
    assert torch.equal(rows.take(np.arange(N)), values["blocks.0.hook_mlp_out"])


def test_columns_of_different_stores_or_lengths_are_refused(tmp_path, columns, values):
    other = write_store(tmp_path / "other", {k: v[:150] for k, v in values.items()}, **GEOMETRY)
    with pytest.raises(StoreError, match="one store and one length"):
        BatchReader([columns[0], other[1]], 16, seed=0)


def test_small_columns_held_in_memory_give_the_same_batches(columns, monkeypatch):
    held = BatchReader(columns, 48, seed=3)
    assert not [c for c in held.columns if isinstance(c, MappedRows)]
    found = list(held.iterate(2, 20))
    monkeypatch.setattr(reader_module, "IN_MEMORY_BYTES", 0)
    monkeypatch.setattr(reader_module, "IN_MEMORY_TOKENS", 0)
    mapped = BatchReader(columns, 48, seed=3)
    assert all(isinstance(c, MappedRows) for c in mapped.columns)
    for mine, its in zip(found, mapped.iterate(2, 20), strict=True):
        assert all(torch.equal(a, b) for a, b in zip(mine, its, strict=True))


def test_an_error_in_the_thread_reaches_the_consumer(columns, monkeypatch):
    monkeypatch.setattr(reader_module, "IN_MEMORY_BYTES", 0)
    shard = columns[1].array / "c" / "0" / "0" / "0"
    data = bytearray(shard.read_bytes())
    data[0] ^= 1
    shard.write_bytes(data)
    with pytest.raises(ShardError, match="chunk 0"):
        list(BatchReader(columns, 64, seed=0).iterate(0, 100))


def test_the_thread_ends_with_the_consumer(columns, monkeypatch):
    monkeypatch.setattr(reader_module, "IN_MEMORY_BYTES", 0)

    def reading() -> bool:
        return any(thread.name.startswith("batch-reader") for thread in threading.enumerate())

    batches = BatchReader(columns, 16, seed=0).iterate(0, 10_000)
    next(batches)
    assert reading()
    batches.close()
    assert not reading()
    for _ in BatchReader(columns, 16, seed=0).iterate(0, 10_000):
        break
    time.sleep(0.01)
    assert not reading()
