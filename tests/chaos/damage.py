"""Faults between runs: flipped bits, truncated and deleted files, lost artifacts, times of files, torn bookkeeping."""

import os
import re
import shutil
import time
from functools import partial
from random import Random

from tests.chaos.bench import Bench, Copy
from tests.chaos.outcome import Outcome, judge

from saeflow.planning.stages import stages


def damaged(bench: Bench, rng: Random, name: str, most: int, how: str) -> list[Outcome]:
    """Files of a finished experiment are damaged, and something that reads them has yet to be made. Then it is run
    again; what nothing reads `make verify` finds."""
    copy = bench.copy(name)
    kinds = _file_kinds(bench)
    files = [rng.choice(kinds[kind]) for kind in rng.sample(sorted(kinds), min(most, len(kinds)))]
    about = f"{how} " + "; ".join(f"{file}: {_damage(copy, file, how, rng)}" for file in files)
    hurt = {a for file in files for a in bench.artifacts if file.startswith(f"{a}/")}
    stores = {"/".join(f.split("/")[:2]) for f in files if not any(f.startswith(f"{a}/") for a in hurt)}
    hurt |= {a for a in bench.artifacts for store in stores if a.startswith(f"{store}/")}  # the columns of a store
    needs = bench.base.needs()
    removed = {rng.choice(readers) for a in sorted(hurt) if (readers := sorted(r for r in needs if a in needs[r]))}
    for artifact in bench.readers(removed):  # so that something needs the reader
        shutil.rmtree(copy.results / artifact, ignore_errors=True)
    kept = {a: receipt for a, receipt in copy.receipts().items() if a not in hurt}
    runs = copy.finish(most + 4)
    if (check := copy.verify()).code:
        runs += [check, *copy.finish()]
    named = frozenset(part for file in files for part in (file.split("/")[-1], file.split("/")[1]))
    found = judge(how, about, copy, bench, runs, kept, _caches(hurt | stores), named)
    return [found] * len(files)


flipped, truncated, deleted = (partial(damaged, how=how) for how in ("flip", "truncate", "delete"))


def _file_kinds(bench: Bench) -> dict[str, list[str]]:
    """Files of the undisturbed run by stage and name, so that each kind is as likely as another."""
    kinds: dict[str, list[str]] = {}
    for name in bench.expected:
        kind = re.sub(r"[0-9a-f]{8,}", "H", re.sub(r"\d+", "0", f"{name.split('/')[0]}/{name.split('/')[-1]}"))
        kinds.setdefault(kind, []).append(name)
    return kinds


def _damage(copy: Copy, file: str, how: str, rng: Random) -> str:
    path = copy.results / file
    about = path.stat()
    size = about.st_size
    if how == "delete":
        path.unlink()
        return "gone"
    if how == "truncate":
        to = rng.choice([0, size // 2, max(size - 1, 0)])
        os.truncate(path, to)
        return f"{size} to {to} bytes"
    data = bytearray(path.read_bytes())
    if not data:
        return "was empty"
    at, bit = rng.randrange(len(data)), rng.randrange(8)
    data[at] ^= 1 << bit
    path.write_bytes(data)
    os.utime(path, ns=(about.st_atime_ns, about.st_mtime_ns))  # bits rot without a trace
    return f"bit {bit} of byte {at} of {size}"


def lost(bench: Bench, rng: Random, name: str, most: int) -> list[Outcome]:
    """Artifacts, or all of a stage, are deleted."""
    copy = bench.copy(name)
    if rng.random() < 0.3:
        stage = rng.choice(sorted({a.split("/")[0] for a in bench.artifacts}))
        removed = {a for a in bench.artifacts if a.startswith(f"{stage}/")}
        folders = {stage}  # with the stores that columns of activations lie in
    else:
        removed = folders = set(rng.sample(sorted(bench.artifacts), rng.randint(1, min(most, 4))))
    for folder in folders:
        shutil.rmtree(copy.results / folder)
    about = f"{', '.join(sorted(removed))[:300]} lost"
    found = judge("lost", about, copy, bench, copy.finish(), copy.receipts(), _passing(folders))
    return [found] * min(len(removed), most)


def _passing(folders: set[str]) -> frozenset[str]:
    """Of what is gone, all that is there only for others to read: nothing asks for it unless they are gone too."""
    return frozenset(folder for folder in folders if not stages()[folder.split("/")[0]].target)


def _caches(hurt: set[str]) -> frozenset[str]:
    """Of what is damaged, all that a run makes again only if something needs it."""
    return frozenset(a for a in hurt if stages()[a.split("/")[0]].cached)


def clock(bench: Bench, rng: Random, name: str, most: int) -> list[Outcome]:
    """Times of files in the future, in the past, in no order, or those of a copy; then one artifact is made again."""
    copy, how = bench.copy(name), rng.choice(["future", "past", "shuffled", "some in the future"])
    now = time.time()
    for path in [p for p in sorted(copy.home.rglob("*")) if p.is_file() and not p.is_symlink()]:
        if how == "some in the future" and rng.random() < 0.5:
            continue
        shift = {"past": -1e6, "shuffled": rng.uniform(-1e6, 0)}.get(how, 7200.0)
        os.utime(path, (now + shift, now + shift))
    removed = _remove_a_target(bench, copy, rng)
    found = judge("clock", f"{how}, {removed} lost", copy, bench, copy.finish(), copy.receipts())
    return [found]


def _remove_a_target(bench: Bench, copy: Copy, rng: Random) -> str:
    removed = rng.choice([a for a in sorted(bench.artifacts) if stages()[a.split("/")[0]].target])
    shutil.rmtree(copy.results / removed)
    return removed


def bookkeeping(bench: Bench, rng: Random, name: str, most: int) -> list[Outcome]:
    """Frozen plans, digests, the diary and Snakemake's records are torn, and one artifact is made again."""
    copy, how = bench.copy(name), rng.choice(["empty", "half", "noise", "list"])
    files = [p for p in sorted((copy.home / ".snakemake").rglob("*")) if p.is_file() and "log" not in p.parts]
    files = rng.sample(files, max(1, len(files) // 3)) + sorted((copy.home / ".snakemake").rglob("*.json"))
    files += [p for p in [copy.results / "made.jsonl"] if p.exists()]
    for path in files:
        whole = path.read_bytes()
        path.write_bytes(
            {"empty": b"", "half": whole[: len(whole) // 2], "noise": rng.randbytes(64), "list": b"[]"}[how]
        )
    removed = _remove_a_target(bench, copy, rng)
    about = f"{how}, {len(files)} files, {removed} lost"
    found = judge("bookkeeping", about, copy, bench, copy.finish(), copy.receipts())
    return [found]
