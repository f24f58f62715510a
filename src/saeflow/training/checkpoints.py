"""Checkpoints of trainings: one safetensors file a checkpoint, appearing whole, with its checksum.

They lie in `results/checkpoints/<key>/step-<n>.safetensors`, beside the artifacts rather than in them, because
Snakemake removes what a failed job has made. When they are written has no influence on the result, so time decides:
about every `every_seconds`, and never so often that writing takes more than a hundredth of the time.
"""

import logging
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from torch import Tensor

from saeflow.storage.checksums import StateError, load_state, save_state

log = logging.getLogger("saeflow")
SHARE = 0.01  # of the time that writing may take


class Checkpoints:
    """The checkpoints of one training."""

    def __init__(self, folder: Path, keep: int = 1) -> None:
        self.folder, self.keep = folder, keep

    def save(self, step: int, state: dict[str, Tensor]) -> None:
        """Writes the state after `step` steps, then removes all but the newest `keep`."""
        save_state(self.folder / f"step-{step:09d}.safetensors", state)
        for old in self._paths()[: -self.keep]:
            old.unlink()

    def newest(self) -> dict[str, Tensor] | None:
        """The newest state that can be read; None where there is none."""
        for path in reversed(self._paths()):
            try:
                return load_state(path)
            except StateError as error:
                log.warning("checkpoint %s: going on without it", error)
        return None

    def remove(self) -> None:
        """Removes all of them; the folder too, unless something else lies in it."""
        for path in [*self._paths(), *self.folder.glob("*.partial")]:
            path.unlink()
        if self.folder.is_dir() and not any(self.folder.iterdir()):
            self.folder.rmdir()

    def _paths(self) -> list[Path]:
        return sorted(self.folder.glob("step-*.safetensors"))


class Timer:
    """Says when the next checkpoint is due."""

    def __init__(self, every_seconds: float) -> None:
        self.every = every_seconds
        self.due = time.monotonic() + every_seconds

    @property
    def passed(self) -> bool:
        return time.monotonic() >= self.due

    @contextmanager
    def saving(self) -> Iterator[None]:
        started = time.monotonic()
        yield
        now = time.monotonic()
        self.due = now + max(self.every, (now - started) / SHARE)
