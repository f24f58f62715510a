"""What is looked up of every latent of a dictionary."""

from dataclasses import dataclass
from typing import Literal

from saeflow.config.checks import at_least, check_seed


@dataclass(frozen=True)
class FeaturesConfig:
    """Whether to `make` a table of the latents of every dictionary, and how: on `n_tokens` tokens of the `split`, of
    rows spread over all, BOS left out; fewer where it has fewer. On `train` the cached activations are read, on
    `held_out` the model is run, `batch_rows` rows at a time.

    Of each latent there are the `top` activations, at most one a window, and `per_interval` random ones of each of the
    `intervals` equal intervals between 0 and its largest activation; each with the `before` and `after` tokens around
    it. Its histogram has `bins` bins. Named are the `tokens` tokens on which it fires most often, the `logits` that it
    raises and lowers most, and the `neighbours` nearest to it, in firing by `neighbour_tokens` of the tokens. It is
    ablated on `effect_samples` tokens on which it fires; 0: on none. `seed` decides all draws.
    """

    make: bool = False
    split: Literal["held_out", "train"] = "held_out"
    n_tokens: int = 65536
    batch_rows: int = 16
    top: int = 16
    intervals: int = 8
    per_interval: int = 3
    before: int = 16
    after: int = 8
    bins: int = 40
    tokens: int = 10
    logits: int = 10
    neighbours: int = 10
    neighbour_tokens: int = 16384
    effect_samples: int = 8
    seed: int = 0

    def __post_init__(self) -> None:
        at_least(1, self, "features", "n_tokens batch_rows top intervals bins neighbour_tokens")
        at_least(0, self, "features", "per_interval before after tokens logits neighbours effect_samples")
        check_seed(self, "features.seed")
