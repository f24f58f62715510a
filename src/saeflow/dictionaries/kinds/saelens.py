"""SAELens's training classes on our trainer, store, resume and evaluation: `dictionary=saelens/<name>`."""

import dataclasses
import difflib
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar

from saeflow.config.checks import ConfigError, require
from saeflow.dictionaries.kinds.trained import TrainedConfig
from saeflow.dictionaries.spec import Spec, amount_of

if TYPE_CHECKING:
    from saeflow.config.point import PointConfig

_TOPK_OPTIONS = ("aux_loss_coefficient", "rescale_acts_by_decoder_norm", "use_sparse_activations")
_BATCHTOPK_OPTIONS = (*_TOPK_OPTIONS, "topk_threshold_lr")
SAELENS: dict[str, tuple[str, tuple[str, ...]]] = {
    "standard": ("l1_coefficient", ("lp_norm",)),
    "gated": ("l1_coefficient", ()),
    "topk": ("k", _TOPK_OPTIONS),
    "abstopk": ("k", _TOPK_OPTIONS),
    "batchtopk": ("k", _BATCHTOPK_OPTIONS),
    "matryoshka_batchtopk": ("k", (*_BATCHTOPK_OPTIONS, "matryoshka_widths", "use_matryoshka_aux_loss")),
    "jumprelu": (
        "l0_coefficient",
        ("jumprelu_init_threshold", "jumprelu_bandwidth", "jumprelu_sparsity_loss_mode", "pre_act_loss_coefficient",
         "jumprelu_tanh_scale", "jumprelu_ste_to_input", "target_l0"),
    ),
    "matching_pursuit": ("residual_threshold", ("max_iterations", "stop_on_duplicate_support")),
}  # fmt: skip
"""The option that a sweep varies, and the others. A test holds it in step with SAELens."""


@dataclass(frozen=True)
class SAELensConfig(TrainedConfig, kind="saelens"):
    """SAELens brings its first weights and its loss."""

    activation: str = "saelens"  # type: ignore[assignment]
    """Always `saelens`: its class has its own."""
    saelens: str | None = None
    """Name of the class: a key of `saeflow.dictionaries.kinds.saelens.SAELENS`."""
    options: dict[str, Any] = field(default_factory=dict)
    """The class's own options, such as `l0_coefficient`."""

    activations: ClassVar[tuple[str, ...]] = ()
    trainer: ClassVar[str] = "saeflow.training.saelens:SAELensTrainer"
    studies: ClassVar[frozenset[str]] = frozenset({"stack"})
    instead: ClassVar[dict[str, str]] = {"apply_b_dec_to_input": "true with activation=saelens"}

    @classmethod
    def claims(cls, tree: dict[str, Any]) -> bool:
        named = tree.get("saelens") is not None or bool(tree.get("options"))
        return tree.get("activation") == "saelens" or named

    def __post_init__(self) -> None:
        wanted = "sae with activation=saelens: SAELens trains no transcoder, and heads one by one"
        require(self.kind in ("sae", "saelens"), "dictionary.kind", self.kind, wanted)
        super().__post_init__()

    def check_amount(self) -> None:
        wanted = f"one of {', '.join(SAELENS)} with activation=saelens, else null and without dictionary.options"
        legal = self.activation == "saelens" and self.saelens in SAELENS
        require(legal, "dictionary.saelens", self.saelens, wanted)
        scaling = self.normalize_activations
        wanted = "none or expected_average_only_in"
        require(scaling != "per_head", "dictionary.normalize_activations", scaling, wanted)
        amount, others = SAELENS[self.saelens or ""]
        for name in ("k", "l1_coefficient"):
            given, takes = getattr(self, name), name == amount
            require((given is not None) == takes, f"dictionary.{name}", given, "a number" if takes else "null here")
        names = (*others, *(() if amount in ("k", "l1_coefficient") else (amount,)))
        for option in self.options:
            near = difflib.get_close_matches(option, names, n=1)
            hint = f" (did you mean {near[0]!r}?)" if near else ""
            if option not in names:
                raise ConfigError(
                    f"unknown option dictionary.options.{option}{hint}; SAELens's {self.saelens} has here: "
                    + (", ".join(names) or "none")
                )
        legal = amount not in names or isinstance(self.options.get(amount), int | float)
        require(legal, f"dictionary.options.{amount}", self.options.get(amount), "a number")

    @property
    def amount(self) -> tuple[str, float | None]:
        return amount_of(self.k, self.l1_coefficient, self.options)

    @property
    def kind_label(self) -> str:
        return str(self.saelens)

    def identity(self) -> dict[str, Any]:
        return super().identity() | {"kind": "sae"}

    def check(self, point: "PointConfig") -> None:
        head = point.site.head
        require(head is None, "site.head", head, "null with activation=saelens: SAELens's classes are of whole hooks")
        initial, wanted = point.training.initial, "saeflow or saelens with activation=saelens, which draws its own"
        require(initial in ("saeflow", "saelens"), "training.initial", initial, wanted)
        super().check(point)

    def spec(self, *args: Any, **named: Any) -> Spec:
        return dataclasses.replace(super().spec(*args, **named), kind="sae", apply_b_dec_to_input=True)
