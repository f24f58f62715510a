"""Is the map from one input latent to one output latent a line, and does J tell what an ablation would do?

After section 5.3 of the paper (arXiv 2502.18147) and its runners. Of a random token a random pair of active latents is
taken, the input latent's decoder row moved in the dictionary's input from 0 to max(5, s + 1) in 100 steps (s: the
latent's activation), and the output latent read behind f, encoder and TopK: a function g, with g(s) what it is now.

Classes, with a tolerance on the residuals of the least-squares line through the 100 points:

    linear     all residuals are below it
    jumprelu   not linear; the points at exactly 0 are one run at an end, and the others, two or more, are linear
    other      neither
    flat       the range of g is below `FLAT`: nothing depends on the input latent, a line of its own kind

The paper's tolerance is absolute, 0.01, so that the smaller a Jacobian is, the easier it passes; the relative one is
0.02 of g's range. The paper counts what is flat here as linear, as
`absolute_linear_or_flat` of the summary does. `residual`, the largest, and `range` are kept, so that
any other tolerance can be applied. The sweep leaves the activations that occur for most latents; that is the paper's.

Ablations: `delta_unit`, the change of g when one unit of the decoder row is subtracted, is what the paper compares with
-J (|J + delta_unit| < 0.1: "on the line"); `delta_ablation`, when all of it is, s rows, is what -J s predicts.
"""

from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor

from saeflow.evaluation.intervals import entry, interval, ratio, resampled_sums
from saeflow.jacobians.maps import Pair
from saeflow.jobs.progress import progress

POINTS = 100
ABSOLUTE, RELATIVE = 1e-2, 0.02
FLAT = 1e-4
ON_LINE = 0.1
CLASSES = ("linear", "jumprelu", "other", "flat")
SAMPLES_AT_ONCE = 32


class Samples(NamedTuple):
    """Tokens whose functions are taken."""

    token: np.ndarray
    """(S,), numbers of the study's tokens, ascending."""
    document: np.ndarray
    """(S,)"""
    x: Tensor
    """(S, d)"""
    y: Tensor
    """(S, p)"""


def choose_tokens(n_tokens: int, n_samples: int, seed: int = 0) -> np.ndarray:
    """(n_samples,), ascending; each once where there are enough."""
    return np.sort(np.random.default_rng(seed).choice(n_tokens, n_samples, replace=n_samples > n_tokens))


@torch.no_grad()
def linearity_table(pair: Pair, samples: Samples, seed: int = 0) -> pa.Table:
    """One row a sample: which latents, J, the classes, what ablations do, and g itself (`curve`, at equal steps from 0
    to `sweep_end`). Tokens without a pair of active latents are left out."""
    # drawn at once: a sample's pair depends on its place alone
    chosen = np.random.default_rng(seed).random((len(samples.token), 2))
    rows: list[dict[str, Any]] = []
    n, size = len(samples.token), SAMPLES_AT_ONCE
    for start in progress(range(0, n, size), "linearity", n, "samples", each=size):
        some = slice(start, start + size)
        part = Samples(samples.token[some], samples.document[some], samples.x[some], samples.y[some])
        rows += _rows(pair, part, chosen[some])
    return pa.Table.from_pylist(rows, schema=_SCHEMA)


def _rows(pair: Pair, samples: Samples, chosen: np.ndarray) -> list[dict[str, Any]]:
    found = []
    for blocks in pair.blocks([samples.x, samples.y]):
        for n, place in enumerate(range(blocks.tokens.start, blocks.tokens.stop)):
            on_in, on_out = ((v[n] > 0).nonzero().flatten() for v in (blocks.values_in, blocks.values_out))
            if len(on_in) and len(on_out):
                a, b = (int(on[int(u * len(on))]) for on, u in zip((on_in, on_out), chosen[place], strict=True))
                active = (int(blocks.inputs[n, a]), int(blocks.outputs[n, b]))
                found.append((place, *active, float(blocks.values_in[n, a]), float(blocks.J[n, b, a])))
    if not found:
        return []
    t, j, i, s, J = (np.array(column) for column in zip(*found, strict=True))
    base = pair.base(samples.x[t])
    end = np.maximum(5.0, s + 1)
    steps = torch.from_numpy(np.linspace(0, end, POINTS, axis=1))
    at = torch.cat([steps, torch.from_numpy(np.stack([s, s - 1, 0 * s], 1))], 1).to(base)  # (S, POINTS + 3)
    row = pair.input.W_dec[torch.from_numpy(j)]
    moved = base[:, None] + (at - at[:, POINTS : POINTS + 1])[..., None] * row[:, None]
    latent = torch.from_numpy(i).to(base.device).repeat_interleave(at.shape[1])
    g = _latent(pair, moved.flatten(0, 1), latent).view(at.shape).double().cpu().numpy()
    curves, (now, unit, ablated) = g[:, :POINTS], g[:, POINTS:].T
    lines = [classify(steps[n].numpy(), curve) for n, curve in enumerate(curves)]
    values = (samples.token[t], samples.document[t], j, i, s, J, now, unit - now, ablated - now, end)
    columns = dict(zip((*_INTEGERS, *_NUMBERS), values, strict=True)) | {"curve": curves}
    named = (dict(zip(columns, one, strict=True)) for one in zip(*columns.values(), strict=True))
    return [one | line for one, line in zip(named, lines, strict=True)]


def _latent(pair: Pair, x: Tensor, latent: Tensor) -> Tensor:
    """(N,): the activation of output latent `latent` (N,) behind f at `x` (N, d), 0 where TopK drops it."""
    step = max(1, (1 << 24) // pair.n_out)
    parts = zip(x.split(step), latent.split(step), strict=True)
    return torch.cat([pair.output.encode(pair.f(some)).gather(1, i[:, None])[:, 0] for some, i in parts])


def classify(s: np.ndarray, g: np.ndarray) -> dict[str, Any]:
    """`class_absolute` and `class_relative` of a function's points, its largest `residual` and its `range`."""
    spread = float(np.ptp(g))
    residual = _residual(s, g)
    named: dict[str, Any] = {"residual": residual, "range": spread}
    for name, tolerance in (("class_absolute", ABSOLUTE), ("class_relative", RELATIVE * spread)):
        if spread < FLAT:
            named[name] = "flat"
        elif residual < tolerance:
            named[name] = "linear"
        else:
            named[name] = "jumprelu" if _jumps(s, g, tolerance) else "other"
    return named


def _residual(s: np.ndarray, g: np.ndarray) -> float:
    """Largest distance of a point from the least-squares line."""
    centred = s - s.mean()
    slope = centred @ g / (centred @ centred) if len(s) > 1 else 0.0
    return float(np.abs(g - g.mean() - slope * centred).max())


def _jumps(s: np.ndarray, g: np.ndarray, tolerance: float) -> bool:
    zeros = np.flatnonzero(g == 0)
    rest = g != 0
    one_run = len(zeros) > 0 and zeros[-1] - zeros[0] == len(zeros) - 1 and (rest[0] != rest[-1])
    return bool(one_run and rest.sum() >= 2 and _residual(s[rest], g[rest]) < tolerance)


_INTEGERS = ("token", "document", "input", "output")
_NUMBERS = ("activation", "jacobian", "value", "delta_unit", "delta_ablation", "sweep_end")
_TYPES = dict.fromkeys(_INTEGERS, pa.int64()) | dict.fromkeys((*_NUMBERS, "residual", "range"), pa.float64())
_TYPES |= {"class_absolute": pa.string(), "class_relative": pa.string(), "curve": pa.list_(pa.float32())}
_SCHEMA = pa.schema(list(_TYPES.items()))


def summarise_linearity(table: pa.Table, n_resamples: int) -> dict[str, Any]:
    """Shares of the classes, and how well J predicts ablations, each with the ends of its interval over documents.

    `ablation_slope` and `ablation_r2`: of the line through 0 that gives delta_ablation from -J s, and the share of the
    square of delta_ablation that -J s itself explains, 1 - sum (delta + J s)^2 / sum delta^2.
    """
    if not len(table):
        return {}
    column = {name: table[name].to_numpy() for name in _TYPES if name != "curve"}
    which, place = np.unique(column["document"], return_inverse=True)
    J, delta = column["jacobian"], column["delta_ablation"]
    predicted = -J * column["activation"]
    parts = {f"{kind}_{name}": column[f"class_{kind}"] == name for kind in ("absolute", "relative") for name in CLASSES}
    parts["absolute_linear_or_flat"] = parts["absolute_linear"] | parts["absolute_flat"]
    parts["on_line"] = np.abs(J + column["delta_unit"]) < ON_LINE
    terms = [np.ones(len(J)), *parts.values(), predicted * delta, predicted**2, (delta - predicted) ** 2, delta**2]
    sums = np.stack([np.bincount(place, term, len(which)) for term in terms], axis=1)

    def measures(total: np.ndarray) -> np.ndarray:
        """(..., terms) to (..., names + 2)."""
        cross, squared, error, size = np.moveaxis(total[..., -4:], -1, 0)
        shares = ratio(total[..., 1:-4], total[..., :1])
        return np.concatenate([shares, ratio(cross, squared)[..., None], 1 - ratio(error, size)[..., None]], axis=-1)

    value = measures(sums.sum(0))
    names = [*parts, "ablation_slope", "ablation_r2"]
    share = np.array([name in parts for name in names])
    least, most = np.where(share, 0.0, -np.inf), np.where(share | (np.array(names) == "ablation_r2"), 1.0, np.inf)
    low, high = interval(value, measures(resampled_sums(sums, n_resamples)), least=least, most=most)
    out: dict[str, Any] = {"linearity_samples": len(J), "linearity_documents": len(which)}
    for name, one, one_low, one_high in zip(names, value, low, high, strict=True):
        out |= entry(name, one, one_low, one_high, len(which))
    return out
