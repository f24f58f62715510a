"""Writes docs/reproduction.md: what notebooks and papers printed, and ours beside it.

    make reproduction                              (or .venv/bin/python docs/reproduction.py FOLDER ...)

Of every experiment that docs/published.yaml names and whose figures are in one of the folders of results, as the plan
has them today, ours are read into docs/figures/reproduction.csv; others stay as they are there. Without a folder the
page is written from that table alone. A row holds the key of the figures that it is from, which changes with all that
the number depends on: a test says which experiments to run again.
"""

import sys
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

import pandas as pd
import yaml
from draw_figures import planned

from saeflow.config import ConfigError

ROOT = Path(__file__).resolve().parents[1]
PUBLISHED = ROOT / "docs/published.yaml"
TABLE = ROOT / "docs/figures/reproduction.csv"
PAGE = ROOT / "docs/reproduction.md"
MODELS = {"embedded": "embedded model", "smollm2": "SmolLM2-135M"}
UNITS = {
    "%": (100, ".1f", " %"),
    "percent": (1, ".1f", " %"),
    "nats": (1, "+.4f", ""),
    "count": (1, ".0f", ""),
    "variance": (1, ".4f", ""),
    "cosine": (1, ".2f", ""),
    "score": (1, ".3f", ""),
}
"""By what they are multiplied, how they are written, and what stands behind."""
COLUMNS = ["id", "model", "value", "low", "high", "at", "experiment", "key"]


class Quantity(NamedTuple):
    """One row of the page: what was published, and where ours are."""

    id: str
    what: str
    paper: str
    n: str
    ours: dict[str, dict[str, Any]]
    unit: str
    why: str


def published() -> dict[str, Any]:
    """What the file holds: `about`, and `sources`, with their `rows` as quantities. Raises `TypeError` where a row
    lacks a field."""
    found: dict[str, Any] = yaml.safe_load(PUBLISHED.read_text())
    for source in found["sources"]:
        source["rows"] = [Quantity(**{"unit": "", "why": ""} | row) for row in source["rows"]]
    return found


def quantities() -> Iterator[tuple[Quantity, str, dict[str, Any]]]:
    """Every number of ours: the row that it stands in, its model, and where it is found."""
    for source in published()["sources"]:
        for row in source["rows"]:
            for model, where in row.ours.items():
                if "experiment" in where:
                    yield row, model, where


def key(experiment: str) -> str:
    """Of an experiment's figures as the plan has them today. Raises `ConfigError` where its model is not there."""
    with TemporaryDirectory() as nothing:
        return planned(f"experiment={experiment}", nothing)[1]


def look_up(figures: Path, where: dict[str, Any]) -> dict[str, Any]:
    """The number that a lookup names in an experiment's figures: `value`, `low`, `high`, and `at`, the number of the
    column `near`. Raises `LookupError` where no row or several answer."""
    table = pd.read_csv(figures / f"{where['table']}.csv")
    rows = table
    for column, wanted in where.get("where", {}).items():
        same = rows[column].isna() if wanted is None else rows[column] == wanted
        rows = rows[same]
    at = None
    for column, wanted in where.get("near", {}).items():
        at = rows[column].iloc[(rows[column] - wanted).abs().argmin()] if len(rows) else None
        rows = rows[rows[column] == at]
    name = where["value"]
    if "over" in where:  # seeds, or layers: the mean, and the range
        values = rows[name].astype(float)
        if len(values) < 2:
            raise LookupError(f"{figures.name}/{where['table']}.csv: {len(values)} rows for {where}, to be averaged")
        low, high = (values.min(), values.max()) if values.nunique() > 1 else (None, None)
        return {"value": values.mean(), "low": low, "high": high, "at": at}
    if len(rows) != 1:
        raise LookupError(f"{figures.name}/{where['table']}.csv: {len(rows)} rows for {where}")
    (row,) = rows.to_dict("records")
    ends = where.get("interval", [f"{name}_low", f"{name}_high"])
    low, high = (row.get(end) for end in ends)
    return {"value": row[name], "low": low, "high": high, "at": at}


def figures_of(experiment: str, results: list[Path]) -> Path | None:
    """The folder of an experiment's figures, in the first of the folders of results that has it; says what it found."""
    try:
        there = [folder / "figures" / key(experiment) for folder in results]
    except ConfigError as error:
        print(f"{experiment}: its rows stay, as it cannot be planned here: {error}")
        return None
    found = next((folder for folder in there if folder.is_dir()), None)
    print(f"{experiment}: {found or 'is in none of the folders; its rows stay'}")
    return found


def collect(results: list[Path]) -> pd.DataFrame:
    """The table with what is in the folders of results read anew."""
    table = pd.read_csv(TABLE) if TABLE.exists() else pd.DataFrame(columns=COLUMNS)
    found = {(row["id"], row["model"]): row for row in table.to_dict("records")}
    experiments = dict.fromkeys(where["experiment"] for _, _, where in quantities())
    folders = {experiment: there for experiment in experiments if (there := figures_of(experiment, results))}
    for row, model, where in quantities():
        if figures := folders.get(where["experiment"]):
            named = {"id": row.id, "model": model, "experiment": where["experiment"], "key": figures.name}
            found[row.id, model] = named | look_up(figures, where)
    order = [(row.id, model) for row, model, _ in quantities()]
    return pd.DataFrame([found[at] for at in order if at in found], columns=COLUMNS)


def shown(number: dict[str, Any], unit: str) -> str:
    """As it stands on the page: "16.5 % [15.9, 17.0]"."""
    scale, digits, after = UNITS.get(unit, (1, ".3g", unit and f" {unit}"))

    def text(value: float) -> str:
        return format(scale * value, digits).replace("-", "−")

    found = text(number["value"]) + after
    if pd.notna(number["low"]):
        found += f" [{text(number['low'])}, {text(number['high'])}]"
    return found + (f" at {number['at']:.3g}" if pd.notna(number["at"]) else "")


def page(table: pd.DataFrame) -> str:
    numbers = {(row["id"], row["model"]): row for row in table.to_dict("records")}
    held = published()
    about = held["about"]
    lines = ["<!-- Written by docs/reproduction.py from docs/published.yaml: change those. -->", ""]
    lines += ["# What was published, and ours", "", about["introduction"].strip(), ""]
    for source in held["sources"]:
        lines += [f"## {source['source']}", "", source["of"].strip(), ""]
        lines += [f"*Published*: {source['published'].strip()}", "", f"*Here*: {source['here'].strip()}", ""]
        lines += [f"| quantity | published | its n | {' | '.join(MODELS.values())} | why they differ |"]
        lines += ["|---|---|---|" + "---|" * len(MODELS) + "---|"]
        for row in source["rows"]:
            cells = [row.what, row.paper, row.n]
            for model in MODELS:
                where = row.ours.get(model, {"none": "–"})
                number = numbers.get((row.id, model))
                cells.append(where["none"] if "none" in where else shown(number, row.unit) if number else "not run yet")
            escaped = (cell.replace("|", "\\|") for cell in [*cells, row.why])
            lines.append(f"| {' | '.join(escaped)} |")
        lines += [""]
    lines += [
        "## Where ours are from",
        "",
        about["commands"].strip(),
        "",
        "| experiment | key of its figures |",
        "|---|---|",
    ]
    keys = table.drop_duplicates("experiment")
    lines += [f"| `{row['experiment']}` | `{row['key']}` |" for row in keys.to_dict("records")]
    return "\n".join([*lines, ""])


if __name__ == "__main__":
    if folders := [Path(name) for name in sys.argv[1:]]:
        collect(folders).to_csv(TABLE, index=False, float_format="%.6g", lineterminator="\n")
    PAGE.write_text(page(pd.read_csv(TABLE)))
    print(f"wrote {PAGE.relative_to(ROOT)}")
