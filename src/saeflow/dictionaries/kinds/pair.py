"""Two ordinary TopK SAEs, one at each side of an MLP, whose Jacobian is studied: the baseline of Jacobian pairs."""

from dataclasses import dataclass
from typing import Any, ClassVar

from saeflow.config.dictionary import Part, Training
from saeflow.config.site import SiteConfig
from saeflow.dictionaries.kinds.sae import alone
from saeflow.dictionaries.kinds.trained import TrainedConfig
from saeflow.dictionaries.spec import DictionaryError, Spec


@dataclass(frozen=True)
class PairConfig(TrainedConfig, kind="pair"):
    """Each is trained alone, and is the one that a sweep of SAEs has."""

    apply_b_dec_to_input: bool = True
    """Whether each subtracts its `b_dec` from its input, as of an SAE."""

    two_hooks: ClassVar[bool] = True
    activations: ClassVar[tuple[str, ...]] = ("topk",)
    studies: ClassVar[frozenset[str]] = frozenset({"jacobian"})

    @property
    def kind_label(self) -> str:
        return "sae"

    def trainings(self, site: SiteConfig) -> list[Training]:
        identity = alone(self).identity()
        return [Training(identity, hook, None) for hook in self.hooks(site)]

    def parts(self, site: SiteConfig, n_heads: int) -> list[Part]:
        return [Part(i, hook) for i, hook in enumerate(self.hooks(site))]

    def spec(self, *args: Any, **named: Any) -> Spec:
        raise DictionaryError("a pair is two SAEs, one a hook")
