"""How figures name what a dictionary is: its kind, where it writes, how sparse it is.

`saeflow.dictionaries.series` names the dictionaries of an experiment with these.
"""

from saeflow.config.dictionary import kinds

_ACTIVATIONS = {"topk": "TopK", "relu": "ReLU + L1", "jumprelu": "BatchTopK"}  # the last: what it is once trained
_KINDS = {
    (name, activation): f"{_ACTIVATIONS[activation]} {kind.noun}"
    for by_head in (False, True)
    for activations in (("topk", "relu"), ("jumprelu",))
    for name, kind in kinds().items()
    if kind.noun and kind.by_head == by_head
    for activation in activations
}
_AMOUNTS = {"l1_coefficient": "L1", "l0_coefficient": "L0 coefficient"}
SERIES = (*_KINDS.values(), *(f"skip {name}" for name in _KINDS.values()))
"""Names of kinds, in the order in which figures number them; other names follow."""


def series_name(
    kind: str, activation: str, skip: bool = False, saelens: object = None, source: str | None = None, head: int = -1
) -> str:
    """Name of a kind. `saelens`: the class of SAELens that trained it, if it is a text (pandas says NaN for None beside
    names); `source`: the library that made it; `head`: the one that it is of, -1 for all."""
    if isinstance(saelens, str):
        return f"SAELens {saelens.replace('_', ' ')}"
    name = _KINDS.get((kind, activation.replace("batchtopk", "jumprelu")), "SAELens SAE")
    if source:  # made elsewhere, where what is a JumpReLU here may not have been a BatchTopK
        return f"{source} ({name.replace('BatchTopK', 'JumpReLU')})"
    return ("skip " if skip else "") + name + (" of one head" if head >= 0 else "")


def dictionary_key(key: str, part: str | None) -> str:
    """What a dictionary is known by: the key of its artifact, and which part of that it is, if it is one."""
    return f"{key}/{part}" if part else key


def amount_name(name: str) -> str:
    return _AMOUNTS.get(name, name.replace("_", " "))


def hook_title(hook_name: str) -> str:
    """`blocks.2.hook_mlp_out` as `layer 2, mlp_out`."""
    parts = hook_name.split(".")
    name = ".".join(parts[2:]).replace("hook_", "")
    return f"layer {parts[1]}, {name}" if parts[0] == "blocks" else hook_name


def place_name(hook_name: str, head: int = -1) -> str:
    """Where a dictionary writes, or reads, as a title."""
    return hook_title(hook_name) + (f", head {head}" if head >= 0 else "")
