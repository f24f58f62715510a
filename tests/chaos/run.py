"""Injects faults into a small experiment and says what became of it: make chaos FAULTS=1000 SEED=0.

One line a kind (tried, and how they ended), then one JSON object. Ends with 1 unless every fault was survived: the
experiment ends with the same bytes, nothing that was whole is made again, and what fails names the file or artifact.
"""

import argparse
import json
import shutil
import sys
import tempfile
import threading
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from random import Random

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from tests.chaos.bench import Bench  # noqa: E402
from tests.chaos.faults import KINDS, SURVIVED, Outcome  # noqa: E402


def inject(bench: Bench, faults: int, seed: int, workers: int, only: list[str]) -> list[Outcome]:
    """`faults` faults in the shares of `KINDS`, with progress on stderr."""
    kinds = {k: v for k, v in KINDS.items() if k in only or not only}
    total = sum(share for _, share in kinds.values())
    left = {k: round(faults * share / total) for k, (_, share) in kinds.items()}
    left[max(left, key=left.__getitem__)] += faults - sum(left.values())
    outcomes: list[Outcome] = []
    lock, number = threading.Lock(), 0

    def work() -> None:
        nonlocal number
        while True:
            with lock:
                open_kinds = [k for k, n in left.items() if n > 0]
                if not open_kinds:
                    return
                kind = max(open_kinds, key=left.__getitem__)
                most = min(left[kind], 6)
                left[kind] -= most if kind in ("kill", "signal", "power") else 1
                number += 1
                mine = number
            found = kinds[kind][0](bench, Random(f"{seed} {mine}"), f"trial-{mine}", most)
            with lock:
                if kind in ("kill", "signal", "power"):
                    left[kind] += most - len(found)  # it got through before it was hit so often
                outcomes.extend(found)
                for one in found[:1]:
                    print(f"[{len(outcomes)}] {kind}: {one.verdict} ({one.about[:700]})", file=sys.stderr, flush=True)

    with ThreadPoolExecutor(workers) as pool:
        for future in [pool.submit(work) for _ in range(workers)]:
            future.result()
    return outcomes


def report(outcomes: list[Outcome]) -> dict[str, int]:
    """Prints a line a kind; returns flat counts."""
    flat: dict[str, int] = {"faults": len(outcomes), SURVIVED: sum(o.verdict == SURVIVED for o in outcomes)}
    for kind in KINDS:
        counts = Counter(o.verdict for o in outcomes if o.kind == kind)
        if counts:
            print(f"{kind:15} {counts.total():4} tried   " + ", ".join(f"{n} {v}" for v, n in sorted(counts.items())))
            name = kind.replace(" ", "_")
            flat |= {f"{name}_tried": counts.total()} | {f"{name}_{v}": n for v, n in counts.items()}
    return flat


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--faults", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--experiment", default="chaos", choices=["chaos", "chaos_small"])
    parser.add_argument("--only", nargs="*", default=[], choices=list(KINDS))
    args = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="saeflow-chaos-"))
    started = time.monotonic()
    try:
        bench = Bench(folder, args.experiment)
        print(f"undisturbed: {bench.seconds:.0f} s, {len(bench.expected)} files", file=sys.stderr, flush=True)
        outcomes = inject(bench, args.faults, args.seed, args.workers, args.only)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    flat = report(outcomes)
    print(json.dumps(flat | {"seed": args.seed, "seconds": round(time.monotonic() - started)}))
    sys.exit(flat["faults"] != flat[SURVIVED])


if __name__ == "__main__":
    main()
