"""The token store: packed rows of one split of a corpus in Zarr, and the table of the documents that they are from.

Rows are written in order, a shard at a time, as the corpus streams by: memory does not grow with the corpus, reading
stops with the last row, and the first n rows are the same however many are asked for.
"""

import itertools
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import numpy as np

from saeflow.config import ConfigError
from saeflow.jobs.progress import progress
from saeflow.text.ahead import Ahead, token_ids
from saeflow.text.corpus import (
    SHUFFLE_DOCUMENTS,
    SHUFFLE_SEED,
    Document,
    document_hash,
    is_held_out,
    shuffle_documents,
)
from saeflow.text.look import too_short
from saeflow.text.packing import Packer, Rows
from saeflow.text.tokenizer import LoadedTokenizer, row_bos

if TYPE_CHECKING:
    import zarr

PACKING = (
    f"documents shuffled in a buffer of {SHUFFLE_DOCUMENTS} (seed {SHUFFLE_SEED}), joined by EOS, cut into rows; "
    "BOS in front of every row if prepend_bos"
)
NEVER_WRITTEN = -2  # what Zarr gives for a chunk that is not there: neither a token nor `packing.NO_DOCUMENT`
CHUNK_TOKENS = 1 << 16  # 256 KiB before compression: the unit of checksums, and the least that is read
SHARD_TOKENS = 1 << 22  # one file, and what is held in memory
_ABOUT = {
    "tokens": "token id",
    "document": "index of the token's document in documents.parquet; -1 for the BOS in front of a row",
    "offset": "index of the token in its document, the EOS that ends it included; -1 for the BOS in front of a row",
}


class TokensError(ConfigError):
    """A token store that cannot be read; the message names the file and how to make it anew."""


@dataclass(frozen=True)
class TokenStore:
    """Rows on disk: `store[a:b]` reads token ids, (rows, context_size) int32, `store.rows(a, b)` all three arrays."""

    folder: Path
    arrays: dict[str, "zarr.Array"]
    attributes: dict[str, Any]

    @property
    def n_rows(self) -> int:
        return int(self.arrays["tokens"].shape[0])

    @property
    def context_size(self) -> int:
        return int(self.arrays["tokens"].shape[1])

    def __len__(self) -> int:
        return self.n_rows

    def __getitem__(self, rows: slice) -> np.ndarray:
        return self._read("tokens", rows)

    def rows(self, start: int, stop: int) -> Rows:
        return Rows(*(self._read(name, slice(start, stop)) for name in Rows._fields))

    def spread_rows(self, n: int, seed: int = 0, of: int | None = None) -> tuple[np.ndarray, Rows]:
        """Numbers (n,), ascending, and the arrays of `n` rows that are spread over all, or over the first `of`
        (`spread`)."""
        chosen = spread(self.n_rows if of is None else of, n, seed)
        return chosen, Rows(*(self._read(name, chosen) for name in Rows._fields))

    def _read(self, name: str, rows: slice | np.ndarray) -> np.ndarray:
        array = self.arrays[name]
        try:
            return np.asarray(array[rows] if isinstance(rows, slice) else array.oindex[rows, slice(None)])
        except (ValueError, RuntimeError) as error:
            start, stop = (
                rows.indices(self.n_rows)[:2] if isinstance(rows, slice) else (int(rows[0]), int(rows[-1]) + 1)
            )
            raise _damaged(self.folder, _first_bad_shard(self.folder, array, name, start, stop), str(error)) from error


def spread(n_rows: int, n: int, seed: int = 0) -> np.ndarray:
    """(n,) numbers of rows, ascending: of `n_rows` cut into n equal runs, one row of each, drawn at random.

    A study of some of the tokens takes these rather than the first ones, which are from a few documents.
    """
    edges = np.arange(n + 1) * n_rows // n
    return np.random.default_rng(seed).integers(edges[:-1], edges[1:])


def open_tokens(folder: str | Path) -> TokenStore:
    """Opens `tokens.zarr` of an artifact folder.

    Raises `TokensError` where it is not there, or lacks a shard: Zarr itself would read fill values without a word.
    """
    import zarr

    folder = Path(folder)
    path = folder / "tokens.zarr"
    if not (path / "zarr.json").is_file():
        raise TokensError(f"{folder} holds no tokens.zarr; run the workflow, it makes the tokens first")
    group = zarr.open_group(path, mode="r")
    arrays = {name: cast("zarr.Array", group[name]) for name in Rows._fields}
    for name, array in arrays.items():
        for i in range(-(-array.shape[0] // _shard_rows(array))):
            if not _shard(folder, name, i).is_file():
                raise _damaged(folder, _shard(folder, name, i), "no such file")
    return TokenStore(folder, arrays, dict(group.attrs))


def write_tokens(
    folder: str | Path,
    documents: Iterable[Document],
    tokenizer: LoadedTokenizer,
    *,
    split: str,
    n_rows: int,
    context_size: int,
    prepend_bos: bool,
    held_out_fraction: float,
    tokenizer_digest: str,
    ahead: Ahead | None = None,
) -> int:
    """Writes the first `n_rows` rows of a split (`train` or `held_out`) as `tokens.zarr` and `documents.parquet`. What
    was tokenised `ahead` is taken from there.

    Returns the number of documents that they are from. Raises `CorpusError` where the split has fewer rows, and
    `TokenizerError` where a BOS is wanted of a tokenizer that has none.
    """
    folder = Path(folder)
    bos = row_bos(tokenizer.bos_token_id, prepend_bos)
    attributes: dict[str, Any] = {"context_size": context_size, "prepend_bos": prepend_bos}
    attributes |= {"bos_token_id": bos, "eos_token_id": tokenizer.eos_token_id}
    attributes |= {"split": split, "held_out_fraction": held_out_fraction}
    attributes |= {"tokenizer": tokenizer_digest, "packing": PACKING}
    shuffled = in_order(documents, split, held_out_fraction)
    stream = _Stream(shuffled, tokenizer, Packer(context_size, tokenizer.eos_token_id, bos), ahead)
    arrays = _create(folder / "tokens.zarr", n_rows, context_size, attributes)
    with _document_table(folder / "documents.parquet") as write, progress(None, split, n_rows, "rows") as bar:
        written = n_documents = 0
        for shard in _shards(stream, n_rows, _shard_rows(arrays["tokens"])):
            for name, values in shard._asdict().items():
                arrays[name][written : written + len(values)] = values
            written += len(shard.tokens)
            n_documents += write(stream.pop_documents(int(shard.document.max())))
            bar.update(len(shard.tokens))
    if written < n_rows:
        raise too_short(stream.n_documents, stream.n_tokens, split, written, n_rows, context_size)
    return n_documents


def in_order(documents: Iterable[Document], split: str, held_out_fraction: float) -> Iterator[Document]:
    """The documents of a split, as they are packed."""
    kept = (d for d in documents if is_held_out(d.text, held_out_fraction) == (split == "held_out"))
    return shuffle_documents(kept)


def write_unpacked_rows(folder: str | Path, tokens: np.ndarray, source: str, attributes: dict[str, Any]) -> None:
    """Writes rows (rows, context_size) of token ids that are not packed from text: each is a document of its own, and
    the offset of a token is its position."""
    folder = Path(folder)
    n_rows, context_size = tokens.shape
    document = np.broadcast_to(np.arange(n_rows)[:, None], tokens.shape)
    offset = np.broadcast_to(np.arange(context_size), tokens.shape)
    metadata = {"context_size": context_size, "packing": "whole rows"} | attributes
    arrays = _create(folder / "tokens.zarr", n_rows, context_size, metadata)
    for name, values in zip(Rows._fields, (tokens, document, offset), strict=True):
        arrays[name][:] = values.astype(np.int32)
    with _document_table(folder / "documents.parquet") as write:
        hashes = (document_hash(" ".join(map(str, row))) for row in tokens.tolist())
        write([(i, source, hash, context_size) for i, hash in enumerate(hashes)])


class _Stream:
    """Blocks of whole rows, as documents come; keeps the records of those documents until they are taken."""

    def __init__(
        self, documents: Iterable[Document], tokenizer: LoadedTokenizer, packer: Packer, ahead: Ahead | None
    ) -> None:
        self.packer = packer
        self.n_documents = self.n_tokens = 0
        self._records: list[tuple[int, str, str, int]] = []
        self._documents, read = itertools.tee(documents)  # tokenising reads a batch ahead
        self._ids = token_ids(read, tokenizer.tokenizer, ahead)

    def __iter__(self) -> Iterator[Rows]:
        for document, ids in zip(self._documents, self._ids, strict=True):
            self.packer.add(self.n_documents, ids)
            self._records.append((self.n_documents, document.source, document_hash(document.text), len(ids)))
            self.n_documents += 1
            self.n_tokens += len(ids)
            if self.packer.rows_ready():
                yield self.packer.take()

    def pop_documents(self, last: int) -> list[tuple[int, str, str, int]]:
        """Records (document, source, hash, n_tokens) up to document `last` that were not taken yet."""
        n = next((i for i, record in enumerate(self._records) if record[0] > last), len(self._records))
        taken, self._records = self._records[:n], self._records[n:]
        return taken


def _shards(blocks: Iterable[Rows], n_rows: int, shard_rows: int) -> Iterator[Rows]:
    """Joins blocks of rows into shards; stops asking for blocks at `n_rows`. The last shard may be smaller."""
    pending: list[Rows] = []
    waiting = written = 0
    for block in blocks:
        pending.append(block)
        waiting += len(block.tokens)
        while waiting and (waiting >= shard_rows or written + waiting >= n_rows):
            joined = Rows(*(np.concatenate(parts) for parts in zip(*pending, strict=True)))
            n = min(waiting, shard_rows, n_rows - written)
            yield Rows(*(values[:n] for values in joined))
            pending, waiting, written = [Rows(*(values[n:] for values in joined))], waiting - n, written + n
            if written == n_rows:
                return
    if waiting:
        yield Rows(*(np.concatenate(parts) for parts in zip(*pending, strict=True)))


def _create(path: Path, n_rows: int, context_size: int, attributes: dict[str, Any]) -> dict[str, "zarr.Array"]:
    import zarr
    from zarr.codecs import Crc32cCodec, ZstdCodec

    chunk = max(1, CHUNK_TOKENS // context_size)
    shard = chunk * max(1, SHARD_TOKENS // (chunk * context_size))
    group = zarr.open_group(path, mode="w", zarr_format=3, attributes=attributes)
    arrays = {
        name: group.create_array(
            name,
            shape=(n_rows, context_size),
            chunks=(chunk, context_size),
            shards=(shard, context_size),
            dtype="int32",
            fill_value=NEVER_WRITTEN,
            compressors=[ZstdCodec(level=3), Crc32cCodec()],  # documents and offsets shrink to almost nothing
            dimension_names=("sequence", "position"),
            attributes={"description": about},
        )
        for name, about in _ABOUT.items()
    }
    with warnings.catch_warnings():  # it is outside the specification of version 3, and xarray warns where it lacks
        warnings.filterwarnings("ignore", message="Consolidated metadata")
        zarr.consolidate_metadata(path)
    return arrays


@contextmanager
def _document_table(path: Path) -> Iterator[Callable[[list[tuple[int, str, str, int]]], int]]:
    """Opens `documents.parquet`: a function that writes records as a row group and returns how many those are."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    types = {"document": pa.int32(), "source": pa.string(), "hash": pa.string(), "n_tokens": pa.int32()}
    schema = pa.schema(types.items())
    with pq.ParquetWriter(path, schema, compression="zstd") as writer:

        def write(records: list[tuple[int, str, str, int]]) -> int:
            if records:  # none where a shard lies within one document
                writer.write_table(pa.table([list(c) for c in zip(*records, strict=True)], schema=schema))
            return len(records)

        yield write


def _shard_rows(array: "zarr.Array") -> int:
    return int((array.shards or array.chunks)[0])


def _shard(folder: Path, name: str, index: int) -> Path:
    return folder / "tokens.zarr" / name / "c" / str(index) / "0"


def _first_bad_shard(folder: Path, array: "zarr.Array", name: str, start: int, stop: int) -> Path:
    """The first shard of rows `start` to `stop` that does not read."""
    size = _shard_rows(array)
    for i in range(start // size, -(-stop // size)):
        try:
            array[i * size : (i + 1) * size]
        except (ValueError, RuntimeError):
            return _shard(folder, name, i)
    return folder / "tokens.zarr" / name


def _damaged(folder: Path, file: Path, why: str) -> TokensError:
    return TokensError(
        f"{file} is damaged ({why}); remove {folder} and run the workflow again, it makes these tokens anew"
    )
