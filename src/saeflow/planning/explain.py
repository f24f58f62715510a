"""What a plan would run, and why, in the words of the research; and whether the disk can hold it."""

import shutil
from pathlib import Path
from typing import Any, NamedTuple

from saeflow.config import ConfigError
from saeflow.planning.graph import Instance, Plan
from saeflow.planning.stages import stages
from saeflow.storage.receipts import RECEIPT

MAX_REASONS = 6


class Explanation(NamedTuple):
    missing: dict[str, list[Instance]]
    """Instances of each stage that are not on disk, in the order of the data flow."""
    reasons: list[str]
    """What is new in what they read, nearest change first: `dictionary.l1_coefficient=0.002 is new`."""
    bytes_to_cache: int
    bytes_in_all: int
    operations: float
    """Floating-point operations of the missing trainings."""
    rate: float
    """Of them a second, `device.flops`."""


def explain(plan: Plan) -> Explanation:
    """Compares the plan with the artifacts on disk."""
    missing = {
        stage: [i for key, i in table.items() if not plan.done(stage, key)] for stage, table in plan.stages.items()
    }
    reasons: dict[str, None] = {}  # an ordered set
    for stage, instances in missing.items():
        if stages()[stage].says_all and reasons:
            break  # why it is new follows from the rest
        known = _configs_on_disk(plan, stage) if instances else []
        for instance in instances:
            for reason in _what_is_new(instance, known):
                reasons[reason] = None
    sizes = {stage: sum(map(stages()[stage].n_bytes, instances)) for stage, instances in missing.items()}
    cached = sum(size for stage, size in sizes.items() if stages()[stage].cached)
    operations = sum(stages()[i.stage].operations(plan, i) for instances in missing.values() for i in instances)
    return Explanation(missing, list(reasons), cached, sum(sizes.values()), operations, float(plan.device["flops"]))


def sentence(explanation: Explanation) -> str:
    """The explanation in one sentence, for a person."""
    declared = stages()
    counts = {
        stage: f"{len(instances)} {declared[stage].noun[len(instances) != 1]}"
        for stage, instances in explanation.missing.items()
        if instances or declared[stage].cached
    }
    cached = [counts.pop(stage) for stage in list(counts) if declared[stage].cached]
    if not any(explanation.missing.values()):
        return "nothing to do: every artifact of this plan is there"
    why = explanation.reasons[:MAX_REASONS]
    more = len(explanation.reasons) - len(why)
    reason = (", ".join(why) + (f", and {more} more" if more else "")) if why else "an artifact was removed"
    to_cache = f"{', '.join(cached)}, {readable(explanation.bytes_to_cache)} to cache"
    text = f"{', '.join(counts.values()) or 'no other stage'}: {reason}; {to_cache}"
    text += f"; {readable(explanation.bytes_in_all)} in all"
    if explanation.operations:
        seconds = explanation.operations / explanation.rate
        unit, size = ("h", 3600) if seconds >= 3600 else ("min", 60) if seconds >= 60 else ("s", 1)
        least = f"{seconds / size:.2g} {unit}"
        rate = f"device.flops={explanation.rate:.0e}"
        text += f"; {explanation.operations:.1e} operations of training, at least {least} at {rate}"
    return text


def check_disk(plan: Plan) -> None:
    """Raises `ConfigError` where what the plan would write does not fit on the disk, before anything runs."""
    wanted = explain_bytes(plan)
    root = Path(plan.results)
    while not root.exists():
        root = root.absolute().parent
    free = shutil.disk_usage(root).free
    if wanted > free:
        raise ConfigError(
            f"the disk cannot hold this plan: it would write {readable(wanted)} below {plan.results}/ and "
            f"{readable(free)} are free there. Fewer hooks or tokens.train_tokens, activations.dtype=float16, or "
            "another disk (--directory, or a link at results/) would do"
        )


def explain_bytes(plan: Plan) -> int:
    """Predicted bytes of everything that is not on disk."""
    return sum(
        stages()[stage].n_bytes(instance)
        for stage, table in plan.stages.items()
        for key, instance in table.items()
        if not plan.done(stage, key)
    )


def readable(n_bytes: int) -> str:
    size = float(n_bytes)
    for unit in ("bytes", "kB", "MB", "GB"):
        if size < 1000:
            return f"{size:.0f} {unit}" if unit == "bytes" else f"{size:.1f} {unit}"
        size /= 1000
    return f"{size:.1f} TB"


def _configs_on_disk(plan: Plan, stage: str) -> list[dict[str, Any]]:
    """What the artifacts of a stage that are there had read, as flat tables."""
    import yaml

    loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
    found = []
    for receipt in sorted((Path(plan.results) / stage).glob(f"**/{RECEIPT}")):
        file = receipt.with_name("config.yaml")
        try:
            tree = yaml.load(file.read_bytes(), Loader=loader)
            found.append(_flat({"version": tree["version"], **tree["config"]}))
        except (OSError, yaml.YAMLError, KeyError, TypeError):
            continue  # no whole artifact: nothing to compare with
    return found


def _what_is_new(instance: Instance, known: list[dict[str, Any]]) -> list[str]:
    """Differences to the nearest artifact of the same stage; none where only what it needs has changed."""
    read = _flat({"version": instance.version, **instance.config})
    if not known:
        return []
    nearest = min(([k for k in read if read[k] != other.get(k, ...)] for other in known), key=len)
    return [f"{key}={_value(read[key])} is new" for key in nearest]


def _flat(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        if isinstance(value, dict):
            flat |= _flat(value, f"{prefix}{key}.")
        else:
            flat[prefix + key] = value
    return flat


def _value(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)
