"""What a dictionary does to a model whose output is right or wrong, rather than a distribution over next tokens.

The value at the hook where the dictionary writes is replaced by its reconstruction, by zeros, by its mean over all
positions, and (resample) by its value on another row, at every position. Of each output two things are measured, at
the positions after BOS where the program says something: the *error* (mean squared error of a number, cross-entropy of
a category) against what the program says, and the *accuracy*. Recovered against an ablation: (ablated - replaced) /
(ablated - clean).

*IIA through the dictionary*: of the latents that stand for one variable, a base row gets the activations of a source
row, x + (f_source - f_base) W_dec with all else as it was, and the model should say what the program says with that
variable from the source and all others that are made up to there from the base. `iia_nothing_<variable>` is how often
the base row's own output would be right. `iia_all`: all latents are exchanged, and with them all variables that the
compiled model has at the hook; what the model's own alignment allows at most.
"""

from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from saeflow.groundtruth.compiler import written_before
from saeflow.groundtruth.labels import correlation, match, without_leaks
from saeflow.groundtruth.network import Network
from saeflow.groundtruth.program import run
from saeflow.groundtruth.recovery import true_values
from saeflow.groundtruth.training import Truth, loss_of, pairs

if TYPE_CHECKING:
    from saeflow.dictionaries import Dictionary

N_PAIRS = 4096
STANDS_FOR = 0.5  # F1, or correlation: a latent below this stands for no variable
SMALLEST_RISE = 1e-6  # of the error, for a recovered fraction to mean anything


@torch.no_grad()
def faithfulness(network: Network, truth: Truth, dictionary: "Dictionary", seed: int = 0) -> dict[str, Any]:
    """Of a dictionary that reads `spec.hook_name` and writes `spec.hook_name_out`."""
    clean = network(torch.from_numpy(truth.rows))
    x, y = clean.at(dictionary.spec.hook_name), clean.at(dictionary.spec.hook_name_out)
    labels = truth.values[truth.case.program.output]
    other = np.random.default_rng(seed).permutation(len(y))
    other = np.where(other == np.arange(len(y)), np.roll(other, 1), other)
    values = {
        "replaced": dictionary.forward(x.flatten(0, 1)).view_as(y),
        "zero": torch.zeros_like(y),
        "mean": y.mean((0, 1)).expand_as(y),
        "resample": y[torch.from_numpy(other)],
    }
    spliced = {name: network.spliced(clean, dictionary.spec.hook_name_out, v) for name, v in values.items()}
    row: dict[str, Any] = {}
    numerical = truth.case.program.output_variable.numerical
    for name, output in ({"clean": clean.output} | spliced).items():
        row[f"error_{name}"] = loss_of(output, labels, numerical).item()
        row[f"accuracy_{name}"] = float(truth.correct(output, labels).mean())
    for name in ("zero", "mean", "resample"):
        for measure, sign in (("error", 1.0), ("accuracy", -1.0)):
            ablated, lost = (row[f"{measure}_{name}"] - row[f"{measure}_{which}"] for which in ("replaced", "clean"))
            row[f"{measure}_recovered_{name}"] = ablated / lost if sign * lost > SMALLEST_RISE else None
    row["fvu"] = ((y - values["replaced"]).square().sum() / (y - y.mean((0, 1))).square().sum()).item()
    return row


@torch.no_grad()
def interchange_accuracy(network: Network, truth: Truth, dictionary: "Dictionary", seed: int = 0) -> dict[str, Any]:
    """`iia_<variable>`, `latents_<variable>` and `iia_nothing_<variable>` of every variable that the compiled model has
    at the hook where the dictionary writes, `indices` apart: rows have the same."""
    case, hook = truth.case, dictionary.spec.hook_name_out
    clean = network(torch.from_numpy(truth.rows))
    x, y = clean.at(dictionary.spec.hook_name), clean.at(hook)
    f = dictionary.encode(x.flatten(0, 1)).view(*x.shape[:2], -1)
    up_to_hook = [
        name for name, location in case.compiled.locations.items() if location.sublayer < written_before(hook).stop
    ]
    base, source = pairs(len(truth.rows), N_PAIRS, seed)
    b, s = torch.from_numpy(base), torch.from_numpy(source)
    after = type(clean)(clean.output, *([t[b] for t in some] for some in clean[1:]))
    W_dec = dictionary.tensors["W_dec"]

    def accuracy(variables: list[str], latents: list[int] | slice) -> float:
        values = {name: truth.values[name][source if name in variables else base] for name in up_to_hook}
        wanted = run(case.program, truth.rows[base], values)[case.program.output]
        if latents == []:
            return float(truth.correct(clean.output[b], wanted).mean())
        change = (f[s] - f[b])[..., latents] @ W_dec[latents]
        return float(truth.correct(network.spliced(after, hook, y[b] + change), wanted).mean())

    variables_at_hook = list(case.compiled.variables_at(hook))
    row: dict[str, Any] = {"iia_all": accuracy(variables_at_hook, slice(None))}
    for variable, latents in assign_latents(truth, variables_at_hook, f).items():
        if variable != "indices":
            row[f"iia_{variable}"] = accuracy([variable], latents)
            row[f"iia_nothing_{variable}"] = accuracy([variable], [])
            row[f"latents_{variable}"] = len(latents)
    return row


def assign_latents(truth: Truth, variables: list[str], f: Tensor) -> dict[str, list[int]]:
    """Latents by the variable that each matches best: as one of its values by F1, or as its number by correlation; each
    latent stands for one at most. Of variables that are as good (token=x and is_x), it is the one made last, on which
    the other has no effect any more. f (N, P, n)."""
    activations = without_leaks(f.flatten(0, 1).double().numpy())
    live = np.flatnonzero((activations > 0).any(0))
    scores = np.zeros((len(variables), len(live)))
    categorical = true_values(truth.case, truth.rows, variables)
    for i, name in enumerate(variables):
        if name in categorical:
            scores[i] = match(activations[:, live], categorical[name]).f1.max(1)
        elif truth.case.program.variables[name].numerical:
            scores[i] = np.abs(correlation(activations[:, live], truth.values[name].ravel()))
    best = len(variables) - 1 - scores[::-1].round(6).argmax(0) if len(live) else np.zeros(0, dtype=np.int64)
    stands = scores.max(0, initial=0) >= STANDS_FOR
    return {name: live[(best == i) & stands].tolist() for i, name in enumerate(variables)}
