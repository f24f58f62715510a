"""The text, and how it becomes rows of tokens."""

from dataclasses import dataclass
from typing import Literal

from saeflow.config.checks import ConfigError, require


@dataclass(frozen=True)
class CorpusConfig:
    """Where the text is from. Exactly one of `path`, `dataset` and `case` is given."""

    name: str
    """What people call it; in no key, as its contents identify it."""
    path: str | None = None
    """A local file, or a folder with all that is below it (docs/inputs.md)."""
    dataset: str | None = None
    """A dataset of the Hugging Face hub, which the job `tokens` streams."""
    subset: str | None = None
    """The dataset's configuration, such as `en` of C4; null: its only one."""
    split: str = "train"
    """The dataset's split; what is held out is taken from it too, by the hash of each document."""
    revision: str | None = None
    """The dataset's branch, tag or commit on the hub; null: its main branch."""
    text_field: str = "text"
    """Field of a record that holds the text, also one within another: `text.body`."""
    source_field: str = "source"
    """Field of a record that says where the document is from; kept in `documents.parquet`, and may be missing."""
    sample_by: Literal["document", "paragraph", "line"] = "document"
    """What of a `.txt` file is a document: all of it, a paragraph, or a line."""
    case: int | None = None
    """[index] Number of a case whose algorithm is known, whose rows are the text; it has to be `model.tracr.case`."""

    def __post_init__(self) -> None:
        if sum(source is not None for source in (self.path, self.dataset, self.case)) != 1:
            raise ConfigError("corpus: set exactly one of corpus.path, corpus.dataset and corpus.case")


@dataclass(frozen=True)
class TokensConfig:
    """How documents become rows of tokens."""

    context_size: int
    """[tokens] Length of a row, BOS and EOS counted."""
    train_tokens: int
    """[tokens] How many are cached of the training split, in whole rows."""
    held_out_tokens: int
    """[tokens] How many are evaluated on, of documents that are held out, in whole rows."""
    held_out_fraction: float = 0.1
    """[fraction] Share of the documents that is held out, decided by the hash of each."""
    prepend_bos: bool = True
    """Whether a BOS token stands in front of every row."""
    bos_token: str | None = None
    """The token in front of rows; null: the tokenizer's own BOS."""
    eos_token: str | None = None
    """The token between two documents; null: the tokenizer's own EOS."""

    def __post_init__(self) -> None:
        require(self.context_size >= 2, "tokens.context_size", self.context_size, "2 or more")
        require(0 < self.held_out_fraction < 1, "tokens.held_out_fraction", self.held_out_fraction, "between 0 and 1")
        for name in ("train_tokens", "held_out_tokens"):
            value = getattr(self, name)
            require(value >= self.context_size, f"tokens.{name}", value, f"one row ({self.context_size}) or more")
