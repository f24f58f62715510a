"""Whether a machine can run a plan: its disk, its memory, its devices. What is certain to fail is said first."""

import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from saeflow.config import ConfigError
from saeflow.config.device import missing
from saeflow.planning.explain import counted, readable
from saeflow.planning.graph import Instance, Plan
from saeflow.planning.stages import stages
from saeflow.storage.memory import installed_memory


def check_disk(plan: Plan) -> None:
    """Raises `ConfigError` where what the plan would write does not fit on the disk, before anything runs. That is the
    same disk on every machine that runs a part of it."""
    wanted = bytes_on_disk(plan)
    beside = (stages()[stage].beside(plan, _of(plan, stage, keys)) for stage, keys in jobs(plan))
    total = sum(wanted.values()) + max(beside, default=0)
    free = shutil.disk_usage(_there(plan.results)).free
    if total > free:
        most = max(wanted, key=lambda stage: wanted[stage])
        largest = max((plan.stages[most][k] for k in plan.to_make[most]), key=lambda i: stages()[most].n_bytes(plan, i))
        by = f" ({stages()[most].sized_by(largest)})" if stages()[most].sized_by(largest) else ""
        raise ConfigError(
            f"the disk cannot hold this plan: it would write {readable(total)} below {plan.results}/ and "
            f"{readable(free)} are free there. Most of it, {readable(wanted[most])}, is for "
            f"{counted(most, len(plan.to_make[most]))}{by}. Fewer hooks or tokens.train_tokens, a smaller dictionary, "
            "activations.dtype=float16, or another disk (--directory, or a link at results/) would do"
        )


def check_folders(plan: Plan) -> None:
    """Raises `ConfigError` where the folders of artifacts and logs cannot be written, before anything runs."""
    for name in (plan.results, "logs"):
        folder = _there(name)
        if not folder.is_dir():
            raise ConfigError(f"{folder} is a file, and {name}/ has to be a folder: move it away")
        if not os.access(folder, os.W_OK | os.X_OK):
            raise ConfigError(
                f"{name}/ cannot be written: {folder} is read-only, or another user's; change its rights, or work in "
                "another folder (--directory)"
            )


def _there(name: str) -> Path:
    """A path, or what of it is there."""
    path = Path(name).absolute()
    return next(one for one in (path, *path.parents) if one.exists())


def check_machine(plan: Plan) -> None:
    """Raises `ConfigError` where this machine cannot run the plan."""
    for problem in unfit(plan):
        raise ConfigError(f"this machine cannot run this plan: {problem}")


def notes(plan: Plan) -> list[str]:
    """What to say of a plan that nothing runs yet, and that another machine may run."""
    said = "on this machine a run is refused, on others (--executor) it is not"
    of_jobs = (stages()[stage].note(plan, _of(plan, stage, keys)) for stage, keys in jobs(plan))
    return [*(f"{said}: {problem}" for problem in unfit(plan)), *dict.fromkeys(filter(None, of_jobs))]


def unfit(plan: Plan) -> Iterator[str]:
    """Why this machine cannot run what is to be made, a sentence each: devices that it has not, jobs that hold more
    than all of its memory. A machine that a cluster gives them may."""
    for device in sorted({plan.device_of(stage) for stage, keys in plan.to_make.items() if keys}):
        if reason := missing(device):
            asked = [stage for stage, keys in plan.to_make.items() if keys and plan.device_of(stage) == device]
            yield f"device.{{{','.join(asked)}}}={device}, but {reason}; use device=cpu, or run it where there is one"
    memory = installed_memory()
    for stage, keys in jobs(plan):
        instances = _of(plan, stage, keys)
        held = stages()[stage].holds(plan, instances)
        if held > memory and plan.device_of(stage) == "cpu":
            largest = max(instances, key=lambda i: stages()[stage].holds(plan, [i]))
            together = f" ({len(keys)} in one job)" if len(keys) > 1 else ""
            yield (
                f"{stages()[stage].noun[0]} {keys[0]}{together} would hold {readable(held)} of memory with "
                f"{stages()[stage].sized_by(largest)}, and there are {readable(memory)}"
            )


def bytes_on_disk(plan: Plan) -> dict[str, int]:
    """Predicted bytes of everything that a run makes, by stage."""
    return {s: sum(stages()[s].n_bytes(plan, i) for i in _of(plan, s, keys)) for s, keys in plan.to_make.items()}


def jobs(plan: Plan) -> Iterator[tuple[str, list[str]]]:
    """Stage and keys of every job of a run."""
    for stage in plan.to_make:
        yield from ((stage, keys) for keys in plan.jobs(stage))


def _of(plan: Plan, stage: str, keys: list[str]) -> list[Instance]:
    return [plan.stages[stage][key] for key in keys]
