"""How Jacobians are studied."""

from dataclasses import dataclass
from typing import Literal

from saeflow.config.checks import at_least, require
from saeflow.config.evaluation import FEWEST_DOCUMENTS


@dataclass(frozen=True)
class JacobianConfig:
    """`n_tokens` held-out tokens (position 0 left out), of rows spread over all; the histogram has `bins` equal
    bins on [0, `max_value`].

    `at`: whether the Jacobian is taken at the true input of f or at its reconstruction by the input dictionary. `norm`
    matters where f begins before the norm: `ignored` leaves it out of f but for its gain and bias (notebook 000's
    `ignore_ln`, whose MLP reads the residual stream as it is).
    `thresholds` are of |J| itself and of J divided by a token's L1 or L2 norm, `relative_thresholds` in units of the
    RMS of J. Intervals over documents come from `resamples` resamples at most, each without one document, or without
    one group of them.

    The Jacobians of the first `stored_tokens` tokens are stored whole. The `top_pairs` pairs by each statistic, and the
    `top_inputs` inputs of the outputs among them, are those active together on `min_count` tokens or more, and each
    comes with up to `contexts` windows of `window` tokens. `linearity_samples` functions of one latent by another are
    looked at. With `transcoders`, the Jacobian of every transcoder's input-output map is studied too.
    """

    n_tokens: int = 16384
    at: Literal["input", "reconstruction"] = "input"
    norm: Literal["inside", "ignored"] = "inside"
    bins: int = 200
    max_value: float = 0.5
    thresholds: tuple[float, ...] = (0.005, 0.01, 0.015, 0.02)
    relative_thresholds: tuple[float, ...] = (0.1, 0.5, 1.0, 2.0)
    resamples: int = 1000
    stored_tokens: int = 1024
    top_pairs: int = 32
    top_inputs: int = 16
    min_count: int = 12
    contexts: int = 12
    window: int = 16
    linearity_samples: int = 1000
    transcoders: bool = False

    def __post_init__(self) -> None:
        names = "n_tokens bins stored_tokens top_pairs top_inputs min_count contexts window "
        at_least(1, self, "jacobian", names + "linearity_samples")
        at_least(FEWEST_DOCUMENTS, self, "jacobian", "resamples")
        require(self.max_value > 0, "jacobian.max_value", self.max_value, "more than 0")
        for name in ("thresholds", "relative_thresholds"):
            legal = all(value > 0 for value in getattr(self, name))
            require(legal, f"jacobian.{name}", list(getattr(self, name)), "a list of numbers above 0")
