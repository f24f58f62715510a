"""The dashboard of a dictionary: a page, and the data of its table of latents in pieces that the page loads.

index.html, app/        the page, its scripts and its style: the same for all
data/overview.js        what the dictionary is and how good it is
data/table.js           of all latents what the table shows, sorts and searches
data/latents-0000.js    all that there is of the first `GROUP` latents, and so on
"""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import xarray as xr

from saeflow.dashboards.naming import identity
from saeflow.dashboards.scripts import copy_app, packed, packed_column, write_script
from saeflow.dictionaries.settings import lineage, settings
from saeflow.features.artifact import TOKEN_COLUMNS
from saeflow.jobs.job import Job

FORMAT = 1
BEFORE, AFTER = 6, 3  # tokens around the largest activation that the table shows
IN_TABLE = ("fired", "max", "effect", "label_f1", "head", "mean_position", *TOKEN_COLUMNS, "raised_by", "lowered_by")


def dashboard(job: Job) -> dict[str, Any]:
    """Writes the folder of one dictionary; returns its overview."""
    folder = job.input("features")
    texts = Texts(folder)
    overview = describe(job, json.loads((folder / "index.json").read_text()))
    profiles = xr.open_zarr(folder / "profiles.zarr").load()
    overview["position_begin"] = profiles["position_begin"].values.tolist()
    per_latent = {name: a.values for name, a in profiles.variables.items() if a.dims[:1] == ("latent",)}
    latents, examples = (pq.ParquetFile(folder / f"{name}.parquet") for name in ("latents", "examples"))
    snippets = []
    with job.writing() as out:
        copy_app(out, "dashboard.html")
        (out / "data").mkdir()
        size = overview["index"]["latents_per_group"]
        for group in range(latents.num_row_groups):
            shown = examples.read_row_group(group)
            mine = {name: values[group * size : (group + 1) * size] for name, values in per_latent.items()}
            data = chunk(latents.read_row_group(group), shown, mine, texts)
            write_script(out / "data" / f"latents-{group:04d}.js", data)
            snippets.append(strongest(shown))
        write_script(out / "data/table.js", table(latents.read(), pa.concat_tables(snippets), texts))
        write_script(out / "data/overview.js", overview)
    return overview


class Texts:
    """What the token ids of a table of latents read."""

    def __init__(self, folder: Path) -> None:
        table = pq.read_table(folder / "tokens.parquet")
        self.ids, self.texts = table["token"].to_numpy(), table["text"].to_pylist()

    def local(self, ids: list[np.ndarray]) -> tuple[list[str], list[np.ndarray]]:
        """The distinct texts of some lists of token ids, and the lists as places among them."""
        used, place = np.unique(np.concatenate(ids), return_inverse=True)
        texts = [self.texts[i] for i in np.searchsorted(self.ids, used)]
        return texts, np.split(place, np.cumsum([len(some) for some in ids])[:-1])


def _with_texts(columns: dict[str, Any], lists: dict[str, pa.ChunkedArray], texts: Texts) -> dict[str, Any]:
    """Columns beside which lists of token ids are, as places in `texts`."""
    flat = {name: column.combine_chunks() for name, column in lists.items()}
    read, places = texts.local([array.flatten().to_numpy() for array in flat.values()])
    for (name, array), place in zip(flat.items(), places, strict=True):
        columns[name] = {
            "offsets": packed(array.offsets.to_numpy() - array.offsets[0].as_py()),
            "values": packed(place),
        }
    return columns | {"texts": read}


# -------------------------------------------------------------------- pieces
def chunk(latents: pa.Table, examples: pa.Table, profiles: dict[str, np.ndarray], texts: Texts) -> dict[str, Any]:
    """All of some latents: their columns, their examples, sorted by latent, and their profiles."""
    lists = {name: latents[name] for name in TOKEN_COLUMNS} | {"token_ids": examples["token_ids"]}
    columns = {name: packed_column(latents[name]) for name in latents.column_names if name not in TOKEN_COLUMNS}
    found: dict[str, Any] = _with_texts(columns, lists, texts)
    shown = {name: packed_column(examples[name]) for name in ("value", "quantile", "document", "row", "position")}
    latent = examples["latent"].to_numpy()
    first = latents["latent"][0].as_py() if latents.num_rows else 0
    shown["offsets"] = packed(np.searchsorted(latent - first, np.arange(latents.num_rows + 1)))
    shown["interval"] = packed(examples["interval"].fill_null(-1).to_numpy().astype(np.int32))
    shown["at"] = packed(examples["position"].to_numpy() - examples["begin"].to_numpy())
    activations = examples["activations"].combine_chunks().flatten().to_numpy()
    active = np.flatnonzero(activations)  # of most examples a few tokens are
    shown |= {"active": packed(active), "active_value": packed(activations[active])}
    found |= {"examples": shown, "profiles": {name: packed(values) for name, values in profiles.items()}}
    return found


def strongest(examples: pa.Table) -> pa.Table:
    """Of each latent that fires the tokens around its largest activation: `latent`, `token_ids`, `at`."""
    of = examples.filter(pc.equal(examples["rank"].fill_null(0), 1))
    at = (of["position"].to_numpy() - of["begin"].to_numpy()).tolist()
    ids = of["token_ids"].to_pylist()
    begin = [max(0, place - BEFORE) for place in at]
    around = [one[b : place + 1 + AFTER] for one, b, place in zip(ids, begin, at, strict=True)]
    columns = {
        "latent": of["latent"].combine_chunks(),
        "token_ids": pa.array(around, type=pa.list_(pa.int32())),
        "at": pa.array([place - b for b, place in zip(begin, at, strict=True)], type=pa.int32()),
    }
    return pa.table(columns)


def table(latents: pa.Table, snippets: pa.Table, texts: Texts) -> dict[str, Any]:
    """Of all latents what the page shows of them in its table."""
    n = latents.num_rows
    columns = {name: packed_column(latents[name]) for name in IN_TABLE if name not in TOKEN_COLUMNS}
    for name in ("raised_by", "lowered_by"):  # the first of each
        columns[name] = packed(np.array([one[0] if one else np.nan for one in latents[name].to_pylist()], np.float32))
    labels = latents["label"].combine_chunks().dictionary_encode()
    columns["label"] = packed(labels.indices.fill_null(len(labels.dictionary)).to_numpy())
    has = np.zeros(n + 1, np.int64)
    has[snippets["latent"].to_numpy() + 1] = 1
    columns |= {"snippet_of": packed(np.cumsum(has)), "snippet_at": packed(snippets["at"].to_numpy())}
    lists = {name: latents[name] for name in TOKEN_COLUMNS} | {"snippet": snippets["token_ids"]}
    return _with_texts(columns, lists, texts) | {"labels": labels.dictionary.to_pylist()}


# -------------------------------------------------------------------- overview
def describe(job: Job, index: dict[str, Any]) -> dict[str, Any]:
    """What a dictionary is, how good it is, and what it was made from."""
    measured = {stage: _summary(job, stage) for stage in ("evaluate", "recover")}
    plan, stage, key = job.plan, job.instance.stage, job.instance.key
    made_from = [(name, instance.key) for name, instance in lineage(plan, stage, key).values() if name != stage]
    dictionary = next(name for name, _ in made_from if name in ("train", "foreign"))
    held = settings(plan, dictionary, job.instance.needs[dictionary][0])
    return {
        "format": FORMAT,
        "name": identity(
            index, measured["evaluate"] or measured["recover"] or {}, job.instance.sources.get("side", "")
        ),
        "index": index,
        "evaluation": measured["evaluate"],
        "recovery": measured["recover"],
        "settings": {path: value for path, value in sorted(held.items()) if path not in NOT_CONTENT},
        "made_from": made_from,
        "partner": job.instance.sources.get("partner"),
    }


NOT_CONTENT = ("model.name", "corpus.name", "dictionary.label")
"""Settings that are what people call things here and now: equal dashboards may be of both."""


def _summary(job: Job, stage: str) -> dict[str, Any] | None:
    return next((json.loads((f / "summary.json").read_text()) for f in job.inputs(stage, "summary.json")), None)
