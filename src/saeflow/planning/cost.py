"""How much arithmetic a training takes, for the plan to say before it starts.

Counted are the matrix products of a step and its work on active pairs: of an SAE, or the SAE of every head, the
encoder's product, of a Jacobian pair also D W_in and E W_out^T, their gradients, and three passes over k x k inner
products of d_mlp numbers (`saeflow.kernels.jacobian`). ReLU is counted as dense, which it is at first.
"""

from math import prod
from pathlib import Path

from saeflow.models.folder import ModelError, read_geometry
from saeflow.planning.graph import Instance, Plan


def training_operations(plan: Plan, instance: Instance) -> float:
    """Floating-point operations, additions and multiplications, of one instance of `train`."""
    dictionary, training = instance.config["dictionary"], instance.config["training"]
    columns = [plan.instance("activations", key).config["size"] for key in instance.needs["activations"]]
    by_head = dictionary["kind"] == "heads" or "head" in instance.config
    d_in, d_out = (size[-1] if by_head else prod(size) for size in (columns[0], columns[-1]))
    n_heads = columns[0][0] if dictionary["kind"] == "heads" else 1
    pair, k = dictionary["kind"] == "jacobian", dictionary["k"]
    sides = [(d, dictionary["d_sae"] or d * dictionary["expansion"]) for d in ((d_in, d_out) if pair else (d_in,))]
    each = 0.0  # token
    for d, d_sae in sides:
        each += 2.0 * d * d_sae + (6.0 * k * (d + d_out) if k else 4.0 * d_sae * (d + d_out))
    if pair and dictionary["jacobian_coefficient"]:
        d_mlp = _d_mlp(instance) or 4 * d_in
        products = sum(4.0 * d * d_sae * d_mlp for d, d_sae in sides) / training["batch_size"]
        each += products + training["jacobian_fraction"] * (6.0 * k * k + 2.0 * d_in) * d_mlp
    return n_heads * each * training["n_tokens"]


def _d_mlp(instance: Instance) -> int | None:
    """None for a model that the workflow makes, where it has not made it yet."""
    try:
        return read_geometry(Path(instance.sources["model"])).d_mlp
    except (ModelError, OSError):
        return None
