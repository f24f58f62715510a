"""Packing: against notebook 004's definition, whole texts, and what tokenizers must have."""

import json
from pathlib import Path

import numpy as np
import pytest
from conftest import SENTENCE, make_texts
from hypothesis import given
from hypothesis import strategies as st

from saeflow.config import ConfigError
from saeflow.text.packing import (
    NO_DOCUMENT,
    LoadedTokenizer,
    Packer,
    Rows,
    TokenizerError,
    encode_all,
    load_tokenizer,
    row_bos,
)

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


def copy_tokenizer(folder: Path, to: Path, tokenizer: dict | None = None, **config) -> Path:
    """The tiny tokenizer with other top-level keys in `tokenizer.json` and `tokenizer_config.json`."""
    held = json.loads((folder / "tokenizer.json").read_text()) | (tokenizer or {})
    (to / "tokenizer.json").write_text(json.dumps(held))
    (to / "tokenizer_config.json").write_text(json.dumps(config))
    return to


def test_a_truncating_padding_tokenizer_keeps_documents_whole(tokenizer_folder, tmp_path):
    settings = {
        "truncation": {"max_length": 4, "strategy": "LongestFirst", "stride": 0, "direction": "Right"},
        "padding": {
            "strategy": {"Fixed": 8},
            "direction": "Right",
            "pad_to_multiple_of": None,
            "pad_id": 0,
            "pad_type_id": 0,
            "pad_token": "<|endoftext|>",
        },
    }
    folder = copy_tokenizer(tokenizer_folder, tmp_path, settings, eos_token="<|endoftext|>")
    texts = ["a", "the sea lay calm under a pale moon"]
    whole = list(encode_all(load_tokenizer(tokenizer_folder).tokenizer, texts))
    assert list(encode_all(load_tokenizer(folder).tokenizer, texts)) == whole
    assert len(whole[0]) == 1 and len(whole[1]) > 4


def test_special_tokens_are_read_as_text_and_as_mapping(tokenizer_folder, tmp_path):
    folder = copy_tokenizer(tokenizer_folder, tmp_path, eos_token={"content": "<|endoftext|>"}, bos_token=None)
    (folder / "special_tokens_map.json").write_text(json.dumps({"bos_token": "a"}))
    loaded = load_tokenizer(folder)
    assert (loaded.eos_token_id, loaded.bos_token_id) == (0, loaded.tokenizer.token_to_id("a"))
    assert load_tokenizer(folder, bos_token="b").bos_token_id == loaded.tokenizer.token_to_id("b")


@pytest.mark.parametrize(
    ("config", "bos_token", "message"),
    [
        ({}, None, "names no eos_token"),
        ({"eos_token": "<nope>"}, None, r"eos_token='<nope>' is not in the vocabulary of .*tokenizer.json"),
        ({"eos_token": "<|endoftext|>"}, "<nope>", r"tokens.bos_token='<nope>' is not in the vocabulary"),
    ],
)
def test_unusable_special_tokens_are_named(tokenizer_folder, tmp_path, config, bos_token, message):
    folder = copy_tokenizer(tokenizer_folder, tmp_path, **config)
    with pytest.raises(TokenizerError, match=message):
        load_tokenizer(folder, bos_token)


def test_folder_without_tokenizer_says_how_to_save_one(tmp_path):
    with pytest.raises(ConfigError, match=r"has no tokenizer.json; save it there with AutoTokenizer"):
        load_tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(TokenizerError, match=r"tokenizer.json cannot be read .*copy the model folder again"):
        load_tokenizer(tmp_path)


def test_bos_wanted_of_a_tokenizer_without_one_names_the_key(tokenizer_folder, tmp_path):
    loaded = load_tokenizer(copy_tokenizer(tokenizer_folder, tmp_path, eos_token="<|endoftext|>"))
    assert row_bos(loaded, prepend_bos=False) is None
    with pytest.raises(TokenizerError, match=r"no BOS: name the token to use with tokens.bos_token"):
        row_bos(loaded, prepend_bos=True)
    assert row_bos(LoadedTokenizer(loaded.tokenizer, 5, 0), prepend_bos=True) == 5
