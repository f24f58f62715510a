"""Faults of a cluster: nodes that die, disks that show files late, jobs that are preempted or killed for memory."""

import contextlib
import os
import signal
import socket
import threading
import time
from random import Random

import psutil
from tests.chaos.bench import HERE, START, Bench, ended_within, strike
from tests.chaos.outcome import STUCK, SURVIVED, UNNAMED, Outcome, judge

from saeflow.jobs.signals import jobs_below


def node_died(bench: Bench, rng: Random, name: str, most: int) -> list[Outcome]:
    """The node of a job and its Snakemake is gone in mid-job: `.partial` folders stay half-written, and locks stay that
    name a process of another host, whose last sign of life is some time ago."""
    copy = bench.begun(name, rng)
    process, moment = copy.start(), rng.uniform(0.8 * min(3, copy.seconds), 1 + 0.8 * copy.seconds)
    ended_within(process, moment)
    strike(process, signal.SIGKILL)
    halves = [p for p in copy.results.rglob("*.partial*") if p.is_file()]
    halves += [p for folder in copy.results.rglob("*.partial") for p in folder.rglob("*") if p.is_file()]
    for path in halves:
        os.truncate(path, rng.randint(0, path.stat().st_size))
    for lock in copy.results.rglob("*.lock"):
        lock.write_text(lock.read_text().replace(socket.gethostname(), "node-that-died"))
        silent = time.time() - rng.choice([90, 110, 1e5])  # of 120 after which a lock is nobody's
        os.utime(lock, (silent, silent))
    about = f"after {moment:.1f} s, {len(halves)} files half-written"
    return [judge("node", about, copy, bench, copy.finish(), copy.receipts())]


def late_disk(bench: Bench, rng: Random, name: str, most: int) -> list[Outcome]:
    """Every process sees what others wrote some seconds late, and the disk has no `flock`: one run, and two at once,
    get through at the first try."""
    copy, seconds = bench.begun(name, rng), rng.uniform(0.5, 3)
    environment = {"PYTHONPATH": str(HERE / "cluster_disk"), "CHAOS_LATE": f"{seconds:.2f}"}
    copies = [copy, copy.beside()][: rng.randint(1, 2)]
    processes = [one.start(environment=environment) for one in copies]
    runs = [one.ended(process) for one, process in zip(copies, processes, strict=True)]
    found = judge("late disk", f"{len(runs)} runs, {seconds:.1f} s late", copy, bench, runs)
    return [_at_once(found, runs[0].code)]


def log_folder(bench: Bench, rng: Random, name: str, most: int) -> list[Outcome]:
    """Logs can't be written: their folder is a file, or on a disk that is read-only. A run says so before it does
    anything; one at work gets through, as nothing depends on a log."""
    copy, how = bench.begun(name, rng), rng.choice(["a file", "a file in mid-run"])
    logs = copy.home / "logs"
    if how == "a file":
        logs.write_text("")
        first = copy.run()
        logs.unlink()
    else:
        process = copy.start()
        ended_within(process, rng.uniform(START, 1 + copy.seconds / 2))
        logs.rename(copy.home / "logs-before")
        logs.write_text("")
        first = copy.ended(process)
        logs.unlink()
    return [judge("log folder", how, copy, bench, [first, *copy.finish()], copy.receipts(), named=frozenset({"log"}))]


def preempted(bench: Bench, rng: Random, name: str, most: int) -> list[Outcome]:
    """Jobs, and not their Snakemake, are asked to stop at random moments: the run gets through by itself, without
    `retries`."""
    copy = bench.begun(name, rng)
    process, hits = copy.start(), 0
    while process.poll() is None:
        time.sleep(rng.uniform(1, 2 + copy.seconds / 10))
        if hits < most:
            for job in jobs_below(process.pid):
                with contextlib.suppress(psutil.Error):
                    job.terminate()
                    hits += 1
    run = copy.ended(process)
    found = _at_once(judge("preempted", f"{hits} jobs", copy, bench, [run, *copy.finish()]), run.code)
    return [found] * max(1, min(hits, most))


def memory(bench: Bench, rng: Random, name: str, most: int) -> list[Outcome]:
    """The kernel kills a job that holds more than it asked for: the run says so, and tries again."""
    copy = bench.begun(name, rng)
    process, limit = copy.start("--retries", "1"), rng.uniform(100, 300) * 2**20
    killed = threading.Event()

    def kill() -> None:
        while process.poll() is None and not killed.is_set():
            for job in jobs_below(process.pid):
                with contextlib.suppress(psutil.Error):
                    if job.memory_info().rss > limit:
                        job.kill()
                        killed.set()
            time.sleep(0.05)

    thread = threading.Thread(target=kill)
    thread.start()
    run = copy.ended(process)
    thread.join()
    about = f"a job above {limit / 2**20:.0f} MiB {'killed' if killed.is_set() else 'never seen'}"
    found = _at_once(judge("memory", about, copy, bench, [run, *copy.finish()]), run.code)
    if found.verdict == SURVIVED and killed.is_set() and "too much memory" not in run.said:
        found = Outcome("memory", UNNAMED, f"{about}: {run.said[-300:]}")
    return [found]


def _at_once(found: Outcome, code: int) -> Outcome:
    """What ends well only at the second try has not been survived."""
    return (
        found if code == 0 or found.verdict != SURVIVED else Outcome(found.kind, STUCK, f"{found.about}: failed first")
    )
