"""How a layer's heads are studied."""

from dataclasses import dataclass

from saeflow.config.checks import at_least, check_seed
from saeflow.config.evaluation import FEWEST_DOCUMENTS


@dataclass(frozen=True)
class HeadsConfig:
    """How a layer's heads and their dictionaries are studied, on held-out tokens (docs/heads.md)."""

    n_tokens: int = 65536
    """[tokens] Of rows spread over all."""
    batch_rows: int = 16
    """[rows] How many go through the model at once."""
    loss_tokens: int = 16384
    """[tokens] Of these, spread alike, on which the model is run without cross terms between heads."""
    resamples: int = 1000
    """[resamples] Of the documents at most, for the intervals of those losses."""
    top_pairs: int = 32
    """[pairs] Of latents of every two heads, those that interfere most, which are kept."""
    min_active: int = 12
    """[tokens] On which a latent of a dictionary on all heads has to be active to count."""
    n_latents: int = 64
    """[latents] Of those, drawn at random, that are decomposed in the heads' dictionaries."""
    max_atoms: int = 16
    """[atoms] In a decomposition at most."""
    dashboards: int = 12
    """[latents] Of those that are decomposed, how many are shown."""
    contexts: int = 4
    """[examples] Texts shown of each."""
    window: int = 12
    """[tokens] To either side of an activation."""
    seed: int = 0
    """[seed] Decides all draws."""

    def __post_init__(self) -> None:
        names = "n_tokens batch_rows loss_tokens top_pairs min_active n_latents max_atoms contexts window"
        at_least(1, self, "heads", names)
        at_least(FEWEST_DOCUMENTS, self, "heads", "resamples")
        at_least(0, self, "heads", "dashboards")
        check_seed(self, "heads.seed")
