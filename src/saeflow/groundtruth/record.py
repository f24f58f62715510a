"""What notebook 002 prints of a dictionary, and what its hand-made lists are made from: losses, latents by state."""

from typing import Any

import numpy as np
import pandas as pd

from saeflow.groundtruth.cases import Case
from saeflow.groundtruth.labels import TIE
from saeflow.groundtruth.network import Node
from saeflow.groundtruth.program import BOS, PAD
from saeflow.groundtruth.training import align


def losses(y: np.ndarray, reconstruction: np.ndarray, activations: np.ndarray) -> dict[str, float]:
    """As SAELens 3 logs them, over all tokens at once: y, reconstruction (M, d), activations (M, n).

    `mse`: squared error of a token, summed over d; `l1`: sum of a token's activations, without a coefficient;
    `explained_variance`, `explained_variance_sd`: mean and standard deviation over tokens of 1 - squared error of the
    token / its squared distance from the mean (those at the mean are left out).
    """
    squared = np.square(y - reconstruction).sum(1)
    spread = np.square(y - y.mean(0)).sum(1)
    explained = 1 - squared[spread > TIE] / spread[spread > TIE]
    return {
        "mse": float(squared.mean()),
        "l1": float(np.abs(activations).sum(1).mean()),
        "explained_variance": float(explained.mean()) if len(explained) else 0.0,
        "explained_variance_sd": float(explained.std(ddof=1)) if len(explained) > 1 else 0.0,
    }


def state_names(case: Case, tokens: np.ndarray, hook_name: str, states: np.ndarray) -> list[str]:
    """What the states (M,) of `saeflow.groundtruth.labels.states` are called, by number: `x@2`, `frac_prevs=0.5`."""
    first = np.unique(states, return_index=True)[1]
    values, held = case.program.run(tokens), case.compiled.variables_at(hook_name)
    words, special = case.program.vocabulary, [case.program.token_id(BOS), case.program.token_id(PAD)]
    names = []
    for place in first:
        row, position = divmod(int(place), tokens.shape[1])
        said = []
        if "tokens" in held:
            word = str(words[tokens[row, position]])
            said.append(word if tokens[row, position] in special or "indices" not in held else f"{word}@{position}")
        for name in held:
            if name not in ("tokens", "indices"):
                of, value = case.program.variables[name].values, values[name][row, position]
                if of is None:
                    said.append(f"{name}={value:.3g}")
                elif 0 <= value < len(of):
                    said.append(f"{name}={of[int(value)]}")
        names.append(", ".join(said) or "none")
    return names


def truth_table(case: Case, tokens: np.ndarray) -> pd.DataFrame:
    """A row for every position of rows `tokens` (N, P): `row`, `position`, `token`, every variable of the program, and
    `label`, what the program says there; None where it says nothing. Numbers are float64, categories their words."""
    values, program = case.program.run(tokens), case.program
    row, position = np.divmod(np.arange(tokens.size), tokens.shape[1])
    table = {"row": row, "position": position, "token": [str(program.vocabulary[t]) for t in tokens.ravel()]}
    for name, variable in program.variables.items():
        table[f"variable_{name}"] = _said(values[name].ravel(), variable.values)
    table["label"] = _said(values[program.output].ravel(), program.output_variable.values)
    return pd.DataFrame(table)


def _said(values: np.ndarray, of: tuple[Any, ...] | None) -> Any:
    if of is None:
        return values.astype(np.float64)
    return [str(of[int(v)]) if 0 <= v < len(of) else None for v in values]


def node_table(case: Case, config: dict[str, Any]) -> pd.DataFrame:
    """The notebook's table of operations and hooks: a row for each variable of the program, with the `node` of a model
    of that config which stands for it (None: its embedding), the node's `hook`, and the `directions` of the residual
    stream in which the compiled model writes it. Last come the nodes off the circuit, without a variable."""
    found = align(case, config)
    stands = {name: node for node, variables in found.on_circuit.items() for name in variables}
    rows: list[dict[str, Any]] = []
    for name in case.program.variables:
        written = [d for d in case.compiled.directions if d.partition(":")[0] == name]
        rows.append({"variable": name, **_place(stands.get(name)), "directions": written})
    rows += [{"variable": None, **_place(node), "directions": []} for node in found.off_circuit]
    return pd.DataFrame(rows)


def _place(node: Node | None) -> dict[str, Any]:
    if node is None:
        return {"node": None, "hook": "hook_embed"}
    hook = "mlp.hook_post" if node.head is None else "attn.hook_z"
    return {"node": node.name, "hook": f"blocks.{node.layer}.{hook}"}


def by_state(names: list[str], states: np.ndarray, activations: np.ndarray) -> pd.DataFrame:
    """A row for each live latent and state in which it fires: `latent`, `state`, its name, mean activation there, and
    `share`, of the state's positions at which it fires. `names` of states (M,), `activations` (M, n)."""
    live = np.flatnonzero((activations > 0).any(0))
    grouped = pd.DataFrame(activations[:, live], columns=live).groupby(states)
    mean, share = grouped.mean().to_numpy(), (pd.DataFrame(activations[:, live] > 0).groupby(states).mean()).to_numpy()
    which, state = np.nonzero(share.T)
    found = {"latent": live[which], "state": state, "name": [names[s] for s in state]}
    return pd.DataFrame(found | {"mean": mean.T[which, state], "share": share.T[which, state]})
