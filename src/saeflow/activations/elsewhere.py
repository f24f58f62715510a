"""Which arrays of a store lie in a bucket: `remote.json` beside `activations.zarr` says so, for this folder of results.

It names the place, and of each hook for how many tokens the array there suffices. It is of the machine: no receipt and
no key knows of it, and what is here is read here.
"""

import json
from pathlib import Path
from typing import Any

from saeflow.activations.shards import hook_of, shards_are_there
from saeflow.storage.publish import publish_text

POINTER = "remote.json"


def array_url(column: Path) -> str | None:
    """Where the array of a column is to be read; None where it is here, or nobody knows of one."""
    pointer = read_pointer(column.parent)
    hook = hook_of(column) if pointer["arrays"] else None
    if hook is None or pointer["arrays"].get(hook, 0) < _n_tokens(column) or shards_are_there(column):
        return None
    return f"{pointer['url']}/{hook}"


def rows_are_somewhere(column: Path) -> bool:
    """Whether all shards that a column folder stands for are here, or are said to be in a bucket."""
    return shards_are_there(column) or array_url(column) is not None


def point_to(store: Path, url: str, hook: str, n_tokens: int) -> None:
    """Notes that the array of a hook, with so many tokens, lies in the group at `url`. The caller holds the store's
    lock. Raises `ValueError` where other arrays of the store lie elsewhere."""
    pointer = read_pointer(store)
    arrays = pointer["arrays"]
    if arrays and pointer["url"] != url:
        raise ValueError(
            f"{store} has arrays in {pointer['url']}, and a store can have them in one bucket: bring them here first "
            "(pull with that device.remote and ARRAYS=1), and remove its remote.json"
        )
    arrays[hook] = max(n_tokens, arrays.get(hook, 0))
    publish_text(store / POINTER, json.dumps({"url": url, "arrays": arrays}, indent=1) + "\n")


def forget(store: Path, hook: str) -> None:
    """Notes that the array of a hook is not to be read in the bucket."""
    pointer = read_pointer(store)
    if pointer["arrays"].pop(hook, None) is not None:
        publish_text(store / POINTER, json.dumps(pointer, indent=1) + "\n")


def read_pointer(store: Path) -> dict[str, Any]:
    """`url` and `arrays`; empty where there is none that is whole."""
    try:
        pointer = json.loads((store / POINTER).read_bytes())
        arrays = {str(hook): int(n) for hook, n in pointer["arrays"].items()}
        return {"url": str(pointer["url"]), "arrays": arrays}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return {"url": "", "arrays": {}}


def _n_tokens(column: Path) -> int:
    return int(json.loads((column / "column.json").read_bytes())["n_tokens"])
