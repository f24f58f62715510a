"""Statistics of |J| over the active entries of each token, with their confidence intervals over documents.

Counts are kept by document between fixed points: on a linear scale as they are, and on a logarithmic one as they are
and *norm-matched*, each token's J divided by its own norm:

    l1   sum |J|             l2   sqrt(sum J^2)             rms   sqrt(mean J^2)

Another normalisation makes J of two sites, or layers, comparable whose norms have other gains:

    unit   J[i, j] over the length by which one unit of input latent j moves what the MLP reads, |D_j * gain|

D_j is the latent's decoder row, and the gain that of the norm where f begins before it. The paper's input SAE, with its
unit decoder rows after the gain, has J in these units. Where f begins before the norm's division, there is none.

A penalty on |J| shrinks J as well as making it sparse, and a fixed threshold cannot tell the two apart; what follows
does not change when J is scaled. Of the n entries x = |J| of one token:

    l1_over_l2         sum x / sqrt(sum x^2): from 1 (one entry) to sqrt(n) (all equal)
    kurtosis           mean x^4 / (mean x^2)^2 (Pearson's, about 0): 3 for a normal distribution, n for one entry
    hoyer              (sqrt(n) - l1_over_l2) / (sqrt(n) - 1): from 0 (all equal) to 1 (one entry); Hoyer 2004
    gini               sum over ranks r = 1.. from the largest of (n - 2 r + 1) x_r / (n sum x); Hurley and Rickard 2009
    effective_inputs   (sum x)^2 / sum x^2 over the inputs of one output latent: mean over outputs that are not all 0

Means are over tokens whose block is not all 0, and intervals are over documents (`evaluation.intervals`).
"""

from typing import Any

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor

from saeflow.config import JacobianConfig
from saeflow.evaluation.intervals import entry, interval, ratio, resampled_sums
from saeflow.training.jacobian_histogram import words

NORMS = ("none", "l1", "l2", "rms")
LOG_EDGES = np.logspace(-8, 3, 11 * 32 + 1)
"""32 bins a decade: fine enough to interpolate the survival function between them."""
_MEANS = {"mean_absolute": ("absolute", "entries")}  # a numerator and a denominator of token_statistics
_MEANS |= {name: (name, "nonzero_tokens") for name in ("l1_over_l2", "kurtosis", "hoyer", "gini")}
_MEANS |= {"effective_inputs": ("effective_inputs", "live_outputs")}


class Tally:
    """Counts and sums of |J| by document, D of them."""

    def __init__(self, config: JacobianConfig, n_documents: int) -> None:
        self.config, self.n_documents = config, n_documents
        self.points = {
            "linear": _points(linear_edges(config), config.thresholds),
            "none": _points(LOG_EDGES),
            "l1": _points(LOG_EDGES, config.thresholds),
            "l2": _points(LOG_EDGES, config.thresholds),
            "rms": _points(LOG_EDGES, config.relative_thresholds),
            "unit": _points(config.thresholds),
        }
        """Ascending, float32: the precision that |J| has."""
        self.between = {s: np.zeros((n_documents, len(p) + 1), dtype=np.int64) for s, p in self.points.items()}
        """(D, T + 1) a scale: entries in (points[i - 1], points[i]]; zeros are in the first."""
        self.sums: dict[str, np.ndarray] = {}
        """(D,) float64 a quantity."""

    @property
    def n_tokens(self) -> int:
        return int(self.sums["tokens"].sum()) if self.sums else 0

    def add(
        self, J: Tensor, document: np.ndarray, n_entries: Tensor | None = None, lengths: Tensor | None = None
    ) -> None:
        """`J` (N, k_out, k_in), `document` (N,), from 0 to D - 1; `n_entries` (N,): how many are no padding; `lengths`
        (N, k_in): of the input latents (`maps.JacobianBlocks`)."""
        size = J.abs()
        n = torch.full((len(J),), J[0].numel(), device=J.device) if n_entries is None else n_entries
        found = token_statistics(size.double(), n)
        per_unit = None
        if lengths is not None:
            per_unit = size / lengths.where(lengths > 0, 1.0)[:, None]
            found["absolute_unit"] = per_unit.double().sum((1, 2))
        for name, value in found.items():
            self.sums[name] = self.sums.get(name, 0.0) + np.bincount(document, value.cpu().numpy(), self.n_documents)

        flat, entries = size.flatten(1), n.cpu().numpy()
        self._count("linear", flat, document, entries)
        self._count("none", flat, document, entries)
        if per_unit is not None:
            self._count("unit", per_unit.flatten(1), document, entries)
        live = found["nonzero_tokens"] > 0
        if not live.any():
            return
        some, where = live.nonzero().flatten(), live.cpu().numpy()
        l1, l2 = found["absolute"][some], found["squares"][some].sqrt()
        for name, norm in (("l1", l1), ("l2", l2), ("rms", l2 / n[some].sqrt())):
            matched = flat[some] / norm.to(flat.dtype)[:, None]
            self._count(name, matched, document[where], entries[where])

    def _count(self, scale: str, values: Tensor, document: np.ndarray, n_entries: np.ndarray) -> None:
        """`values` (N, E) of which `n_entries` (N,) are no padding; padding is 0."""
        points = torch.from_numpy(self.points[scale]).to(values)
        bins = len(points) + 1
        which, local = np.unique(document, return_inverse=True)
        places = torch.bucketize(values, points) + torch.from_numpy(local * bins).to(values.device)[:, None]
        counts = torch.bincount(places.flatten(), minlength=len(which) * bins).cpu().numpy()
        self.between[scale][which] += counts.reshape(len(which), bins)
        padding = np.bincount(local, values.shape[1] - n_entries, len(which))
        self.between[scale][which, 0] -= padding.astype(np.int64)

    # ---------------------------------------------------------------- what tables are made of
    def above(self, scale: str, values: np.ndarray) -> np.ndarray:
        """(D, V): entries strictly above each of `values` (V,), which must be among the points of the scale."""
        places = np.searchsorted(self.points[scale], values.astype(np.float32))
        return self.between[scale][:, ::-1].cumsum(1)[:, ::-1][:, 1:][:, places]

    def totals(self, scale: str) -> np.ndarray:
        """(D,): all entries that were counted on this scale."""
        return self.between[scale].sum(1)

    def with_interval(
        self, numerator: np.ndarray, denominator: np.ndarray, most: float = np.inf
    ) -> tuple[np.ndarray, ...]:
        """Value, low and high (...) of the ratio of sums `numerator` (D, ...) to `denominator` (D,), neither negative;
        `most`: what the ratio cannot exceed."""
        shape = (-1, *[1] * (numerator.ndim - 1))
        value = ratio(numerator.sum(0), denominator.sum())
        above, below = (resampled_sums(sums, self.config.resamples) for sums in (numerator, denominator))
        return value, *interval(value, ratio(above, below.reshape(shape)), least=0.0, most=most)


def token_statistics(size: Tensor, n: Tensor) -> dict[str, Tensor]:
    """Of |J| (N, k_out, k_in), float64, with `n` (N,) entries each: what is summed over tokens, (N,) each."""
    row_sum, row_squares = size.sum(2), size.square().sum(2)
    absolute, squares = row_sum.sum(1), row_squares.sum(1)
    nonzero = squares > 0
    safe = squares.where(nonzero, torch.ones_like(squares))
    live = row_squares > 0
    effective = (row_sum.square() / row_squares.where(live, torch.ones_like(row_squares))).where(live, 0.0)
    l1_over_l2 = absolute / safe.sqrt()
    root = n.double().sqrt()
    ordered = size.flatten(1).sort(1, descending=True).values
    rank = torch.arange(1, ordered.shape[1] + 1, device=size.device, dtype=torch.float64)
    spread = (n + 1) * absolute - 2 * ordered @ rank  # sum of (n - 2 r + 1) x_r
    return {
        "tokens": torch.ones_like(squares),
        "entries": n.double(),
        "absolute": absolute,
        "squares": squares,
        "nonzero_tokens": nonzero.double(),
        "l1_over_l2": l1_over_l2.where(nonzero, 0.0),
        "kurtosis": (size.pow(4).sum((1, 2)) * n / safe.square()).where(nonzero, 0.0),
        "hoyer": ((root - l1_over_l2) / (root - 1).clamp(min=1e-12)).where(nonzero, 0.0),
        "gini": (spread / (n * absolute).where(nonzero, torch.ones_like(absolute))).where(nonzero, 0.0),
        "live_outputs": live.sum(1).double(),
        "effective_inputs": effective.sum(1),
    }


def linear_edges(config: JacobianConfig) -> np.ndarray:
    return np.linspace(0, config.max_value, config.bins + 1)


def _points(*values: Any) -> np.ndarray:
    return np.unique(np.concatenate(values).astype(np.float32))


# -------------------------------------------------------------------- tables
def histogram_table(tally: Tally) -> pa.Table:
    """`count_per_token` in each bin (left, right], zeros in the first; the summary has what is beyond the last."""
    edges = linear_edges(tally.config)
    above = tally.above("linear", edges)  # (D, bins + 1)
    counts = above[:, :-1] - above[:, 1:]
    counts[:, 0] = tally.totals("linear") - above[:, 1]
    tokens = tally.sums["tokens"]
    count, low, high = tally.with_interval(counts, tokens)
    above_value, above_low, above_high = tally.with_interval(above[:, :-1], tokens)
    columns = {"bin_left": edges[:-1], "bin_right": edges[1:], "count_per_token": count, "above_per_token": above_value}
    columns |= {"count_low": low, "count_high": high, "above_low": above_low, "above_high": above_high}
    return pa.table(columns)


def survival_table(tally: Tally) -> pa.Table:
    """`values_above_per_token` and their `fraction` of all entries at every bin edge above 0 and every threshold;
    `cdf` is 1 - `fraction`."""
    values = {np.float32(v): v for v in [*linear_edges(tally.config)[1:], *tally.config.thresholds]}  # the latter wins
    return pa.table(_above(tally, "linear", np.array([values[point] for point in sorted(values)])))


def _above(tally: Tally, scale: str, thresholds: np.ndarray) -> dict[str, np.ndarray]:
    above = tally.above(scale, thresholds)
    tokens = tally.sums["tokens" if scale in ("linear", "none", "unit") else "nonzero_tokens"]
    fraction, low, high = tally.with_interval(above, tally.totals(scale), most=1.0)
    per_token = ratio(above.sum(0), tokens.sum())
    named = {"threshold": thresholds, "values_above_per_token": per_token, "fraction": fraction}
    return named | {"fraction_low": low, "fraction_high": high, "cdf": 1 - fraction}


def log_histogram_table(tally: Tally) -> pa.Table:
    """As `survival_table`, at logarithmic bins: for each normalisation the fraction of entries in a bin (left, right],
    with its interval, and what is at most `bin_right` (`cdf`). Values below the first bin, zeros too, are in none."""
    tables = []
    for norm in NORMS:
        above = tally.above(norm, LOG_EDGES)
        total = tally.totals(norm)
        fraction, low, high = tally.with_interval(above[:, :-1] - above[:, 1:], total, most=1.0)
        cdf, cdf_low, cdf_high = tally.with_interval(total[:, None] - above[:, 1:], total, most=1.0)
        columns = {"normalisation": [norm] * len(fraction), "bin_left": LOG_EDGES[:-1], "bin_right": LOG_EDGES[1:]}
        columns |= {"fraction": fraction, "fraction_low": low, "fraction_high": high}
        tables.append(pa.table(columns | {"cdf": cdf, "cdf_low": cdf_low, "cdf_high": cdf_high}))
    return pa.concat_tables(tables)


def thresholds_table(tally: Tally) -> pa.Table:
    """Entries above the configured thresholds, by `normalisation`:

    `none`: |J| itself; `unit`: for a unit step of what the MLP reads, the same thresholds, where there is that; `l1`,
    `l2`: divided by the token's own norm, the same thresholds; `rms`: in units of the token's own RMS, at
    `relative_thresholds`; `rms_all`: in units of the RMS of all entries of the study, at the same. The last is known
    only when all is counted, so it is read off the survival function, linear in log |J| between 32 bins a decade, and
    its interval includes that of the RMS.
    """
    tables = []
    units = [("unit", "unit")] if tally.totals("unit").any() else []
    for norm, scale in (("none", "linear"), *units, ("l1", "l1"), ("l2", "l2"), ("rms", "rms")):
        thresholds = np.array(tally.config.relative_thresholds if norm == "rms" else tally.config.thresholds)
        rows = _above(tally, scale, thresholds)
        tables.append(pa.table({"normalisation": [norm] * len(thresholds)} | rows).drop_columns("cdf"))
    return pa.concat_tables([*tables, _above_rms(tally)])


def _above_rms(tally: Tally) -> pa.Table:
    """The rows `rms_all` of `thresholds_table`."""
    wanted = np.array(tally.config.relative_thresholds)
    total = tally.totals("none")
    parts = np.column_stack([tally.above("none", LOG_EDGES), total, tally.sums["squares"]])

    def fraction(sums: np.ndarray) -> np.ndarray:
        """`sums`, one a column of `parts`."""
        n, squares = sums[-2:]
        if squares == 0:
            return np.full(len(wanted), np.nan)
        at = np.log(wanted * np.sqrt(squares / n))
        return np.interp(at, np.log(tally.points["none"].astype(np.float64)), sums[:-2] / n)

    value = fraction(parts.sum(0))
    resampled = np.array([fraction(row) for row in resampled_sums(parts, tally.config.resamples)])
    low, high = interval(value, resampled, least=0.0, most=1.0)
    per_token = value * total.sum() / tally.n_tokens
    columns = {"normalisation": ["rms_all"] * len(wanted), "threshold": wanted, "values_above_per_token": per_token}
    return pa.table(columns | {"fraction": value, "fraction_low": low, "fraction_high": high})


def summarise(tally: Tally) -> dict[str, Any]:
    """Sizes and scale-free measures, each with `_low` and `_high`, the ends of its interval; None where undefined
    (`evaluation.intervals.entry`)."""
    sums = tally.sums
    out: dict[str, Any] = {
        "n_tokens": tally.n_tokens,
        "n_documents": int((sums["tokens"] > 0).sum()),
        "entries_per_token": float(sums["entries"].sum() / tally.n_tokens),
    }

    def put(name: str, value: np.ndarray, low: np.ndarray, high: np.ndarray) -> None:
        out.update(entry(name, value, low, high, tally.n_documents))

    for name, (numerator, denominator) in _MEANS.items():
        put(name, *tally.with_interval(sums[numerator], sums[denominator]))
    put("rms", *np.sqrt(tally.with_interval(sums["squares"], sums["entries"])))
    nonzero = tally.above("linear", np.zeros(1))[:, 0]
    put("nonzero_fraction", *tally.with_interval(nonzero, sums["entries"], most=1.0))
    beyond = tally.above("linear", np.array([tally.config.max_value]))[:, 0]
    put("overflow_per_token", *tally.with_interval(beyond, sums["tokens"]))
    thresholds = np.array(tally.config.thresholds)
    fractions = tally.with_interval(tally.above("linear", thresholds), sums["entries"], most=1.0)
    for i, t in enumerate(thresholds):
        put(f"fraction_above_{t:g}", *(column[i] for column in fractions))
    if "absolute_unit" in sums:
        put("mean_absolute_unit", *tally.with_interval(sums["absolute_unit"], sums["entries"]))
        fractions = tally.with_interval(tally.above("unit", thresholds), sums["entries"], most=1.0)
        for i, t in enumerate(thresholds):
            put(f"fraction_above_{t:g}_unit", *(column[i] for column in fractions))
    return out


def notebook_lines(tally: Tally) -> list[str]:
    """The table of notebook 000, at its 19 bin edges, in its words; and, as what exceeds the last edge counts here and
    not in its `torch.histc`, where its histogram ends and how much that is."""
    edges = torch.linspace(0, tally.config.max_value, tally.config.bins + 1).numpy()[1:20]  # it rounds as the notebook
    above = tally.above("linear", linear_edges(tally.config)[1:20]).sum(0) / tally.n_tokens
    end = tally.config.max_value
    beyond = tally.above("linear", np.array([end]))[:, 0].sum() / tally.n_tokens
    counted = f"{beyond:.1f} values above {end:g}, which are counted here and not by the notebook's torch.histc"
    said = f"The histogram is of {tally.config.bins} bins from 0 to {end:g}; there are {counted}."
    return [*words(above, edges), said]
