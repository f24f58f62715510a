"""Documents of a corpus, streamed one at a time: the one place that knows what is in its files.

A document is a text with the name of the work it comes from. Whether it is held out is a property of its text alone
(`is_held_out`), so that no order, limit or source can move a document from one side to the other.
"""

import codecs
import gzip
import hashlib
import io
import itertools
import json
import logging
import random
import zlib
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from saeflow.text.files import CorpusError, corpus_files, file_format, open_file

log = logging.getLogger(__name__)

# Twice the King James Bible. A tokenizer needs a hundred bytes a character, and a longer "document" is most likely a
# file read with the wrong `sample_by`.
MAX_DOCUMENT_CHARACTERS = 8_000_000
_ABSENT = object()
SHUFFLE_DOCUMENTS, SHUFFLE_CHARACTERS, SHUFFLE_SEED = 10_000, 32_000_000, 42


class Document(NamedTuple):
    text: str
    source: str
    """Name of the work or file that the text is from."""


def document_hash(text: str) -> str:
    """16 hexadecimal digits of the text's BLAKE2s."""
    return hashlib.blake2s(text.encode(), digest_size=8).hexdigest()


def is_held_out(text: str, fraction: float) -> bool:
    """Whether a document belongs to the held-out split: its hash, read as a number in [0, 1), is below `fraction`."""
    return int(document_hash(text), 16) / 2**64 < fraction


def open_corpus(corpus: Mapping[str, Any], path: str | Path | None = None) -> Iterator[Document]:
    """The documents that a job's `corpus` group names: of the files at `path`, or without one of a data set."""
    if path is not None:
        return read_documents(path, **{name: corpus[name] for name in ("text_field", "source_field", "sample_by")})
    names = ("dataset", "subset", "split", "revision", "text_field", "source_field")
    return stream_dataset(*(corpus[name] for name in names))


def read_documents(
    path: str | Path, text_field: str = "text", source_field: str = "source", sample_by: str = "document"
) -> Iterator[Document]:
    """Yields the documents of `corpus_files(path)` that hold more than white space; the log says how many do not.

    `.jsonl` and `.json` (one object a line) and `.parquet` are read by field, one within another as `text.body`; `.txt`
    by `sample_by`: the whole file is one document, or each paragraph (separated by blank lines), or each line. `.gz`
    or `.zst` may follow any but Parquet.

    Raises `CorpusError` for a missing or empty corpus, an unknown format, a missing field, or text that is not UTF-8.
    """
    n_records = n_empty = 0
    try:
        for document in read_records(path, text_field, source_field, sample_by):
            n_records += 1
            if document.text.strip():
                yield document
            else:
                n_empty += 1
    finally:  # also where the reader has enough
        if n_empty:
            log.info("corpus %s: %s of the first %s records hold no text", path, f"{n_empty:,}", f"{n_records:,}")
    if n_records == n_empty:
        raise CorpusError(f"corpus {path} is empty: it holds no document with any text")


def read_records(
    path: str | Path, text_field: str = "text", source_field: str = "source", sample_by: str = "document"
) -> Iterator[Document]:
    """`read_documents` with those that hold no text: lines and rows without one, but no blank lines of a `.txt`."""
    for file in corpus_files(path):
        yield from _read_file(file, text_field, source_field, sample_by)


def stream_dataset(
    name: str, subset: str | None, split: str, revision: str | None, text_field: str, source_field: str
) -> Iterator[Document]:
    """Yields the documents of a Hugging Face dataset, streamed.

    Raises `CorpusError` where the dataset cannot be reached, saying that this needs the network.
    """
    from datasets import load_dataset  # two seconds, and only here

    _register_zstd()
    try:
        for row in load_dataset(name, subset, split=split, revision=revision, streaming=True):
            document = _document(row, f"dataset {name}", text_field, source_field, name)
            if document.text.strip():
                yield document
    except CorpusError:
        raise
    except ValueError as error:
        raise CorpusError(
            f"dataset {name!r} cannot be read ({error}); set corpus.subset, corpus.split and corpus.revision to what "
            "it has"
        ) from error
    except (OSError, RuntimeError) as error:
        raise CorpusError(
            f"dataset {name!r} cannot be had here ({type(error).__name__}: {error}). It is streamed from the Hugging "
            "Face hub, which needs the network; offline, name a local file with corpus.path instead"
        ) from error


def _register_zstd() -> None:
    """Lets the library of datasets read .zst, as the Pile's files are, by pyarrow."""
    import pyarrow
    from fsspec import compression  # type: ignore[import-untyped]

    def opened(file: Any, mode: str = "rb", **rest: Any) -> Any:
        return pyarrow.CompressedInputStream(pyarrow.PythonFile(file, mode="r"), "zstd")

    if "zstd" not in compression.compr:
        compression.register_compression("zstd", opened, "zst")


def shuffle_documents(documents: Iterable[Document]) -> Iterator[Document]:
    """Yields the documents in an order that depends on them alone, by a buffer of 10,000 (seed 42), as notebook 004.

    A corpus is often sorted by source, and a run that reads only its first part would see one of them. The buffer is
    smaller where documents are long: `SHUFFLE_CHARACTERS` in all.
    """
    rng = random.Random(SHUFFLE_SEED)
    buffer: list[Document] = []
    size = 0

    def draw() -> Document:
        i = int(rng.random() * len(buffer))
        buffer[i], buffer[-1] = buffer[-1], buffer[i]
        return buffer.pop()

    for document in documents:
        buffer.append(document)
        size += len(document.text)
        while len(buffer) > SHUFFLE_DOCUMENTS or size > SHUFFLE_CHARACTERS:
            drawn = draw()
            size -= len(drawn.text)
            yield drawn
    while buffer:
        yield draw()


def _read_file(file: Path, text_field: str, source_field: str, sample_by: str) -> Iterator[Document]:
    kind = file_format(file)
    try:
        if kind == ".parquet":
            yield from _read_parquet(file, text_field, source_field)
        else:
            with open_file(file) as raw, io.TextIOWrapper(raw, encoding="utf-8-sig") as text:
                if kind == ".txt":
                    yield from _read_text(file, _lines(file, text), sample_by)
                else:
                    yield from _read_jsonl(file, _lines(file, text), text_field, source_field)
    except UnicodeDecodeError as error:
        raise CorpusError(
            f"corpus {file} is not UTF-8 (line {_first_bad_line(file)}: {error.reason}); convert it, for example with "
            "iconv -f LATIN1 -t UTF-8"
        ) from error
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise CorpusError(f"corpus {file} is not a whole gzip file ({error}); copy it again") from error
    except OSError as error:
        if file.suffix.lower() != ".zst" or error.errno is not None:
            raise
        raise CorpusError(
            f"corpus {file} is not a whole zstd file ({error}); copy it again, or pack it anew, without --long"
        ) from error


def _lines(file: Path, text: io.TextIOWrapper) -> Iterator[str]:
    """The lines of a file; a file without line ends never enters memory whole."""
    most = 6 * MAX_DOCUMENT_CHARACTERS  # JSON may spell a character with six
    while line := text.readline(most):
        if len(line) == most:
            raise CorpusError(f"corpus {file}: a line of more than {len(line):,} characters; split it")
        yield line


def _first_bad_line(file: Path) -> int:
    """Number of the first line that is not UTF-8. Lines may be longer than memory."""
    decoder, number = codecs.getincrementaldecoder("utf-8")(), 1
    with open_file(file) as raw:
        while True:
            chunk = raw.read(1 << 20)
            try:
                decoder.decode(chunk, final=not chunk)
            except UnicodeDecodeError as error:
                return number + error.object[: error.start].count(b"\n")
            if not chunk:
                raise AssertionError(f"all of {file} is UTF-8, and then not")
            number += chunk.count(b"\n")


def _read_jsonl(file: Path, lines: Iterator[str], text_field: str, source_field: str) -> Iterator[Document]:
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        where = f"corpus {file}, line {number}"
        try:
            row = json.loads(line)
        except RecursionError as error:
            raise CorpusError(f"{where}: JSON that is nested too deeply to be read; leave this line out") from error
        except ValueError as error:
            raise CorpusError(f"{where}: not a JSON object ({error}); each line must be one") from error
        if not isinstance(row, dict):
            raise CorpusError(f"{where}: not a JSON object but a {type(row).__name__}; each line must be one")
        yield _document(row, where, text_field, source_field, file.name)


def _read_text(file: Path, lines: Iterator[str], sample_by: str) -> Iterator[Document]:
    """Groups lines into documents; line ends around each are dropped."""
    block: list[str] = []
    size = 0
    for line in lines:
        if sample_by != "document" and not line.strip():
            if block:
                yield Document("".join(block).strip("\n"), file.name)
            block, size = [], 0
        elif sample_by == "line":
            yield Document(line.strip("\n"), file.name)
        else:
            block.append(line)
            size += len(line)
            if size > MAX_DOCUMENT_CHARACTERS:
                raise CorpusError(
                    f"corpus {file}: a document of more than {MAX_DOCUMENT_CHARACTERS:,} characters; "
                    "set corpus.sample_by=paragraph or line"
                )
    if block:
        yield Document("".join(block).strip("\n"), file.name)


def _read_parquet(file: Path, text_field: str, source_field: str) -> Iterator[Document]:
    import pyarrow
    import pyarrow.parquet as pq

    try:
        table = pq.ParquetFile(file)
    except pyarrow.ArrowInvalid as error:
        raise CorpusError(f"corpus {file} is not a Parquet file ({error}); copy it again") from error
    with table:
        names = _leaves(table.schema_arrow)
        if text_field not in names:
            raise _no_field(f"corpus {file}", "column", text_field, names)
        columns = [c for c in (text_field, source_field) if c in names]
        try:
            for batch in table.iter_batches(batch_size=256, columns=columns):
                for row in batch.to_pylist():
                    yield _document(row, f"corpus {file}", text_field, source_field, file.name)
        except (pyarrow.ArrowException, OSError) as error:
            raise CorpusError(f"corpus {file} is a damaged Parquet file ({error}); copy it again") from error


def _leaves(fields: Any, prefix: str = "") -> list[str]:
    """Names of all columns of a schema, and of the fields within them."""
    import pyarrow

    names = []
    for field in fields:
        names.append(prefix + field.name)
        if pyarrow.types.is_struct(field.type):
            names += _leaves(field.type, f"{prefix}{field.name}.")
    return names


def _document(row: dict[str, Any], where: str, text_field: str, source_field: str, default: str) -> Document:
    text = _value(row, text_field)
    if text is _ABSENT:
        raise _no_field(where, "field", text_field, row)
    source = _value(row, source_field)
    return Document(_text(text, where, text_field), str(default if source is _ABSENT else source or default))


def _value(row: dict[str, Any], field: str) -> Any:
    """What a row holds in a field of this name, or in one within another (`text.body`); `_ABSENT` without either."""
    if field in row:
        return row[field]
    value: Any = row
    for part in field.split("."):
        if value is None:
            return None
        if not isinstance(value, dict) or part not in value:
            return _ABSENT
        value = value[part]
    return value


def _no_field(where: str, noun: str, field: str, there: Iterable[str]) -> CorpusError:
    return CorpusError(f"{where}: no {noun} {field!r}; set corpus.text_field to one of {_named(there)}")


def _named(names: Iterable[str]) -> str:
    """Some names, for a message on a terminal."""
    first = [name if name.isprintable() else ascii(name) for name in map(str, itertools.islice(names, 21))]
    return ", ".join(first[:20]) + (", …" if len(first) > 20 else "")


def _text(value: Any, where: str, text_field: str) -> str:
    """The value of a text field; an absent text is empty. Raises `CorpusError` where it is no text, or too long."""
    if value is None:
        return ""
    if not isinstance(value, str):
        within = f"; within it: {_named(f'{text_field}.{name}' for name in value)}" if isinstance(value, dict) else ""
        raise CorpusError(
            f"{where}: {text_field!r} holds a {type(value).__name__}, not text; set corpus.text_field to the field "
            f"that does{within}"
        )
    if len(value) > MAX_DOCUMENT_CHARACTERS:
        raise CorpusError(
            f"{where}: a document of {len(value):,} characters, more than {MAX_DOCUMENT_CHARACTERS:,}; split it"
        )
    if not value.isascii():
        try:
            value.encode()
        except UnicodeEncodeError as error:  # JSON can spell half a character
            raise CorpusError(f"{where}: {text_field!r} is no Unicode text ({error.reason})") from error
    return value
