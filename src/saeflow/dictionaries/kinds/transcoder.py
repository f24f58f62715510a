"""A transcoder: reads one hook and predicts another, such as an MLP's input and output (Dunefsky et al. 2024)."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from saeflow.dictionaries.kinds.trained import TrainedConfig

if TYPE_CHECKING:
    from saeflow.config.point import PointConfig


@dataclass(frozen=True)
class TranscoderConfig(TrainedConfig, kind="transcoder"):
    """From `site.hook_name` to `site.hook_name_out`."""

    skip: bool = False
    """Whether a linear map from its input to its output is added. Source: Paulo et al. 2025 (arXiv 2501.18823)."""

    noun: ClassVar[str] = "transcoder"
    two_hooks: ClassVar[bool] = True
    studies: ClassVar[frozenset[str]] = frozenset({"stack", "jacobian"})

    def has_jacobian(self, point: "PointConfig") -> bool:
        return point.jacobian.transcoders
