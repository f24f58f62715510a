"""What a plan would run, and why, in the words of the research."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from saeflow.config import ConfigError
from saeflow.config.defaults import flat, with_defaults
from saeflow.planning.graph import Instance, Plan
from saeflow.planning.history import START_SECONDS, Prediction, lines, predict
from saeflow.planning.stages import stages
from saeflow.storage.receipts import RECEIPT

MAX_REASONS = 6

WORDS = {
    "model.weights": "the model's weights are new",
    "corpus.content": "the corpus's text is new",
    "tokenizer": "the tokenizer is new",
}
"""What is no setting, but known by its content."""
FOLLOWS = ("size", "part", "group", "layers")
"""What follows from settings that are told."""


class Explanation(NamedTuple):
    missing: dict[str, list[Instance]]
    """Instances of each stage that a run makes, in the order of the data flow."""
    reasons: list[str]
    """What is deleted, and what is new in what they read, nearest change first: `dictionary.l1_coefficient=0.002 is
    new`."""
    parts: dict[str, int]
    """Of stages whose work several jobs share, how many of these run ahead of those that make the artifacts."""
    bytes_to_cache: int
    bytes_in_all: int
    time: Prediction


def explain(plan: Plan) -> Explanation:
    """Compares the plan with the artifacts on disk."""
    missing = {stage: [plan.stages[stage][key] for key in keys] for stage, keys in plan.to_make.items()}
    sizes = {stage: sum(stages()[stage].n_bytes(plan, i) for i in instances) for stage, instances in missing.items()}
    cached = sum(size for stage, size in sizes.items() if stages()[stage].cached)
    made = lines(plan.results)
    reasons = _reasons(plan, missing, made)
    parts = {stage: sum(map(len, jobs.values())) for stage, jobs in plan.parts.items()}
    return Explanation(missing, reasons, parts, cached, sum(sizes.values()), predict(plan, made))


def _reasons(plan: Plan, missing: dict[str, list[Instance]], made: list[dict[str, Any]]) -> list[str]:
    if not any(missing.values()):
        return []
    receipts = {stage: _receipts(plan, stage) for stage in missing}
    ever = {(line["stage"], line["key"]) for line in made} | _needed_by(receipts)
    if not any(receipts.values()):
        return ["all that was made has been deleted" if ever else "nothing is there yet"]
    deleted, changed = [], dict[str, None]()  # an ordered set
    for stage, instances in missing.items():
        gone = [i for i in instances if (stage, i.key) in ever]
        if gone:
            deleted.append(f"{counted(stage, len(gone))} {'was' if len(gone) == 1 else 'were'} deleted or lost a file")
        if not stages()[stage].says_all:  # why those are new follows from the rest
            known = _configs(receipts[stage]) if len(gone) < len(instances) else []
            new = [i for i in instances if (stage, i.key) not in ever]
            changed |= dict.fromkeys(reason for instance in new for reason in _what_is_new(instance, known))
    if deleted or changed:
        return [*deleted, *changed]
    drawn = [i.key.rsplit("-", 1)[0] for stage, found in missing.items() if stages()[stage].says_all for i in found]
    known_before = any(
        name in {r.parent.name.rsplit("-", 1)[0] for found in receipts.values() for r in found} for name in drawn
    )
    return [
        f"what the experiment {plan.experiment} holds has changed"
        if known_before
        else f"the experiment {plan.experiment} is new"
    ]


def counted(stage: str, n: int) -> str:
    """`3 trainings`."""
    return f"{n} {stages()[stage].noun[n != 1]}"


def sentence(explanation: Explanation) -> str:
    """The explanation in one sentence, for a person."""
    declared = stages()
    counts = {
        stage: counted(stage, len(instances)) + _in_parts(explanation.parts.get(stage, 0))
        for stage, instances in explanation.missing.items()
        if instances or declared[stage].cached
    }
    cached = [counts.pop(stage) for stage in list(counts) if declared[stage].cached]
    if not any(explanation.missing.values()):
        return "nothing to do: what this experiment shows is there"
    why = explanation.reasons[:MAX_REASONS]
    more = len(explanation.reasons) - len(why)
    reason = ", ".join(why) + (f", and {more} more" if more else "")
    to_cache = f"{', '.join(cached)}, {readable(explanation.bytes_to_cache)} to cache"
    text = f"{', '.join(counts.values()) or 'no other stage'}: {reason}; {to_cache}"
    return f"{text}; {readable(explanation.bytes_in_all)} in all; {_time(explanation.time)}"


def _in_parts(n: int) -> str:
    return f" ({n} part{'s' * (n > 1)} ahead)" if n else ""


def _time(time: Prediction) -> str:
    text = f"about {_span(time.seconds)} of jobs, one after another, "
    by = [f"by {time.measured} earlier ones on this machine"] if time.measured else []
    if time.guessed:
        by.append(
            f"by device.flops and {START_SECONDS:g} s a job for {', '.join(time.guessed)}, of which none ran here"
        )
    return text + " and ".join(by)


def costs(explanation: Explanation, jobs: Mapping[str, int]) -> str:
    """A table for people of what each stage is predicted to take; "" where nothing is to be made. `jobs`: how many
    there are of each."""
    time = explanation.time
    if not time.by_stage:
        return ""
    rows = [("stage", "jobs", "time of all", "memory of the largest", "by")]
    for stage, seconds in time.by_stage.items():
        memory = readable(1e6 * time.memory_mb[stage]) if stage in time.memory_mb else "-"
        by = "device.flops, what is asked for" if stage in time.guessed else "earlier jobs here"
        rows.append((stage, str(jobs[stage]), _span(seconds), memory, by))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join("  ".join(c.ljust(w) for c, w in zip(row, widths, strict=True)).rstrip() for row in rows)


def _span(seconds: float) -> str:
    unit, size = ("h", 3600) if seconds >= 3600 else ("min", 60) if seconds >= 60 else ("s", 1)
    return f"{seconds / size:.2g} {unit}"


def readable(n_bytes: float) -> str:
    size = float(n_bytes)
    for unit in ("bytes", "kB", "MB", "GB"):
        if size < 1000:
            return f"{size:.0f} {unit}" if unit == "bytes" else f"{size:.1f} {unit}"
        size /= 1000
    return f"{size:.1f} TB"


def _receipts(plan: Plan, stage: str) -> list[Path]:
    return sorted((Path(plan.results) / stage).glob(f"**/{RECEIPT}"))


def _needed_by(receipts: dict[str, list[Path]]) -> set[tuple[str, str]]:
    """Artifacts that others were made from: they have been there."""
    found = set()
    for receipt in (one for several in receipts.values() for one in several):
        try:
            needs = json.loads(receipt.read_bytes()).get("needs", {})
        except (OSError, ValueError, AttributeError):
            continue
        found |= {(stage, key) for stage, keys in needs.items() for key in keys}
    return found


def _configs(receipts: list[Path]) -> list[dict[str, Any]]:
    """What the artifacts of a stage that are there had read, as flat tables."""
    import yaml

    loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
    found = []
    for file in (receipt.with_name("config.yaml") for receipt in receipts):
        try:
            tree = yaml.load(file.read_bytes(), Loader=loader)
            found.append(flat({"version": tree["version"], **with_defaults(tree["config"])}))
        except (OSError, yaml.YAMLError, KeyError, TypeError, ConfigError):
            continue  # no whole artifact, or of a kind of dictionary that there is no longer
    return found


def _what_is_new(instance: Instance, known: list[dict[str, Any]]) -> list[str]:
    """Differences to the nearest artifact of the same stage, in the user's words; none where only what it needs has
    changed."""
    read = flat({"version": instance.version, **instance.config})
    if not known:
        return []
    nearest = min(([k for k in read if read[k] != other.get(k, ...)] for other in known), key=len)
    return [_told(instance, key, read[key]) for key in nearest if key not in FOLLOWS]


def _told(instance: Instance, key: str, value: Any) -> str:
    if key == "version":
        return f"{stages()[instance.stage].noun[1]} are computed otherwise since version {value} (CHANGELOG.md)"
    setting, value = instance.says.get(key, (key, value))
    return WORDS.get(key, f"{setting}={_value(value)} is new")


def _value(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)
