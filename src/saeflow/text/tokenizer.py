"""The tokenizer in a model's folder: its files, and the token ids of its BOS and EOS.

The plan reads the files too, to hash them, so the library that opens them is imported only where it does.
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from saeflow.config import ConfigError, TokensConfig
from saeflow.planning.digests import DigestCache, short_hash

if TYPE_CHECKING:
    from tokenizers import Tokenizer


FILE = "tokenizer.json"


class TokenizerError(ConfigError):
    """A tokenizer that cannot be used; the message names the folder and what to do."""


class LoadedTokenizer(NamedTuple):
    tokenizer: "Tokenizer"
    bos_token_id: int | None
    """None where the tokenizer has no BOS, and none was named."""
    eos_token_id: int


def load_tokenizer(folder: str | Path, bos_token: str | None = None, eos_token: str | None = None) -> LoadedTokenizer:
    """Opens the `tokenizer.json` of a Hugging Face folder with the token ids of its BOS and EOS.

    `bos_token` and `eos_token` name tokens to use in place of the tokenizer's own, where it has none (Qwen has no BOS)
    or another is wanted (chat tokenizers end a turn, not a document, with theirs).
    Raises `TokenizerError` for a folder without a fast tokenizer, or without an EOS.
    """
    tokenizer = open_tokenizer(folder)
    return LoadedTokenizer(tokenizer, *special_ids(Path(folder), tokenizer.token_to_id, bos_token, eos_token))


def open_tokenizer(folder: str | Path) -> "Tokenizer":
    """The tokenizer in a folder's `tokenizer.json`. Raises `TokenizerError` where there is none that can be read."""
    from tokenizers import Tokenizer

    file = tokenizer_file(Path(folder))
    try:
        tokenizer = Tokenizer.from_file(str(file))
    except Exception as error:  # the Rust library raises nothing narrower
        raise TokenizerError(f"{file} cannot be read ({error}); copy the model folder again") from error
    tokenizer.no_truncation()  # some folders are saved with both; a document must stay whole
    tokenizer.no_padding()
    return tokenizer


def special_ids(
    folder: Path, token_to_id: Callable[[str], int | None], bos_token: str | None, eos_token: str | None
) -> tuple[int | None, int]:
    """Ids of BOS, None where there is none, and EOS: of the tokens that are named, or else of the folder's own.

    Raises `TokenizerError` for a token that is not in the vocabulary, and for no EOS.
    """
    special = special_tokens(folder)

    def token_id(name: str, override: str | None) -> int | None:
        token = override or special.get(name)
        token = token["content"] if isinstance(token, dict) else token
        found = token_to_id(token) if token else None
        if token and found is None:
            key = f"tokens.{name}"
            named, remedy = (key, "name one that is") if override else (name, f"name one that is with {key}")
            raise TokenizerError(f"{named}={token!r} is not in the vocabulary of {folder / FILE}; {remedy}")
        return found

    eos = token_id("eos_token", eos_token)
    if eos is None:
        raise TokenizerError(
            f"{folder}/tokenizer_config.json names no eos_token, and documents are joined by it: name the token to use "
            "with tokens.eos_token"
        )
    return token_id("bos_token", bos_token), eos


def read_vocabulary(folder: Path) -> dict[str, int]:
    """Token ids of a folder's `tokenizer.json`, by token, without the library that opens it."""
    file = tokenizer_file(folder)
    try:
        keys = read_json(file, TokenizerError)
        own = keys["model"]["vocab"]
        pairs = own.items() if isinstance(own, dict) else ((token, i) for i, (token, *_) in enumerate(own))
        return dict(pairs) | {token["content"]: int(token["id"]) for token in keys.get("added_tokens") or ()}
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        if isinstance(error, TokenizerError):
            raise
        raise TokenizerError(f"{file} holds no vocabulary ({error!r}); copy the model folder again") from error


def check_tokenizer(folder: Path, tokens: TokensConfig, n_embeddings: int | None) -> None:
    """Raises `TokenizerError` for a tokenizer that cannot make rows for the model in its folder.

    `n_embeddings`: rows of the model's token embedding, which may be more than there are tokens; None if not known.
    """
    vocabulary = read_vocabulary(folder)
    beyond = sorted((i, token) for token, i in vocabulary.items() if n_embeddings is not None and i >= n_embeddings)
    if beyond:
        first, token = beyond[0]
        raise TokenizerError(
            f"{folder / FILE} has {len(beyond)} tokens beyond the model's vocabulary: the id of {token!r} is {first}, "
            f"and the embedding has {n_embeddings:,} rows; take such tokens out of added_tokens there, use the "
            "tokenizer that the model was trained with, or enlarge its embedding (resize_token_embeddings)"
        )
    bos, _ = special_ids(folder, vocabulary.get, tokens.bos_token, tokens.eos_token)
    row_bos(bos, tokens.prepend_bos)


def row_bos(bos_token_id: int | None, prepend_bos: bool) -> int | None:
    """The token in front of every row, None for no such token.

    Raises `TokenizerError` where a BOS is wanted of a tokenizer that has none.
    """
    if not prepend_bos:
        return None
    if bos_token_id is None:
        raise TokenizerError(
            "tokens.prepend_bos=true, but the model's tokenizer has no BOS: name the token to use with "
            "tokens.bos_token, or set tokens.prepend_bos=false"
        )
    return bos_token_id


def row_of(text: str, folder: Path | str, tokens: TokensConfig) -> list[int]:
    """Token ids of a text, behind what `tokens` puts in front of a row, by the tokenizer of a model's folder."""
    tokenizer = load_tokenizer(folder, tokens.bos_token, tokens.eos_token)
    bos = row_bos(tokenizer.bos_token_id, tokens.prepend_bos)
    return ([] if bos is None else [bos]) + tokenizer.tokenizer.encode(text, add_special_tokens=False).ids


def tokenizer_file(folder: Path) -> Path:
    """The `tokenizer.json` of a folder. Raises `TokenizerError` where there is none."""
    file = folder / FILE
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
