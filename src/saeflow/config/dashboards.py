"""Pages on which people look at dictionaries and their latents."""

from dataclasses import dataclass

from saeflow.config.checks import at_least


@dataclass(frozen=True)
class DashboardsConfig:
    """Whether to `make` a dashboard of every dictionary. Its table of latents (`features`) is then made too, and a
    comparison of the dictionaries at each place, which has of every latent the `matches` nearest of each other one."""

    make: bool = False
    matches: int = 3

    def __post_init__(self) -> None:
        at_least(1, self, "dashboards", "matches")
