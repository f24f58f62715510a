"""How circuits through transcoders are looked for."""

import re
from dataclasses import dataclass

from saeflow.config.checks import ConfigError, at_least, check_seed, require

Condition = tuple[str, str, int | str]
"""Field, operator, value: what a node of a path has to be."""
NODES = ("feature", "head", "embedding")
_CONDITION = re.compile(r"(?P<field>layer|latent|head|token)(?P<operator>!=|=|<|>)(?P<value>\d+)")
_KIND = re.compile(rf"(?P<field>kind)(?P<operator>!=|=)(?P<value>{'|'.join(NODES)})")


@dataclass(frozen=True)
class CircuitsConfig:
    """What makes latents of transcoders active, by weights and on a text (docs/circuits.md)."""

    layer: int | None = None
    """[index] Of the latents that are explained; null: the highest that has a transcoder."""
    latents: tuple[int, ...] = ()
    """[index] Those that are explained; none named: `n_latents`, drawn from those that fire on `min_active` tokens."""
    n_latents: int = 3
    """[latents] Drawn where none is named."""
    min_active: int = 12
    """[tokens] Of those that are looked at, on which a latent has to be active to be drawn."""
    prompt: str | None = None
    """Text on which latents are explained, each where it is most active; null: the held-out text on which each is most
    active."""
    n_tokens: int = 16384
    """[tokens] Of held-out rows spread over all, on which activity is looked up."""
    batch_rows: int = 16
    """[rows] How many go through the model at once."""
    top: int = 10
    """[rows] Of each table of weights, the largest and as many of the least."""
    heads: int = 3
    """[heads] Those whose OV circuit writes most to a latent, through which weights are followed too."""
    iterations: int = 4
    """[steps] Of the search for paths, each one node further down. Source: transcoder paper, section 4.3."""
    branches: int = 15
    """[paths] Kept after each. Source: transcoder paper's `greedy_get_top_paths`."""
    per_node: int = 5
    """[nodes] Features, and (head, source) pairs, with which a path is continued. Source: the same."""
    through: tuple[str, ...] = ()
    """Only paths that go through a node of each of these: conditions `layer`, `latent`, `head`, `token` (position) with
    `=`, `!=`, `<` or `>`, or `kind` (feature, head, embedding), separated by blanks, as in `layer=1 latent=230`.
    Source: transcoder paper's path filters."""
    without: tuple[str, ...] = ()
    """No paths that go through a node of any of these."""
    seed: int = 0
    """[seed] Decides which latents are drawn."""

    def __post_init__(self) -> None:
        at_least(1, self, "circuits", "n_latents min_active n_tokens batch_rows top iterations branches per_node")
        at_least(0, self, "circuits", "heads")
        check_seed(self, "circuits.seed")
        for name in ("through", "without"):
            for text in getattr(self, name):
                try:
                    conditions(text)
                except ValueError:
                    need = "conditions like 'layer=1 latent=230', 'head=3 layer<2', 'token>4' or 'kind!=embedding'"
                    require(False, f"circuits.{name}", text, need)
        require(self.prompt is None or self.prompt.strip() != "", "circuits.prompt", self.prompt, "a text, or null")
        distinct = len(set(self.latents)) == len(self.latents) and all(latent >= 0 for latent in self.latents)
        require(distinct, "circuits.latents", list(self.latents), "a list of latents, each once, counted from 0")
        layer = self.layer
        require(layer is None or layer >= 0, "circuits.layer", layer, "a layer, counted from 0, or null")


def conditions(text: str) -> list[Condition]:
    """Of an entry of `through` or `without`. Raises `ValueError` for what is none."""
    found: list[Condition] = []
    for part in text.split():
        if (match := _KIND.fullmatch(part)) is not None:
            found.append((match["field"], match["operator"], match["value"]))
        elif (match := _CONDITION.fullmatch(part)) is not None:
            found.append((match["field"], match["operator"], int(match["value"])))
        else:
            raise ValueError(f"{part!r} is no condition")
    if not found:
        raise ValueError("there is no condition")
    return found


def check_prompt(n_tokens: int, bos: bool, n_positions: int) -> None:
    """Raises `ConfigError` for a prompt of no tokens, or of more than the model takes behind its BOS, if any."""
    if not 0 < n_tokens <= n_positions - bos:
        raise ConfigError(
            f"circuits.prompt is {n_tokens} tokens long, of which the model takes 1 to {n_positions - bos}; give a "
            "text that is"
        )
