"""What an experiment asked: what it compared, from the table of its dictionaries, and what its file says of it."""

import re
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

from saeflow.config.labels import file_safe

_SAID = ("place", "series", "amount_name", "amount", "seed", "d_sae", "dictionary_key", "worse_than_the_mean")
_METRIC = re.compile(r"(l0|ce_\w+|loss_recovered_\w+|explained_variance|dead_fraction)(_low|_high)?")
_MOST_VALUES, _MOST_SERIES = 12, 24


class Series(NamedTuple):
    """What was compared: dictionaries that are equal in all but their amounts, seeds and places."""

    series: str
    amounts: str
    places: str
    seeds: str
    n: int


def asked(table: list[dict[str, str]]) -> list[Series]:
    """By series: which amounts, at which places, with which seeds."""
    rows: dict[str, list[dict[str, str]]] = {}
    for row in table:
        rows.setdefault(row["series"], []).append(row)
    return [
        Series(
            series,
            f"{mine[0]['amount_name']} = {_values(row['amount'] for row in mine)}" if mine[0].get("amount") else "",
            _values((row["place"] for row in mine), "; "),
            _values(row.get("seed", "") for row in mine),
            len(mine),
        )
        for series, mine in list(rows.items())[:_MOST_SERIES]
    ]  # fmt: skip


def axes(table: list[dict[str, str]]) -> list[tuple[str, str]]:
    """What else differs between dictionaries of one kind, by its name in `conf/`."""
    columns = [name for name in (table[0] if table else {}) if name not in _SAID and not _METRIC.fullmatch(name)]
    kinds: dict[str, list[dict[str, str]]] = {}
    for row in table:
        kinds.setdefault(row["series"].partition(",")[0], []).append(row)
    varies = [name for name in columns if any(len({row[name] for row in rows}) > 1 for rows in kinds.values())]
    return [(name, _values(row[name] or "none" for row in table)) for name in varies]


def _values(found: Iterable[str], between: str = ", ") -> str:
    values = list(dict.fromkeys(value for value in found if value))
    more = f" and {len(values) - _MOST_VALUES} more" if len(values) > _MOST_VALUES else ""
    return between.join(values[:_MOST_VALUES]) + more


def experiments_of(conf: Path) -> dict[str, str]:
    """What the files of `conf/experiment` say of themselves: the comment at their head, by the experiment's name."""
    found = {}
    for file in sorted((conf / "experiment").rglob("*.yaml")):
        text = file.read_text(encoding="utf-8", errors="replace")
        named = re.search(r"^experiment_name: *[\"']?([\w.+-]+)", text, re.MULTILINE)
        head = [line[1:].strip() for line in text.split("\n\n")[0].splitlines() if line.startswith("#")]
        about_it = " ".join(line for line in head if not line.startswith("@package"))
        if named and about_it:
            found[file_safe(named[1])] = about_it
    return found
