"""How long Snakemake needs to answer: dry runs of sweeps of 100, 1,000 and 5,000 points, and `make demo` when done.

Last line: {"dry_run_s_100", "dry_run_s_1000", "dry_run_s_5000", "noop_s"}, medians in seconds. Each dry run is checked
to list a training job for every four points.
"""

import json
import statistics
import sys
import tempfile

from _dry_runs import ROOT, dry_run, timed


def main() -> None:
    found: dict[str, list[float]] = {}
    with tempfile.TemporaryDirectory() as directory:
        for _ in range(3):
            for points in (100, 1000, 5000):
                seconds = dry_run(points, directory)
                print(f"{points} points: {seconds:.1f} s", file=sys.stderr)
                found.setdefault(f"dry_run_s_{points}", []).append(seconds)
    print("finishing the demo, if it is not", file=sys.stderr)
    timed(["make", "demo"], ROOT)
    for _ in range(3):
        seconds, said = timed(["make", "demo"], ROOT)
        if "Nothing to be done" not in said:
            sys.exit(f"the second `make demo` did something:\n{said}")
        found.setdefault("noop_s", []).append(seconds)
    print(json.dumps({name: round(statistics.median(values), 2) for name, values in found.items()}))


main()
