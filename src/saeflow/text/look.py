"""The plan's look at the first records of a corpus, so that no job finds a wrong field, one document, or too few.

A look reads `LOOK_CHARACTERS` at most. Where a corpus ends within them all of it is known: which documents are held
out, and, where there may be too few, how many tokens they are.
"""

from pathlib import Path
from typing import NamedTuple

from saeflow.config import CorpusConfig, TokensConfig
from saeflow.text.corpus import is_held_out, read_records
from saeflow.text.files import CorpusError, corpus_files, file_format
from saeflow.text.tokenizer import open_tokenizer

LOOK_CHARACTERS, LOOK_RECORDS = 3_000_000, 20_000
MOST_BYTES_A_TOKEN = 8
"""A text with more bytes than so many for each token that is wanted is taken to be long enough, and not counted."""
FEW_DOCUMENTS = 3  # of one split, where each may be a whole book
SPLITS = ("train", "held_out")


class Look(NamedTuple):
    texts: list[str]
    """Of the first documents."""
    whole: bool
    """Whether there are no more."""


def look_at(corpus: CorpusConfig) -> Look:
    """The first documents of a local corpus. Raises `CorpusError` for those that cannot be read, and for none."""
    assert corpus.path is not None
    texts: list[str] = []
    n_records = size = 0
    for record in read_records(corpus.path, corpus.text_field, corpus.source_field, corpus.sample_by):
        if n_records >= LOOK_RECORDS or size >= LOOK_CHARACTERS:
            return Look(texts, False)
        n_records += 1
        size += len(record.text)
        if record.text.strip():
            texts.append(record.text)
    if not texts:
        raise CorpusError(
            f"corpus {corpus.path} is empty: none of its {n_records:,} records holds any text in corpus.text_field="
            f"{corpus.text_field}"
        )
    return Look(texts, True)


def check_length(
    look: Look, corpus: CorpusConfig, tokens: TokensConfig, model_folder: Path, splits: tuple[str, ...] = SPLITS
) -> None:
    """Raises `CorpusError` where a corpus that was seen whole has fewer rows than are wanted, in any of `splits`."""
    if not look.whole:
        return
    body = tokens.context_size - tokens.prepend_bos
    for split in splits:
        texts = [t for t in look.texts if is_held_out(t, tokens.held_out_fraction) == (split == "held_out")]
        wanted: int = getattr(tokens, f"{split}_tokens") // tokens.context_size
        if not texts:
            raise CorpusError(_no_documents(len(look.texts), split, corpus))
        if sum(len(t.encode()) for t in texts) < MOST_BYTES_A_TOKEN * wanted * body:
            from saeflow.text.packing import encode_all  # numpy and tokenizers, which a plan can mostly do without

            n_tokens = sum(map(len, encode_all(open_tokenizer(model_folder), texts)))
            n_rows = (n_tokens + len(texts) - 1) // body  # an EOS between two documents
            if n_rows < wanted:
                raise too_short(len(texts), n_tokens, split, n_rows, wanted, tokens.context_size)


def _no_documents(n: int, split: str, corpus: CorpusConfig) -> str:
    side = "held out" if split == "held_out" else "trained on"
    has = "is one document" if n == 1 else f"has {n} documents"
    only_text = all(file_format(file) == ".txt" for file in corpus_files(str(corpus.path)))
    if only_text and corpus.sample_by == "document":
        remedy = "set corpus.sample_by=paragraph (or line), so that a file is many"
    else:
        remedy = "use more documents, or another tokens.held_out_fraction"
    return (
        f"corpus {corpus.path} {has}, and whole documents are held out by their hash, so that none is {side}; {remedy}"
    )


def too_short(n_documents: int, n_tokens: int, split: str, n_rows: int, wanted: int, context_size: int) -> CorpusError:
    """What is wrong with a corpus that ends before the last row: what its split holds, and what is wanted."""
    other = "smaller" if split == "train" else "larger"
    more = f"use more text, or a {other} tokens.held_out_fraction"
    if n_documents <= FEW_DOCUMENTS:
        more += ", or make more documents of each text with corpus.sample_by=paragraph"
    holds = f"the {split} split holds {n_documents:,} documents of {n_tokens:,} tokens in all"
    if n_rows == 0:
        return CorpusError(
            f"the corpus is too short for one row: {holds}, and tokens.context_size={context_size}; {more}"
        )
    return CorpusError(
        f"the corpus is too short: {holds}, {n_rows:,} rows of {context_size}, but {wanted:,} rows are asked for; set "
        f"tokens.{split}_tokens={n_rows * context_size} or less, or {more}"
    )
