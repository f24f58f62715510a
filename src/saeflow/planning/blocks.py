"""The blocks of a sweep: products whose union it is, and what overrides say of one of them by its name.

A block is called as the dictionary that it is of (`relu`, of `saelens/gated` `gated`), or by its number, from 0:

    sweep.relu.dictionary.l1_coefficient=[1,2]     replaces the values of an axis, or makes it one
    +sweep.relu.dictionary.l1_coefficient=4        adds values to it
    +sweep.mine={dictionary:topk,site:mlp_in}      adds a block
    ~sweep.pair                                    leaves a block out
"""

from collections.abc import Collection
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from saeflow.config import ConfigError, takes_list


class Edit(NamedTuple):
    """An override of `sweep.<path>`."""

    text: str
    path: str
    """A block, or an axis of one."""
    value: Any
    action: str
    """`+`, `~` or ''."""


@dataclass
class Block:
    """One product."""

    axes: dict[str, list[Any]]
    name: str = ""
    edited: set[str] = field(default_factory=set)
    """Axes of which an override of this block alone has the last word."""


def blocks_of(sweep: Any, groups: Collection[str], edits: list[Edit]) -> list[Block]:
    """The blocks of `sweep` as configured, with what overrides say of single ones put in.

    Raises `ConfigError` for a block or an axis that is not there, and for a value that cannot be there.
    """
    trees = sweep if isinstance(sweep, list) else [sweep]
    blocks = [Block(_axes(tree, groups, f"sweep[{number}]")) for number, tree in enumerate(trees)]
    names = [_name(block) for block in blocks]
    for number, block in enumerate(blocks):
        block.name = names[number] if names.count(names[number]) == 1 and names[number] else str(number)
    if not sweep and any(edit.action == "+" and "." not in edit.path for edit in edits):
        blocks = []  # of a single point, which the new block takes the place of
    for edit in edits:
        _apply(edit, blocks, groups)
    return blocks


def axis(path: str, value: Any) -> list[Any]:
    """The values of a sweep axis. Where the field itself is a list, one list is one value."""
    if takes_list(path):
        nested = isinstance(value, list) and bool(value) and all(isinstance(v, list) for v in value)
        return value if nested else [value]
    values = as_list(value)
    if not values:
        raise ConfigError(f"sweep of {path}: the list is empty")
    return values


def as_list(value: Any) -> list[Any]:
    return list(value) if isinstance(value, list | tuple) else [value]


def _axes(tree: Any, groups: Collection[str], where: str) -> dict[str, list[Any]]:
    if not isinstance(tree, dict):
        raise ConfigError(f"{where}={tree!r} must be a mapping from axes to values, such as {{dictionary.k:[8,16]}}")
    return {key: as_list(value) if key in groups else axis(key, value) for key, value in tree.items()}


def _name(block: Block) -> str:
    chosen = block.axes.get("dictionary", [])
    return str(chosen[0]).rsplit("/", 1)[-1] if len(chosen) == 1 else ""


def _apply(edit: Edit, blocks: list[Block], groups: Collection[str]) -> None:
    first, _, rest = edit.path.partition(".")
    found = next((b for n, b in enumerate(blocks) if first in (b.name, str(n))), None)
    if not rest and edit.action == "+":
        if found:
            raise ConfigError(f"{edit.text}: the sweep has a block {first} already; give the new one another name")
        blocks.append(Block(_axes(edit.value, groups, f"sweep.{first}"), first))
        return
    if found is None and len(blocks) == 1 and blocks[0].axes:
        found, rest = blocks[0], edit.path  # of the only block there need be no name
    if found is None:
        there = ", ".join(block.name for block in blocks if block.axes) or "none"
        raise ConfigError(f"{edit.text}: the sweep has no block {first}; its blocks are {there}")
    if not rest:
        if edit.action == "~":
            blocks.remove(found)
        else:
            found.axes = _axes(edit.value, groups, f"sweep.{first}")
        return
    if edit.action and rest not in found.axes:
        what = (
            f"give all of its values: sweep.{found.name}.{rest}=[...]" if edit.action == "+" else "nothing to leave out"
        )
        raise ConfigError(f"{edit.text}: block {found.name} has no axis {rest}; {what}")
    if edit.action == "~":
        del found.axes[rest]
        return
    values = as_list(edit.value) if rest in groups else axis(rest, edit.value)
    before = found.axes[rest] if edit.action == "+" else []
    found.axes[rest] = before + [value for value in values if value not in before]
    found.edited.add(rest)
