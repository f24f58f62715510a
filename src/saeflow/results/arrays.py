"""Cached activations as xarray, read when they are asked for."""

from typing import Any

import numpy as np
import xarray as xr
from xarray.backends import BackendArray
from xarray.core import indexing

from saeflow.activations.elsewhere import array_url
from saeflow.activations.store import Column

COORDINATES = ("token_id", "document", "position")


def activations(column: Column) -> xr.DataArray:
    """(token, d) or (token, head, d_head): the activations of one hook, with the token id, the document and the
    position in its row of each token. Lazy: `.values` or `.load()` reads; chunks carry checksums, which are compared.

    What is stored as bfloat16 reads as the same numbers in float32. Raises `ValueError` where they lie in a bucket.
    """
    if url := array_url(column.folder):
        raise ValueError(
            f"the activations of {column.hook_name} are in {url}: make pull HYDRA=... ARRAYS=1 brings them"
        )
    store = xr.open_zarr(column.store / "activations.zarr", consolidated=False, chunks=None, mask_and_scale=False)
    named = store[column.hook_name]
    if column.dtype == "bfloat16":
        lazy: Any = indexing.LazilyIndexedArray(_FromBfloat16(named.variable))
        named = named.copy(data=lazy)
    found = named.isel(token=slice(0, column.n_tokens))
    found.attrs["n_tokens"] = column.n_tokens
    return found.rename(column.hook_name)


class _FromBfloat16(BackendArray):
    """The upper halves of float32 numbers, stored as uint16."""

    def __init__(self, stored: xr.Variable) -> None:
        self.stored, self.shape, self.dtype = stored, stored.shape, np.dtype(np.float32)

    def __getitem__(self, key: Any) -> Any:
        support = indexing.IndexingSupport.BASIC
        return indexing.explicit_indexing_adapter(key, self.shape, support, self._read)

    def _read(self, key: tuple[Any, ...]) -> np.ndarray:
        return (np.asarray(self.stored[key]).astype(np.uint32) << 16).view(np.float32)
