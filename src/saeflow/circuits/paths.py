"""The paths by which most of a latent's pre-activation comes about, and the graph that they make.

`greedy_paths` follows the largest contributions down (Dunefsky, Chlenski, Nanda 2024, section 4.3, and their
`greedy_get_top_paths`); `graph` merges the paths, with the errors of each node.
"""

import operator
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import pandas as pd

from saeflow.circuits.attribution import CircuitRun, Node, Target
from saeflow.config.circuits import Condition

_OPERATORS = {"=": operator.eq, "!=": operator.ne, "<": operator.lt, ">": operator.gt}
_UNITS = {"latent": "feature", "head": "head"}


class Path(NamedTuple):
    """From the root feature down; `contributions[i]` is what `nodes[i]` adds to the root by way of those before it."""

    nodes: tuple[Node, ...]
    contributions: tuple[float, ...]


def matches(nodes: Any, wanted: Iterable[Condition]) -> Any:
    """Whether a node, or each row of a table with the columns of one, meets all conditions."""
    found: Any = nodes.kind == nodes.kind  # True, or a column of it
    for field, sign, value in wanted:
        if field in _UNITS:
            found = found & (nodes.kind == _UNITS[field]) & _OPERATORS[sign](nodes.unit, value)
        else:
            found = found & _OPERATORS[sign](getattr(nodes, field), value)
    return found


def passes(path: Path, through: Iterable[Sequence[Condition]]) -> bool:
    """Whether a path goes, below its root, through a node for each of `through`."""
    return all(any(matches(node, wanted) for node in path.nodes[1:]) for wanted in through)


def greedy_paths(
    run: CircuitRun,
    root: Target,
    n_iterations: int = 4,
    n_branches: int = 15,
    top_k: int = 5,
    through: Sequence[Sequence[Condition]] = (),
    without: Sequence[Sequence[Condition]] = (),
) -> list[Path]:
    """Paths of the largest positive contributions to `root`, found greedily.

    In each of `n_iterations` the last node of every path is replaced by up to `top_k` features, `top_k` (head, source)
    pairs and the embedding; of all the paths so made, the `n_branches` that contribute most are kept. Sources at
    position 0 are skipped: heads rest there. Every path of every iteration is returned, shorter ones first.

    `through`, `without`: conditions (`saeflow.config.circuits.conditions`) of nodes. Nodes of `without` are left out of
    the search, and make room for others. With `through`, nodes that meet one of them are candidates beside the
    `top_k`, paths that have passed all are kept beside the `n_branches` that have not, and only paths that pass are
    returned, with those that they go on from.
    """
    start = Node("target", root.layer, -1, root.token)
    value = float(run.read(root.layer, root.part)[root.token] @ root.direction)
    frontier: list[tuple[Path, Target]] = [(Path((start,), (value,)), root)]
    found = [frontier[0][0]]
    for _ in range(n_iterations):
        candidates: list[tuple[Path, Target, Node]] = []
        for path, target in frontier:
            table = run.attribute(target)
            table = table[(table["contribution"] > 0) & ~((table["kind"] == "head") & (table["token"] == 0))]
            for unwanted in without:
                table = table[~matches(table, unwanted)]
            for kind in ("feature", "head", "embedding"):
                of_kind = table[table["kind"] == kind]
                parts = [of_kind, *(of_kind[matches(of_kind, wanted)] for wanted in through)]
                best = pd.concat(part.nlargest(top_k, "contribution") for part in parts)
                for row in best[~best.index.duplicated()].to_dict("records"):
                    node = Node(kind, int(row["layer"]), int(row["unit"]), int(row["token"]))
                    longer = Path((*path.nodes, node), (*path.contributions, float(row["contribution"])))
                    candidates.append((longer, target, node))
        candidates.sort(key=lambda one: (-one[0].contributions[-1], one[0].nodes))
        kept = [one for one in candidates if passes(one[0], through)][:n_branches]
        if through:
            kept += [one for one in candidates if not passes(one[0], through)][:n_branches]
        found += [path for path, _, _ in kept]
        frontier = [(path, run.step(target, node)) for path, target, node in kept if node.kind != "embedding"]
    if not through:
        return found
    shown = {path.nodes[: i + 1] for path in found if passes(path, through) for i in range(len(path.nodes))}
    return [found[0], *(path for path in found[1:] if path.nodes in shown)]


def graph(run: CircuitRun, root: Target, paths: list[Path]) -> dict[str, list[dict[str, Any]]]:
    """Paths merged by node, as JSON takes it.

    `edges`: contributions to the root summed over the different ways there. `nodes`: each node's contribution, and how
    it is made up: of `children` (the edges into it), its `bias`, the transcoders' `error` below it, and what was
    `pruned`: everything else. The four add up to the contribution.
    """
    prefixes = {path.nodes: path.contributions[-1] for path in paths}
    nodes: dict[Node, dict[str, float]] = {}
    for prefix, contribution in prefixes.items():
        node = nodes.setdefault(prefix[-1], dict.fromkeys(("contribution", "children", "bias", "error", "pruned"), 0.0))
        node["contribution"] += contribution
        if prefix[-1].kind == "embedding":
            node["pruned"] += contribution
            continue
        children = sum(c for other, c in prefixes.items() if len(other) == len(prefix) + 1 and other[:-1] == prefix)
        bias = run.bias(_target(run, root, prefix[:-1]), prefix[-1]) if len(prefix) > 1 else 0.0
        table = run.attribute(_target(run, root, prefix))
        error = float(table.loc[table["kind"] == "error", "contribution"].sum())
        node["children"] += children
        node["bias"] += bias
        node["error"] += error
        node["pruned"] += contribution - children - bias - error
    return {
        "nodes": [node._asdict() | parts for node, parts in nodes.items()],
        "edges": [{"to": a._asdict(), "from": b._asdict(), "contribution": c} for (a, b), c in edges_of(paths).items()],
    }


def edges_of(paths: Iterable[Path]) -> dict[tuple[Node, Node], float]:
    """From a node to one that it is made of: what comes that way to the root, summed over the ways above."""
    edges: dict[tuple[Node, Node], float] = {}
    for path in paths:
        if len(path.nodes) > 1:
            edge = (path.nodes[-2], path.nodes[-1])
            edges[edge] = edges.get(edge, 0.0) + path.contributions[-1]
    return edges


def _target(run: CircuitRun, root: Target, nodes: tuple[Node, ...]) -> Target:
    """The target that the last of `nodes` is explained by."""
    target = root
    for node in nodes[1:]:
        target = run.step(target, node)
    return target
