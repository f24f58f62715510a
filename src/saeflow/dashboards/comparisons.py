"""Dictionaries at one place beside each other: what each latent of one is in the others, by cosines of decoder rows.

    matches.parquet         a row a latent and one of its nearest in another dictionary
    pairs.parquet           a row an ordered pair of dictionaries: how much of the one is in the other
    index.html, app/        the page, its scripts and its style
    data/overview.js        the dictionaries, and what `pairs.parquet` has
    data/match-0-1.js       the matches between dictionaries 0 and 1, in both directions

Latents that never fired on the tokens looked at count nowhere. The mean of the largest cosines is Sharkey et al.'s
MMCS (2022). Shapes: n and m latents of two dictionaries that write p values.
"""

import json
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import pyarrow.parquet as pq
import torch
from torch import Tensor

from saeflow.dashboards.naming import identity
from saeflow.dashboards.scripts import copy_app, packed, write_script
from saeflow.dictionaries import load_dictionary
from saeflow.dictionaries.series import with_names
from saeflow.dictionaries.settings import read_summaries, with_keys
from saeflow.features.order import largest
from saeflow.jobs.job import Job
from saeflow.jobs.progress import progress

AT_ONCE = 1 << 24  # cosines that are held dense
ALIKE = (0.5, 0.7, 0.9)
"""Cosines from which on latents are counted as found again."""


class Matches(NamedTuple):
    """Of every latent of one dictionary the nearest of another, the nearest first; -1 and NaN where there is none."""

    latent: np.ndarray
    """(n, k) int32"""
    cosine: np.ndarray
    """(n, k) float32"""


class Compared(NamedTuple):
    key: str
    """Of its dashboard."""
    about: dict[str, Any]
    unit: Tensor
    """(n, p) decoder rows of norm 1; 0 of latents that never fire, or write nothing."""


def compare(job: Job) -> int:
    """Writes the folder; returns how many dictionaries are in it."""
    some = dictionaries(job)
    k = int(job.config["dashboards"]["matches"])
    numbers = [(i, j) for i in range(len(some)) for j in range(i + 1, len(some))]
    tables, pairs = [], []
    with job.writing() as out:
        copy_app(out, "comparison.html")
        (out / "data").mkdir()
        for i, j in progress(numbers, "comparing", len(numbers), "pairs"):
            there, back = nearest(some[i].unit, some[j].unit, k), nearest(some[j].unit, some[i].unit, k)
            write_script(out / "data" / f"match-{i}-{j}.js", {"there": _script(there), "back": _script(back)})
            for a, b, one, other in ((i, j, there, back), (j, i, back, there)):
                tables.append(_table(some[a].key, some[b].key, one))
                pairs.append({"dictionary": some[a].key, "other": some[b].key, **summary(one, other)})
        pd.concat(tables, ignore_index=True).to_parquet(out / "matches.parquet")
        pd.DataFrame(pairs).to_parquet(out / "pairs.parquet")
        of_pair = {f"{i}-{j}": pairs[2 * n + side] for n, (a, b) in enumerate(numbers)
                   for side, (i, j) in enumerate(((a, b), (b, a)))}  # fmt: skip
        write_script(
            out / "data/overview.js",
            {"dictionaries": [{"key": one.key, **one.about} for one in some], "pairs": of_pair, "alike": ALIKE},
        )
    return len(some)


def dictionaries(job: Job) -> list[Compared]:
    """In the order of figures and called as there; those that nothing was measured of by what they are, and last."""
    folders = {(f.parent.name, f.name): f for stage in ("train", "foreign") for f in job.inputs(stage)}
    measured = summaries(job)
    by_name = {}
    for folder in job.inputs("features", "index.json", "latents.parquet"):
        index = json.loads((folder / "index.json").read_text())
        by_name[folder.name] = index, pq.read_table(folder / "latents.parquet", columns=["fired"])["fired"].to_numpy()
    some = []
    for key in job.instance.needs["dashboards"]:
        instance = job.plan.instance("dashboards", key)
        index, fired = by_name[instance.needs["features"][0]]
        name, _, part = index["dictionary_key"].partition("/")
        made = next(folders[stage, name] for stage in ("train", "foreign") if (stage, name) in folders)
        about = _about(index, measured.get(index["dictionary_key"], {}), instance.sources.get("side", ""))
        some.append(Compared(key, about, unit_rows(load_dictionary(made / part if part else made).W_dec, fired)))
    place = {key: n for n, key in enumerate(measured)}
    return sorted(some, key=lambda one: place.get(one.about["index"]["dictionary_key"], len(place)))


def summaries(job: Job) -> dict[str, dict[str, Any]]:
    """What was measured of each dictionary by its key, and what figures call it (`label`, `series`), in their order."""
    found = [table for stage in ("evaluate", "recover") if len(table := read_summaries(job, stage))]
    if not found:
        return {}
    named = with_names(with_keys(pd.concat(found, ignore_index=True))).astype(object)
    rows = named.where(named.notna(), None).to_dict("records")
    return {str(row["dictionary_key"]): {str(name): value for name, value in row.items()} for row in rows}


def _about(index: dict[str, Any], measured: dict[str, Any], side: str) -> dict[str, Any]:
    numbers = [f"{name}{end}" for name in ("l0", "loss_recovered_zero") for end in ("", "_low", "_high")]
    name = identity(index, measured, side)
    called = measured.get("label") or ", ".join(text for text in (name["kind"], name["amount"]) if text)
    name |= {"label": ", ".join(text for text in (called, name["part"]) if text)}
    name |= {"series": measured.get("series") or name["kind"]}
    return {"name": name, "index": index, "measured": {name: measured.get(name) for name in numbers}}


def unit_rows(W: Tensor, fired: np.ndarray) -> Tensor:
    """(n, p) rows of norm 1; 0 where W (n, p) has none, or the latent never `fired` (n,)."""
    W = W.detach().double()
    norm = W.norm(dim=1, keepdim=True)
    return (W / norm.clamp(min=1e-30) * ((norm > 0) & torch.from_numpy(fired > 0)[:, None])).float()


def nearest(unit: Tensor, others: Tensor, k: int) -> Matches:
    """Of each row of `unit` (n, p) the `k` of `others` (m, p) with the largest cosines, of equal ones the lower."""
    n, m = len(unit), len(others)
    latent, cosine = np.full((n, k), -1, np.int32), np.full((n, k), np.nan, np.float32)
    here, there = unit.any(1), others.any(1)
    size = max(1, AT_ONCE // max(1, m))
    for start in range(0, n, size):
        values = unit[start : start + size] @ others.T
        values[:, ~there] = -torch.inf
        best, place = largest(values, min(k, m))
        known = np.isfinite(best) & here[start : start + size, None].numpy()
        latent[start : start + size, : best.shape[1]] = np.where(known, place, -1)
        cosine[start : start + size, : best.shape[1]] = np.where(known, best, np.nan)
    return Matches(latent, cosine)


def summary(there: Matches, back: Matches) -> dict[str, Any]:
    """How much of one dictionary is in another: of its latents that fire, the mean of their largest cosines, the shares
    of which that is at least `ALIKE`, and the share whose nearest has them as its nearest."""
    first, cosine = there.latent[:, 0], there.cosine[:, 0]
    live = np.flatnonzero(first >= 0)
    found: dict[str, Any] = {"n_live": len(live)}
    if not len(live):
        return found | dict.fromkeys(("mean_largest_cosine", *(f"share_{a}" for a in ALIKE), "share_mutual"))
    found["mean_largest_cosine"] = float(cosine[live].mean(dtype=np.float64))
    found |= {f"share_{a}": float((cosine[live] >= a).mean()) for a in ALIKE}
    return found | {"share_mutual": float((back.latent[first[live], 0] == live).mean())}


def _script(matches: Matches) -> dict[str, Any]:
    return {"latent": packed(matches.latent), "cosine": packed(matches.cosine), "k": matches.latent.shape[1]}


def _table(key: str, other: str, matches: Matches) -> pd.DataFrame:
    latent, rank = np.nonzero(matches.latent >= 0)
    columns = {"latent": latent.astype(np.int32), "rank": (rank + 1).astype(np.int16)}
    columns |= {"match": matches.latent[latent, rank], "cosine": matches.cosine[latent, rank]}
    return pd.DataFrame({"dictionary": key, "other": other} | columns)
