"""An SAE of each head of a hook, all trained as one; k, L1 coefficient and size are those of each."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from saeflow.config.checks import require
from saeflow.config.dictionary import Columns, Part
from saeflow.config.site import SiteConfig
from saeflow.dictionaries.kinds.sae import SAEConfig, alone
from saeflow.dictionaries.spec import DictionaryError, Origin, Spec

if TYPE_CHECKING:
    from saeflow.config.point import PointConfig


@dataclass(frozen=True)
class HeadSAEsConfig(SAEConfig, kind="heads"):
    """What is saved is a folder a head; they are evaluated as one, and each head alone."""

    noun: ClassVar[str] = "SAEs by head"
    single_head: ClassVar[bool] = False
    by_head: ClassVar[bool] = True
    trainer: ClassVar[str] = "saeflow.training.heads:HeadsTrainer"
    relu_cost: ClassVar[float] = 2.1
    suggestion: ClassVar[str] = "site=attn_z"

    def __post_init__(self) -> None:
        super().__post_init__()
        scaling = self.normalize_activations  # of a head, what is stored with the activations has only the RMS norm
        legal = scaling != "expected_average_only_in"
        require(legal, "dictionary.normalize_activations", scaling, "none or per_head with kind=heads")

    def check(self, point: "PointConfig") -> None:
        super().check(point)
        revive, wanted = point.training.revive, "none or resample with dictionary.kind=heads"
        require(revive in ("none", "resample"), "training.revive", revive, wanted)

    def parts(self, site: SiteConfig, n_heads: int) -> list[Part]:
        hook = site.hook_name
        return [Part(0, hook), *(Part(0, hook, f"head_{head}", head) for head in range(n_heads))]

    def spec(self, *args: Any, **named: Any) -> Spec:
        raise DictionaryError("dictionaries of heads are one SAE a head")

    def specs(self, columns: Columns, seed: int, origin: Origin) -> list[Spec]:
        (hook,), ((n_heads, d_head),), _ = columns
        one = alone(self)
        return [one.spec(d_head, d_head, hook, hook, seed, origin, head) for head in range(n_heads)]
