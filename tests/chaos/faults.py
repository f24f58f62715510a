"""Faults of every kind, injected at a random place or moment, and what became of the experiment."""

import os
import re
import shutil
import signal
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from random import Random

from tests.chaos.bench import HERE, Bench, Copy, Run, strike

SURVIVED, SILENT, STUCK, REPEATED, UNNAMED = "survived", "silent", "stuck", "repeated", "unnamed"
"""How a fault ends. Silent: other bytes, without a word. Stuck: no rerun gets through. Repeated: what was whole was
made again. Unnamed: a job that failed named neither the file nor its artifact."""


@dataclass(frozen=True)
class Outcome:
    kind: str
    verdict: str
    about: str = ""


def judge(
    kind: str,
    about: str,
    copy: Copy,
    bench: Bench,
    runs: list[Run],
    kept: dict[str, str],
    lost: frozenset[str] = frozenset(),
    named: tuple[str, ...] = (),
) -> Outcome:
    """`kept`: receipts that must be as they were; `lost`: artifacts that nothing needs, and which may stay away;
    `named`: what the message of a failed job must hold one of."""
    if runs[-1].code:
        return Outcome(kind, STUCK, f"{about}: {' | '.join(runs[-1].reasons)[:600] or runs[-1].said[-600:]}")
    found = copy.contents()
    gone = {n for n in bench.expected if n not in found and not any(n.startswith(f"{a}/") for a in lost)}
    other = {n for n in bench.expected if n in found and found[n] != bench.expected[n]}
    if gone or other:
        return Outcome(kind, SILENT, f"{about}: differ {sorted(other)[:4]}, gone {sorted(gone)[:4]}")
    receipts = copy.receipts()
    again = [a for a, receipt in kept.items() if receipts.get(a) != receipt]
    if again:
        return Outcome(kind, REPEATED, f"{about}: {sorted(again)[:6]}")
    silent = [r for r in runs if r.code and not any(n in line for n in named for line in r.reasons)]
    if named and silent:
        return Outcome(kind, UNNAMED, f"{about}: {' | '.join(silent[0].reasons)[:400] or silent[0].said[-400:]}")
    return Outcome(kind, SURVIVED, about)


def struck(bench: Bench, rng: Random, name: str, most: int, kind: str, numbers: tuple[int, ...]) -> list[Outcome]:
    """A run from nothing, hit at random moments and started again, until it gets through or was hit `most` times."""
    copy = bench.fresh(name)
    kept: dict[str, str] = {}
    hits: list[str] = []
    flushed = copy.home / "flushed"
    durable = _states(copy) if kind == "power" else set()
    environment = {"PYTHONPATH": str(HERE / "power"), "CHAOS_FLUSHED": str(flushed)} if kind == "power" else None
    moment = 0.0
    while len(hits) < most:
        if "--unlock" in (copy.home / "said").read_text(errors="replace") if (copy.home / "said").exists() else "":
            copy.run("--unlock")
        process = copy.start(environment=environment)
        started, moment = time.monotonic(), rng.uniform(2, 2 + bench.seconds / 2)
        while process.poll() is None and time.monotonic() - started < moment:
            time.sleep(0.01)
        if process.poll() is not None:
            if process.returncode == 0:
                break
            continue
        number = rng.choice(numbers)
        strike(process, number)
        if number == signal.SIGSTOP:
            time.sleep(rng.uniform(0.1, 2))
            strike(process, signal.SIGCONT)
        if number != signal.SIGKILL:
            copy.ended(process)
        if kind == "power":
            _lose(copy, durable | _noted(flushed), kept, rng)
            durable = _states(copy)
        hits.append(f"{signal.Signals(number).name} after {moment:.1f} s")
        kept = {**kept, **copy.receipts()}
    outcome = judge(kind, "; ".join(hits), copy, bench, copy.finish(), kept if kind != "power" else {})
    copy.remove()
    return [Outcome(kind, outcome.verdict, outcome.about)] * max(len(hits), 1)


def _states(copy: Copy) -> set[str]:
    return {_state(p) for p in copy.home.rglob("*")} | {_state(copy.home)}


def _state(path: Path) -> str:
    about = path.lstat()
    return f"{about.st_ino} {about.st_size} {about.st_mtime_ns}"


def _noted(flushed: Path) -> set[str]:
    return set(flushed.read_text().splitlines()) if flushed.exists() else set()


def _lose(copy: Copy, durable: set[str], kept: dict[str, str], rng: Random) -> None:
    """Takes away what had not reached the disk: contents of files (a file system journals their names first), and
    names in folders that had not been flushed since."""
    for folder in [p for p in copy.results.rglob("*") if p.is_dir()]:
        artifact = folder.relative_to(copy.results).as_posix()
        new = (folder / "provenance.json").exists() and artifact not in kept
        if new and _state(folder.parent) not in durable and rng.random() < 0.5:
            shutil.rmtree(folder)
    for path in [*copy.results.rglob("*"), *(copy.home / ".snakemake").rglob("*")]:
        if path.is_file() and not path.is_symlink() and _state(path) not in durable and rng.random() < 0.7:
            os.truncate(path, rng.choice([0, 0, path.stat().st_size // 2]))


def _file_kinds(bench: Bench) -> dict[str, list[str]]:
    """Files of the undisturbed run by stage and name, so that each kind is as likely as another."""
    kinds: dict[str, list[str]] = {}
    for name in bench.expected:
        kind = re.sub(r"[0-9a-f]{8,}", "H", re.sub(r"\d+", "0", "/".join([name.split("/")[0], name.split("/")[-1]])))
        kinds.setdefault(kind, []).append(name)
    return kinds


def damaged(bench: Bench, rng: Random, name: str, most: int, how: str) -> list[Outcome]:
    """One file of a finished experiment is damaged, and something that reads it has yet to be made."""
    copy = bench.copy(name)
    kinds = _file_kinds(bench)
    file = rng.choice(kinds[rng.choice(sorted(kinds))])
    path = copy.results / file
    about = f"{how} {file}: {_damage(path, how, rng)}"
    artifacts = [a for a in bench.artifacts if file.startswith(f"{a}/")]
    if not artifacts:  # a store, whose columns are the artifacts
        artifacts = [a for a in bench.artifacts if a.startswith("/".join(file.split("/")[:2]) + "/")]
    needs = bench.base.needs()
    readers = [a for a in needs if set(needs[a]) & set(artifacts)]
    removed = {rng.choice(readers)} if readers else set()
    while more := {a for a in needs if set(needs[a]) & removed} - removed:  # so that something needs the reader
        removed |= more
    for artifact in removed:
        shutil.rmtree(copy.results / artifact)
    kept = {a: r for a, r in copy.receipts().items() if a not in artifacts}
    named = tuple({Path(file).name, *artifacts, *(a.split("/")[-1] for a in artifacts), *Path(file).parts[1:2]})
    runs = [*([] if readers else [copy.verify()]), *copy.finish()]  # what nothing reads only `make verify` can find
    outcome = judge(how, about, copy, bench, runs, kept, named=named)
    copy.remove()
    return [outcome]


def _damage(path: Path, how: str, rng: Random) -> str:
    if how == "delete":
        path.unlink()
        return "gone"
    size = path.stat().st_size
    if how == "truncate":
        to = rng.choice([0, size // 2, max(size - 1, 0)])
        os.truncate(path, to)
        return f"{size} to {to} bytes"
    data, about = bytearray(path.read_bytes()), path.stat()
    if not data:
        return "was empty"
    at, bit = rng.randrange(len(data)), rng.randrange(8)
    data[at] ^= 1 << bit
    path.write_bytes(data)
    os.utime(path, ns=(about.st_atime_ns, about.st_mtime_ns))  # bits rot without a trace
    return f"bit {bit} of byte {at} of {size}"


def disk_full(bench: Bench, rng: Random, name: str, most: int) -> list[Outcome]:
    """The file system of results/ fills at a random moment of a run, and has room again for the next."""
    copy = bench.fresh(name)
    copy.results.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=512m", "tmpfs", copy.results], capture_output=True, check=False
    )
    if mounted.returncode:
        return []
    try:
        process = copy.start()
        moment = rng.uniform(3, 3 + bench.seconds)
        started = time.monotonic()
        while process.poll() is None and time.monotonic() - started < moment:
            time.sleep(0.01)
        spare = rng.choice([0, 0, 4096, 65536])
        _fill(copy.results / "filler", spare)
        first = copy.ended(process)
        kept = copy.receipts()
        (copy.results / "filler").unlink()
        runs = [first, *copy.finish()]
        named = ("results/",) if first.code else ()
        outcome = judge("disk full", f"after {moment:.1f} s, {spare} bytes left", copy, bench, runs, kept, named=named)
    finally:
        subprocess.run(["umount", "-l", copy.results], check=False)
    copy.remove()
    return [outcome]


def _fill(file: Path, spare: int) -> None:
    free = shutil.disk_usage(file.parent).free
    with file.open("wb") as out:
        try:
            block = b"\0" * (1 << 20)
            for _ in range((free - spare) >> 20):
                out.write(block)
            out.write(b"\0" * ((free - spare) & 0xFFFFF))
            out.flush()
        except OSError:
            pass


def source_swapped(bench: Bench, rng: Random, name: str, most: int) -> list[Outcome]:
    """The corpus or the weights are replaced once the plan is frozen, and put back after the run."""
    copy = bench.fresh(name)
    files = [*(copy.home / "resources").rglob("*.safetensors"), *(copy.home / "resources").rglob("*.jsonl.gz")]
    files = [f for f in files if f.is_file()] or [p for p in (copy.home / "resources").rglob("*") if p.is_file()]
    path = rng.choice(files)
    whole = path.read_bytes()
    process = copy.start()
    delay = rng.uniform(0, bench.seconds / 2)
    while process.poll() is None and not list((copy.home / ".snakemake").rglob("plan*.json")):
        time.sleep(0.01)
    started = time.monotonic()
    while process.poll() is None and time.monotonic() - started < delay:
        time.sleep(0.01)
    data = bytearray(whole)
    data[-rng.randrange(1, len(data) // 2)] ^= 1 << rng.randrange(8)
    path.write_bytes(data)
    first = copy.ended(process)
    path.write_bytes(whole)
    named = (path.name, str(path.parent)) if first.code else ()
    about = f"{path.name} {delay:.1f} s after the plan"
    outcome = judge("source swapped", about, copy, bench, [first, *copy.finish()], {}, named=named)
    copy.remove()
    return [outcome]


def clock(bench: Bench, rng: Random, name: str, most: int) -> list[Outcome]:
    """Times of files in the future, in the past, in no order, or those of a copy; then one artifact is made again."""
    copy = bench.copy(name)
    how = rng.choice(["future", "past", "shuffled", "some in the future"])
    now = time.time()
    for path in [p for p in copy.home.rglob("*") if p.is_file() and not p.is_symlink()]:
        if how == "some in the future" and rng.random() < 0.5:
            continue
        shift = {"past": -1e6, "shuffled": rng.uniform(-1e6, 0)}.get(how, 7200.0)
        os.utime(path, (now + shift, now + shift))
    removed = rng.choice(sorted(bench.artifacts))
    shutil.rmtree(copy.results / removed)
    kept = {a: r for a, r in copy.receipts().items() if not a.startswith(removed)}
    lost = _unneeded(bench, {removed})
    outcome = judge("clock", f"{how}, {removed} lost", copy, bench, copy.finish(), kept, lost)
    copy.remove()
    return [outcome]


def lost(bench: Bench, rng: Random, name: str, most: int) -> list[Outcome]:
    """One or several artifacts, or a whole stage, are deleted."""
    copy = bench.copy(name)
    if rng.random() < 0.3:
        stage = rng.choice(sorted({a.split("/")[0] for a in bench.artifacts}))
        removed = {a for a in bench.artifacts if a.startswith(f"{stage}/")}
        shutil.rmtree(copy.results / stage)
    else:
        removed = set(rng.sample(sorted(bench.artifacts), rng.randint(1, 3)))
        for artifact in removed:
            shutil.rmtree(copy.results / artifact, ignore_errors=True)
    kept = copy.receipts()
    about = f"{', '.join(sorted(removed))[:200]} lost"
    outcome = judge("lost", about, copy, bench, copy.finish(), kept, _unneeded(bench, removed))
    copy.remove()
    return [outcome]


def _unneeded(bench: Bench, removed: set[str]) -> frozenset[str]:
    """Of what is gone, all that is there only for others to read: nothing asks for it unless they are gone too."""
    return frozenset(a for a in removed if a.split("/")[0] in ("tokens", "activations", "train", "baseline"))


def bookkeeping(bench: Bench, rng: Random, name: str, most: int) -> list[Outcome]:
    """Frozen plans, digests and Snakemake's records are torn, and one artifact is made again."""
    copy = bench.copy(name)
    files = [p for p in (copy.home / ".snakemake").rglob("*") if p.is_file() and "log" not in p.parts]
    files = rng.sample(files, max(1, len(files) // 3)) + list((copy.home / ".snakemake").glob("*.json"))
    how = rng.choice(["empty", "half", "noise", "list"])
    for path in files:
        size = path.stat().st_size
        path.write_bytes(
            {"empty": b"", "half": path.read_bytes()[: size // 2], "noise": rng.randbytes(64), "list": b"[]"}[how]
        )
    removed = rng.choice([a for a in sorted(bench.artifacts) if a not in _unneeded(bench, {a})])
    shutil.rmtree(copy.results / removed)
    kept = {a: r for a, r in copy.receipts().items() if not a.startswith(removed)}
    about = f"{how}, {len(files)} files, {removed} lost"
    outcome = judge("bookkeeping", about, copy, bench, copy.finish(), kept)
    copy.remove()
    return [outcome]


def two_runs(bench: Bench, rng: Random, name: str, most: int) -> list[Outcome]:
    """Two runs at once: of two clones with one results/, or of two experiments in one folder."""
    copy = bench.fresh(name)
    clones = rng.random() < 0.5
    if clones:
        other = bench.fresh(f"{name}-clone")
        copy.results.mkdir()
        other.results.symlink_to(copy.results)
        hydra = ""
    else:
        other = Copy(copy.home / "other", bench.experiment)
        other.home, hydra = copy.home, "experiment_name=other seed=1"
    first = copy.start()
    time.sleep(rng.uniform(0, bench.seconds / 2))
    said = copy.home / "said"
    if not clones:
        said.rename(copy.home / "said-first")  # the first process keeps its file open
    second = other.start(hydra=hydra)
    runs = [copy.ended(first), other.ended(second)]
    runs += copy.finish()
    about = "two clones" if clones else "two experiments"
    outcome = judge("two runs", about, copy, bench, runs, {})
    if outcome.verdict == SURVIVED and any(r.code for r in runs[:2]):
        outcome = Outcome("two runs", STUCK, f"{about}: {[r.reasons or r.said[-300:] for r in runs[:2] if r.code]}")
    for c in (other, copy):
        c.remove()
    return [outcome]


Fault = Callable[[Bench, Random, str, int], list[Outcome]]
KINDS: dict[str, tuple[Fault, int]] = {
    "kill": (partial(struck, kind="kill", numbers=(signal.SIGKILL,)), 30),
    "signal": (partial(struck, kind="signal", numbers=(signal.SIGTERM, signal.SIGINT, signal.SIGSTOP)), 8),
    "power": (partial(struck, kind="power", numbers=(signal.SIGKILL,)), 14),
    "flip": (partial(damaged, how="flip"), 18),
    "truncate": (partial(damaged, how="truncate"), 6),
    "delete": (partial(damaged, how="delete"), 6),
    "disk full": (disk_full, 3),
    "source swapped": (source_swapped, 3),
    "clock": (clock, 3),
    "lost": (lost, 4),
    "bookkeeping": (bookkeeping, 3),
    "two runs": (two_runs, 2),
}
"""Each kind, and its share of the faults, in hundredths."""
