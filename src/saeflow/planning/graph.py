"""The plan: the instances of every stage, each named by the hash of what it reads.

A *point* is one combination of a sweep. A *stage* declares the config paths that it reads (`stages`). For every point
each stage is instantiated with that projection and nothing else, and with the instances that it needs; the hash of
(stage, stage version, projection, keys of the needed) ends its key, `<label>-<hash8>`, which names its folder below
`results/<stage>/`. Equal instances of different points are one. So the keys are a Merkle chain: what is not read cannot
make anything stale, what is read always does.

What only says *how* to run (devices, threads, paths) is kept beside the projection and never enters a hash; the model's
weights, its tokenizer and the corpus enter by content.
"""

import dataclasses
import json
import logging
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from saeflow.config import ConfigError
from saeflow.planning.digests import canonical, short_hash
from saeflow.storage.publish import publish_text, remove_leftovers
from saeflow.storage.receipts import RECEIPT, problem, read_receipt, set_aside

log = logging.getLogger("saeflow")


@dataclass
class Instance:
    """One artifact: what it reads, what it needs, and (`sources`, never hashed) where its outside files lie now and
    how it is to be run."""

    stage: str
    key: str
    config: dict[str, Any]
    needs: dict[str, list[str]]
    sources: dict[str, str]
    version: int = 1
    """Of the stage."""

    def write_config(self, path: Path) -> None:
        """Writes what this instance read, for people and for `explain`."""
        from omegaconf import OmegaConf

        tree = {"stage": self.stage, "version": self.version, "config": self.config, "needs": self.needs}
        path.write_text(OmegaConf.to_yaml(OmegaConf.create(tree)))


@dataclass
class Plan:
    """All instances of a run. Composed once, frozen to one JSON file, read by every job."""

    experiment: str
    stages: dict[str, dict[str, Instance]]
    device: dict[str, Any]
    batches: dict[str, list[list[str]]] = field(default_factory=dict)
    past: dict[str, list[list[str]]] = field(default_factory=dict)
    """Finished batches of earlier plans, remembered for when their artifacts are wanted again."""
    results: str = "results"

    # ---------------------------------------------------------------- what the rules and the jobs ask
    def instance(self, stage: str, key: str) -> Instance:
        """Raises `ConfigError` for a key that this plan does not have."""
        try:
            return self.stages[stage][key]
        except KeyError:
            known = ", ".join(list(self.stages.get(stage, {}))[:5])
            raise ConfigError(f"the plan has no {stage} {key!r}; it has {known or 'none'}") from None

    def folder(self, stage: str, key: str) -> Path:
        return Path(self.results) / stage / key

    def receipt(self, stage: str, key: str) -> str:
        """The file that says that an artifact is whole: its `provenance.json`."""
        return f"{self.results}/{stage}/{key}/{RECEIPT}"

    def done(self, stage: str, key: str) -> bool:
        """Whether an artifact is there: it has a whole receipt, and every file that this names, of the right size."""
        folder = self.folder(stage, key)
        return problem(folder, read_receipt(folder)) is None

    def set_aside_broken(self) -> None:
        """Sets receipts aside that do not hold, since a rule only looks whether the file is there; logs each."""
        for stage, table in self.stages.items():
            for key in table:
                folder = self.folder(stage, key)
                if (found := problem(folder, read_receipt(folder))) and set_aside(folder):
                    log.warning("%s: %s; %s counts as missing", *found, folder)

    def inputs(self, stage: str, *keys: str) -> list[str]:
        """Receipts of everything that the instances need, each once."""
        needs = (self.stages[stage][key].needs for key in keys)
        found = (self.receipt(s, k) for need in needs for s, wanted in need.items() for k in wanted)
        return list(dict.fromkeys(found))

    def outputs(self, stage: str, keys: Iterable[str]) -> list[str]:
        return [self.receipt(stage, key) for key in keys]

    def param(self, stage: str, *keys: str) -> str:
        """What the job may read, as one text: Snakemake's record of it. Long lists enter by their hash."""
        text = canonical([[self.stages[stage][k].config, self.stages[stage][k].needs] for k in keys])
        return text if len(text) < 4000 else short_hash(text, 32)

    def device_of(self, stage: str) -> str:
        return str(self.device.get(stage, self.device["default"]))

    def threads(self, stage: str) -> int:
        return int(self.device.get("threads", {}).get(stage, 1))

    # ---------------------------------------------------------------- freezing
    def freeze(self, path: str | Path) -> None:
        path = Path(path)
        publish_text(path, json.dumps(dataclasses.asdict(self)))
        remove_leftovers(path)

    @classmethod
    def load(cls, path: str | Path) -> "Plan":
        again = f"run the workflow, or python scripts/plan.py --freeze {path}"
        try:
            raw = json.loads(Path(path).read_bytes())
            raw["stages"] = {s: {k: Instance(**i) for k, i in table.items()} for s, table in raw["stages"].items()}
            return cls(**raw)
        except FileNotFoundError:
            raise ConfigError(f"no frozen plan at {path}: {again}") from None
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise ConfigError(f"{path} is no whole plan of this version of saeflow ({error}): {again}") from error

    @classmethod
    def load_if_valid(cls, path: str | Path) -> "Plan | None":
        """The plan of the previous run, or None where there is none, or it is torn or of another version of saeflow."""
        if not Path(path).is_file():
            return None
        try:
            return cls.load(path)
        except ConfigError as error:
            log.warning("%s; going on without it", str(error).partition(":")[0])
            return None
