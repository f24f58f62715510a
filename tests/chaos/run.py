"""Injects faults into a small experiment and says what became of it: make chaos FAULTS=1000 SEED=0.

One line a kind (tried, and how they ended), then one JSON object. Ends with 1 unless every fault was survived: the
experiment ends with the same bytes, nothing that was whole is made again, and what fails names the file or artifact.
"""

import argparse
import itertools
import json
import shutil
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from random import Random
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from tests.chaos import damage, nodes, strikes  # noqa: E402
from tests.chaos.bench import Bench, Impossible  # noqa: E402
from tests.chaos.outcome import SURVIVED, Outcome  # noqa: E402


class Kind(NamedTuple):
    inject: Callable[[Bench, Random, str, int], list[Outcome]]
    share: int
    """Of all faults, in hundredths."""
    most: int = 1
    """Faults of one trial, from which what became of them is judged together."""


KINDS = {
    "kill": Kind(strikes.killed, 10, 8),
    "signal": Kind(strikes.signalled, 3, 4),
    "power": Kind(strikes.power_cut, 7, 8),
    "preempted": Kind(nodes.preempted, 3, 4),
    "node": Kind(nodes.node_died, 2),
    "late disk": Kind(nodes.late_disk, 1),
    "memory": Kind(nodes.memory, 1),
    "log folder": Kind(nodes.log_folder, 1),
    "flip": Kind(damage.flipped, 31, 16),
    "truncate": Kind(damage.truncated, 15, 16),
    "delete": Kind(damage.deleted, 15, 16),
    "lost": Kind(damage.lost, 5, 4),
    "clock": Kind(damage.clock, 2),
    "bookkeeping": Kind(damage.bookkeeping, 2),
    "disk full": Kind(strikes.disk_full, 1),
    "source swapped": Kind(strikes.source_swapped, 1),
    "two runs": Kind(strikes.two_runs, 1),
}


def inject(bench: Bench, faults: dict[str, int], seed: int, workers: int = 1, keep: bool = False) -> list[Outcome]:
    """So many faults of each kind, with progress on stderr. Which they are depends on the seed, and the moments at
    which they hit on the machine, too. What is impossible here leaves its share to the other kinds."""
    left = dict(faults)
    outcomes: list[Outcome] = []
    lock, numbers = threading.Lock(), itertools.count(1)

    def work() -> None:
        while True:
            with lock:
                if not any(n > 0 for n in left.values()):
                    return
                name, number = max(left, key=left.__getitem__), next(numbers)
                kind = KINDS[name]
                asked = min(left[name], kind.most)
                left[name] -= asked
            try:
                found = kind.inject(bench, Random(f"{seed} {number}"), f"trial-{number}-{name}", asked)
            except Impossible as error:
                with lock:
                    print(f"{name}: not tried, {error}", file=sys.stderr, flush=True)
                    more = asked + left.pop(name, 0)
                    for other, n in shares(more, list(left)).items():
                        left[other] += n
                continue
            if not keep or all(one.verdict == SURVIVED for one in found):
                for folder in bench.folder.glob(f"trial-{number}-*"):
                    shutil.rmtree(folder, ignore_errors=True)
            with lock:
                if name in left:
                    left[name] += asked - len(found)  # it got through before it was hit so often
                outcomes.extend(found)
                for one in found[:1]:
                    print(
                        f"[{len(outcomes)}] trial-{number} {name}: {one.verdict} ({one.about[:900]})",
                        file=sys.stderr,
                        flush=True,
                    )

    with ThreadPoolExecutor(workers) as pool:
        for future in [pool.submit(work) for _ in range(workers)]:
            future.result()
    return outcomes


def shares(faults: int, kinds: list[str]) -> dict[str, int]:
    """`faults` in the shares of some kinds, the largest remainders first, and of each kind one if they suffice."""
    total, least = sum(KINDS[k].share for k in kinds), int(faults >= len(kinds))
    exact = {k: least + (faults - least * len(kinds)) * KINDS[k].share / total for k in kinds}
    whole = {k: int(exact[k]) for k in kinds}
    for k in sorted(kinds, key=lambda k: whole[k] - exact[k])[: faults - sum(whole.values())]:
        whole[k] += 1
    return whole


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
    parser.add_argument("--keep", action="store_true", help="keep the folders of what was not survived")
    args = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="saeflow-chaos-"))
    started = time.monotonic()
    try:
        bench = Bench.undisturbed(folder, args.experiment)
        print(f"undisturbed: {bench.seconds:.0f} s, {len(bench.expected)} files", file=sys.stderr, flush=True)
        wanted = shares(args.faults, [k for k in KINDS if k in args.only or not args.only])
        outcomes = inject(bench, wanted, args.seed, args.workers, args.keep)
    finally:
        if not args.keep:
            shutil.rmtree(folder, ignore_errors=True)
    flat = report(outcomes)
    print(json.dumps(flat | {"seed": args.seed, "seconds": round(time.monotonic() - started)}))
    sys.exit(flat["faults"] != flat[SURVIVED])


if __name__ == "__main__":
    main()
