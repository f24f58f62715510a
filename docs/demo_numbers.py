"""Writes docs/figures/demo.csv: what README and docs state of the demo.

    make demo
    .venv/bin/python docs/demo_numbers.py

A row is an evaluation, called by its key, which changes with all that its numbers depend on: a test compares the keys
with those of the plan, so that the numbers cannot outlive what made them.
"""

import csv
import json
import sys
from pathlib import Path
from tempfile import TemporaryDirectory

from saeflow.planning.expansion import compose

ROOT = Path(__file__).resolve().parents[1]
TABLE = ROOT / "docs/figures/demo.csv"
METRICS = ("l0", "ce_clean", "ce_replaced", "ce_zero", "ce_mean", "loss_recovered_zero", "n_documents")


def keys() -> list[str]:
    """Of the demo's evaluations, as the plan has them today."""
    with TemporaryDirectory() as nothing:
        return list(compose(ROOT / "conf", ["experiment=demo"], nothing).stages["evaluate"])


def rows(results: Path) -> list[dict[str, str]]:
    """The demo's evaluations in `results`. Raises `FileNotFoundError` where one is not there."""
    found = []
    for key in keys():
        summary = json.loads((results / "evaluate" / key / "summary.json").read_text())
        of = {name: str(summary[name]) for name in ("kind", "activation", "hook_name_out", "d_sae")}
        found.append({"evaluation": key} | of | {name: f"{summary[name]:.6g}" for name in METRICS})
    return found


def write(results: Path) -> None:
    """The table, of the demo in `results`."""
    table = rows(results)
    with TABLE.open("w", newline="") as file:
        writer = csv.DictWriter(file, table[0].keys(), lineterminator="\n")
        writer.writeheader()
        writer.writerows(table)


if __name__ == "__main__":
    write(Path(sys.argv[1] if len(sys.argv) > 1 else "results"))
