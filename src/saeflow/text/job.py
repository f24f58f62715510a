"""The job of the stage `tokens`: packs one split of a corpus into rows of tokens."""

import pkgutil
from collections.abc import Iterator
from contextlib import contextmanager

from saeflow.jobs.job import Job
from saeflow.text.corpus import Document, corpus_digest, read_documents, stream_dataset
from saeflow.text.tokenizer import load_tokenizer, tokenizer_digest
from saeflow.text.tokens import write_tokens

CASE_ROWS = "saeflow.groundtruth.job:write_case_rows"
"""Writes the rows of a case instead; by reference, as cases stand above text."""


def tokens_job(job: Job) -> str:
    config, corpus, packing = job.config, job.config["corpus"], job.config["tokens"]
    if "case" in corpus:
        return str(pkgutil.resolve_name(CASE_ROWS)(job))
    with job.reading("model", tokenizer_digest, config["tokenizer"]) as model:
        tokenizer = load_tokenizer(model, packing["bos_token"])
    with job.writing() as folder, _documents(job) as documents:
        n_documents = write_tokens(
            folder,
            documents,
            tokenizer,
            **{name: config[name] for name in ("split", "n_rows")},
            **{name: packing[name] for name in ("context_size", "prepend_bos", "held_out_fraction")},
            tokenizer_digest=config["tokenizer"],
        )
    rows, size = config["n_rows"], packing["context_size"]
    return f"wrote {rows:,} rows of {size} tokens from {n_documents:,} documents to {job.path}/"


@contextmanager
def _documents(job: Job) -> Iterator[Iterator[Document]]:
    """The documents of a job's corpus, while they are read."""
    corpus = job.config["corpus"]
    if job.instance.sources["corpus"]:
        fields = {name: corpus[name] for name in ("text_field", "source_field", "sample_by")}
        with job.reading("corpus", corpus_digest, corpus["content"]) as path:
            yield read_documents(path, **fields)
    else:
        names = ("dataset", "subset", "split", "revision", "text_field", "source_field")
        yield stream_dataset(*(corpus[name] for name in names))
