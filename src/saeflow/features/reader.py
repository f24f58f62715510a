"""A table of latents, as a notebook opens it:

features = open_features("results/features/<key>")
features.table.nlargest(10, "effect")        # a row a latent
features[123].top[0].text                    # the text around the largest activation of one
"""

import json
from collections.abc import Iterator
from functools import cached_property, lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

if TYPE_CHECKING:
    import pandas as pd


class FeaturesError(ValueError):
    """A folder that holds no table of latents; the message says what to do."""


class Example(NamedTuple):
    """An activation of a latent, and the text around it."""

    value: float
    quantile: float
    """Share of the latent's firings that are weaker."""
    interval: int | None
    """Of its range, from 0 for the weakest; None for one of the top."""
    document: int
    row: int
    position: int
    """In the row."""
    at: int
    """Which of the tokens it is at."""
    tokens: list[str]
    activations: list[float]

    @property
    def text(self) -> str:
        return "".join(self.tokens)


class Feature(NamedTuple):
    """One latent."""

    latent: int
    row: "pd.Series"
    """Its row of the table."""
    top: list[Example]
    """The largest first."""
    intervals: list[list[Example]]
    """Random examples by interval of its range, the weakest first."""
    histogram: np.ndarray
    """(bins,) firings in equal bins from min(0, smallest) to max(0, largest activation)."""
    positions: np.ndarray
    raised: list[tuple[str, float]]
    """Tokens whose logits it raises most."""
    lowered: list[tuple[str, float]]
    tokens: list[tuple[str, int]]
    """On which it fires most often, and how often."""
    near: dict[str, list[tuple[int, float]]]
    """The nearest latents `decoder`, `firing` and `jacobian`."""

    def __repr__(self) -> str:
        top = f": {self.top[0].value:.4g} at {self.top[0].text!r}" if self.top else ""
        return f"<latent {self.latent}, fires on {int(self.row['fired']):,} tokens{top}>"

    def _repr_html_(self) -> str:
        from saeflow.features.show import feature_html

        return feature_html(self)


class Features:
    """A table of latents on disk. What is asked for is read: of one latent its row group of each file."""

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        self._read = lru_cache(2)(lambda name, group: self._files[name].read_row_group(group).to_pandas())
        try:
            self.index: dict[str, Any] = json.loads((self.folder / "index.json").read_text())
        except OSError as error:
            raise FeaturesError(
                f"{self.folder} holds no table of latents (it has no index.json); run the workflow with features=all"
            ) from error

    def __repr__(self) -> str:
        return f"<{len(self)} latents of {self.index['dictionary_key']}>"

    def _repr_html_(self) -> str:
        from saeflow.features.show import features_html

        return features_html(self)

    def __len__(self) -> int:
        return int(self.index["n_latents"])

    def __iter__(self) -> Iterator[Feature]:
        return map(self.__getitem__, range(len(self)))

    def __getitem__(self, latent: int) -> Feature:
        """Raises `IndexError` for a latent that there is not."""
        if not 0 <= latent < len(self):
            raise IndexError(f"latent {latent} of {self.folder}, which has {len(self)}: 0 to {len(self) - 1}")
        row = self._group("latents", latent).iloc[0]
        examples = [self._example(r) for r in self._group("examples", latent).to_dict("records")]
        intervals: list[list[Example]] = [[] for _ in range(self.index["intervals"])]
        for example in examples:
            if example.interval is not None:
                intervals[example.interval].append(example)
        measures = {"decoder": "cosine", "firing": "jaccard", "jacobian": "mean"}
        return Feature(
            latent,
            row,
            [example for example in examples if example.interval is None],
            intervals,
            np.asarray(self.profiles["histogram"][latent]),
            np.asarray(self.profiles["positions"][latent]),
            self._named(row["raised"], row["raised_by"]),
            self._named(row["lowered"], row["lowered_by"]),
            self._named(row["tokens"], row["token_fired"]),
            {name: list(zip(row[f"near_{name}"].tolist(), row[f"near_{name}_{measure}"].tolist(), strict=True))
             for name, measure in measures.items()},
        )  # fmt: skip

    @cached_property
    def table(self) -> "pd.DataFrame":
        """A row a latent; `index["columns"]` says what the columns are."""
        import pandas as pd

        return pd.read_parquet(self.folder / "latents.parquet")

    @cached_property
    def profiles(self) -> Any:
        """Arrays by latent, as an `xarray.Dataset` that reads what is asked for."""
        import xarray as xr

        return xr.open_zarr(self.folder / "profiles.zarr")

    @cached_property
    def token_texts(self) -> dict[int, str]:
        """What the token ids in the tables read."""
        import pyarrow.parquet as pq

        table = pq.read_table(self.folder / "tokens.parquet")
        return dict(zip(table["token"].to_pylist(), table["text"].to_pylist(), strict=True))

    @cached_property
    def _files(self) -> dict[str, Any]:
        import pyarrow.parquet as pq

        return {name: pq.ParquetFile(self.folder / f"{name}.parquet") for name in ("latents", "examples")}

    def _group(self, name: str, latent: int) -> "pd.DataFrame":
        """The rows of one latent, from the row group that has them."""
        group = self._read(name, latent // self.index["latents_per_group"])
        return group[group["latent"] == latent]

    def _example(self, row: Any) -> Example:
        interval = None if np.isnan(row["interval"]) else int(row["interval"])
        tokens = [self.token_texts[token] for token in row["token_ids"].tolist()]
        document, number, position = (int(row[name]) for name in ("document", "row", "position"))
        at = position - int(row["begin"])
        values = row["activations"].tolist()
        return Example(row["value"], row["quantile"], interval, document, number, position, at, tokens, values)

    def _named(self, tokens: np.ndarray, values: np.ndarray) -> list[tuple[str, Any]]:
        return [(self.token_texts[t], value) for t, value in zip(tokens.tolist(), values.tolist(), strict=True)]


def open_features(folder: str | Path) -> Features:
    """Opens a folder of the stage `features`. Raises `FeaturesError` where it is none."""
    return Features(folder)
