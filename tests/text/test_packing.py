"""Packing: against notebook 004's definition, and whole texts."""

import numpy as np
import pytest
from conftest import SENTENCE, make_texts
from hypothesis import given
from hypothesis import strategies as st

from saeflow.text.packing import NO_DOCUMENT, Packer, Rows, encode_all
from saeflow.text.tokenizer import load_tokenizer

EOS, BOS = 0, 1
DOCUMENTS = st.lists(st.lists(st.integers(2, 99), max_size=12), max_size=12)


def pack(documents: list[list[int]], context_size: int, bos: int | None, every: int = 1) -> Rows:
    """Rows of some documents; whole rows are taken after each `every` documents."""
    packer = Packer(context_size, EOS, bos)
    blocks = []
    for i, ids in enumerate(documents):
        packer.add(i, ids)
        if i % every == 0:
            blocks.append(packer.take())
    blocks.append(packer.take())
    return Rows(*(np.concatenate(parts) for parts in zip(*blocks, strict=True)))


def reference_rows(stream: list[int], context_size: int, bos: int | None) -> np.ndarray:
    """Notebook 004: the joined stream cut into rows, the last one dropped unless it is whole, BOS in front of each."""
    front = [] if bos is None else [bos]
    body = context_size - len(front)
    rows = [front + stream[i : i + body] for i in range(0, len(stream) - body + 1, body)]
    return np.array(rows, dtype=np.int32).reshape(-1, context_size)


def join(documents: list[list[int]]) -> list[int]:
    """Documents joined by EOS."""
    return [token for ids in documents for token in [EOS, *ids]][1:]


@given(DOCUMENTS, st.integers(2, 9), st.sampled_from([None, BOS]), st.integers(1, 4))
def test_rows_are_the_joined_stream_cut(documents, context_size, bos, every):
    tokens = pack(documents, context_size, bos, every).tokens
    np.testing.assert_array_equal(tokens, reference_rows(join(documents), context_size, bos))
    assert tokens.dtype == np.int32


@given(DOCUMENTS, st.integers(2, 9), st.sampled_from([None, BOS]))
def test_every_token_knows_its_document_and_offset(documents, context_size, bos):
    rows = pack(documents, context_size, bos)
    if bos is not None:
        assert (rows.tokens[:, 0] == bos).all()
        assert (rows.document[:, 0] == NO_DOCUMENT).all() and (rows.offset[:, 0] == NO_DOCUMENT).all()
    start = 0 if bos is None else 1
    body = (part[:, start:].reshape(-1).tolist() for part in rows)
    for token, document, offset in zip(*body, strict=True):
        assert token == [*documents[document], EOS][offset]


@given(DOCUMENTS, st.integers(2, 9), st.integers(0, 12))
def test_first_rows_do_not_depend_on_later_documents(documents, context_size, n):
    few, all_of_them = pack(documents[:n], context_size, BOS), pack(documents, context_size, BOS)
    for a, b in zip(few, all_of_them, strict=True):
        np.testing.assert_array_equal(a, b[: len(a)])


@given(st.lists(st.text(alphabet=SENTENCE + "\n0ß", max_size=60), min_size=1, max_size=8), st.integers(2, 9))
def test_real_text_packs_as_the_notebook_joins_it(tokenizer_folder, texts, context_size):
    tokenizer = load_tokenizer(tokenizer_folder)
    whole = tokenizer.tokenizer.encode("<|endoftext|>".join(texts), add_special_tokens=False).ids
    rows = pack(list(encode_all(tokenizer.tokenizer, texts, batch=3)), context_size, tokenizer.bos_token_id)
    np.testing.assert_array_equal(rows.tokens, reference_rows(whole, context_size, tokenizer.bos_token_id))


@pytest.mark.parametrize("characters", [1, 300, 1 << 20])
def test_batches_of_texts_do_not_matter(tokenizer_folder, monkeypatch, characters):
    tokenizer, texts = load_tokenizer(tokenizer_folder).tokenizer, make_texts(30)
    monkeypatch.setattr("saeflow.text.packing.BATCH_CHARACTERS", characters)
    alone = [tokenizer.encode(text, add_special_tokens=False).ids for text in texts]
    assert list(encode_all(tokenizer, texts, batch=7)) == alone


def test_only_a_batch_of_texts_is_read_ahead(tokenizer_folder):
    texts = iter(make_texts(30))
    next(encode_all(load_tokenizer(tokenizer_folder).tokenizer, texts, batch=4))
    assert len(list(texts)) == 26
