"""One tokenising and caching of the demo's model, whole and shared by several jobs, for `cluster`."""

import os
import resource
import shutil
import sys
from pathlib import Path

from _dry_runs import ROOT, timed

from saeflow.storage.checksums import crc32c

PARTS = (1, 2, 4, 8)
SHARD_TOKENS = 65_536
APART = ("provenance.json", "made.jsonl")


def scatter(folder: Path, n_tokens: int) -> dict[str, float]:
    """What it takes below `folder`, two jobs of one thread each at a time, as on two nodes; checked to give the same
    bytes for any number of parts.

    `scatter_1_over_8`: bytes a second of one writer over those of eight, two at a time, so that without any cost of
    sharing it would be one half; `scatter_cpu_s_<n>`: time of cores of all jobs of `n` parts together, which does not
    depend on how many are at work at a time; `scatter_wall_s_<n>`: from the first job's start to the last one's end.
    """
    found: dict[str, float] = {}
    whole: dict[str, tuple[int, str]] = {}
    for n in PARTS:
        home = folder / f"scatter-{n}"
        home.mkdir()
        parts = f"device.parts.tokens={n} device.parts.activations={n} device.threads.activations=1"
        hydra = f"dictionary=transcoder site=mlp tokens.train_tokens={n_tokens} {parts}"
        command = [sys.executable, "-m", "snakemake", "-s", str(ROOT / "Snakefile"), "--directory", str(home)]
        command += ["--cores", "2", "--until", "activations", "--config", f"conf={ROOT}/conf", f"hydra={hydra}"]
        (home / "resources").symlink_to(ROOT / "resources")
        before = _cpu_seconds()
        found[f"scatter_wall_s_{n}"], _ = timed(command, home)
        found[f"scatter_cpu_s_{n}"] = _cpu_seconds() - before
        made = _files(home / "results")
        whole = whole or made
        if made != whole:
            sys.exit(f"{n} parts gave other bytes than one job, below {home}")
        wall, cpu = found[f"scatter_wall_s_{n}"], found[f"scatter_cpu_s_{n}"]
        rate = sum(size for size, _ in made.values()) / 1e6 / wall
        print(f"{n} parts: {wall:.1f} s, {cpu:.1f} s of cores, {rate:.1f} MB/s", file=sys.stderr)
        shutil.rmtree(home)
    return {"scatter_1_over_8": found["scatter_wall_s_8"] / found["scatter_wall_s_1"]} | found


def _cpu_seconds() -> float:
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def _files(results: Path) -> dict[str, tuple[int, str]]:
    """Size and crc32c of all that was made."""
    files = [Path(at, name) for at, _, names in os.walk(results) for name in names if name not in APART]
    return {file.relative_to(results).as_posix(): (file.stat().st_size, crc32c(file)) for file in files}
