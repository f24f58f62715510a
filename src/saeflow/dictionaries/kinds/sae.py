"""An SAE: reads one hook, or one head of it, and reconstructs it."""

import dataclasses
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from saeflow.config.checks import require
from saeflow.dictionaries.kinds.trained import TrainedConfig

if TYPE_CHECKING:
    from saeflow.config.point import PointConfig


@dataclass(frozen=True)
class SAEConfig(TrainedConfig, kind="sae"):
    """Of one hook, or of one head of it (`site.head`)."""

    apply_b_dec_to_input: bool = True
    """Whether it subtracts `b_dec` from its input (SAELens, Kissane et al.), or not (Anthropic's April recipe)."""

    noun: ClassVar[str] = "SAE"
    single_head: ClassVar[bool] = True
    relu_cost: ClassVar[float] = 2.7
    studies: ClassVar[frozenset[str]] = frozenset({"stack", "heads"})

    def check(self, point: "PointConfig") -> None:
        super().check(point)
        if point.site.head is not None:
            scaling = self.normalize_activations
            wanted = "none or per_head with site.head"
            require(scaling != "expected_average_only_in", "dictionary.normalize_activations", scaling, wanted)


def alone(several: TrainedConfig) -> SAEConfig:
    """The SAE that each of `several` that are trained as one would be alone."""
    names = {f.name for f in dataclasses.fields(SAEConfig)} & {f.name for f in dataclasses.fields(several)}
    return SAEConfig(**{name: getattr(several, name) for name in names} | {"kind": "sae"})
