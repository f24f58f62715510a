"""What the rest of the project asks a kind of sparse dictionary; the kinds answer in `saeflow.dictionaries.kinds`.

A kind is a frozen dataclass of the options that it has, found by `dictionary.kind`. Every module of that package is
imported once, and a class registers itself by being defined with `kind=`: a new kind is a new module there, and nothing
else names it.
"""

import dataclasses
import importlib
import pkgutil
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

from saeflow.config.checks import ConfigError, require
from saeflow.config.site import SiteConfig

if TYPE_CHECKING:
    from saeflow.config.point import PointConfig

_KINDS: dict[str, type["DictionaryConfig"]] = {}
PACKAGE = "saeflow.dictionaries.kinds"


class Training(NamedTuple):
    """One dictionary, or several that are trained as one."""

    dictionary: dict[str, Any]
    """What of its configuration enters its key."""
    hook_name: str
    hook_name_out: str | None


class Columns(NamedTuple):
    """The columns of activations that a training reads."""

    hooks: list[str]
    sizes: list[tuple[int, ...]]
    """(d,) or (heads, d_head) of each."""
    head: int | None
    """Of hooks with heads, the one that is meant."""


class Part(NamedTuple):
    """A dictionary that is evaluated: all that was trained, or a part of it by name."""

    training: int
    """Which of `DictionaryConfig.trainings`."""
    hook_name: str
    """Where it writes: evaluations compare it with ablations of this hook."""
    name: str = ""
    """Its folder in what was trained; '' where it is all of that."""
    head: int | None = None
    """Of a hook with heads, the one that it writes."""


@dataclass(frozen=True)
class DictionaryConfig:
    """Base of all kinds. Building one from a plain tree gives the class that the tree's `kind` names."""

    kind: str
    """Which kind it is: the name of a class in `saeflow.dictionaries.kinds`."""

    noun: ClassVar[str] = ""
    """What figures call it, after its activation; '' for what is not stored as a kind of its own."""
    two_hooks: ClassVar[bool] = False
    """Whether it is between `hook_name` and `hook_name_out`; else it is at `hook_name` alone."""
    activations: ClassVar[tuple[str, ...]] = ()
    """Legal values of `activation`."""
    single_head: ClassVar[bool] = False
    """Whether `site.head` may name one head."""
    by_head: ClassVar[bool] = False
    """Whether its sizes are those of each head of a hook with heads."""
    trainer: ClassVar[str] = ""
    """`module:class` of its trainer; '' for what is not trained here."""
    training_options: ClassVar[tuple[str, ...]] = ()
    """Fields of `TrainingConfig` that concern this kind alone: in no other's key."""
    studies: ClassVar[frozenset[str]] = frozenset()
    """Stages beyond evaluation that take it: `stack`, `heads`, `jacobian`."""
    instead: ClassVar[dict[str, str]] = {}
    """What an option that only other kinds have must be, for the message that refuses it; else null."""
    takes_any: ClassVar[bool] = False
    """Whether options of other kinds are left aside instead of refused: a sweep may set them for those."""
    suggestion: ClassVar[str] = "site=mlp_in, site=mlp_out or another with one"
    """Sites to use where one of two hooks was given."""

    def __init_subclass__(cls, kind: str | None = None) -> None:
        if kind is not None:
            _KINDS[kind] = cls

    @classmethod
    def claims(cls, tree: dict[str, Any]) -> bool:
        """Whether a plain tree is of this kind whatever `kind` it names."""
        return False

    @classmethod
    def variant(cls, tree: dict[str, Any], where: str) -> tuple[type["DictionaryConfig"], dict[str, Any]]:
        """The kind that a plain tree is of, and the tree without other kinds' options, which must be at their defaults.

        Raises `ConfigError` for a kind that there is not, an activation that it has not, and other kinds' options.
        """
        found = _kind_of(tree)
        if found is None:
            if "kind" not in tree:
                raise ConfigError(f"missing key {where}kind")
            raise ConfigError(f"{where}kind={tree['kind']!r} is not legal: use one of {', '.join(kinds())}")
        if found.activations and "activation" in tree:
            wanted = f"{' or '.join(found.activations)} with kind={tree['kind']}"
            require(tree["activation"] in found.activations, f"{where}activation", tree["activation"], wanted)
        others = _options_of_others(found, len(kinds()))  # type: ignore[arg-type]
        for name in sorted(others.keys() & tree.keys()):
            legal = found.takes_any or tree[name] in (None, {}, others[name])
            require(legal, f"{where}{name}", tree[name], found.instead.get(name, f"null with kind={tree['kind']}"))
        return found, {name: value for name, value in tree.items() if name not in others}

    # -------------------------------------------------------------------- what the plan asks
    @property
    def amount(self) -> tuple[str, float | None]:
        """The option that decides how sparse it is, which a sweep varies, and its value."""
        raise NotImplementedError

    @property
    def kind_label(self) -> str:
        """Kind in the names of folders."""
        return self.kind

    @property
    def amount_label(self) -> str:
        """Amount in the names of folders, such as `k16` or `l1_0.5`."""
        name, value = self.amount
        return f"k{value}" if name == "k" else f"{name.removesuffix('_coefficient')}_{value or 0:g}"

    def identity(self) -> dict[str, Any]:
        """What enters the key of a training, apart from what is at its default."""
        return dataclasses.asdict(self)

    def hooks(self, site: SiteConfig) -> list[str]:
        """Hooks whose activations are cached for it."""
        return [hook for hook in (site.hook_name, site.hook_name_out) if hook]

    def known_hooks(self, site: SiteConfig) -> list[str]:
        """Hooks where it is compared with a known algorithm, and has to be at one that the algorithm writes."""
        return [site.hook_name_out or site.hook_name]

    def trainings(self, site: SiteConfig) -> list[Training]:
        return [Training(self.identity(), site.hook_name, site.hook_name_out)]

    def parts(self, site: SiteConfig, n_heads: int) -> list[Part]:
        """What is evaluated of its trainings; `n_heads` of a hook with heads."""
        return [Part(0, site.hook_name_out or site.hook_name, head=site.head)]

    def has_jacobian(self, point: "PointConfig") -> bool:
        return "jacobian" in self.studies

    def check(self, point: "PointConfig") -> None:
        """Raises `ConfigError` for what the rest of the point does not allow."""
        site, kind = point.site, self.kind
        if not self.two_hooks and site.hook_name_out is not None:
            hooks = f"{site.hook_name} and {site.hook_name_out}"
            raise ConfigError(
                f"dictionary.kind={kind} reads one hook, but this site has two ({hooks}); use {self.suggestion}"
            )
        if site.head is not None:
            require(self.single_head, "site.head", site.head, f"null with dictionary.kind={kind}")
        if self.two_hooks and site.hook_name_out is None:
            raise ConfigError(f"dictionary.kind={kind} needs a site with hook_name and hook_name_out: use site=mlp")

    def check_size(self, hook_name: str, d_in: int, of_each_head: bool) -> None:
        """Raises `ConfigError` where it cannot be of a hook that is `d_in` wide."""

    def needs_heads(self) -> str | None:
        """The setting that only a hook with heads allows; None where there is none."""
        return None

    @property
    def ranks_in_scaled_units(self) -> bool:
        """Whether, of a whole hook, it ranks latents in units that differ from raw ones by a factor for each head."""
        return False

    def trainer_class(self) -> Any:
        """Its trainer, which does what `saeflow.training.protocol.DictionaryTrainer` says; imports torch."""
        return pkgutil.resolve_name(self.trainer)

    @property
    def cost(self) -> float:
        """How long a training takes, about, beside those of other dictionaries at its hooks."""
        return 1.0

    def operations(self, columns: Columns, training: dict[str, Any], d_mlp: Callable[[], int | None]) -> float:
        """Floating-point operations of a training; `d_mlp` finds the width of the model's MLPs."""
        return 0.0


def _kind_of(tree: dict[str, Any]) -> type[DictionaryConfig] | None:
    claimed = (kind for kind in kinds().values() if kind.claims(tree))
    return next(claimed, None) or kinds().get(str(tree.get("kind")))


@cache
def _options_of_others(kind: type[DictionaryConfig], n_kinds: int) -> dict[str, Any]:
    """Options that only other kinds have, of `n_kinds` that there are so far, with their defaults."""
    own_names = {f.name for f in dataclasses.fields(kind)}
    fields = (f for other in kinds().values() for f in dataclasses.fields(other))
    return {f.name: f.default for f in fields if f.name not in own_names}


@cache
def _imported() -> None:
    package = importlib.import_module(PACKAGE)
    for module in pkgutil.iter_modules(package.__path__):
        importlib.import_module(f"{PACKAGE}.{module.name}")


def kinds() -> dict[str, type[DictionaryConfig]]:
    """All kinds, by the name that `dictionary.kind` gives, in an order that does not depend on who imported which."""
    _imported()
    return dict(sorted(_KINDS.items()))
