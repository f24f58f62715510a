"""A job and the artifact that it makes: what it reads, and an output folder that appears whole, by a rename.

An artifact holds `config.yaml` (what the job read) and `provenance.json` (where it came from). The rules declare the
latter as their output; it holds times and hosts, so it is the one file that differs between two runs.
"""

import json
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from saeflow.jobs.modes import share
from saeflow.jobs.provenance import provenance
from saeflow.planning.graph import RECEIPT, Instance, Plan


@dataclass
class Job:
    """One instance of a stage: its configuration, its inputs and the folder that it fills."""

    instance: Instance
    plan: Plan
    device: str
    started: float = field(default_factory=time.perf_counter)

    @property
    def config(self) -> dict[str, Any]:
        """Exactly what the stage declared to read."""
        return self.instance.config

    @property
    def path(self) -> Path:
        return self.plan.folder(self.instance.stage, self.instance.key)

    def inputs(self, stage: str) -> list[Path]:
        """Artifact folders of the instances of `stage` that this one needs, in the declared order."""
        return [self.plan.folder(stage, key) for key in self.instance.needs.get(stage, [])]

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
        """Path of a file or folder from outside the pipeline: `model` or `corpus`."""
        return Path(self.instance.sources[name])

    @contextmanager
    def writing(self) -> Iterator[Path]:
        """Gives a fresh folder to fill; on success adds `config.yaml` and `provenance.json` and moves it into place.

        On an error, or when killed, the final folder is not touched; the next try starts with an empty one.
        """
        partial = self.path.with_name(self.path.name + ".partial")
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        yield partial
        self.instance.write_config(partial / "config.yaml")
        about = provenance(self.instance, self.device, time.perf_counter() - self.started, partial)
        (partial / RECEIPT).write_text(json.dumps(about, indent=1) + "\n")
        share(partial)
        shutil.rmtree(self.path, ignore_errors=True)
        partial.rename(self.path)
