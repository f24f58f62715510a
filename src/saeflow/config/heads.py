"""How a layer's heads are studied."""

from dataclasses import dataclass

from saeflow.config.checks import at_least, check_seed
from saeflow.config.evaluation import FEWEST_DOCUMENTS


@dataclass(frozen=True)
class HeadsConfig:
    """How a layer's heads and their dictionaries are studied, on `n_tokens` held-out tokens of rows that are spread
    over all, `batch_rows` rows at a time. The model is run without cross terms between heads on `loss_tokens` of them,
    spread alike, with intervals from `resamples` resamples of the documents at most.

    Of every two heads the `top_pairs` pairs of latents that interfere most are kept. Latents of a dictionary on all
    heads count where they are active on `min_active` tokens or more; `n_latents` of these, drawn at random, are
    decomposed in the heads' dictionaries with up to `max_atoms` atoms, and `dashboards` of those shown, each with
    `contexts` texts of `window` tokens to either side. `seed` decides all draws.
    """

    n_tokens: int = 65536
    batch_rows: int = 16
    loss_tokens: int = 16384
    resamples: int = 1000
    top_pairs: int = 32
    min_active: int = 12
    n_latents: int = 64
    max_atoms: int = 16
    dashboards: int = 12
    contexts: int = 4
    window: int = 12
    seed: int = 0

    def __post_init__(self) -> None:
        names = "n_tokens batch_rows loss_tokens top_pairs min_active n_latents max_atoms contexts window"
        at_least(1, self, "heads", names)
        at_least(FEWEST_DOCUMENTS, self, "heads", "resamples")
        at_least(0, self, "heads", "dashboards")
        check_seed(self, "heads.seed")
