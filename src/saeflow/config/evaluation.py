"""How dictionaries are evaluated, and blind sets of their latents made."""

from dataclasses import dataclass

from saeflow.config.checks import at_least, check_seed, require

FEWEST_DOCUMENTS = 5  # of which an interval is made: fewer do not tell how much documents differ


@dataclass(frozen=True)
class EvaluationConfig:
    """All rows of the held-out tokens are used, `batch_rows` at a time. Intervals over documents hold the truth with a
    probability of `confidence`; they are made from `resamples` resamples at most, each without one document, or without
    one group of them where there are more documents than that. With `replace_first=false` the first token of each
    row keeps the model's own activations, in ablations too, and counts nowhere: for dictionaries that were not trained
    on it."""

    batch_rows: int = 16
    resamples: int = 1000
    confidence: float = 0.95
    replace_first: bool = True

    def __post_init__(self) -> None:
        at_least(1, self, "evaluation", "batch_rows")
        at_least(FEWEST_DOCUMENTS, self, "evaluation", "resamples")
        require(0 < self.confidence < 1, "evaluation.confidence", self.confidence, "between 0 and 1")


@dataclass(frozen=True)
class BlindConfig:
    """A blind set of `n_features` of each dictionary that are active on `min_active` tokens or more and on more than
    `min_frequency` of all; `n_examples` texts each, of `window` tokens to either side."""

    n_features: int = 50
    n_examples: int = 25
    window: int = 8
    min_active: int = 4
    min_frequency: float = 1e-4
    batch_rows: int = 16
    seed: int = 0

    def __post_init__(self) -> None:
        at_least(1, self, "blind", "n_features n_examples window min_active batch_rows")
        check_seed(self, "blind.seed")
        require(0 <= self.min_frequency < 1, "blind.min_frequency", self.min_frequency, "0 or more and below 1")
