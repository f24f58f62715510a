"""The text, and how it becomes rows of tokens."""

from dataclasses import dataclass
from typing import Literal

from saeflow.config.checks import ConfigError, require


@dataclass(frozen=True)
class CorpusConfig:
    """Where the text is from: a local file or folder (`path`), or a Hugging Face dataset (`dataset`), streamed; or the
    rows of a `case` whose algorithm is known."""

    name: str
    path: str | None = None
    dataset: str | None = None
    subset: str | None = None
    split: str = "train"
    revision: str | None = None
    text_field: str = "text"
    source_field: str = "source"
    sample_by: Literal["document", "paragraph", "line"] = "document"
    case: int | None = None

    def __post_init__(self) -> None:
        if sum(source is not None for source in (self.path, self.dataset, self.case)) != 1:
            raise ConfigError("corpus: set exactly one of corpus.path, corpus.dataset and corpus.case")


@dataclass(frozen=True)
class TokensConfig:
    """How documents become rows of `context_size` tokens; both sizes count BOS and EOS.

    `bos_token` and `eos_token` name the tokens in front of rows and between documents; null: the tokenizer's own.
    """

    context_size: int
    train_tokens: int
    held_out_tokens: int
    held_out_fraction: float = 0.1
    prepend_bos: bool = True
    bos_token: str | None = None
    eos_token: str | None = None

    def __post_init__(self) -> None:
        require(self.context_size >= 2, "tokens.context_size", self.context_size, "2 or more")
        require(0 < self.held_out_fraction < 1, "tokens.held_out_fraction", self.held_out_fraction, "between 0 and 1")
        for name in ("train_tokens", "held_out_tokens"):
            value = getattr(self, name)
            require(value >= self.context_size, f"tokens.{name}", value, f"one row ({self.context_size}) or more")
