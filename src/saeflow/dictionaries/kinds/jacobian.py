"""A Jacobian pair: two TopK SAEs around an MLP, trained as one so that the Jacobian between their latents is sparse
(Farnik et al. 2025, arXiv 2502.18147)."""

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from math import prod
from typing import Any, ClassVar, Literal

from saeflow.config.checks import require
from saeflow.config.dictionary import Columns, Part
from saeflow.config.site import SiteConfig
from saeflow.dictionaries.kinds.sae import alone
from saeflow.dictionaries.kinds.trained import TrainedConfig
from saeflow.dictionaries.spec import DictionaryError, Origin, Spec


@dataclass(frozen=True)
class JacobianPairConfig(TrainedConfig, kind="jacobian"):
    """With a coefficient of 0 its SAEs are those that they would be alone."""

    jacobian_coefficient: float | None = None
    """[factor] Over k^2, weight of the mean over tokens of what the k x k Jacobian of the active latents costs. Source:
    JSAE paper, whose rule is 0.5 k^2 / d_model."""
    jacobian_penalty: Literal["l1", "scad", "l1_over_l2", "lp"] = "l1"
    """What a Jacobian costs (`saeflow.kernels.penalties`). Source: JSAE paper (L1), and its code."""
    jacobian_at: Literal["input", "reconstruction"] = "input"
    """Where it is taken: at the input (as the paper), or at the input SAE's reconstruction of it."""
    jacobian_norm: Literal["inside", "ignored"] = "inside"
    """Where the input SAE is before the norm: `ignored` leaves it out of f, but for its gain and bias. Source: notebook
    000, whose pairs were trained so."""
    apply_b_dec_to_input: bool = True
    """Whether its SAEs subtract their `b_dec` from their input; those of the paper do not."""

    two_hooks: ClassVar[bool] = True
    activations: ClassVar[tuple[str, ...]] = ("topk",)
    trainer: ClassVar[str] = "saeflow.training.jacobian_pair:JacobianTrainer"
    training_options: ClassVar[tuple[str, ...]] = ("jacobian_warm_up_steps", "jacobian_fraction")
    studies: ClassVar[frozenset[str]] = frozenset({"jacobian"})

    def __post_init__(self) -> None:
        super().__post_init__()
        given = self.jacobian_coefficient
        legal = given is not None and given >= 0
        require(legal, "dictionary.jacobian_coefficient", given, "0 or more with kind=jacobian")
        # or a latent could shrink its Jacobian by growing
        wanted = "unit_norm with kind=jacobian"
        require(self.sparsity == "unit_norm", "dictionary.sparsity", self.sparsity, wanted)

    @property
    def amount_label(self) -> str:
        return f"{super().amount_label}-lambda{self.jacobian_coefficient:g}"

    def known_hooks(self, site: SiteConfig) -> list[str]:
        return []  # its input SAE's labels say of what they are

    def parts(self, site: SiteConfig, n_heads: int) -> list[Part]:
        return [Part(0, hook, side) for hook, side in zip(self.hooks(site), ("input", "output"), strict=True)]

    def spec(self, *args: Any, **named: Any) -> Spec:
        raise DictionaryError("a jacobian is two SAEs, one a hook")

    @property
    def options(self) -> dict[str, Any]:
        """What of its training is stored with each of its SAEs."""
        names = ["jacobian_coefficient", "jacobian_penalty", "jacobian_at"]
        if self.jacobian_norm != "inside":
            names.append("jacobian_norm")
        return {name: getattr(self, name) for name in names}

    def specs(self, columns: Columns, seed: int, origin: Origin) -> list[Spec]:
        sae = alone(self)
        found = (sae.spec(prod(d), prod(d), hook, hook, seed, origin) for hook, d in zip(*columns[:2], strict=True))
        return [dataclasses.replace(spec, options=self.options) for spec in found]

    @property
    def cost(self) -> float:
        return 8.0

    def operations(self, columns: Columns, training: dict[str, Any], d_mlp: Callable[[], int | None]) -> float:
        """Beside both encoders' products also D W_in and E W_out^T, their gradients, and three passes over k x k inner
        products of d_mlp numbers (`saeflow.kernels.jacobian`)."""
        d_in, d_out = map(prod, columns.sizes)
        each = sum(self.step_operations(d, d_out) for d in (d_in, d_out))
        if self.jacobian_coefficient:
            k, m = self.k or 0, d_mlp() or 4 * d_in
            products = sum(4.0 * d * self.width(d) * m for d in (d_in, d_out)) / training["batch_size"]
            each += products + training["jacobian_fraction"] * (6.0 * k * k + 2.0 * d_in) * m
        return each * float(training["n_tokens"])
