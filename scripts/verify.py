"""Compares everything below results/ with what was written: artifacts with their receipts, chunks of activations
and coordinates, checkpoints and progress files with the checksums that they carry. Says what a rerun would make again.

python scripts/verify.py [--results results] [--set-aside]
"""

import argparse
import sys
from collections.abc import Iterator
from pathlib import Path

from saeflow.storage.checksums import StateError, load_state
from saeflow.storage.receipts import RECEIPT, DamagedError, verify


def damaged(results: Path) -> Iterator[tuple[Path, Exception | None]]:
    """Every artifact, array and state, with what is wrong with it."""
    from saeflow.activations.coordinates import damaged_coordinates
    from saeflow.activations.reader import damaged_shards
    from saeflow.activations.store import Column, open_column

    longest: dict[Path, Column] = {}
    for receipt in sorted(results.rglob(RECEIPT)):
        folder = receipt.parent
        if any(part.endswith(".partial") for part in folder.parts):
            continue  # of a job that is at work, or was killed
        try:
            verify(folder)
            yield folder, None
            if (folder / "column.json").is_file():
                column = open_column(folder)
                longest[column.array] = max(longest.get(column.array, column), column, key=lambda c: c.n_tokens)
        except DamagedError as error:
            yield folder, error
    for array, column in longest.items():
        errors = list(damaged_shards(column)) if array.is_dir() else []  # else it was deleted to make room
        yield from ((error.path, error) for error in errors)
        if not errors:
            yield array, None
    for store in sorted({column.store for column in longest.values()}):
        n_tokens = max(column.n_tokens for column in longest.values() if column.store == store)
        if (store / "activations.zarr").is_dir():
            yield from ((error.file, error) for error in damaged_coordinates(store, n_tokens))
    for pattern in ("checkpoints/*/step-*.safetensors", "activations/*/progress/*.safetensors"):
        for file in sorted(results.glob(pattern)):
            try:
                load_state(file)
                yield file, None
            except StateError as error:
                yield file, error


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, default=Path("results"), help="the folder; default: results")
    parser.add_argument("--set-aside", action="store_true", help="make what is damaged count as missing")
    args = parser.parse_args()
    n, again = 0, dict[Path, None]()
    for path, error in damaged(args.results):
        n += error is None
        if error:
            print(f"damaged: {error}")
        if isinstance(error, DamagedError):
            again |= dict.fromkeys(error.set_aside() if args.set_aside else error.affected())
        elif isinstance(error, StateError) and args.set_aside:
            path.unlink()  # a training goes on without it, a store computes what it counted again
    for folder in again:
        print(f"{'counts as missing now' if args.set_aside else 'would be made again'}: {folder}")
    if again and not args.set_aside:
        print("make verify SET_ASIDE=1 makes these count as missing, so that the next run makes them again")
    print(f"{n} artifacts, arrays and states are as they were written")
    sys.exit(bool(again))


main()
