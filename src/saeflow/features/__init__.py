"""What every latent of a dictionary is about. `open_features(folder)[123]` shows one."""

from typing import Any

__all__ = ["open_features"]  # pyright: ignore


def __getattr__(name: str) -> Any:
    if name == "open_features":
        from saeflow.features.reader import open_features

        return open_features
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
