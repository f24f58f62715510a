"""The best dictionaries of an experiment, from the tables beside its figures: the front of loss against sparsity.

Numbers are those of the CSV files, as they stand there; nothing is computed but which are on the front.
"""

import csv
import math
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from saeflow.dictionaries.naming import dictionary_key

MOST = 12
"""Points that are shown of a place."""


class Metric(NamedTuple):
    title: str
    unit: str
    form: str


METRICS = {
    "l0": Metric("L0", "active latents per token", ".4g"),
    "ce_replaced": Metric("CE loss", "nats per token", ".4f"),
    "ce_increase": Metric("CE over clean", "nats per token", ".4f"),
    "loss_recovered_zero": Metric("recovered of zero ablation", "share", ".3f"),
    "explained_variance": Metric("explained variance", "share", ".3f"),
    "dead_fraction": Metric("dead latents", "share", ".3f"),
    "recovery": Metric("recovery of true features", "0: random directions, 1: all", ".3f"),
    "mixtures": Metric("mixtures", "share of live latents", ".3f"),
}
_FRONTS = (("table", "ce_replaced", 1.0), ("recovery", "recovery", -1.0))
"""Tables that have a front, by the column beside L0, and whether less of that is better."""
_OF_SEEDS = "sparsity_faithfulness"
"""In which dictionaries that differ in their seeds alone are one row."""


class Cell(NamedTuple):
    """A number of a table: as it stands there, as it is shown, and what is said of how sure it is."""

    value: str
    shown: str
    interval: str
    seeds: str


@dataclass(frozen=True)
class Point:
    """A row of a table that no other row of its place beats in both sparsity and loss."""

    series: str
    amount: str
    seeds: str
    """The seed, or how many there are."""
    keys: tuple[str, ...]
    """Of the dictionaries."""
    cells: dict[str, Cell]
    """By the name of the metric."""


@dataclass(frozen=True)
class Place:
    """The front at one place."""

    place: str
    metrics: tuple[Metric, ...]
    points: tuple[Point, ...]
    """Those that are shown, the sparsest first."""
    n_points: int
    """On the front."""
    n_rows: int
    """That were compared."""
    file: str
    """The table."""


def best_points(folder: Path) -> list[Place]:
    """The front of each place, of the tables in a folder of figures; none where no table has one."""
    for name, column, sense in _FRONTS:
        rows = read_table(folder / f"{name}.csv")
        if name == "table" and any(int(float(row["seeds"])) > 1 for row in read_table(folder / f"{_OF_SEEDS}.csv")):
            name, rows = _OF_SEEDS, read_table(folder / f"{_OF_SEEDS}.csv")
        if any(row.get(column) for row in rows):
            places = dict.fromkeys(row["place"] for row in rows)
            return [_place(place, [r for r in rows if r["place"] == place], column, sense, name) for place in places]
    return []


def read_table(file: Path) -> list[dict[str, str]]:
    """Rows of a CSV by column, as text; none where it is not there."""
    try:
        with open(file, newline="", encoding="utf-8") as lines:
            return list(csv.DictReader(lines))
    except FileNotFoundError:
        return []


def _place(place: str, rows: list[dict[str, str]], column: str, sense: float, name: str) -> Place:
    alive = [(number(row["l0"]), sense * number(row[column]), row) for row in rows]
    alive = [(x, y, row) for x, y, row in alive if x > 0 and math.isfinite(y)]
    front = [
        (x, y, row) for x, y, row in alive
        if not any(a <= x and b <= y and (a < x or b < y) for a, b, _ in alive)
    ]  # fmt: skip
    front.sort(key=lambda point: point[:2])
    shown = front if len(front) <= MOST else [front[round(i * (len(front) - 1) / (MOST - 1))] for i in range(MOST)]
    metrics = {m: METRICS[m] for m in METRICS if any(row.get(m) for *_, row in front)}
    points = tuple(_point(row, metrics) for *_, row in shown)
    return Place(place, tuple(metrics.values()), points, len(front), len(rows), f"{name}.csv")


def _point(row: dict[str, str], metrics: dict[str, Metric]) -> Point:
    amount = f"{row['amount_name']} = {number(row['amount']):g}" if row.get("amount") else ""
    own = row.get("dictionary_key") or dictionary_key(row.get("train_key", ""), row.get("part"))
    keys = row.get("dictionary_keys") or own
    n = int(float(row.get("seeds") or 1))
    seed = f"{number(row['seed']):g}" if row.get("seed") else ""
    cells = {name: _cell(row, name, metric, n) for name, metric in metrics.items()}
    return Point(row["series"], amount, f"{n} seeds" if n > 1 else seed, tuple(keys.split()), cells)


def _cell(row: dict[str, str], name: str, metric: Metric, n_seeds: int) -> Cell:
    def ends(low: str, high: str, between: str) -> str:
        found = [row.get(f"{name}_{end}") for end in (low, high)]
        return between.join(f"{number(end):{metric.form}}" for end in found if end) if all(found) else ""

    value = row.get(name, "")
    seeds = ends("least", "most", " to ") if n_seeds > 1 else ""
    return Cell(value, f"{number(value):{metric.form}}" if value else "", ends("low", "high", ", "), seeds)


def number(text: str) -> float:
    """NaN for none."""
    return float(text) if text else math.nan
