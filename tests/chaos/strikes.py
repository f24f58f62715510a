"""Faults of a run: kills and signals, power cuts, full disks, swapped sources, another run beside it."""

import os
import shutil
import signal
import subprocess
import time
from contextlib import suppress
from pathlib import Path
from random import Random

from tests.chaos.bench import HERE, Bench, Copy, Impossible, ended_within, strike
from tests.chaos.outcome import STUCK, SURVIVED, Outcome, judge


def killed(bench: Bench, rng: Random, name: str, most: int) -> list[Outcome]:
    """Snakemake and its jobs, or a job alone, are killed at random moments; then it is run again, until it gets through
    or was hit `most` times."""
    return _struck(bench, rng, name, most, "kill", (signal.SIGKILL,))


def signalled(bench: Bench, rng: Random, name: str, most: int) -> list[Outcome]:
    """The same with what asks a process to end, and with what stops it for a while."""
    return _struck(bench, rng, name, most, "signal", (signal.SIGTERM, signal.SIGINT, signal.SIGSTOP))


def power_cut(bench: Bench, rng: Random, name: str, most: int) -> list[Outcome]:
    """The same, and of what had not been flushed when the kill came, some is lost."""
    return _struck(bench, rng, name, most, "power", (signal.SIGKILL,))


def _struck(
    bench: Bench, rng: Random, name: str, most: int, kind: str, numbers: tuple[signal.Signals, ...]
) -> list[Outcome]:
    copy = bench.begun(name, rng)
    kept = copy.receipts()
    hits: list[str] = []
    flushed, durable = copy.home / "flushed", _states(copy) if kind == "power" else set()
    environment = {"PYTHONPATH": str(HERE / "power"), "CHAOS_FLUSHED": str(flushed)} if kind == "power" else {}
    for _ in range(3 * most):
        process = copy.start(environment=environment)
        moment = rng.uniform(1, 1 + copy.seconds / 3)
        if ended_within(process, moment):
            if process.returncode == 0 or len(hits) >= most:
                break
            continue
        number = rng.choice(numbers)
        alone = kind == "kill" and rng.random() < 0.3
        strike(process, number, "job.py" if alone else "")
        if number == signal.SIGSTOP:
            time.sleep(rng.uniform(0.1, 2))
            strike(process, signal.SIGCONT)
        if number != signal.SIGKILL or alone:
            copy.ended(process)
        if kind == "power":
            _lose(copy, durable | _noted(flushed), kept, rng)
            durable = _states(copy)
        hits.append(f"{number.name}{' of a job' if alone else ''} after {moment:.1f} s")
        kept = copy.receipts() | kept
        if len(hits) == most:
            break
    found = judge(kind, "; ".join(hits), copy, bench, copy.finish(), None if kind == "power" else kept)
    return [Outcome(kind, found.verdict, found.about)] * len(hits)


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


def disk_full(bench: Bench, rng: Random, name: str, most: int) -> list[Outcome]:
    """The file system of results/ fills at a random moment of a run, and has room again for the next. Raises
    `Impossible` where this process may not mount one."""
    copy = bench.fresh(name)
    copy.results.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=512m", "tmpfs", str(copy.results)]
    if subprocess.run(mount, capture_output=True, check=False).returncode:
        raise Impossible("no file system may be mounted here")
    try:
        process = copy.start()
        moment, spare = rng.uniform(3, 3 + bench.seconds), rng.choice([0, 0, 4096, 65536])
        ended_within(process, moment)
        _fill(copy.results / "filler", spare)
        first = copy.ended(process)
        kept = copy.receipts()
        (copy.results / "filler").unlink()
        runs, about = [first, *copy.finish()], f"after {moment:.1f} s, {spare} bytes left"
        found = judge("disk full", about, copy, bench, runs, kept, named=frozenset({"results/"}))
    finally:
        subprocess.run(["umount", "-l", copy.results], check=False)
    return [found]


def _fill(file: Path, spare: int) -> None:
    """Unbuffered: what the run beside it writes meanwhile may leave no room even for the last bytes of a buffer."""
    free = shutil.disk_usage(file.parent).free
    with file.open("wb", buffering=0) as out, suppress(OSError):
        block = b"\0" * (1 << 20)
        for _ in range((free - spare) >> 20):
            out.write(block)
        out.write(b"\0" * ((free - spare) & 0xFFFFF))


def source_swapped(bench: Bench, rng: Random, name: str, most: int) -> list[Outcome]:
    """The corpus or the weights are replaced once the plan is frozen, and put back after the run."""
    copy = bench.fresh(name)
    files = [p for kind in ("*.safetensors", "*.jsonl.gz") for p in (copy.home / "resources").rglob(kind)]
    path = rng.choice(sorted(files))
    whole = path.read_bytes()
    process, delay = copy.start(), rng.uniform(0, bench.seconds / 2)
    while process.poll() is None and not list((copy.home / ".snakemake/plans").glob("*.json")):
        time.sleep(0.01)
    ended_within(process, delay)
    data = bytearray(whole)
    data[-rng.randrange(1, len(data) // 2)] ^= 1 << rng.randrange(8)
    path.write_bytes(data)
    first = copy.ended(process)
    path.write_bytes(whole)
    named = frozenset({path.name, str(path.parent)})
    about = f"{path.name} {delay:.1f} s after the plan"
    found = judge("source swapped", about, copy, bench, [first, *copy.finish()], named=named)
    return [found]


def two_runs(bench: Bench, rng: Random, name: str, most: int) -> list[Outcome]:
    """Two runs at once: of two clones with one results/, of two experiments in one folder, or of one experiment by an
    orphan (whose Snakemake was killed) and its successor."""
    copy, how = bench.begun(name, rng), rng.choice(["two clones", "two experiments", "orphan and successor"])
    other, hydra = copy.beside(), ""
    if how == "two clones":
        other = bench.fresh(f"{name}-clone")
        copy.results.mkdir(exist_ok=True)
        other.results.symlink_to(copy.results)
    elif how == "two experiments":
        hydra = "experiment_name=other seed=1"
    first, delay = copy.start(), rng.uniform(0, copy.seconds / 2)
    ended_within(first, delay)
    if how == "orphan and successor":
        first.kill()
        runs = other.finish()
    else:
        second = other.start(hydra=hydra)
        runs = [copy.ended(first), other.ended(second)]
    failed = [r for r in runs if r.code]
    found = judge("two runs", f"{how}, {delay:.1f} s apart", copy, bench, [*runs, *copy.finish()])
    if found.verdict == SURVIVED and failed:
        found = Outcome("two runs", STUCK, f"{found.about}: {[r.reasons or r.said[-300:] for r in failed]}")
    strike(first, signal.SIGKILL)
    return [found]
