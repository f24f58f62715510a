"""The plan: the instances of every stage, each named by the hash of what it reads.

A *point* is one combination of a sweep. A *stage* declares the config paths that it reads (`stages`). For every point
each stage is instantiated with that projection and nothing else, and with the instances that it needs; the hash of
(stage, stage version, projection, hashes of the needed) ends its key, `<label>-<hash8>`, which names its folder below
`results/<stage>/`; labels are in no hash. Equal instances of different points are one. So the keys are a Merkle chain:
what is not read cannot make anything stale, what is read always does.

What only says *how* to run (devices, threads, paths) is kept beside the projection and never enters a hash; the model's
weights, its tokenizer and the corpus enter by content.
"""

import dataclasses
import json
from collections.abc import Collection, Iterable
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from saeflow.config import ConfigError
from saeflow.planning.parts import mark
from saeflow.storage.publish import publish_text, remove_leftovers
from saeflow.storage.receipts import RECEIPT, is_whole


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
    says: dict[str, list[Any]] = field(default_factory=dict)
    """The setting that an entry of `config` follows from, and its value: `n_rows` from tokens.train_tokens, 307200."""
    identity: str = ""
    """The whole hash of which the key has the first digits: what the hashes of others that need it are made from."""

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
    found: dict[str, list[str]] = field(default_factory=dict)
    """Keys of each stage whose artifacts were there when the plan was made."""
    to_make: dict[str, list[str]] = field(default_factory=dict)
    """Keys of each stage that a run makes: what is not there and wanted, or needed for something that is to be made."""
    batches: dict[str, list[list[str]]] = field(default_factory=dict)
    """Of stages whose artifacts share jobs, which do: by the first of them a job is known."""
    parts: dict[str, dict[str, list[str]]] = field(default_factory=dict)
    """Of stages whose work several jobs share, by what a job is known by: the parts (`2-of-8`) that are to be made."""
    results: str = "results"
    overrides: list[str] = field(default_factory=list, compare=False)
    """Hydra's, that it was composed with: what to type for the same again."""

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
        return is_whole(self.folder(stage, key))

    def forget(self) -> None:
        """What was remembered of another look at the disk."""
        for name in ("leaders", "_members", "_found"):
            self.__dict__.pop(name, None)

    @cached_property
    def leaders(self) -> dict[tuple[str, str], str]:
        """Of every artifact that shares a job with others, the one by which the job is known."""
        return {(s, key): batch[0] for s, batches in self.batches.items() for batch in batches for key in batch}

    @cached_property
    def _found(self) -> set[tuple[str, str]]:
        return {(stage, key) for stage, keys in self.found.items() for key in keys}

    def members(self, stage: str, key: str) -> list[str]:
        """All that the job makes that is known by `key`."""
        return self._members.get((stage, key), [key])

    @cached_property
    def _members(self) -> dict[tuple[str, str], list[str]]:
        return {(stage, batch[0]): batch for stage, batches in self.batches.items() for batch in batches}

    def jobs(self, stage: str) -> list[list[str]]:
        """Keys of every job of a stage that a run has, each job's known key first."""
        keys = self.to_make[stage]
        return [self.members(stage, key) for key in keys if self.leaders.get((stage, key), key) == key]

    def inputs(self, stage: str, key: str, again: bool = False, alone: Collection[str] = ()) -> list[str]:
        """Receipts of the jobs that make what the job known by `key` needs, each once. Where it has been done, it waits
        for nothing that is gone, unless it is to be done `again`. `alone`: receipts that were asked for by name, each
        of which has a job of its own."""
        needs = (self.stages[stage][k].needs for k in self.members(stage, key))
        wanted = dict.fromkeys((s, k) for need in needs for s, keys in need.items() for k in keys)
        if (stage, key) in self._found and not again:
            wanted = dict.fromkeys(one for one in wanted if one in self._found)
        own = {one: self.receipt(*one) for one in wanted}
        jobs = (own[s, k] if own[s, k] in alone else self.receipt(s, self.leaders.get((s, k), k)) for s, k in wanted)
        return list(dict.fromkeys(jobs))

    def marks(self, stage: str, key: str) -> list[str]:
        """Files that say that the parts are done which the job known by `key` waits for."""
        return [mark(stage, key, part) for part in self.parts.get(stage, {}).get(key, ())]

    def outputs(self, stage: str, keys: Iterable[str]) -> list[str]:
        """Receipts of the jobs that make some artifacts, each once."""
        return list(dict.fromkeys(self.receipt(stage, self.leaders.get((stage, key), key)) for key in keys))

    @property
    def together(self) -> dict[str, list[str]]:
        """Receipts of all that jobs make which make several, by the one that each is known by."""
        receipts = ([self.receipt(s, key) for key in batch] for s, found in self.batches.items() for batch in found)
        return {several[0]: several for several in receipts}

    def device_of(self, stage: str) -> str:
        return str(self.device.get(stage, self.device["default"]))

    def threads(self, stage: str) -> int:
        return int(self.device.get("threads", {}).get(stage, 1))

    @property
    def read_ahead_mb(self) -> int:
        """Memory of a training for what it reads ahead of columns in a bucket."""
        return int(self.device.get("read_ahead_mb", 1000))

    # ---------------------------------------------------------------- freezing
    @property
    def text(self) -> str:
        return json.dumps(dataclasses.asdict(self))

    def freeze(self, path: str | Path) -> None:
        path = Path(path)
        publish_text(path, self.text)
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
