"""Which pairs of latents compute most, and the text on which they do.

After the appendix of the paper (arXiv 2502.18147): pairs ranked by their mean J, mean |J| and count over the tokens on
which both latents are active; for the outputs that come first, the inputs of highest mean J; for every latent so named
the windows of text with its largest activations, and for every pair the windows with its largest |J|. Windows are
aligned within a row of tokens, so that no two overlap, and a latent's windows are ranked by their largest activation.
"""

import shutil
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow as pa
from torch import Tensor

from saeflow.config import JacobianConfig
from saeflow.features.examples import top
from saeflow.features.firings import Firings
from saeflow.features.text import Grid, Seen
from saeflow.jacobians.maps import JacobianBlocks
from saeflow.jacobians.sums import BLOCK, Pairs

STATISTICS = ("mean", "mean_absolute", "count")


# -------------------------------------------------------------------- pairs
def top_pairs_table(pairs: Pairs, config: JacobianConfig) -> pa.Table:
    """The first `config.top_pairs` pairs by each of `STATISTICS`, of those active together on `min_count` tokens or
    more. Means and standard deviations are over these tokens."""
    tables = []
    for statistic in STATISTICS:
        places = _ranked(pairs, statistic, config.top_pairs, config)
        columns = {"statistic": [statistic] * len(places), "rank": np.arange(1, len(places) + 1)}
        tables.append(pa.table(columns | _describe(pairs, places)))
    return pa.concat_tables(tables)


def top_inputs_table(pairs: Pairs, config: JacobianConfig) -> pa.Table:
    """Of the outputs that `top_pairs_table` names by mean J, each once: the `config.top_inputs` inputs of highest mean
    J. `output_rank` is the order of the outputs."""
    ranked = _ranked(pairs, "mean", config.top_pairs, config)
    tables = []
    for order, output in enumerate(dict.fromkeys(pairs.output[ranked].tolist()), start=1):
        start, end = np.searchsorted(pairs.output, [output, output + 1])
        places = _ranked(pairs, "mean", config.top_inputs, config, start, end)
        columns = {"output_rank": [order] * len(places), "rank": np.arange(1, len(places) + 1)}
        tables.append(pa.table(columns | _describe(pairs, places)))
    empty = np.zeros(0, np.int64)
    return pa.concat_tables(tables or [pa.table({"output_rank": empty, "rank": empty} | _describe(pairs, empty))])


def _ranked(
    pairs: Pairs, statistic: str, most: int, config: JacobianConfig, start: int = 0, end: int | None = None
) -> np.ndarray:
    """Places of the first `most` of the pairs from `start` to `end` that are frequent enough, best first; ties by
    output, then input latent."""
    end = len(pairs.count) if end is None else end
    best = np.zeros(0, np.int64)
    for first in range(start, end, BLOCK):
        best = _first(pairs, statistic, np.append(best, np.arange(first, min(first + BLOCK, end))), config)[:most]
    return best


def _first(pairs: Pairs, statistic: str, places: np.ndarray, config: JacobianConfig) -> np.ndarray:
    """`places` of pairs that are frequent enough, best first; of equal ones the earlier of `places`."""
    places = places[pairs.count[places] >= config.min_count]
    count = pairs.count[places]
    value = {"count": pairs.count, "mean": pairs.sum, "mean_absolute": pairs.sum_absolute}[statistic][places]
    return places[np.argsort(-(value if statistic == "count" else value / count), kind="stable")]


def _describe(pairs: Pairs, places: np.ndarray) -> dict[str, np.ndarray]:
    output, input, count = pairs.output[places], pairs.input[places], pairs.count[places]
    mean, mean_absolute, squares = (sums[places] / count for sums in (pairs.sum, pairs.sum_absolute, pairs.sum_squares))
    columns = {"output": output, "input": input, "count": count}
    for name, value in (("", mean), ("_absolute", mean_absolute)):
        columns |= {f"mean{name}": value, f"std{name}": np.sqrt(np.maximum(squares - value**2, 0))}
    return columns | {"active_output": pairs.active_output[output], "active_input": pairs.active_input[input]}


# -------------------------------------------------------------------- windows
class TopWindows:
    """The windows with the largest activations of every latent of one side."""

    def __init__(self, n_latents: int, grid: Grid, keep: int, scratch: Path) -> None:
        """`scratch`: a folder that may be made and filled."""
        self.grid, self.keep, self.firings = grid, keep, Firings(n_latents, scratch)

    def add(self, latents: Tensor, values: Tensor) -> None:
        """`latents` and `values` (N, k) of the next N tokens."""
        token, place = (values > 0).nonzero(as_tuple=True)
        found = (token, latents[token, place], values[token, place].float())
        self.firings.add(len(values), *(column.cpu().numpy() for column in found))

    def remove(self) -> None:
        """Frees the disk."""
        shutil.rmtree(self.firings.scratch, ignore_errors=True)

    def windows(self) -> dict[int, list[int]]:
        """Of every latent that is active, the largest activation first; of equal ones the earlier."""
        found: dict[int, list[int]] = {}
        for chunk in self.firings.chunks():
            best = top(Seen(chunk, self.grid), self.keep)
            windows = self.grid.windows(chunk.token[best])
            for latent, window in zip((chunk.first + chunk.latent[best]).tolist(), windows.tolist(), strict=True):
                found.setdefault(latent, []).append(window)
        return found


class ExampleSelection(NamedTuple):
    """Latents and pairs whose examples are shown, and the windows that they take them from."""

    sides: dict[str, dict[int, list[int]]]
    """Windows by latent, of `output` and of `input`."""
    pairs: list[tuple[int, int]]
    """(output, input)"""

    @property
    def windows(self) -> list[int]:
        """All of them, each once, in order."""
        return sorted({w for side in self.sides.values() for found in side.values() for w in found})


def select_examples(tables: Iterable[pa.Table], outputs: TopWindows, inputs: TopWindows) -> ExampleSelection:
    """Everything that the tables of pairs name."""
    named = (zip(t["output"].to_pylist(), t["input"].to_pylist(), strict=True) for t in tables)
    pairs = list(dict.fromkeys(pair for table in named for pair in table))
    of_outputs, of_inputs = outputs.windows(), inputs.windows()
    by_output = {i: of_outputs.get(i, []) for i in sorted({i for i, _ in pairs})}
    by_input = {j: of_inputs.get(j, []) for j in sorted({j for _, j in pairs})}
    return ExampleSelection({"output": by_output, "input": by_input}, pairs)


class Activity:
    """Activations of the wanted latents, and J of the wanted pairs, on the tokens of the windows."""

    def __init__(self, wanted: ExampleSelection) -> None:
        self.wanted = wanted
        self.values: dict[str, dict[tuple[int, int], float]] = {"output": {}, "input": {}}
        """By side, then by latent and token number."""
        self.jacobians: dict[tuple[int, int, int], float] = {}
        """By output latent, input latent and token number."""
        self._latents = {side: np.array(sorted(windows)) for side, windows in wanted.sides.items()}
        self._pairs = np.array([i << 32 | j for i, j in wanted.pairs])

    def add(self, token: np.ndarray, blocks: JacobianBlocks) -> None:
        """`token` (N,): numbers of the blocks' tokens."""
        sides = {"output": (blocks.outputs, blocks.values_out), "input": (blocks.inputs, blocks.values_in)}
        for side, (latents, values) in sides.items():
            indices, size = latents.cpu().numpy(), values.cpu().numpy()
            rows, places = np.nonzero(np.isin(indices, self._latents[side]) & (size > 0))
            keys = zip(indices[rows, places].tolist(), token[rows].tolist(), strict=True)
            self.values[side].update(zip(keys, size[rows, places].tolist(), strict=True))
        i, j = blocks.outputs.cpu().numpy()[:, :, None], blocks.inputs.cpu().numpy()[:, None, :]
        J = blocks.J.cpu().numpy()
        rows, a, b = np.nonzero(np.isin(i << 32 | j, self._pairs) & (J != 0))
        triples = zip(i[rows, a, 0].tolist(), j[rows, 0, b].tolist(), token[rows].tolist(), strict=True)
        self.jacobians.update(zip(triples, J[rows, a, b].tolist(), strict=True))


class Window(NamedTuple):
    """A window of text as it is shown."""

    sequence: int
    """Row of the held-out split."""
    position: int
    """Of its first token."""
    token_ids: list[int]
    tokens: list[str]


Read = Callable[[int], Window]
"""The text of a window, by its number."""


def contexts_table(activity: Activity, grid: Grid, read: Read) -> pa.Table:
    """One row a latent and window: `side` (input or output), `latent`, `rank`, where the window lies, its tokens and
    the latent's activations on them; 0 at position 0, which is not studied."""
    rows = []
    for side, latents in activity.wanted.sides.items():
        for latent, windows in latents.items():
            for rank, window in enumerate(windows, start=1):
                values = [activity.values[side].get((latent, t), 0.0) for t in _numbers(grid, window)]
                named = {"side": side, "latent": latent, "rank": rank, "max_activation": max(values)}
                rows.append(named | read(window)._asdict() | {"activations": values})
    return pa.Table.from_pylist(rows, schema=_schema({"side": pa.string(), "latent": pa.int64()}, ["activations"]))


def pair_contexts_table(activity: Activity, grid: Grid, keep: int, read: Read) -> pa.Table:
    """One row a pair and window, of the windows of both its latents the `keep` with the largest |J|: `output`, `input`,
    `rank`, where the window lies, its tokens, J, and both latents' activations."""
    rows = []
    sides = activity.wanted.sides
    for i, j in activity.wanted.pairs:
        found = []
        for window in sorted({*sides["output"][i], *sides["input"][j]}):
            J = [activity.jacobians.get((i, j, t), 0.0) for t in _numbers(grid, window)]
            if any(J):
                found.append((window, J))
        found.sort(key=lambda one: -max(map(abs, one[1])))  # stable: of equal ones the earlier
        for rank, (window, J) in enumerate(found[:keep], start=1):
            named = {"output": i, "input": j, "rank": rank, "max_activation": max(J, key=abs)}
            numbers = _numbers(grid, window)
            values = {"jacobian": J}
            for side, latent in (("output", i), ("input", j)):
                values[f"{side}_activations"] = [activity.values[side].get((latent, t), 0.0) for t in numbers]
            rows.append(named | read(window)._asdict() | values)
    names = ["jacobian", "output_activations", "input_activations"]
    table = pa.Table.from_pylist(rows, schema=_schema({"output": pa.int64(), "input": pa.int64()}, names))
    return table.rename_columns({"max_activation": "largest_jacobian"})


def _numbers(grid: Grid, window: int) -> list[int]:
    """Token numbers of a window; -1 at position 0."""
    row, start, end = grid.span(window)
    return [int(grid.number(np.array(row), np.array(p))) if p >= grid.first else -1 for p in range(start, end)]


def _schema(first: dict[str, pa.DataType], values: list[str]) -> pa.Schema:
    types = first | {"rank": pa.int64(), "max_activation": pa.float64(), "sequence": pa.int64(), "position": pa.int64()}
    types |= {"token_ids": pa.list_(pa.int32()), "tokens": pa.list_(pa.string())}
    return pa.schema(list((types | {name: pa.list_(pa.float32()) for name in values}).items()))
