"""What SAEDashboard and Neuronpedia show of a latent, made of a table of latents (`saeflow.features`) and the weights.

The tables have most of it. What the two show beside that depends on weights alone: the logits that a latent adds to
every token of the vocabulary, and the largest entries of its decoder row. What needs the activations of all tokens at
once, correlations with neurons and with other latents, is left out. Shapes: L latents, V vocabulary, p what a
dictionary writes.
"""

import itertools
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import pyarrow.parquet as pq
import torch
from torch import Tensor

from saeflow.config import ConfigError
from saeflow.dictionaries.fitting import open_dictionary
from saeflow.export.subjects import Subject
from saeflow.features import open_features
from saeflow.features.logits import direct_path, logit_effects
from saeflow.features.order import largest
from saeflow.features.reader import Features
from saeflow.jobs.job import Job
from saeflow.models.opening import open_model
from saeflow.models.resources import block_of
from saeflow.planning.digests import canonical
from saeflow.storage.receipts import verify

if TYPE_CHECKING:
    from transformer_lens import HookedTransformer

LOGIT_BINS, ALIGNED = 50, 3  # SAEDashboard's
AT_ONCE = 1 << 24  # logits that are held at once
LEFT_OUT = "correlations with neurons and with other latents, and the losses of single sequences"
"""What neither format gets of ours."""


Example = dict[str, Any]
"""A row of `examples.parquet`."""


class Histogram(NamedTuple):
    """Of equal bins: their centres and their counts."""

    centres: np.ndarray
    counts: np.ndarray


class Group(NamedTuple):
    """Sequences that are shown together."""

    low: float
    """Lower end of their interval; -1 for the largest activations, as Neuronpedia has it."""
    high: float
    """Upper end; the largest activation."""
    contains: float
    """Share of all tokens that are in the interval, in the one with 0 those too on which it does not fire; -1."""
    examples: list[Example]


class Latent(NamedTuple):
    """One latent."""

    latent: int
    row: dict[str, Any]
    """Of the table of latents; None for what does not apply."""
    groups: list[Group]
    """The largest activations, then the intervals of its range, the highest first."""
    histogram: Histogram | None
    """Of its activations where it fires; None of one that never does."""
    logits: np.ndarray | None
    """(V,) what it adds to the logits, a unit of activation, less the mean; None where its hook leads to none."""
    aligned: list[tuple[int, float, float]]
    """Places of the largest entries of its decoder row, these, and their size over the sum of sizes."""
    head_share: list[float] | None
    """Of the norms of its decoder row's parts; None unless it is of all heads of a layer."""

    def logit_histogram(self) -> Histogram | None:
        if self.logits is None:
            return None
        counts, edges = np.histogram(self.logits, LOGIT_BINS)
        return Histogram((edges[1:] + edges[:-1]) / 2, counts)


class Dashboard(NamedTuple):
    """All latents of a dictionary."""

    features: Features
    layer: int
    """Of the hook that it writes."""
    model_id: str
    corpus: str
    latents: Iterator[Latent]


Models = dict[str, "HookedTransformer"]
"""Those that are open, by what identifies them."""


def open_dashboard(subject: Subject, models: Models) -> Dashboard:
    """`models`: where those that are opened stay. Raises `ConfigError` where its latents have not been looked up, or in
    bins that do not add up to intervals, and `FitError` where it does not fit its model."""
    job = subject.features()
    if not subject.plan.done("features", job.instance.key):
        raise ConfigError(f"{job.path} is not made yet: run the experiment with features=all first, then export it")
    verify(job.path)
    features = open_features(job.path)
    bins, intervals = features.index["bins"], features.index["intervals"]
    if bins % intervals:
        raise ConfigError(
            f"{job.path} has {bins} bins and {intervals} intervals: how many activations are in an interval is known "
            "only where it is a number of bins; set features.bins to a multiple of features.intervals"
        )
    hook = features.index["hook_name_out"]
    model, corpus = (str(subject.settings.get(f"{source}.name", "")) for source in ("model", "corpus"))
    return Dashboard(features, block_of(hook), model, corpus, _latents(features, job, models))


def _latents(features: Features, job: Job, models: Models) -> Iterator[Latent]:
    (path,) = job.dictionaries()
    dictionary = open_dictionary(path, job)
    effects = None if "raised" in features.index["left_out"] else _effects(features, job, models)
    files = [pq.ParquetFile(features.folder / f"{name}.parquet") for name in ("latents", "examples")]
    size = features.index["latents_per_group"]
    for group, first in enumerate(range(0, len(features), size)):
        rows, examples = (file.read_row_group(group).to_pylist() for file in files)
        of_latent = {key: [*some] for key, some in itertools.groupby(examples, key=lambda example: example["latent"])}
        histograms = np.asarray(features.profiles["histogram"][first : first + size])
        shares = features.profiles.get("head_share")
        of_heads = None if shares is None else np.asarray(shares[first : first + size]).tolist()
        decoder = dictionary.W_dec[first : first + size].detach().float()
        weights = zip(_aligned(decoder), _each(effects, decoder), strict=True)
        for i, (row, (aligned, added)) in enumerate(zip(rows, weights, strict=True)):
            groups = _groups(row, of_latent.get(first + i, []), histograms[i], features)
            histogram, share = _histogram(row, histograms[i]), of_heads and of_heads[i]
            yield Latent(first + i, row, groups, histogram, added, aligned, share)


def _effects(features: Features, job: Job, models: Models) -> Callable[[Tensor], Tensor]:
    """Decoder rows (L, p) to what they add to the logits (L, V)."""
    key = canonical([job.instance.sources["model"], job.config["model"], job.device])
    if key not in models:
        models[key] = open_model(job)
    model, index = models[key], features.index
    path = direct_path(model, index["hook_name_out"], index["hook_head_index"])
    assert path is not None
    return lambda rows: logit_effects(model, rows.to(path) @ path)


@torch.no_grad()
def _each(effects: Callable[[Tensor], Tensor] | None, decoder: Tensor) -> Iterator[np.ndarray | None]:
    if effects is None:
        yield from [None] * len(decoder)
        return
    size = max(1, AT_ONCE // effects(decoder[:1]).shape[1])
    for rows in decoder.split(size):
        found = effects(rows)
        yield from (found - found.mean(dim=1, keepdim=True)).cpu().numpy()


def _aligned(decoder: Tensor) -> list[list[tuple[int, float, float]]]:
    values, places = largest(decoder, min(ALIGNED, decoder.shape[1]))
    shares = np.abs(values) / decoder.abs().sum(dim=1, keepdim=True).clamp(min=1e-30).cpu().numpy()
    columns = (places.tolist(), values.tolist(), shares.tolist())
    return [list(zip(*of_one, strict=True)) for of_one in zip(*columns, strict=True)]


def _ends(row: dict[str, Any]) -> tuple[float, float]:
    """Of the range that its histogram and its intervals cut."""
    return min(0.0, float(row["min"])), max(0.0, float(row["max"]))


def _histogram(row: dict[str, Any], counts: np.ndarray) -> Histogram | None:
    if not row["fired"]:
        return None
    edges = np.linspace(*_ends(row), len(counts) + 1)
    return Histogram((edges[1:] + edges[:-1]) / 2, counts)


def _groups(row: dict[str, Any], examples: list[Example], counts: np.ndarray, features: Features) -> list[Group]:
    """None of a latent that never fires."""
    if not row["fired"]:
        return []
    n, n_tokens = features.index["intervals"], features.index["n_tokens"]
    low, high = _ends(row)
    edges, inside = np.linspace(low, high, n + 1), counts.reshape(n, -1).sum(1)
    inside[min(n - 1, int(np.searchsorted(edges, 0.0, side="right")) - 1)] += n_tokens - row["fired"]
    of: dict[int | None, list[Example]] = {}
    for example in examples:
        of.setdefault(example["interval"], []).append(example)
    found = [Group(-1.0, high, -1.0, of.get(None, []))]
    for i in reversed(range(n)):
        found.append(Group(float(edges[i]), float(edges[i + 1]), float(inside[i] / n_tokens), of.get(i, [])))
    return found


def at(example: Example) -> int:
    """Which of an example's tokens it is an example of."""
    return int(example["position"] - example["begin"])
