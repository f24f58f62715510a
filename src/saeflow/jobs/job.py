"""A job and the artifact that it makes: what it reads, and an output folder that appears whole, by a rename.

An artifact holds `config.yaml` (what the job read) and `provenance.json` (where it came from). The rules declare the
latter as their output; it holds times and hosts, so it is the one file that differs between two runs.
"""

import functools
import json
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from saeflow.config import ConfigError
from saeflow.jobs.progress import cpu_seconds
from saeflow.jobs.provenance import provenance
from saeflow.planning.digests import DIGESTS_FILE, DigestCache
from saeflow.planning.graph import Instance, Plan
from saeflow.storage.locks import Lock
from saeflow.storage.publish import beside, make_folder, publish, remove_leftovers
from saeflow.storage.receipts import RECEIPT, is_whole, verify


class SourceError(ConfigError):
    """A file from outside that holds something else than the plan read; the message names it and what to do."""


@functools.cache
def _digests() -> DigestCache:
    """What this process knows of outside files: first what the plan found out about them."""
    return DigestCache(DIGESTS_FILE)


@dataclass
class Job:
    """One instance of a stage: its configuration, its inputs and the folder that it fills."""

    instance: Instance
    plan: Plan
    device: str
    """Where it computes: one that torch knows."""
    model_device: str = ""
    """Over which GPUs a language model is spread (`cuda:0-3`), or else `device`."""
    started: float = field(default_factory=time.perf_counter)
    cpu_started: float = field(default_factory=cpu_seconds)
    sharing: int = 1
    """Artifacts that one process makes together, this one among them: each has an equal share of its time."""
    lock: Lock | None = None
    """Held, by a job of the workflow, until its artifact is there."""
    is_new: bool = False
    """Whether there was nothing in its place when it took the lock."""

    def __post_init__(self) -> None:
        self.model_device = self.model_device or self.device

    @property
    def config(self) -> dict[str, Any]:
        """Exactly what the stage declared to read."""
        return self.instance.config

    @property
    def path(self) -> Path:
        return self.plan.folder(self.instance.stage, self.instance.key)

    def inputs(self, stage: str, *files: str) -> list[Path]:
        """Artifact folders of the instances of `stage` that this one needs, in the declared order.

        They are verified, once a process; of what large artifacts have, only `files` if the job reads no others.
        Raises `DamagedError` where one is not what was written.
        """
        folders = [self.plan.folder(stage, key) for key in self.instance.needs.get(stage, [])]
        for folder in folders:
            verify(folder, files)
        return folders

    def input(self, stage: str) -> Path:
        (folder,) = self.inputs(stage)
        return folder

    def dictionaries(self) -> list[Path]:
        """Folders of the dictionaries that this instance needs: a pair that was trained as one has two, or the named
        `part` is meant. Those of heads are one."""
        folders = self.inputs("train") + self.inputs("foreign")
        if "part" in self.config:
            return [folders[0] / self.config["part"]]
        return [part for f in folders for part in ([f / "input", f / "output"] if (f / "input").is_dir() else [f])]

    def source(self, name: str) -> Path:
        """Path of a file or folder from outside the pipeline: `model` or `corpus`. What is in it is read inside
        `reading`."""
        return Path(self.instance.sources[name])

    @contextmanager
    def reading(self, name: str, digest: Callable[[Path, DigestCache], Any], planned: Any) -> Iterator[Path]:
        """The path of an outside source, whose `digest` is what it was for the plan, before and after it is read.

        Costs nothing where no file has changed. One that was replaced meanwhile and put back has changed: nobody knows
        which of the two was read. Raises `SourceError`.
        """
        path, cache = self.source(name), _digests()
        cache.states = {}
        if digest(path, cache) != planned:
            raise SourceError(
                f"{path} does not hold what it held when the plan was made: put it back, or run the workflow again, "
                "which then plans with what is there now"
            )
        before, cache.states = cache.states, {}
        yield path
        cache.states = {}
        digest(path, cache)
        changed = {file for file, _ in before.items() ^ cache.states.items()}
        if changed:
            raise SourceError(f"{min(changed)} was changed while this job read it: run the workflow again")

    @contextmanager
    def writing(self) -> Iterator[Path]:
        """Gives a fresh folder to fill; on success adds `config.yaml` and `provenance.json` and moves it into place.

        On an error, or when killed, the final folder is not touched; the next try starts with an empty one.
        """
        partial = beside(self.path)
        make_folder(self.path.parent)
        remove_leftovers(self.path, locked=self.lock is not None)
        partial.mkdir()
        try:
            yield partial
        except BaseException:
            shutil.rmtree(partial, ignore_errors=True)  # what a full disk has no room for
            raise
        self.instance.write_config(partial / "config.yaml")
        seconds, cpu = time.perf_counter() - self.started, cpu_seconds() - self.cpu_started
        about = provenance(self.instance, self.model_device, seconds, cpu, self.sharing, partial)
        (partial / RECEIPT).write_text(json.dumps(about, indent=1) + "\n")
        # What another has made meanwhile, which a disk showed too late, is the same, and may be read by now.
        publish(partial, self.path, unless=lambda path: self.is_new and is_whole(path))
        if self.lock:
            self.lock.release()
