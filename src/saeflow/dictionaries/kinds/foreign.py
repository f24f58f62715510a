"""A dictionary that another library made, read instead of trained: `dictionary=foreign`; and two of them around an MLP,
`dictionary=foreign_pair`."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from saeflow.config.checks import ConfigError, require
from saeflow.config.dictionary import DictionaryConfig, Training
from saeflow.config.site import SiteConfig

if TYPE_CHECKING:
    from saeflow.config.point import PointConfig


PAIR = "foreign_pair"


@dataclass(frozen=True)
class ForeignConfig(DictionaryConfig, kind="foreign"):
    """A dictionary of another library; the site says whether it is an SAE or a transcoder."""

    activation: str = "foreign"
    """Always `foreign`: its files say which it has."""
    path: str | None = None
    """Its folder or file (docs/evaluation.md); this, `heads` or `release`. A folder with `head_0`, `head_1`, ... is of
    all heads of the hook."""
    heads: tuple[str, ...] = ()
    """Folders or files of the SAEs of all heads of the hook, that of head 0 first, which are read as one dictionary."""
    format: Literal["saelens", "transcoder_circuits", "dictionary_learning", "sparsify", "kissane", "jsae"] | None = (
        None
    )
    """Which library's files they are; null: known by them."""
    release: str | None = None
    """A release that SAELens knows, fetched when the job runs."""
    sae_id: str | None = None
    """The dictionary of that release."""
    label: str | None = None
    """Its name in figures; null: that of its folder."""

    takes_any: ClassVar[bool] = True
    single_head: ClassVar[bool] = True
    studies: ClassVar[frozenset[str]] = frozenset({"stack", "heads"})

    @classmethod
    def claims(cls, tree: dict[str, Any]) -> bool:
        named = any(tree.get(name) is not None for name in ("path", "release")) or bool(tree.get("heads"))
        return (named or "foreign" in (tree.get("kind"), tree.get("activation"))) and tree.get("kind") != PAIR

    def __post_init__(self) -> None:
        legal = self.kind in ("foreign", PAIR) and self.activation == "foreign"
        require(legal, "dictionary.kind", self.kind, "foreign, with activation=foreign: use dictionary=foreign")
        if sum((self.path is not None, bool(self.heads), self.release is not None)) != 1:
            raise ConfigError(
                f"dictionary={self.kind}: set exactly one of dictionary.path, dictionary.heads and dictionary.release"
            )
        legal = (self.release is None) == (self.sae_id is None)
        require(legal, "dictionary.sae_id", self.sae_id, "given with dictionary.release, and only then")

    @property
    def amount(self) -> tuple[str, float | None]:
        return "k", None

    def identity(self) -> dict[str, Any]:
        """Nothing of it is in a key but what its files hold: see the stage `foreign`."""
        return {"kind": self.kind, "activation": self.activation}

    def hooks(self, site: SiteConfig) -> list[str]:
        return [site.hook_name_out or site.hook_name]  # whose mean stands for it when it is ablated

    def trainings(self, site: SiteConfig) -> list[Training]:
        return []

    def check(self, point: "PointConfig") -> None:
        """Whatever does not fit is known when its files are read."""


@dataclass(frozen=True)
class ForeignPairConfig(ForeignConfig, kind=PAIR):
    """Two SAEs of other libraries around an MLP, whose Jacobian is studied; `path` or `sae_id` is the input SAE's."""

    path_out: str | None = None
    """The output SAE's folder or file; null: that of `path`, which holds both (JSAE's checkpoints do)."""
    sae_id_out: str | None = None
    """The output SAE of the release."""

    two_hooks: ClassVar[bool] = True
    single_head: ClassVar[bool] = False
    studies: ClassVar[frozenset[str]] = frozenset({"jacobian"})

    @classmethod
    def claims(cls, tree: dict[str, Any]) -> bool:
        return tree.get("kind") == PAIR

    def __post_init__(self) -> None:
        super().__post_init__()
        require(not self.heads, "dictionary.heads", self.heads, "left out: a pair is two SAEs")
        given, wanted = self.sae_id_out, "given with dictionary.release, and only then"
        require((self.release is None) == (given is None), "dictionary.sae_id_out", given, wanted)

    def hooks(self, site: SiteConfig) -> list[str]:
        return [site.hook_name, str(site.hook_name_out)]

    def check(self, point: "PointConfig") -> None:
        super().check(point)
        DictionaryConfig.check(self, point)
