"""Datasets of xarray on disk: Zarr v3, compressed; the same dataset gives the same bytes."""

import warnings
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import xarray as xr


def write_dataset(path: Path, dataset: "xr.Dataset") -> None:
    """Writes a dataset with its names, coordinates and attributes; `xarray.open_zarr(path)` opens it."""
    with warnings.catch_warnings():  # it is outside the specification of version 3, and xarray warns where it lacks
        warnings.filterwarnings("ignore", message="Consolidated metadata")
        warnings.filterwarnings("ignore", message=".*does not have a Zarr V3 specification.*")
        dataset.to_zarr(path, mode="w", zarr_format=3, consolidated=True)
