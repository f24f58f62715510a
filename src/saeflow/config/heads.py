"""How a layer's heads are studied."""

from dataclasses import dataclass
from typing import Literal

from saeflow.config.checks import ConfigError, at_least, check_seed, require
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
    latents: tuple[int, ...] | Literal["all"] = ()
    """[index] Latents that are decomposed and shown instead, by their numbers in each dictionary of the layer (of
    dictionaries of heads, head times `d_sae` plus the latent there); `all`: all that count."""
    rotations: int = 20
    """[samples] Of random rotations of the heads, with which their cosines and interference are compared."""
    max_atoms: int = 16
    """[atoms] In a decomposition at most."""
    dashboards: int = 12
    """[latents] Of those that are decomposed, how many are shown; of `latents` all."""
    contexts: int = 4
    """[examples] Texts shown of each."""
    window: int = 12
    """[tokens] To either side of an activation."""
    seed: int = 0
    """[seed] Decides all draws."""

    def __post_init__(self) -> None:
        names = "n_tokens batch_rows loss_tokens top_pairs min_active n_latents rotations max_atoms contexts window"
        at_least(1, self, "heads", names)
        at_least(FEWEST_DOCUMENTS, self, "heads", "resamples")
        at_least(0, self, "heads", "dashboards")
        named = () if isinstance(self.latents, str) else self.latents
        require(all(i >= 0 for i in named), "heads.latents", list(named), "numbers of latents, 0 or more, or all")
        check_seed(self, "heads.seed")

    def check_latents(self, d_sae: int, name: str) -> None:
        """Raises `ConfigError` where a latent is named that a dictionary of `d_sae` latents has not."""
        beyond = [] if isinstance(self.latents, str) else [i for i in self.latents if i >= d_sae]
        if beyond:
            raise ConfigError(
                f"heads.latents={beyond} are not in {name}, which has latents 0 to {d_sae - 1}; leave them out"
            )
