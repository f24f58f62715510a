"""The job of the stage `tokens`: packs one split of a corpus into rows of tokens."""

import logging
import pkgutil
from collections.abc import Iterator
from contextlib import contextmanager

from saeflow.jobs.job import Job
from saeflow.planning.parts import Part
from saeflow.text.ahead import Ahead, tokenise_ahead
from saeflow.text.corpus import Document, open_corpus
from saeflow.text.files import corpus_digest, corpus_parts
from saeflow.text.tokenizer import LoadedTokenizer, load_tokenizer, tokenizer_digest
from saeflow.text.tokens import in_order, write_tokens

log = logging.getLogger(__name__)
CASE_ROWS = "saeflow.groundtruth.job:write_case_rows"
"""Writes the rows of a case instead; by reference, as cases stand above text."""


def tokens_job(job: Job) -> str:
    config, corpus, packing = job.config, job.config["corpus"], job.config["tokens"]
    if "case" in corpus:
        return str(pkgutil.resolve_name(CASE_ROWS)(job))
    tokenizer, ahead = _tokenizer(job), Ahead(job.path)
    _tell(tokenizer, packing["prepend_bos"])
    with job.writing() as folder, _documents(job) as documents:
        n_documents = write_tokens(
            folder,
            documents,
            tokenizer,
            **{name: config[name] for name in ("split", "n_rows")},
            **{name: packing[name] for name in ("context_size", "prepend_bos", "held_out_fraction")},
            tokenizer_digest=config["tokenizer"],
            ahead=ahead,
        )
    ahead.remove()
    rows, size = config["n_rows"], packing["context_size"]
    return f"wrote {rows:,} rows of {size} tokens from {n_documents:,} documents to {job.path}/"


def tokens_part(job: Job, part: Part) -> str:
    """Tokenises every N-th block of the documents that `tokens_job` will pack."""
    config, packing, ahead = job.config, job.config["tokens"], Ahead(job.path)
    tokenizer = _tokenizer(job)
    wanted = config["n_rows"] * (packing["context_size"] - packing["prepend_bos"])
    with _documents(job) as documents:
        shuffled = in_order(documents, config["split"], packing["held_out_fraction"])
        made = tokenise_ahead(shuffled, tokenizer.tokenizer, ahead, part, wanted)
    return f"{made:,} blocks of documents tokenised ahead in {ahead.folder}/"


def _tokenizer(job: Job) -> LoadedTokenizer:
    config, packing = job.config, job.config["tokens"]
    with job.reading("model", tokenizer_digest, config["tokenizer"]) as model:
        return load_tokenizer(model, packing["bos_token"], packing.get("eos_token"))


@contextmanager
def _documents(job: Job) -> Iterator[Iterator[Document]]:
    """The documents of a job's corpus, while they are read."""
    corpus = job.config["corpus"]
    if job.instance.sources["corpus"]:
        with job.reading("corpus", corpus_digest, corpus["content"]) as path:
            if left_out := corpus_parts(path).left_out_in_words():
                log.warning("not read: %s", left_out)
            yield open_corpus(corpus, path)
    else:
        yield open_corpus(corpus)


def _tell(tokenizer: LoadedTokenizer, prepend_bos: bool) -> None:
    """Logs which tokens end documents and begin rows: a chat model's EOS ends a turn."""
    eos, bos = tokenizer.eos_token_id, tokenizer.bos_token_id if prepend_bos else None
    end = f"{tokenizer.tokenizer.id_to_token(eos)!r} (id {eos}) ends a document (tokens.eos_token)"
    front = f"{tokenizer.tokenizer.id_to_token(bos)!r} (id {bos})" if bos is not None else "nothing"
    log.info("%s; %s stands in front of every row (tokens.bos_token, tokens.prepend_bos)", end, front)
