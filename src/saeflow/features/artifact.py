"""The files of a table of latents: `saeflow.features.reader` opens them.

    latents.parquet   a row a latent, with all that is said of it but the following (`COLUMNS`)
    examples.parquet  a row an example, sorted by latent (`saeflow.features.examples.SCHEMA`)
    profiles.zarr     arrays by latent: histogram, positions, head_share
    tokens.parquet    what the token ids in the other files read: `token`, `text`, which is not escaped in any way
    index.json        of which dictionary, on which tokens, what the columns are, and why some are empty

Both tables have a row group for every `GROUP` latents, so that to look up one reads one.
"""

import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import xarray as xr

from saeflow.config import FeaturesConfig
from saeflow.features.examples import SCHEMA
from saeflow.features.statistics import QUANTILES
from saeflow.storage.xarrays import write_dataset

FORMAT = 1
GROUP = 256  # latents
ints, floats = pa.list_(pa.int32()), pa.list_(pa.float32())

COLUMNS: dict[str, tuple[pa.DataType, str]] = {
    "latent": (pa.int32(), "number in the dictionary"),
    "fired": (pa.int64(), "tokens on which its activation is not 0"),
    "frequency": (pa.float64(), "fired over the tokens looked at"),
    "n_documents": (pa.int32(), "documents in which it fires"),
    "mean": (pa.float32(), "mean activation where it fires"),
    "std": (pa.float32(), "standard deviation of activations where it fires"),
    "min": (pa.float32(), "smallest activation where it fires"),
    **{f"q{100 * q:02.0f}": (pa.float32(), f"quantile {q} of activations where it fires") for q in QUANTILES},
    "max": (pa.float32(), "largest activation"),
    "mean_position": (pa.float32(), "mean position in a row where it fires, tokens"),
    "n_distinct_tokens": (pa.int32(), "different tokens on which it fires"),
    "decoder_norm": (pa.float32(), "L2 norm of its decoder row"),
    "head": (pa.int32(), "the head of its hook with the largest share of the decoder row's norm"),
    "effect": (pa.float32(), "mean rise in loss where it is ablated at a token on which it fires, nats"),
    "effect_error": (pa.float32(), "standard error of that over the tokens, nats"),
    "effect_tokens": (pa.int32(), "tokens on which it was ablated"),
    "label": (pa.string(), "of a model whose algorithm is known: the predicate of the largest F1"),
    "label_f1": (pa.float32(), "that F1"),
    "tokens": (ints, "token ids on which it fires most often"),
    "token_fired": (ints, "how often it fires on these"),
    "token_share": (floats, "that over their occurrences"),
    "token_mean": (floats, "its mean activation on these where it fires"),
    "raised": (ints, "token ids whose logits its decoder row raises most"),
    "raised_by": (floats, "logits a unit of activation, but for the last norm's scale; mean over the vocabulary 0"),
    "lowered": (ints, "token ids whose logits it lowers most"),
    "lowered_by": (floats, "as raised_by, below 0"),
    "near_decoder": (ints, "latents with the largest cosines of decoder rows"),
    "near_decoder_cosine": (floats, "these cosines"),
    "near_firing": (ints, "latents that fire on the same tokens"),
    "near_firing_jaccard": (floats, "tokens on which both fire over those on which either does, of a sample"),
    "near_jacobian": (ints, "latents of the pair's other side with the largest Jacobian entries"),
    "near_jacobian_mean": (floats, "mean |J| over all tokens of the study"),
}
"""Of `latents.parquet`: type, and what it is, with its unit. What does not apply is null, and lists are empty."""

TOKEN_COLUMNS = ("tokens", "raised", "lowered")


class ExamplesWriter:
    """Writes `examples.parquet`, and remembers which tokens are in it."""

    def __init__(self, folder: Path) -> None:
        self.tokens: list[np.ndarray] = []
        self._writer = pq.ParquetWriter(folder / "examples.parquet", SCHEMA, compression="zstd")

    def write(self, table: pa.Table) -> None:
        """Of the next `GROUP` latents."""
        self.tokens.append(np.unique(table["token_ids"].combine_chunks().flatten().to_numpy()))
        self._writer.write_table(table, row_group_size=max(1, table.num_rows))

    def close(self) -> None:
        self._writer.close()


def latents_table(columns: dict[str, Any], n: int) -> pa.Table:
    """Of `columns` (n,) by name, lists of arrays among them; those that are not given are null, lists empty. NaN is
    null."""
    found = {}
    for name, (kind, _) in COLUMNS.items():
        given = columns.get(name)
        if given is None:
            found[name] = _nothing(kind, n)
        elif pa.types.is_list(kind):
            offsets = np.concatenate([[0], np.cumsum([len(one) for one in given])]).astype(np.int32)
            flat = np.concatenate([*given]) if n else np.zeros(0)
            found[name] = pa.ListArray.from_arrays(offsets, pa.array(flat).cast(kind.value_type))
        elif isinstance(given, list):
            found[name] = pa.array(given, type=kind)
        else:
            found[name] = pa.array(given, from_pandas=True).cast(kind)
    return pa.table(found, schema=pa.schema({name: kind for name, (kind, _) in COLUMNS.items()}))


def _nothing(kind: pa.DataType, n: int) -> pa.Array:
    nothing: list[Any] = [[] if pa.types.is_list(kind) else None]
    return pa.array(nothing * n, type=kind)


def write_latents(
    folder: Path, table: pa.Table, profiles: xr.Dataset, used: Iterable[np.ndarray], text: Callable[[int], str]
) -> None:
    """Writes `latents.parquet`, `profiles.zarr` and `tokens.parquet`; `used`: token ids beside those of the table."""
    pq.write_table(table, folder / "latents.parquet", row_group_size=GROUP, compression="zstd")
    for variable in profiles.variables.values():
        if variable.dims and variable.dims[0] == "latent":
            variable.encoding["chunks"] = (max(1, min(GROUP, variable.shape[0])), *variable.shape[1:])
    write_dataset(folder / "profiles.zarr", profiles)
    named = [table[name].combine_chunks().flatten().to_numpy() for name in TOKEN_COLUMNS]
    ids = np.unique(np.concatenate([*used, *named])).astype(np.int32)
    read = pa.array([text(int(token)) for token in ids], type=pa.string())
    pq.write_table(pa.table({"token": ids, "text": read}), folder / "tokens.parquet", compression="zstd")


def write_index(folder: Path, about: dict[str, Any], table: pa.Table, config: FeaturesConfig) -> dict[str, Any]:
    """Writes `index.json` and returns it."""
    live = pc.sum(pc.greater(table["fired"], 0)).as_py() or 0
    index = {"format": FORMAT} | about | {"n_latents": table.num_rows, "n_live": live, "latents_per_group": GROUP}
    index |= {"intervals": config.intervals, "bins": config.bins, "before": config.before, "after": config.after}
    index["columns"] = {name: description for name, (_, description) in COLUMNS.items()}
    (folder / "index.json").write_text(json.dumps(index, indent=1, allow_nan=False) + "\n")
    return index
