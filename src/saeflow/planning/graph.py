"""The plan: from Hydra's configuration to the instances of every stage, each named by the hash of what it reads.

A *point* is one combination of a sweep. A *stage* declares the config paths that it reads (`STAGES`). For every point
each stage is instantiated with that projection and nothing else, and with the instances that it needs; the hash of
(stage, stage version, projection, keys of the needed) ends its key, `<label>-<hash8>`, which names its folder below
`results/<stage>/`. Equal instances of different points are one. So the keys are a Merkle chain: what is not read cannot
make anything stale, what is read always does.

What only says *how* to run (devices, threads, paths) is kept beside the projection and never enters a hash; the model's
weights, its tokenizer and the corpus enter by content.
"""

import dataclasses
import json
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from saeflow.config import ConfigError
from saeflow.planning.digests import canonical, short_hash

RECEIPT = "provenance.json"


@dataclass(frozen=True)
class Stage:
    """`reads`: dotted paths of the point. `version`: raise it when the code changes what the stage computes.
    `batched`: several instances share a job (one forward pass fills many hooks, one read many trainings)."""

    reads: tuple[str, ...]
    version: int = 1
    batched: bool = False


_PACKING = ("tokens.context_size", "tokens.prepend_bos", "tokens.bos_token", "tokens.held_out_fraction")
STAGES = {
    "groundtruth": Stage(reads=("model.tracr",)),
    "tokens": Stage(reads=("corpus", "tokenizer", *_PACKING)),
    "activations": Stage(reads=("model", "activations", "tokens.context_size"), batched=True),
    "train": Stage(reads=("dictionary", "training", "seed"), version=3, batched=True),
    "foreign": Stage(reads=("model",)),
    "jacobian": Stage(reads=("jacobian", "model"), version=3),
    "baseline": Stage(reads=("evaluation.batch_rows", "model"), batched=True),
    "evaluate": Stage(reads=("evaluation", "model"), version=4, batched=True),
    "stack": Stage(reads=("evaluation", "model")),
    "heads": Stage(reads=("heads", "model")),
    "blind": Stage(reads=("model",)),
    "recover": Stage(reads=("model",), version=2, batched=True),
    "figures": Stage(reads=()),
}


@dataclass
class Instance:
    """One artifact: what it reads, what it needs, and (`sources`, never hashed) where its outside files lie now and
    how it is to be run."""

    stage: str
    key: str
    config: dict[str, Any]
    needs: dict[str, list[str]]
    sources: dict[str, str]

    def write_config(self, path: Path) -> None:
        """Writes what this instance read, for people and for `explain`."""
        from omegaconf import OmegaConf

        version = STAGES[self.stage].version if self.stage in STAGES else 1
        tree = {"stage": self.stage, "version": version, "config": self.config, "needs": self.needs}
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
        return Path(self.receipt(stage, key)).is_file()

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

    def resources(self, stage: str) -> dict[str, Any]:
        """Device and needs of a stage's jobs: never a reason to rerun."""
        device = self.device[stage]
        found = {"device": device, "gpu": int(str(device).startswith("cuda"))}
        return found | {k: self.device[k][stage] for k in ("mem_mb", "runtime") if stage in self.device.get(k, {})}

    def threads(self, stage: str) -> int:
        return int(self.device.get("threads", {}).get(stage, 1))

    # ---------------------------------------------------------------- freezing
    def freeze(self, path: str | Path) -> None:
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_suffix(".partial")
        partial.write_text(json.dumps(dataclasses.asdict(self)))
        partial.replace(path)

    @classmethod
    def load(cls, path: str | Path) -> "Plan":
        try:
            raw = json.loads(Path(path).read_text())
        except FileNotFoundError:
            raise ConfigError(
                f"no frozen plan at {path}: run the workflow, or python scripts/plan.py --freeze {path}"
            ) from None
        raw["stages"] = {s: {k: Instance(**i) for k, i in table.items()} for s, table in raw["stages"].items()}
        return cls(**raw)

    @classmethod
    def load_if_valid(cls, path: str | Path) -> "Plan | None":
        """The plan of the previous run, or None where there is none or another version of saeflow wrote it."""
        try:
            return cls.load(path)
        except (ConfigError, TypeError, KeyError, json.JSONDecodeError):
            return None

    # ---------------------------------------------------------------- batches
    def assign_batches(self, previous: "Plan | None") -> None:
        """Groups the instances of batched stages that are not on disk into jobs.

        A batch of an earlier run whose artifacts are all there, and all wanted, is kept as it was: its rule stays the
        one that made them. What was made by a batch that is no longer whole is simply there, with no rule.
        """
        for name, stage in STAGES.items():
            if not stage.batched:
                continue
            table = self.stages[name]
            size = int(self.device.get("batch", {}).get(name, 1 << 30))
            kept: list[list[str]] = []
            self.past[name] = []
            held: set[str] = set()
            for batch in previous.batches.get(name, []) + previous.past.get(name, []) if previous else []:
                if held.isdisjoint(batch) and all(self.done(name, k) for k in batch):
                    wanted = all(k in table for k in batch)
                    (kept if wanted else self.past[name]).append(batch)
                    held.update(batch if wanted else ())
            groups: dict[tuple[str, int], list[str]] = {}
            for key, instance in table.items():
                if key not in held and not self.done(name, key):
                    together = json.loads(instance.sources["training"])["together"] if name == "train" else size
                    most = min(size, together)
                    groups.setdefault((self._batch_group(instance), most), []).append(key)
            new = []
            for (_, most), keys in groups.items():
                if name == "train":  # those that read the same columns side by side, the longest first
                    keys = sorted(keys, key=lambda key: (table[key].needs["activations"], -_cost(table[key])))
                new += _even_parts(keys, [_cost(table[key]) for key in keys], most)
            self.batches[name] = kept + new

    def _batch_group(self, instance: Instance) -> str:
        """Instances of one group may share a job: columns of one store; dictionaries that read the same tokens in the
        same batches; those of one model that are evaluated on the same tokens."""
        if instance.stage == "activations":
            return instance.key.split("/")[0]
        if instance.stage == "train":
            training = instance.config["training"]
            column = self.instance("activations", instance.needs["activations"][0])
            store = column.key.split("/")[0]
            return short_hash([store, column.config["n_rows"], training["batch_size"], training["shuffle_seed"]])
        return short_hash([instance.config["model"], instance.config.get("evaluation"), instance.needs["tokens"]])


def _cost(instance: Instance) -> float:
    """About how long it takes beside others of its stage: ReLU begins dense, and stays denser where it reconstructs."""
    if instance.stage != "train":
        return 1.0
    dictionary = instance.config["dictionary"]
    if dictionary["kind"] == "jacobian":
        return 8.0
    if dictionary["activation"] != "relu":
        return 1.0 + (dictionary.get("k") or 0) / 50
    return 2.7 if dictionary["kind"] == "sae" else 2.1


def _even_parts(keys: list[str], costs: list[float], most: int) -> list[list[str]]:
    """As few parts as can be with at most `most` keys each, in order, of about equal cost."""
    parts: list[list[str]] = []
    for left in range(-(-len(keys) // most), 0, -1):
        budget, end, total = sum(costs) / left, 0, 0.0
        while end < min(most, len(keys)) and (total + costs[end] / 2 <= budget or len(keys) - end > most * (left - 1)):
            total += costs[end]
            end += 1
        parts.append(keys[:end])
        keys, costs = keys[end:], costs[end:]
    return parts
