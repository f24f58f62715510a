"""What of a plan goes to a bucket, comes back, and is whole there; and whether a run can read what it left there."""

from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from typing import Any

from saeflow.config import ConfigError
from saeflow.planning.explain import readable
from saeflow.planning.graph import Plan
from saeflow.planning.stages import Stage, stages
from saeflow.storage import transfer
from saeflow.storage.locks import Lock
from saeflow.storage.receipts import RECEIPT
from saeflow.storage.remote import QUICK, Remote, RemoteError


def remote_of(plan: Plan) -> Remote:
    """The place that `device.remote` names. Raises `ConfigError` where it names none, `RemoteError` where that cannot
    be read."""
    if not plan.device.get("remote"):
        raise ConfigError(
            'device.remote says no place: add it to the overrides, as in HYDRA="experiment=demo '
            'device.remote=s3://bucket/folder", or to conf/device/'
        )
    remote = Remote(plan.device["remote"])
    remote.check()
    return remote


def push(plan: Plan, remote: Remote, drop: bool = False) -> Iterator[tuple[str, bool]]:
    """Puts all artifacts of a plan that are here into the bucket, those first that others were made from, and with
    `drop` then removes here what can be read there. Yields lines, and whether all went well."""
    stores: dict[Path, Stage] = {}
    for name, stage in stages().items():
        for key in plan.found[name]:
            folder, carrier = plan.folder(name, key), _carrier(stage)
            try:
                sent = carrier.push(remote, folder) if carrier else 0
                done = transfer.push(remote.below(f"{name}/{key}"), folder)
            except ValueError as error:  # damaged here, or of other bytes there
                yield str(error), False
                continue
            stores |= {folder.parent: stage} if carrier else {}
            beside = f", and {readable(sent)} beside it" if sent else ""
            yield f"{'pushed' if done == 'pushed' else 'there already'}: {name}/{key}{beside}", True
    for store, stage in stores.items() if drop else ():
        if reader := _at_work(plan, stage, store):
            yield (
                f"kept the arrays of {store}: {reader}, which may be reading them; push again when it has ended",
                False,
            )
        else:
            yield from ((line, True) for line in _carrier(stage).drop(remote, store))


def pull(plan: Plan, remote: Remote, arrays: bool = False) -> Iterator[tuple[str, bool]]:
    """Brings all artifacts of a plan that are not here; of activations, columns, whose arrays stay in the bucket unless
    `arrays`. Yields lines, and whether all went well."""
    for name, stage in stages().items():
        for key in plan.stages[name]:
            folder, carrier = plan.folder(name, key), _carrier(stage)
            here = key in plan.found[name]
            if here and not (arrays and stage.elsewhere(folder)):
                continue
            place, came = remote.below(f"{name}/{key}"), 0
            try:
                if transfer.receipt_there(place) is None:
                    yield f"not in the bucket: {name}/{key}", True
                    continue
                came = carrier.pull(remote, folder, arrays) if carrier else 0
                if not here:
                    transfer.pull(place, folder)
            except RemoteError as error:
                yield str(error), False
                continue
            yield f"pulled: {name}/{key}" + (f", and {readable(came)} beside it" if came else ""), True


def damaged(plan: Plan, remote: Remote, set_aside: bool = False) -> Iterator[tuple[str, bool]]:
    """Reads all artifacts of a plan that are in the bucket. Yields a line for each that is whole, and for each file
    that is not; `set_aside`: takes the latter away there, and the receipt with it, so that a push puts both again."""
    for name, stage in stages().items():
        for key in plan.stages[name]:
            place, carrier = remote.below(f"{name}/{key}"), _carrier(stage)
            if transfer.receipt_there(place) is None:
                continue
            found = [(place, *one) for one in transfer.damaged(place)]
            if carrier and not found:
                store = remote.below(f"{name}/{key.split('/')[0]}")
                found += [(store, *one) for one in carrier.damaged(remote, plan.folder(name, key))]
            for where, path, problem in found:
                yield f"damaged: {where.name(path)} ({problem})", False
                if set_aside:
                    place.delete(RECEIPT)
                    where.delete(path)
            if not found:
                yield f"whole: {name}/{key}", True


def check_remote(plan: Plan) -> None:
    """Raises `ConfigError` where jobs of a run would read something in a bucket that cannot be read from here, or
    `device.remote` cannot."""
    if not any(plan.to_make.values()):
        return
    if plan.device.get("remote"):
        try:
            remote_of(plan)
        except RemoteError as error:
            raise ConfigError(f"device.remote: {error}") from None
    needed = {
        (stage, key)
        for name, keys in plan.to_make.items()
        for k in keys
        for stage, of_stage in plan.stages[name][k].needs.items()
        for key in of_stage
    }
    making = {(name, key) for name, keys in plan.to_make.items() for key in keys}
    urls = {stages()[s].elsewhere(plan.folder(s, key)): (s, key) for s, key in sorted(needed - making)}
    for url, (stage, key) in urls.items():
        if url is None:
            continue
        try:
            remote = Remote(url, QUICK)
            remote.check()
            if next(remote.names(), None) is None:
                raise RemoteError(f"{remote.name('')} is empty: is AWS_ENDPOINT_URL the server that it was pushed to?")
        except RemoteError as error:
            raise ConfigError(f"{stage} {key} is to be read in a bucket: {error}") from None


def notes_of_bucket(plan: Plan) -> list[str]:
    """What to say of a plan that would make what is in `device.remote` already."""
    if not plan.device.get("remote"):
        return []
    remote = Remote(plan.device["remote"])
    receipts = [f"{name}/{key}/{RECEIPT}" for name, keys in plan.to_make.items() for key in keys]
    found = sum(one is not None for one in transfer.each(receipts, remote.stat))
    said = f"{found} of {len(receipts)} artifacts to make are in {remote.url}: make pull brings them instead"
    return [said] if found else []


def _at_work(plan: Plan, stage: Stage, store: Path) -> str:
    """Which process makes something from what is in a store; '' where none does. On a network disk a file that is
    removed is lost to those who have it open elsewhere."""
    for name, table in plan.stages.items():
        for key, instance in table.items():
            if any(plan.folder(stage.name, needed).parent == store for needed in instance.needs.get(stage.name, ())):
                file = plan.folder(name, key).with_name(f"{key.split('/')[-1]}.lock")
                if file.exists() and (lock := Lock(file)).taken():
                    return f"{lock.holder()} makes {plan.folder(name, key)}"
    return ""


def _carrier(stage: Stage) -> Any:
    """Its functions, or None: `Stage.carrier`."""
    return import_module(stage.carrier) if stage.carrier else None
