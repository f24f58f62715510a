"""How Jacobians are studied."""

from dataclasses import dataclass
from typing import Literal

from saeflow.config.checks import ConfigError, at_least, require
from saeflow.config.evaluation import FEWEST_DOCUMENTS


@dataclass(frozen=True)
class JacobianConfig:
    """How Jacobians are studied, on held-out tokens (docs/jacobian.md)."""

    n_tokens: int = 16384
    """[tokens] Of rows spread over all, position 0 of each left out; of a `text` those that `text_tokens` names."""
    text: str | None = None
    """A text that is studied in place of held-out tokens, as one row. Source: notebook 000's prompt."""
    text_path: str | None = None
    """A file that holds that text, in UTF-8; in its place."""
    text_tokens: tuple[int, ...] = ()
    """[tokens] Positions in its row of the first and the last that count, 0 being what `tokens.prepend_bos` puts in
    front; empty: all but that. Source: notebook 000, which takes 11 to 20."""
    at: Literal["input", "reconstruction"] = "input"
    """Where the Jacobian is taken: at the true input of f (the JSAE paper), or at its reconstruction by the input
    dictionary (notebook 000)."""
    norm: Literal["inside", "ignored"] = "inside"
    """Where f begins before the norm: `ignored` leaves it out of f but for its gain and bias. Source: notebook 000's
    `ignore_ln`, whose MLP reads the residual stream as it is."""
    bins: int = 200
    """[bins] Of the histogram. Source: notebook 000."""
    max_value: float = 0.5
    """[|J|] Where the histogram ends. Source: notebook 000."""
    thresholds: tuple[float, ...] = (0.005, 0.01, 0.015, 0.02)
    """[|J|] Above which entries are counted, of J itself and of J divided by a token's L1 or L2 norm. Source: JSAE
    paper (arXiv 2502.18147)."""
    relative_thresholds: tuple[float, ...] = (0.1, 0.5, 1.0, 2.0)
    """[factor] The same in units of the RMS of J."""
    resamples: int = 1000
    """[resamples] At most so many, each without one document, or without one group of them."""
    stored_tokens: int = 1024
    """[tokens] The first of the study, whose Jacobians are stored whole."""
    top_pairs: int = 32
    """[pairs] Of latents, the first by each statistic."""
    top_inputs: int = 16
    """[latents] Inputs of the outputs among these pairs."""
    min_count: int = 12
    """[tokens] On which a pair has to be active together to be listed."""
    contexts: int = 12
    """[examples] Windows of text with each pair, at most."""
    window: int = 16
    """[tokens] Length of such a window."""
    linearity_samples: int = 1000
    """[samples] Functions of one latent by another that are looked at. Source: JSAE paper, section 5.3."""
    transcoders: bool = False
    """Whether the Jacobian of every transcoder's input-output map is studied too."""

    def __post_init__(self) -> None:
        names = "n_tokens bins stored_tokens top_pairs top_inputs min_count contexts window "
        at_least(1, self, "jacobian", names + "linearity_samples")
        at_least(FEWEST_DOCUMENTS, self, "jacobian", "resamples")
        require(self.max_value > 0, "jacobian.max_value", self.max_value, "more than 0")
        if self.text is not None and self.text_path is not None:
            raise ConfigError("jacobian: set one of jacobian.text and jacobian.text_path, not both")
        ends, given = self.text_tokens, self.of_text
        legal = not ends or (given and len(ends) == 2 and 1 <= ends[0] <= ends[1])
        wanted = "two positions [first, last], from 1 up," if given else "empty without jacobian.text"
        require(legal, "jacobian.text_tokens", list(ends), wanted)
        for name in ("thresholds", "relative_thresholds"):
            legal = all(value > 0 for value in getattr(self, name))
            require(legal, f"jacobian.{name}", list(getattr(self, name)), "a list of numbers above 0")

    @property
    def of_text(self) -> bool:
        """Whether a text is studied in place of held-out tokens."""
        return self.text is not None or self.text_path is not None
