"""The tokenizer in a model's folder: its files, and the token ids of its BOS and EOS.

The plan reads the files too, to hash them, so the library that opens them is imported only where it does.
"""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from saeflow.config import ConfigError
from saeflow.planning.digests import DigestCache, short_hash

if TYPE_CHECKING:
    from tokenizers import Tokenizer


class TokenizerError(ConfigError):
    """A tokenizer that cannot be used; the message names the folder and what to do."""


class LoadedTokenizer(NamedTuple):
    tokenizer: "Tokenizer"
    bos_token_id: int | None
    """None where the tokenizer has no BOS, and none was named."""
    eos_token_id: int


def load_tokenizer(folder: str | Path, bos_token: str | None = None) -> LoadedTokenizer:
    """Opens the `tokenizer.json` of a Hugging Face folder with the token ids of its BOS and EOS.

    `bos_token` names the token to use where the tokenizer has none of its own (Qwen, for one).
    Raises `TokenizerError` for a folder without a fast tokenizer, or without an EOS.
    """
    from tokenizers import Tokenizer

    folder = Path(folder)
    file = tokenizer_file(folder)
    try:
        tokenizer = Tokenizer.from_file(str(file))
    except Exception as error:  # the Rust library raises nothing narrower
        raise TokenizerError(f"{file} cannot be read ({error}); copy the model folder again") from error
    tokenizer.no_truncation()  # some folders are saved with both; a document must stay whole
    tokenizer.no_padding()
    special = special_tokens(folder)

    def token_id(name: str, override: str | None = None) -> int | None:
        token = override or special.get(name)
        token = token["content"] if isinstance(token, dict) else token
        found = tokenizer.token_to_id(token) if token else None
        if token and found is None:
            named = f"tokens.{name}" if override else name
            raise TokenizerError(f"{named}={token!r} is not in the vocabulary of {file}")
        return found

    eos = token_id("eos_token")
    if eos is None:
        raise TokenizerError(f"{folder}/tokenizer_config.json names no eos_token; documents are joined by it")
    return LoadedTokenizer(tokenizer, token_id("bos_token", bos_token), eos)


def row_bos(tokenizer: LoadedTokenizer, prepend_bos: bool) -> int | None:
    """The token in front of every row, None for no such token.

    Raises `TokenizerError` where a BOS is wanted of a tokenizer that has none.
    """
    if not prepend_bos:
        return None
    if tokenizer.bos_token_id is None:
        raise TokenizerError(
            "tokens.prepend_bos=true, but the model's tokenizer has no BOS: name the token to use with "
            "tokens.bos_token, or set tokens.prepend_bos=false"
        )
    return tokenizer.bos_token_id


def tokenizer_file(folder: Path) -> Path:
    """The `tokenizer.json` of a folder. Raises `TokenizerError` where there is none."""
    file = folder / "tokenizer.json"
    if not file.is_file():
        raise TokenizerError(
            f"model folder {folder} has no tokenizer.json; save it there with "
            "AutoTokenizer.from_pretrained(..., use_fast=True).save_pretrained(folder)"
        )
    return file


def tokenizer_digest(folder: Path, cache: DigestCache) -> str:
    """Hash of what decides token ids, 32 hexadecimal digits."""
    special = {k: v for k, v in special_tokens(folder).items() if k in ("bos_token", "eos_token")}
    return short_hash([cache.file(tokenizer_file(folder)), special], 32)


def special_tokens(folder: Path) -> dict[str, Any]:
    """What a folder's tokenizer files say of its special tokens, by role; each a text or a mapping with `content`."""
    special: dict[str, Any] = {}
    for name in ("special_tokens_map.json", "tokenizer_config.json"):
        if (folder / name).is_file():
            special |= {k: v for k, v in read_json(folder / name, TokenizerError).items() if v}
    return special


def read_json(file: Path, error: type[ConfigError]) -> dict[str, Any]:
    """The keys in one of a model folder's JSON files. Raises `error` where it holds none."""
    try:
        keys = json.loads(file.read_text())
    except ValueError as reason:
        raise error(f"{file} is not JSON ({reason}); copy the model folder again") from reason
    if not isinstance(keys, dict):
        raise error(f"{file} holds a {type(keys).__name__} where keys should be; copy the model folder again")
    return keys
