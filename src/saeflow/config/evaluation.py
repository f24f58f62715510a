"""How dictionaries are evaluated, and blind sets of their latents made."""

from dataclasses import dataclass

from saeflow.config.checks import at_least, check_seed, require
from saeflow.config.corpus import CorpusConfig

FEWEST_DOCUMENTS = 5  # of which an interval is made: fewer do not tell how much documents differ


@dataclass(frozen=True)
class EvaluationConfig:
    """How dictionaries are evaluated, on all rows of the held-out tokens."""

    batch_rows: int = 16
    """[rows] How many go through the model at once."""
    resamples: int = 1000
    """[resamples] At most so many, each without one document, or without one group of them where there are more
    documents than that. Source: the jackknife, Efron and Tibshirani 1993, chapter 11."""
    confidence: float = 0.95
    """[fraction] Probability with which an interval over documents holds the truth."""
    replace_first: bool = True
    """Whether the first token of each row is replaced like any other. With false it keeps the model's own activations,
    in ablations too, and counts nowhere: for dictionaries that were not trained on it."""
    corpus: CorpusConfig | None = None
    """Another corpus that all held-out tokens are of, those of Jacobian studies too: the name of a file in
    `conf/corpus/`, or settings like those of `corpus`. Source: the JSAE paper trains on the Pile, and studies on C4."""

    def __post_init__(self) -> None:
        at_least(1, self, "evaluation", "batch_rows")
        at_least(FEWEST_DOCUMENTS, self, "evaluation", "resamples")
        require(0 < self.confidence < 1, "evaluation.confidence", self.confidence, "between 0 and 1")


@dataclass(frozen=True)
class BlindConfig:
    """A blind set of latents of all dictionaries, for people to judge (`blind={}` for one as it is here)."""

    n_features: int = 50
    """[latents] Of each dictionary. Source: transcoder paper, section 3.2.1."""
    n_examples: int = 25
    """[examples] Texts shown of each latent."""
    window: int = 8
    """[tokens] To either side of an activation."""
    min_active: int = 4
    """[tokens] A latent has to be active on so many or more to be drawn."""
    min_frequency: float = 1e-4
    """[fraction] And on more than this share of all tokens."""
    batch_rows: int = 16
    """[rows] How many go through the model at once."""
    seed: int = 0
    """[seed] Decides all draws and the order."""

    def __post_init__(self) -> None:
        at_least(1, self, "blind", "n_features n_examples window min_active batch_rows")
        check_seed(self, "blind.seed")
        require(0 <= self.min_frequency < 1, "blind.min_frequency", self.min_frequency, "0 or more and below 1")
