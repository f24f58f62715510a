"""Which files a corpus is, in which order, and what of its folder is not read; their bytes, decompressed.

What enters the corpus's digest is what `corpus_parts` lists as read, and nothing else is read.
"""

import gzip
from pathlib import Path
from typing import BinaryIO, NamedTuple, cast

from saeflow.config import ConfigError
from saeflow.config.checks import where
from saeflow.planning.digests import DigestCache, short_hash

FORMATS = (".txt", ".jsonl", ".json", ".parquet")
COMPRESSED = (".gz", ".zst")
"""May follow any format but Parquet."""
NOT_TEXT = ("LICENSE", "LICENCE", "COPYING", "NOTICE", "CHANGELOG", "CITATION")
METADATA = ("dataset_infos.json", "dataset_info.json", "dataset_dict.json", "state.json")
"""What Hugging Face's library writes beside data."""
MOST_NAMED = 5


class CorpusError(ConfigError):
    """A corpus that cannot be read; the message names the file and what to do."""


class Parts(NamedTuple):
    read: list[Path]
    """In the order in which they are read: that of their paths."""
    left_out: dict[Path, str]
    """Files and links that are not read, and why. Hidden ones, `.ipynb_checkpoints` among them, are not listed."""

    def left_out_in_words(self) -> str:
        """What is not read, in a clause; empty where there is nothing."""
        by_reason: dict[str, list[str]] = {}
        for path, why in self.left_out.items():
            by_reason.setdefault(why, []).append(path.name)
        clauses = []
        for why, names in by_reason.items():
            more = f" and {len(names) - MOST_NAMED} more" if len(names) > MOST_NAMED else ""
            clauses.append(f"{', '.join(names[:MOST_NAMED])}{more} ({why})")
        return "; ".join(clauses)


def corpus_files(path: str | Path) -> list[Path]:
    """The files that a corpus is: `corpus_parts` without what is not read."""
    return corpus_parts(path).read


def corpus_digest(path: Path, digests: DigestCache) -> str:
    """Hash of the files that a corpus is, in their order, and how they are read; 32 hexadecimal digits."""
    return digest_of_files(corpus_files(path), digests)


def digest_of_files(files: list[Path], digests: DigestCache) -> str:
    """`corpus_digest` of a corpus whose files are known."""
    return short_hash([[file_format(file), file.suffix.lower(), digests.file(file)] for file in files], 32)


def corpus_parts(path: str | Path) -> Parts:
    """The files that a corpus is: `path` itself, or every corpus file below a folder.

    Links to folders are followed, each folder once. Raises `CorpusError` where there is nothing to read, for a file of
    an unknown format, a link to nothing, and a folder that cannot be opened.
    """
    path = Path(path)
    if not path.exists():
        raise CorpusError(f"corpus.path={path}: no such file or folder{where(path)}")
    if path.is_file():
        if file_format(path) is None:
            raise CorpusError(
                f"corpus {path}: unknown format; use .txt, .jsonl, .json (a line an object) or .parquet; .gz or .zst "
                "may follow the first three"
            )
        return Parts([path], {})
    files, left_out = _walk(path)
    read: list[Path] = []
    for file in files:
        kind = file_format(file)
        if file.name.upper().startswith("README") or file.name.split(".")[0].upper() in NOT_TEXT:
            left_out[file] = "not text of a corpus"
        elif file.name in METADATA:
            left_out[file] = "metadata"
        elif kind is None:
            left_out[file] = "unknown format"
        elif file.is_file():
            read.append(file)
        else:
            raise CorpusError(f"corpus {file} is {'a link to nothing' if file.is_symlink() else 'no file'}; remove it")
    if not read:
        raise CorpusError(f"corpus {path}: no .txt, .jsonl, .json or .parquet file in this folder")
    return Parts(sorted(read), dict(sorted(left_out.items())))


def _walk(root: Path) -> tuple[list[Path], dict[Path, str]]:
    """All that is below a folder but folders, and links that lead to where others have led. Links come last, so that
    what has a place of its own is found there."""
    files: list[Path] = []
    left_out: dict[Path, str] = {}
    links: list[Path] = []
    seen: set[Path] = set()

    def visit(folder: Path) -> None:
        target = folder.resolve()
        if target in seen:
            left_out[folder] = "a folder that is read already"
            return
        seen.add(target)
        try:
            entries = sorted(folder.iterdir())
        except OSError as error:
            raise CorpusError(f"corpus folder {folder} cannot be opened ({error.strerror})") from error
        for entry in entries:
            if entry.name.startswith("."):
                continue
            if not entry.is_dir():
                files.append(entry)
            elif entry.is_symlink():
                links.append(entry)
            else:
                visit(entry)

    visit(root)
    for link in links:  # grows while they are followed
        visit(link)
    return files, left_out


def file_format(file: Path) -> str | None:
    """The last suffix before those of compression, if it is known."""
    *_, last = ["", *(s.lower() for s in file.suffixes if s.lower() not in COMPRESSED)]
    return last if last in FORMATS else None


def open_file(file: Path) -> BinaryIO:
    """The bytes of a file, decompressed as they are read."""
    suffix = file.suffix.lower()
    if suffix == ".gz":
        return cast(BinaryIO, gzip.open(file))
    if suffix == ".zst":
        import pyarrow  # the one library here that reads it, and it takes half a second

        return cast(BinaryIO, pyarrow.input_stream(str(file), compression="zstd"))
    return file.open("rb")
