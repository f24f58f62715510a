"""Documents of a corpus, streamed one at a time: the one place that knows file formats.

A document is a text with the name of the work it comes from. Whether it is held out is a property of its text alone
(`is_held_out`), so that no order, limit or source can move a document from one side to the other.
"""

import gzip
import hashlib
import io
import json
import random
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from saeflow.config import ConfigError
from saeflow.planning.digests import DigestCache

# Twice the King James Bible. A tokenizer needs a hundred bytes a character, and a longer "document" is most likely a
# file read with the wrong `sample_by`.
MAX_DOCUMENT_CHARACTERS = 8_000_000
SHUFFLE_DOCUMENTS, SHUFFLE_CHARACTERS, SHUFFLE_SEED = 10_000, 32_000_000, 42


class CorpusError(ConfigError):
    """A corpus that cannot be read; the message names the file and what to do."""


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


def corpus_files(path: str | Path) -> list[Path]:
    """The files that a corpus is: `path` itself, or every corpus file below a folder, in name order.

    Raises `CorpusError` where there are none, or for an unknown format.
    """
    path = Path(path)
    if not path.exists():
        raise CorpusError(f"corpus {path}: no such file or folder")
    if path.is_file():
        if _format(path) is None:
            raise CorpusError(f"corpus {path}: unknown format; use .txt, .jsonl, .json (a line an object) or .parquet")
        return [path]
    files = sorted(p for p in path.rglob("*") if p.is_file() and _format(p))
    if not files:
        raise CorpusError(f"corpus {path}: no .txt, .jsonl, .json or .parquet file in this folder")
    return files


def corpus_digest(path: Path, digests: DigestCache) -> str:
    """Hash of the files that a corpus is, 32 hexadecimal digits."""
    return digests.files(path.parent if path.is_file() else path, corpus_files(path))


def read_documents(
    path: str | Path, text_field: str = "text", source_field: str = "source", sample_by: str = "document"
) -> Iterator[Document]:
    """Yields the documents of `corpus_files(path)` that hold more than white space.

    `.jsonl` and `.json` (one object a line) and `.parquet` are read by field; `.txt` by `sample_by`: the whole file is
    one document, or each paragraph (separated by blank lines), or each line. `.gz` may follow any but Parquet.

    Raises `CorpusError` for a missing or empty corpus, an unknown format, a missing field, or text that is not UTF-8.
    """
    empty = True
    for file in corpus_files(path):
        for document in _read_file(file, text_field, source_field, sample_by):
            if document.text.strip():
                empty = False
                yield document
    if empty:
        raise CorpusError(f"corpus {path} is empty: it holds no document with any text")


def stream_dataset(
    name: str, subset: str | None, split: str, revision: str | None, text_field: str, source_field: str
) -> Iterator[Document]:
    """Yields the documents of a Hugging Face dataset, streamed.

    Raises `CorpusError` where the dataset cannot be reached, saying that this needs the network.
    """
    from datasets import load_dataset  # two seconds, and only here

    try:
        for row in load_dataset(name, subset, split=split, revision=revision, streaming=True):
            if text_field not in row:
                raise CorpusError(f"dataset {name}: no field {text_field!r}; it has {', '.join(sorted(row))}")
            text = _text(row[text_field], f"dataset {name}", text_field)
            if text.strip():
                yield Document(text, str(row.get(source_field) or name))
    except (OSError, RuntimeError) as error:
        raise CorpusError(
            f"dataset {name!r} cannot be had here ({type(error).__name__}: {error}). It is streamed from the Hugging "
            "Face hub, which needs the network; offline, name a local file with corpus.path instead"
        ) from error


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


def _format(file: Path) -> str | None:
    *_, last = ["", *(s.lower() for s in file.suffixes if s.lower() != ".gz")]
    return last if last in (".txt", ".jsonl", ".json", ".parquet") else None


def _open(file: Path) -> BinaryIO:
    return gzip.open(file) if file.suffix.lower() == ".gz" else file.open("rb")  # type: ignore[return-value]


def _read_file(file: Path, text_field: str, source_field: str, sample_by: str) -> Iterator[Document]:
    kind = _format(file)
    try:
        if kind == ".parquet":
            yield from _read_parquet(file, text_field, source_field)
        else:
            with _open(file) as raw, io.TextIOWrapper(raw, encoding="utf-8-sig") as text:
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


def _lines(file: Path, text: io.TextIOWrapper) -> Iterator[str]:
    """The lines of a file; a file without line ends never enters memory whole."""
    most = 6 * MAX_DOCUMENT_CHARACTERS  # JSON may spell a character with six
    while line := text.readline(most):
        if len(line) == most:
            raise CorpusError(f"corpus {file}: a line of more than {len(line):,} characters; split it")
        yield line


def _first_bad_line(file: Path) -> int:
    """Number of the first line that is not UTF-8."""
    with _open(file) as raw:
        for number, line in enumerate(raw, 1):
            try:
                line.decode()
            except UnicodeDecodeError:
                return number
    raise AssertionError(f"every line of {file} is UTF-8, but not the file")


def _read_jsonl(file: Path, lines: Iterator[str], text_field: str, source_field: str) -> Iterator[Document]:
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        where = f"corpus {file}, line {number}"
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise CorpusError(f"{where}: not a JSON object ({error}); each line must be one") from error
        if not isinstance(row, dict):
            raise CorpusError(f"{where}: not a JSON object but a {type(row).__name__}; each line must be one")
        if text_field not in row:
            raise CorpusError(f"{where}: no field {text_field!r} (corpus.text_field); it has {', '.join(row)}")
        yield Document(_text(row[text_field], where, text_field), str(row.get(source_field) or file.name))


def _read_text(file: Path, lines: Iterator[str], sample_by: str) -> Iterator[Document]:
    """Groups lines into documents; line ends around each are dropped."""
    block: list[str] = []
    size = 0
    for line in lines:
        if sample_by == "line":
            yield Document(line.strip("\n"), file.name)
        elif sample_by == "paragraph" and not line.strip():
            yield Document("".join(block).strip("\n"), file.name)
            block, size = [], 0
        else:
            block.append(line)
            size += len(line)
            if size > MAX_DOCUMENT_CHARACTERS:
                raise CorpusError(
                    f"corpus {file}: a document of more than {MAX_DOCUMENT_CHARACTERS:,} characters; "
                    "set corpus.sample_by=paragraph or line"
                )
    yield Document("".join(block).strip("\n"), file.name)


def _read_parquet(file: Path, text_field: str, source_field: str) -> Iterator[Document]:
    import pyarrow
    import pyarrow.parquet as pq

    try:
        table = pq.ParquetFile(file)
    except pyarrow.ArrowInvalid as error:
        raise CorpusError(f"corpus {file} is not a Parquet file ({error}); copy it again") from error
    with table:
        names = table.schema_arrow.names
        if text_field not in names:
            raise CorpusError(f"corpus {file}: no column {text_field!r} (corpus.text_field); it has {', '.join(names)}")
        columns = [c for c in (text_field, source_field) if c in names]
        for batch in table.iter_batches(batch_size=256, columns=columns):
            for row in batch.to_pylist():
                text = _text(row[text_field], f"corpus {file}", text_field)
                yield Document(text, str(row.get(source_field) or file.name))


def _text(value: Any, where: str, text_field: str) -> str:
    """The value of a text field; an absent text is empty. Raises `CorpusError` where it is no text, or too long."""
    if value is None:
        return ""
    if not isinstance(value, str):
        raise CorpusError(
            f"{where}: {text_field!r} holds a {type(value).__name__}, not text; set corpus.text_field to the field "
            "that does"
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
