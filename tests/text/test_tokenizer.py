"""Tokenizers in model folders: what they must have, and how they are opened."""

import json
from pathlib import Path

import pytest

from saeflow.config import ConfigError
from saeflow.text.packing import encode_all
from saeflow.text.tokenizer import TokenizerError, load_tokenizer, read_vocabulary, row_bos


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
    named = load_tokenizer(folder, bos_token="b", eos_token="c")
    assert (named.bos_token_id, named.eos_token_id) == tuple(map(loaded.tokenizer.token_to_id, "bc"))


def test_the_vocabulary_is_the_one_of_the_library(tokenizer_folder):
    assert read_vocabulary(tokenizer_folder) == load_tokenizer(tokenizer_folder).tokenizer.get_vocab()


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
    assert row_bos(loaded.bos_token_id, prepend_bos=False) is None
    with pytest.raises(TokenizerError, match=r"no BOS: name the token to use with tokens.bos_token"):
        row_bos(loaded.bos_token_id, prepend_bos=True)
    assert row_bos(5, prepend_bos=True) == 5


def test_a_damaged_file_of_special_tokens_is_named(tokenizer_folder, tmp_path):
    folder = copy_tokenizer(tokenizer_folder, tmp_path, eos_token="<|endoftext|>")
    (folder / "special_tokens_map.json").write_text("[")
    with pytest.raises(TokenizerError, match=r"special_tokens_map.json is not JSON .*copy the model folder again"):
        load_tokenizer(folder)
