"""Scores a filled-in sheet of a blind set: python scripts/score_blind.py results/blind/<key> [--sheet filled.csv]."""

import argparse
import json
from pathlib import Path

from saeflow.evaluation.blind import SheetError, p_value, read_sheet, score
from saeflow.planning.command import fail

if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path, help="the blind set: a folder of results/blind/")
    parser.add_argument("--sheet", type=Path, help="the filled-in sheet; default: sheet.csv in the folder")
    args = parser.parse_args()
    try:
        key = json.loads((args.folder / "secret/key.json").read_text())
        table = score(read_sheet(args.sheet or args.folder / "sheet.csv", key))
    except (SheetError, FileNotFoundError) as error:
        fail(f"score_blind: {error}")
    print(table.to_string(index=False))
    p = p_value(table)
    if p is not None:
        print(f"interpretable or not, Fisher's exact test: p = {p:.3g}")
