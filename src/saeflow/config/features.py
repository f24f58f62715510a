"""What is looked up of every latent of a dictionary."""

from dataclasses import dataclass
from typing import Literal

from saeflow.config.checks import at_least, check_seed


@dataclass(frozen=True)
class FeaturesConfig:
    """Whether, and how, a table is made of what every latent of every dictionary is about (docs/features.md)."""

    make: bool = False
    """Whether tables are made at all: `features=all`."""
    split: Literal["held_out", "train"] = "held_out"
    """On `train` the cached activations are read; on `held_out` the model is run."""
    n_tokens: int = 65536
    """[tokens] Of rows spread over all of the split, BOS left out; fewer where it has fewer."""
    batch_rows: int = 16
    """[rows] How many go through the model at once."""
    top: int = 16
    """[examples] The largest activations of each latent, at most one a window of text."""
    intervals: int = 8
    """[intervals] Equal parts of the range between 0 and a latent's largest activation."""
    per_interval: int = 3
    """[examples] Random activations from each of these."""
    before: int = 16
    """[tokens] Shown before an activation."""
    after: int = 8
    """[tokens] Shown after it."""
    bins: int = 40
    """[bins] Of a latent's histogram."""
    tokens: int = 10
    """[tokens] Those on which it fires most often."""
    logits: int = 10
    """[tokens] Those whose logits it raises most, and as many that it lowers most."""
    neighbours: int = 10
    """[latents] The nearest to it, by decoder row, by firing and by Jacobian."""
    neighbour_tokens: int = 16384
    """[tokens] By which those near in firing are found."""
    effect_samples: int = 8
    """[tokens] On which it fires, and on which it is ablated; 0: on none."""
    seed: int = 0
    """[seed] Decides all draws."""

    def __post_init__(self) -> None:
        at_least(1, self, "features", "n_tokens batch_rows top intervals bins neighbour_tokens")
        at_least(0, self, "features", "per_interval before after tokens logits neighbours effect_samples")
        check_seed(self, "features.seed")
