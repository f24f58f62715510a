"""Pages on which people look at dictionaries and their latents."""

from dataclasses import dataclass

from saeflow.config.checks import at_least


@dataclass(frozen=True)
class DashboardsConfig:
    """Whether, and how, pages of dictionaries and their latents are made (docs/dashboards.md)."""

    make: bool = False
    """Whether they are made at all, and the tables of latents that they show with them: `dashboards=all`."""
    matches: int = 3
    """[latents] The nearest of each latent in every other dictionary at its place."""

    def __post_init__(self) -> None:
        at_least(1, self, "dashboards", "matches")
