"""A study of heads on disk, as its job writes it and figures and the report read it.

What is of one dictionary is shown of the one of all heads whose L0 is nearest to 20 (what Kissane et al. aim for) and
of the one of single heads that it is decomposed in.
"""

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import xarray as xr

WANTED_L0 = 20


class HeadStudy(NamedTuple):
    """One artifact of the stage."""

    folder: Path
    summary: dict[str, Any]
    title: str = ""
    """What tells it from the experiment's other studies; '' where the layer does."""
    labels: Mapping[str, str] = MappingProxyType({})
    """What figures call its dictionaries, by key: what tells them from others of the experiment."""

    @property
    def key(self) -> str:
        return self.folder.name

    @property
    def name(self) -> str:
        return self.title or f"layer {self.summary['layer']}"

    def dataset(self, name: str, dictionary: str | None = None) -> xr.Dataset:
        """The whole of it, in memory."""
        return xr.open_zarr(self.file(f"{name}.zarr", dictionary)).load()

    def table(self, name: str, dictionary: str | None = None) -> pd.DataFrame:
        return pd.read_parquet(self.file(f"{name}.parquet", dictionary))

    def of_kind(self, kind: str) -> list[str]:
        """Keys of the dictionaries of a kind, the sparsest last."""
        of_kind = {key: one for key, one in self.summary["dictionaries"].items() if one["kind"] == kind}
        return sorted(of_kind, key=lambda key: -of_kind[key]["l0"])

    def shown_dictionary(self, kind: str) -> str | None:
        """The dictionary of a kind that figures of one dictionary show; none that never fires."""
        dictionaries = self.summary["dictionaries"]
        keys = [key for key in self.of_kind(kind) if dictionaries[key]["l0"] > 0]
        if kind == "heads":
            concat = self.shown_dictionary("concat")
            if concat is not None and "decomposed_in" in dictionaries[concat]:
                return str(dictionaries[concat]["decomposed_in"])
        return min(keys, key=lambda key: abs(np.log(dictionaries[key]["l0"] / WANTED_L0))) if keys else None

    def label(self, key: str) -> str:
        dictionary = self.summary["dictionaries"][key]
        if key in self.labels:
            return f"{self.labels[key]}, L0 {dictionary['l0']:.0f}"
        of = "SAEs of heads" if dictionary["kind"] == "heads" else "SAE of all heads"
        name = {"l1_coefficient": "L1"}.get(dictionary["amount_name"], dictionary["amount_name"])
        amount = f", {name} = {dictionary['amount']:g}" if dictionary["amount"] is not None else ""
        return f"{of}{amount}, L0 {dictionary['l0']:.0f}"

    def file(self, name: str, dictionary: str | None) -> Path:
        return self.folder / "dictionaries" / dictionary / name if dictionary else self.folder / name


def read_head_studies(folders: Iterable[Path]) -> list[HeadStudy]:
    """Their summaries; datasets are read when a figure wants them."""
    found = [HeadStudy(folder, json.loads((folder / "summary.json").read_text())) for folder in folders]
    return sorted(found, key=lambda study: (study.summary["layer"], study.key))
