"""Comparisons of dictionaries evaluated on the same tokens: at equal L0 or CE, in pairs, and as notebook 004 has them.

All from summaries and resampled metrics: resample r left the same documents out for every dictionary, so that a
difference of two dictionaries is taken resample by resample, and its interval is that of the paired difference.
"""

import itertools
from collections.abc import Callable
from typing import Any

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
"""(kind, L1 coefficient): (l0, ce_loss), as notebook 004 prints them for layer 15 of Pythia-410M."""


def matched_l0(
    one: pd.DataFrame, other: pd.DataFrame, resamples: pd.DataFrame, confidence: float, positions: str = ""
) -> pd.DataFrame:
    """CE of the front `other` minus that of `one` at equal L0, over the range of L0 that both cover.

    `one`, `other`: rows of evaluations (`dictionary_key`, `l0`, `ce_replaced`); `resamples`: those columns, one row a
    resample and dictionary. At the L0 of every point of either, and at 40 between. A resample moves L0 and CE of all
    points; where it ends a front a little short, the front's last segment is continued. With
    `positions="_without_bos"` both metrics are those without BOS.
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
    *fronts, resamples = (t.assign(log_l0=np.log(t[f"l0{positions}"])) for t in (one, other, resamples))
    grid = _matched(fronts, resamples, confidence, x, y, lambda ce: ce)
    grid[["ratio", "low", "high"]] = np.exp(grid[["difference", "low", "high"]].astype(float))
    return grid.rename(columns={x: "ce_increase"})[["ce_increase", "ratio", "low", "high", "at_point_of"]]


def _matched(
    fronts: list[pd.DataFrame], resamples: pd.DataFrame, confidence: float, x: str, y: str, scale: Callable[[Any], Any]
) -> pd.DataFrame:
    """`difference` of the fronts in y at equal x, where y is linear in `scale` of x between the points of a front."""
    one, other = fronts
    columns = [x, "difference", "low", "high", "at_point_of"]
    low, high = max(one[x].min(), other[x].min()), min(one[x].max(), other[x].max())
    if not low < high:
        return pd.DataFrame(columns=columns)
    between = (np.geomspace if low > 0 else np.linspace)(low, high, POINTS)
    points = pd.concat([one.assign(at_point_of="one"), other.assign(at_point_of="other")])
    points = points[(points[x] >= low) & (points[x] <= high)][[x, "at_point_of"]]
    grid = pd.concat([points, pd.DataFrame({x: between})]).sort_values(x)
    at = scale(grid[x].to_numpy())
    a, b = (_extended(scale(rows[x].to_numpy()), rows[y].to_numpy(), at) for rows in fronts)
    grid["difference"] = b - a

    def resampled(rows: pd.DataFrame) -> np.ndarray:
        """(resamples, at)"""
        tables = (resamples.pivot(columns="dictionary_key", values=n)[rows["dictionary_key"]] for n in (x, y))
        both = zip(*(table.to_numpy() for table in tables), strict=True)
        return np.stack([_extended(scale(a), b, at) for a, b in both])

    grid["low"], grid["high"] = interval(b - a, resampled(other) - resampled(one), confidence)
    return grid[columns].reset_index(drop=True)


def _extended(x: np.ndarray, y: np.ndarray, at: np.ndarray) -> np.ndarray:
    """The line through points at some x, with the ends' own segments continued: a resample moves the ends a little."""
    order = np.argsort(x)
    x, y = x[order], y[order]
    segment = np.clip(np.searchsorted(x, at) - 1, 0, len(x) - 2)
    slope = (y[segment + 1] - y[segment]) / (x[segment + 1] - x[segment])
    return y[segment] + slope * (at - x[segment])


def paired_differences(evaluations: pd.DataFrame, resamples: pd.DataFrame, confidence: float) -> pd.DataFrame:
    """Metric of `other` minus that of `one`, for every pair evaluated on the same tokens; one row a pair and metric."""
    by_key = {str(key): rows for key, rows in resamples.groupby("dictionary_key")}
    out = []
    for _, group in evaluations.groupby("tokens_key", sort=True):
        for (_, one), (_, other) in itertools.combinations(group.iterrows(), 2):
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
    """Its two tables in its own terms beside ours: dictionaries with an L1 coefficient, SAEs of an MLP's output first.

    `l0` and `ce_loss` are the notebook's: means over all positions, BOS and the prediction made from it included.
    `printed_*` is what it printed for the same coefficient, where the model and the hook are its own.
    """
    # the notebook's are all ReLU with L1
    rows = evaluations[(evaluations["activation"] == "relu") & ~evaluations["skip"].astype(bool)]
    rows = rows[rows["hook_name_out"].str.endswith("hook_mlp_out")]
    rows = rows.sort_values(["hook_name_out", "kind", "l1_coefficient"])
    same_model = (rows["model_name"] == "pythia-410m") & (rows["hook_name_out"] == "blocks.15.hook_mlp_out")
    found = zip(rows["kind"], rows["l1_coefficient"], same_model, strict=True)
    printed: list[Any] = [
        NOTEBOOK_004.get((kind, l1), (None, None)) if is_own else (None, None) for kind, l1, is_own in found
    ]
    rows = rows.assign(printed_l0=[p[0] for p in printed], printed_ce_loss=[p[1] for p in printed])
    names = ["hook_name_out", "kind", "l1_coefficient", "seed", "dictionary_key", "l0", "ce_replaced"]
    names += ["printed_l0", "printed_ce_loss", "l0_without_bos", "ce_replaced_without_bos"]
    intervals = ("ce_increase_without_bos", "loss_recovered_zero_without_bos")
    names += [f"{name}{end}" for name in intervals for end in ("", "_low", "_high")]
    table = rows[[*names, "dead_fraction"]].rename(columns={"hook_name_out": "hook", "ce_replaced": "ce_loss"})
    return table.reset_index(drop=True)
