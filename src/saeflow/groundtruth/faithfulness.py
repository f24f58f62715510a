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

*Jacobians*: the derivative of an MLP that is known, against that of dictionaries that stand in for it. At an input x
the MLP has J = W_in diag(phi'(x W_in + b_in)) W_out, (d, d) from input to output direction. What is compared with it,
in the same form:

* a transcoder: W_enc diag(f > 0) W_dec (+ W_skip^T);
* a pair of SAEs around the MLP: P_in J P_out, with P = W_enc diag(f > 0) W_dec of each. That is the pair's Jacobian of
  active latents (k, k), which `saeflow.jacobians.maps.Pair` gives, read by the encoder of the input SAE and written by
  the decoder of the output SAE: what one who looks at these latents alone takes the MLP to do. At x, not at its
  reconstruction.

A dictionary has only seen inputs that occur, and only along the directions in which these differ can it know J: both
are compared along those, weighted by how much inputs vary, C^1/2 J with C the covariance of the inputs.
`jacobian_cosine` is the mean over positions of the cosine between the two as vectors of d d entries (positions where J
vanishes along all that varies are left out); `jacobian_error` the mean squared distance over the mean squared size of
the truth.

A pair has only the entries between active latents, so not even the truth has a cosine of 1: of the compiled model
`jacobian_cosine_directions` is that of the pair whose latents are the directions of the program's variables, active
where the stream is not 0. `effective_inputs_true` says how sparse the truth is in that basis, `effective_inputs` how
sparse a pair's Jacobian is between latents, in the words of the Jacobian stage: of each output that has any derivative,
(sum |J|)^2 / sum J^2 over its inputs.
"""

from typing import Any

import numpy as np
import torch
from torch import Tensor

from saeflow.dictionaries import Dictionary
from saeflow.groundtruth.compiler import written_before
from saeflow.groundtruth.labels import correlation, match, without_leaks
from saeflow.groundtruth.network import Network, Pass
from saeflow.groundtruth.recovery import true_values
from saeflow.groundtruth.training import Truth, loss_of, pairs

N_PAIRS = 4096
STANDS_FOR = 0.5  # F1, or correlation: a latent below this stands for no variable
SMALLEST_RISE = 1e-6  # of the error, for a recovered fraction to mean anything
SMALLEST = 1e-6  # norm of a Jacobian along what varies, below which there is no direction to compare


@torch.no_grad()
def faithfulness(network: Network, truth: Truth, dictionary: Dictionary, seed: int = 0) -> dict[str, Any]:
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
def interchange_accuracy(network: Network, truth: Truth, dictionary: Dictionary, seed: int = 0) -> dict[str, Any]:
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
        wanted = case.program.run(truth.rows[base], values)[case.program.output]
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


# -------------------------------------------------------------------- Jacobians
def mlp_jacobians(network: Network, layer: int, x: Tensor) -> Tensor:
    """x (M, d) before the MLP of a layer -> J (M, d, d), rows by input direction."""
    p, name = network.parameters, f"blocks.{layer}.mlp."
    pre = (x @ p[name + "W_in"] + p[name + "b_in"]).detach().requires_grad_()
    with torch.enable_grad():
        (slopes,) = torch.autograd.grad(network.activation(pre).sum(), pre)
    return torch.einsum("im,Mm,mo->Mio", p[name + "W_in"], slopes, p[name + "W_out"])


def dictionary_jacobians(dictionary: Dictionary, x: Tensor) -> Tensor:
    """x (M, d) -> the Jacobian of the dictionary's output by its input there (M, d, d), rows by input direction."""
    J = torch.einsum("in,Mn,no->Mio", dictionary.W_enc, (dictionary.encode(x) > 0).to(x.dtype), dictionary.W_dec)
    return J if dictionary.W_skip is None else J + dictionary.W_skip.T


def effective_inputs(J: Tensor) -> float:
    """Mean over positions and outputs with a derivative, of J (M, d, d), rows by input direction."""
    squares = J.square().sum(1)
    live = squares > SMALLEST**2
    return (J.abs().sum(1).square()[live] / squares[live]).mean().item() if live.any() else 0.0


@torch.no_grad()
def compare_jacobians(
    network: Network, clean: Pass, dictionary: Dictionary, input: Dictionary | None = None
) -> dict[str, Any]:
    """Of a transcoder from `blocks.L.hook_resid_mid` to `blocks.L.hook_mlp_out`, or of a pair of SAEs of these hooks,
    `input` the first of them; nothing of any other dictionary. Values are None where no input moves the MLP."""
    hook_name, hook_name_out = (input or dictionary).spec.hook_name, dictionary.spec.hook_name_out
    layer = hook_name.split(".")[1]
    if (hook_name, hook_name_out) != (f"blocks.{layer}.hook_resid_mid", f"blocks.{layer}.hook_mlp_out"):
        return {}
    x, y = (clean.at(name).flatten(0, 1) for name in (hook_name, hook_name_out))
    J, root = mlp_jacobians(network, int(layer), x), _root(torch.cov(x.T))
    if input is None:
        cosine, error = _agreement(root @ J, root @ dictionary_jacobians(dictionary, x))
        return {"jacobian_cosine": cosine, "jacobian_error": error}
    cosine, error = _agreement(
        root @ J, root @ dictionary_jacobians(input, x) @ J @ dictionary_jacobians(dictionary, y)
    )
    between = torch.einsum("ni,Mio,oq->Mnq", input.W_dec, J, dictionary.W_enc)
    between *= (input.encode(x) > 0)[:, :, None] & (dictionary.encode(y) > 0)[:, None]
    return {"jacobian_cosine": cosine, "jacobian_error": error, "effective_inputs": effective_inputs(between)}


@torch.no_grad()
def true_jacobians(network: Network, clean: Pass, layer: int) -> dict[str, Any]:
    """Of a compiled model, whose directions are variables: what a dictionary's numbers can be held against."""
    x, y = (clean.at(f"blocks.{layer}.{hook}").flatten(0, 1) for hook in ("hook_resid_mid", "hook_mlp_out"))
    J, root = mlp_jacobians(network, layer, x), _root(torch.cov(x.T))
    cosine, _ = _agreement(root @ J, root @ ((x != 0)[:, :, None] * J * (y != 0)[:, None]))
    return {"effective_inputs_true": effective_inputs(J), "jacobian_cosine_directions": cosine}


def _root(covariance: Tensor) -> Tensor:
    values, vectors = torch.linalg.eigh(covariance)
    root: Tensor = vectors * values.clamp(min=0).sqrt() @ vectors.T
    return root


def _agreement(J: Tensor, found: Tensor) -> tuple[float | None, float | None]:
    """Mean cosine, and squared distance over squared size, of two times (M, d, d)."""
    sizes, others = J.norm(dim=(1, 2)), found.norm(dim=(1, 2))
    some = sizes > SMALLEST
    if not some.any():
        return None, None
    cosine = (J * found).sum((1, 2)) / (sizes * others).clamp(min=SMALLEST**2)
    return cosine[some].mean().item(), ((J - found).square().sum() / J.square().sum()).item()
