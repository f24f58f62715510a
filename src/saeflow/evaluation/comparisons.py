"""Comparisons of dictionaries at one place: at equal L0 or CE, in pairs, and in the terms of the transcoder paper.

All from summaries and resampled metrics: resample r left the same documents out for every dictionary that was evaluated
on the same tokens, and for no others, so that a difference of two is taken resample by resample, and its interval is
that of the paired difference. It covers the documents, for these dictionaries; what other seeds would give is said
beside it.
"""

import itertools
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import pandas as pd

from saeflow.evaluation.intervals import interval

_PAIRED = ("l0", "ce_replaced", "kl", "loss_recovered_zero", "loss_recovered_mean", "fvu", "cosine")
POINTS = 40  # of a comparison, besides those of the fronts
PAIRED = (*_PAIRED, *(f"{name}_without_bos" for name in _PAIRED))

NOTEBOOK_004 = {
    ("sae", 4e-05): (505.2548745727539, 3.3368855),
    ("sae", 7e-05): (109.87291198730469, 3.351243),
    ("sae", 8.5e-05): (55.06920654296875, 3.3596144),
    ("sae", 1e-04): (31.498437805175783, 3.367786),
    ("transcoder", 2.5e-05): (203.77172332763672, 3.341213),
    ("transcoder", 3e-05): (148.1538818359375, 3.3440711),
    ("transcoder", 4e-05): (82.748544921875, 3.3491273),
    ("transcoder", 5.5e-05): (44.042958984375, 3.3549356),
    ("transcoder", 7e-05): (27.454230651855468, 3.3682058),
}
"""(kind, L1 coefficient): (l0, ce_loss), as the transcoder paper's notebook prints them for layer 15 of Pythia-410M."""


class Front(NamedTuple):
    """Dictionaries of one series at one place: a point each, seeds of equal settings joined in their means."""

    points: pd.DataFrame
    """`x` and `y` of each point, `point`, `seeds` (how many dictionaries it is of)."""
    resampled: dict[str, np.ndarray]
    """`x`, `y`: of each resample of the documents, (resamples, points)."""
    alone: list[tuple[np.ndarray, np.ndarray]]
    """x and y of each seed's own front, of those that have all points; empty where there is one seed."""


def matched_l0(
    one: pd.DataFrame, other: pd.DataFrame, resamples: pd.DataFrame, confidence: float, positions: str = ""
) -> pd.DataFrame:
    """CE of the front `other` minus that of `one` at equal L0, over the range of L0 that both cover.

    `one`, `other`: rows of evaluations (`dictionary_key`, `l0`, `ce_replaced`; those with the same `point` are seeds,
    told apart by `repeat`); `resamples`: those columns, one row a resample and dictionary. At the L0 of every point of
    either, and at 40 between; `low` and `high` cover the documents, `seeds_low` and `seeds_high` are the least and
    largest difference of one seed's front from another's, NaN where neither has seeds. A resample moves L0 and CE of
    all points; where it ends a front a little short, the front's last segment is continued. Dictionaries whose L0 is 0
    are left out. With `positions="_without_bos"` both metrics are those without BOS.
    """
    x, y = f"l0{positions}", f"ce_replaced{positions}"
    return _matched([one, other], resamples, confidence, x, y, np.log).rename(columns={x: "l0"})


def matched_ce(
    one: pd.DataFrame, other: pd.DataFrame, resamples: pd.DataFrame, confidence: float, positions: str = ""
) -> pd.DataFrame:
    """L0 of the front `other` over that of `one` at equal CE, as `ratio`, over the range of CE that both cover.

    Both fronts are those of `matched_l0`, read the other way: log L0 is linear in CE between their points. CE is said,
    and held equal in each resample, as the increase over the clean model on the same documents (`ce_increase`), which
    harder documents do not raise for all alike.
    """
    x, y = f"ce_increase{positions}", "log_l0"
    with np.errstate(divide="ignore"):  # those whose L0 is 0 are left out
        *fronts, resamples = (t.assign(log_l0=np.log(t[f"l0{positions}"])) for t in (one, other, resamples))
    grid = _matched(fronts, resamples, confidence, x, y, lambda ce: ce)
    values = ["difference", "low", "high", "seeds_low", "seeds_high"]
    grid[values] = np.exp(grid[values].astype(float))
    return grid.rename(columns={x: "ce_increase", "difference": "ratio"})


def _matched(
    evaluations: list[pd.DataFrame],
    resamples: pd.DataFrame,
    confidence: float,
    x: str,
    y: str,
    scale: Callable[[Any], Any],
) -> pd.DataFrame:
    """`difference` of the fronts in y at equal x, where y is linear in `scale` of x between the points of a front."""
    columns = [x, "difference", "low", "high", "seeds_low", "seeds_high", "at_point_of"]
    fronts = [front(rows, resamples, x, y) for rows in evaluations]
    ends = [(one.points["x"].min(), one.points["x"].max()) for one in fronts if len(one.points) > 1]
    low, high = max((low for low, _ in ends), default=np.nan), min((high for _, high in ends), default=np.nan)
    if len(ends) < 2 or not low < high:
        return pd.DataFrame(columns=columns)
    between = (np.geomspace if low > 0 else np.linspace)(low, high, POINTS)
    points = pd.concat([f.points.assign(at_point_of=name) for f, name in zip(fronts, ("one", "other"), strict=True)])
    points = points[(points["x"] >= low) & (points["x"] <= high)][["x", "at_point_of"]]
    grid = pd.concat([points, pd.DataFrame({"x": between})]).sort_values("x", kind="stable")
    at = scale(grid["x"].to_numpy())
    a, b = (_extended(scale(f.points["x"].to_numpy()), f.points["y"].to_numpy(), at) for f in fronts)
    grid["difference"] = b - a
    one, other = (
        np.stack([_extended(scale(u), v, at) for u, v in zip(f.resampled["x"], f.resampled["y"], strict=True)])
        for f in fronts
    )
    grid["low"], grid["high"] = interval(grid["difference"].to_numpy(), other - one, confidence)
    grid["seeds_low"], grid["seeds_high"] = _over_seeds(fronts, at, scale)
    return grid.rename(columns={"x": x})[columns].reset_index(drop=True)


def front(rows: pd.DataFrame, resamples: pd.DataFrame, x: str, y: str) -> Front:
    """Of dictionaries of one series at one place. Raises `ValueError` where they were not evaluated on the same tokens,
    whose resamples have nothing in common."""
    if "tokens_key" in rows and rows["tokens_key"].nunique() > 1:
        raise ValueError(f"dictionaries of a front were evaluated on {', '.join(sorted(rows['tokens_key'].unique()))}")
    rows = rows[np.isfinite(rows[x].astype(float)) & np.isfinite(rows[y].astype(float))]
    if x.startswith("l0"):  # no line goes through what never fires
        rows = rows[rows[x] > 0]
    rows = rows.assign(point=rows.get("point", rows["dictionary_key"]), repeat=rows.get("repeat", ""))
    names = {"x": (x, "mean"), "y": (y, "mean"), "seeds": (y, "size")}
    points = rows.groupby("point", sort=False).agg(**names).reset_index()
    resampled = {}
    for name, column in (("x", x), ("y", y)):
        wide = resamples.pivot(columns="dictionary_key", values=column)
        each = [wide[rows.loc[rows["point"] == p, "dictionary_key"]].mean(axis=1) for p in points["point"]]
        resampled[name] = np.stack(each, axis=1) if each else np.empty((len(wide), 0))
    by_seed = [one.set_index("point").reindex(points["point"])[[x, y]] for _, one in rows.groupby("repeat")]
    whole = [(one[x].to_numpy(float), one[y].to_numpy(float)) for one in by_seed if one.notna().all(axis=None)]
    return Front(points, resampled, whole if points["seeds"].max() > 1 else [])


def _over_seeds(fronts: list[Front], at: np.ndarray, scale: Callable[[Any], Any]) -> tuple[Any, Any]:
    """The least and largest difference of the seeds' own fronts: of every seed of the one from every of the other."""
    if not any(len(one.alone) > 1 for one in fronts):
        return np.nan, np.nan
    one, other = (
        [_extended(scale(u), v, at) for u, v in f.alone or [(f.points["x"].to_numpy(), f.points["y"].to_numpy())]]
        for f in fronts
    )
    differences = np.array([b - a for a, b in itertools.product(one, other)])
    return differences.min(0), differences.max(0)


def _extended(x: np.ndarray, y: np.ndarray, at: np.ndarray) -> np.ndarray:
    """The line through points at some x, with the ends' own segments continued: a resample moves the ends a little."""
    order = np.argsort(x, kind="stable")
    x, y = x[order], y[order]
    segment = np.clip(np.searchsorted(x, at) - 1, 0, len(x) - 2)
    rise, run = y[segment + 1] - y[segment], x[segment + 1] - x[segment]
    slope = np.divide(rise, run, out=np.zeros_like(rise), where=run != 0)
    return y[segment] + slope * (at - x[segment])


def paired_differences(evaluations: pd.DataFrame, resamples: pd.DataFrame, confidence: float) -> pd.DataFrame:
    """Metric of `other` minus that of `one`, for every pair of dictionaries of one place; one row a pair and metric.

    `evaluations`, and the resampled metrics of each (`resamples`), are of one place: of one model and the same held-out
    tokens, so that resample r left the same documents out for all. Raises `ValueError` for several tokens.
    """
    if evaluations["tokens_key"].nunique() > 1:
        raise ValueError(f"evaluated on other tokens: {', '.join(sorted(evaluations['tokens_key'].unique()))}")
    by_key = {str(key): rows for key, rows in resamples.groupby("dictionary_key")}
    out = []
    for one, other in itertools.combinations(evaluations.to_dict("records"), 2):
        for name in PAIRED:
            if pd.isna(one[name]) or pd.isna(other[name]):
                continue
            a, b = (by_key[row["dictionary_key"]][name].to_numpy() for row in (one, other))
            difference = other[name] - one[name]
            low, high = interval(difference, b - a, confidence)
            names = {"one": one["dictionary_key"], "other": other["dictionary_key"], "metric": name}
            out.append(names | {"difference": difference, "low": float(low), "high": float(high)})
    return pd.DataFrame(out, columns=["one", "other", "metric", "difference", "low", "high"])


def notebook_004(evaluations: pd.DataFrame) -> pd.DataFrame:
    """The two tables of the transcoder paper's notebook in its own terms beside ours: ReLU dictionaries with an L1
    penalty at an MLP's output, in the order of `evaluations`.

    `l0` and `ce_loss` are the notebook's: means over all positions, BOS and the prediction made from it included.
    `printed_*` is what it printed for the same coefficient, where the model and the hook are its own.
    """
    rows = evaluations[(evaluations["activation"] == "relu") & ~evaluations["skip"].astype(bool)]
    rows = rows[rows["hook_name_out"].str.endswith("hook_mlp_out")]
    same_model = (rows["model_name"] == "pythia-410m") & (rows["hook_name_out"] == "blocks.15.hook_mlp_out")
    found = zip(rows["kind"], rows["l1_coefficient"], same_model, strict=True)
    printed: list[Any] = [
        NOTEBOOK_004.get((kind, l1), (None, None)) if is_own else (None, None) for kind, l1, is_own in found
    ]
    rows = rows.assign(printed_l0=[p[0] for p in printed], printed_ce_loss=[p[1] for p in printed])
    names = [
        "place",
        "series",
        "hook_name_out",
        "kind",
        "l1_coefficient",
        "seed",
        "dictionary_key",
        "l0",
        "ce_replaced",
    ]
    names += ["printed_l0", "printed_ce_loss", "l0_without_bos", "ce_replaced_without_bos"]
    intervals = ("ce_increase_without_bos", "loss_recovered_zero_without_bos")
    names += [f"{name}{end}" for name in intervals for end in ("", "_low", "_high")]
    table = rows[[*names, "dead_fraction"]].rename(columns={"hook_name_out": "hook", "ce_replaced": "ce_loss"})
    return table.reset_index(drop=True)
