"""A transcoder: reads one hook and predicts another, such as an MLP's input and output (Dunefsky et al. 2024)."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from saeflow.dictionaries.kinds.trained import TrainedConfig

if TYPE_CHECKING:
    from saeflow.config.point import PointConfig


@dataclass(frozen=True)
class TranscoderConfig(TrainedConfig, kind="transcoder"):
    """`skip` adds a linear map from its input to its output."""

    skip: bool = False

    noun: ClassVar[str] = "transcoder"
    two_hooks: ClassVar[bool] = True
    studies: ClassVar[frozenset[str]] = frozenset({"stack", "jacobian"})

    def has_jacobian(self, point: "PointConfig") -> bool:
        return point.jacobian.transcoders
