"""Where an artifact came from: all that it was made from, down to the hashes of what is from outside, each step with
what it read and what it cost. All of it is on disk: receipts, `config.yaml`, `made.jsonl`.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from saeflow.config.defaults import flat
from saeflow.dictionaries.settings import lineage
from saeflow.planning.explain import readable
from saeflow.planning.graph import Instance
from saeflow.planning.history import lines
from saeflow.planning.ledger import Time, span, time_of
from saeflow.planning.parts import without_hash
from saeflow.planning.stages import stages
from saeflow.results.disk import Disk
from saeflow.storage.receipts import RECEIPT

CONTENTS = {"corpus.content": "corpus", "model.weights": "model", "tokenizer": "tokenizer", "content": "dictionary"}
"""What of a stage's configuration is the hash of something from outside."""


@dataclass(frozen=True)
class Step:
    """One artifact of a chain."""

    stage: str
    key: str
    version: int
    """Of the stage that made it."""
    read: dict[str, Any]
    """What of the configuration it read, by path, but for hashes of content."""
    contents: dict[str, str]
    """What it read from outside: `corpus`, `model`, `tokenizer`, with the hash of each."""
    needs: tuple[tuple[str, str], ...]
    """Stage and key of what it was made from."""
    receipt: dict[str, Any] | None
    """None: it is no longer there, and what is known of it is from the plan of a run."""
    time: Time
    names: dict[str, str]
    """What people called the model and the corpus."""

    @property
    def title(self) -> str:
        """Stage and name, without the hash."""
        return f"{stages()[self.stage].noun[0]} {without_hash(self.key.rsplit('/', 1)[-1])}"

    @property
    def files(self) -> list[str]:
        """Those that lie in its folder itself, the receipt last; none where it is no longer there."""
        return [*(name for name in self.receipt.get("sizes", {}) if "/" not in name), RECEIPT] if self.receipt else []

    @property
    def cost(self) -> str:
        """Of time, memory and disk, in words; of jobs that made several artifacts, a share of the time."""
        told = [f"{span(self.time.wall_s, 0)} wall", f"{span(self.time.cpu_s, 0)} of cores"]
        told += [f"{span(self.time.gpu_s, 0)} of a GPU"] if self.time.gpu_s else []
        if self.receipt is None:
            return ", ".join([*told, "deleted since"])
        memory, size = self.receipt.get("peak_memory_bytes"), self.receipt.get("bytes")
        told += [f"{readable(memory)} of memory"] if memory else []
        told += [f"{readable(size)} on disk"] if size else []
        sharing = self.receipt.get("sharing", 1)
        return ", ".join(told) + (f" (one of {sharing} that its job made)" if sharing > 1 else "")

    @property
    def made(self) -> str:
        """When, where and by which code."""
        receipt = self.receipt or {}
        git = receipt.get("git") or {}
        commit = f"saeflow {git['commit'][:12]}{', changed' if git.get('dirty') else ''}" if git else ""
        where = f"on {receipt['host']} ({receipt.get('device', 'cpu')})" if "host" in receipt else ""
        told = [receipt.get("finished", "").replace("T", " ").replace("+00:00", " UTC"), where, commit]
        return ", ".join(text for text in [*told, f"version {self.version} of the stage"] if text)


@dataclass(frozen=True)
class Chain:
    """An artifact, and all that it was made from: the nearest first."""

    steps: list[Step]

    def __iter__(self) -> Iterator[Step]:
        return iter(self.steps)

    def __len__(self) -> int:
        return len(self.steps)

    @property
    def contents(self) -> dict[str, list[str]]:
        """Hashes of all that is from outside, by what it is."""
        found: dict[str, list[str]] = {}
        for step in self.steps:
            for name, content in step.contents.items():
                found.setdefault(name, []).extend([content] if content not in found.get(name, []) else [])
        return found

    def __repr__(self) -> str:
        lines = [f"{step.title}\n    {step.key}\n    {step.cost}\n    {step.made}" for step in self.steps]
        return "\n".join([*lines, *(f"{name} {', '.join(found)}" for name, found in self.contents.items())])

    def _repr_html_(self) -> str:
        from saeflow.results.show import chain_html

        return chain_html(self)


class Lineage:
    """Chains of a results folder, of which steps are shared."""

    def __init__(self, disk: Disk) -> None:
        self.disk = disk
        self._newest = {(line["stage"], line["key"]): line for line in lines(disk.root)}
        self._steps: dict[tuple[str, str], Step] = {}

    def chain(self, stage: str, key: str) -> Chain:
        found = lineage(self.disk.plan([(stage, key)]), stage, key)
        return Chain([self._step(instance) for _, instance in found.values()])

    def _step(self, instance: Instance) -> Step:
        one = instance.stage, instance.key
        if one not in self._steps:
            self._steps[one] = self._read(instance)
        return self._steps[one]

    def _read(self, instance: Instance) -> Step:
        one = instance.stage, instance.key
        receipt = self.disk.whole[instance.stage].get(instance.key)
        read = {path: value for path, value in flat(instance.config).items() if value is not None}
        contents = {name: str(read.pop(path)) for path, name in CONTENTS.items() if path in read}
        needs = tuple((stage, key) for stage, keys in instance.needs.items() for key in keys)
        time = time_of(self._newest.get(one), receipt)
        names = {name: value for name, value in instance.sources.items() if name.endswith("_name")}
        return Step(*one, instance.version, read, contents, needs, receipt, time, names)


def chain(disk: Disk, stage: str, key: str) -> Chain:
    """Of one artifact."""
    return Lineage(disk).chain(stage, key)
