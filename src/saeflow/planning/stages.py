"""Stages and outside sources, as the packages that have them declare them.

Every package of `saeflow` may have a `stage.py` with `STAGES` and a `source.py` with `SOURCES`; both are found by
looking, so nothing here knows which there are. Both are imported by every plan and every job: they must be light.
"""

import importlib
import importlib.util
import pkgutil
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import saeflow
from saeflow.planning.graph import Instance, Plan
from saeflow.planning.parts import Parts

if TYPE_CHECKING:
    from saeflow.planning.expansion import Expansion, PlannedPoint


@dataclass(frozen=True)
class Stage:
    """One kind of artifact, and everything about it that the plan, the rules and the jobs ask."""

    name: str
    """Also its folder below `results/`, and its part of `device`."""
    noun: tuple[str, str]
    """One and several, for people: `training`, `trainings`."""
    work: Callable[[list[Any]], str]
    """Makes the artifacts of the `Job`s that share a job; returns lines that say what it wrote where."""
    expand: Callable[["Expansion"], None]
    """Adds its instances to the plan, after all stages that it needs have done so."""
    reads: tuple[str, ...] = ()
    """Dotted paths of the point that enter its key; one that ends in `?` does so where it is not null."""
    version: int = 1
    """Raise it when the code changes what the stage computes: above all that `version_of` says."""
    version_of: Callable[[dict[str, Any]], int | None] = lambda config: None
    """The version of an instance by what it reads, where the code has since changed what it computes of some alone, so
    that the artifacts of all others stay what they are; None: `version`."""
    needs: tuple[str, ...] = ()
    """Stages whose artifacts it reads."""
    after: tuple[str, ...] = ()
    """Stages that stand before it where the data flow leaves it open."""
    together: Callable[[Plan, Instance], Any] | None = None
    """What instances have in common that may share a job; None: each has its own."""
    most: Callable[[Instance], int] = lambda instance: 1 << 30
    """How many may share a job with it."""
    order: Callable[[Instance], Any] = lambda instance: 0
    """Of the instances that may share a job, by which they are put side by side."""
    cost: Callable[[Instance], float] = lambda instance: 1.0
    """Time that an instance takes beside others of the stage; jobs are cut so that their costs are even."""
    parts: Parts | None = None
    """How several jobs share the work of one, where `device.parts` asks for it; None: they cannot."""
    spreads: bool = False
    """Whether the layers of the model that its jobs run may lie on several GPUs, as `device.<stage>=cuda:0-3` asks."""
    n_bytes: Callable[[Plan, Instance], int] = lambda plan, instance: 0
    """What it will take on disk, where that is of a size to matter."""
    sized_by: Callable[[Instance], str] = lambda instance: ""
    """The setting that decides that, with its value."""
    beside: Callable[[Plan, Sequence[Instance]], int] = lambda plan, instances: 0
    """What a job takes on disk beside that until it is done."""
    holds: Callable[[Plan, Sequence[Instance]], int] = lambda plan, instances: 0
    """Bytes of memory that a job cannot do without, where they may be more than a machine has."""
    note: Callable[[Plan, Sequence[Instance]], str] = lambda plan, instances: ""
    """What the plan is to say of a job on this machine, a sentence without its full stop; "": nothing."""
    cached: bool = False
    """Whether these bytes are said apart: what is cached can be deleted once all is made from it."""
    operations: Callable[[Plan, Sequence[Instance]], float] = lambda plan, instances: 0.0
    """Floating-point operations of a job that makes some instances, where they decide how long it takes."""
    whole: Callable[[Path], bool] = lambda folder: True
    """Whether what lies outside of an artifact's folder and belongs to it is there, as far as can be seen without
    reading it."""
    outside: Callable[[Path], list[Path]] = lambda folder: []
    """What lies outside of an artifact's folder and belongs to it, perhaps to others too: it is removed with the last
    of them, which need not be there yet."""
    elsewhere: Callable[[Path], str | None] = lambda folder: None
    """The URL in a bucket at which jobs read what belongs to an artifact; None where all of it is here."""
    carrier: str = ""
    """The module that carries what lies outside of artifacts' folders to a bucket and back: its functions `push`,
    `drop`, `pull` and `damaged` (`saeflow.planning.remote`)."""
    all_outside: Callable[[Path], list[Path]] = lambda results: []
    """All below a results folder that lies outside of artifacts' folders and belongs to some of the stage."""
    resources: Callable[[Plan, Sequence[Instance]], dict[str, int]] = lambda plan, instances: {}
    """`mem_mb` and `runtime` (minutes) by the sizes of what a job makes, where `device.mem_mb` and `device.runtime` do
    not say them."""
    target: bool = False
    """Whether it is made even where nothing needs it."""
    drawn: Literal["never", "where_asked", "where_there", "always"] = "never"
    """Whether figures are made from its artifacts, so that an experiment makes these: where it asks for a figure of the
    stage, or for any; `always`: figures of it that are asked for fail where it has none."""
    listed: str = ""
    """`module:function` that lists its artifacts for people: of the job of figures, a table and an HTML page, which are
    saved beside the figures as `table.csv` and `table.html`."""
    table: Callable[[Instance], bool] | None = None
    """Which artifacts have a `table.txt` for the terminal: `snakemake <stage>_tables`; None: none."""
    says_all: bool = False
    """Whether it is one artifact of all others, so that why it is new follows from them."""


@dataclass(frozen=True)
class Source:
    """Something from outside the pipeline that points read: a model, a corpus."""

    applies: Callable[[Any], bool]
    """Whether a `PointConfig` reads it."""
    identify: Callable[["PlannedPoint"], None]
    """Puts what identifies it, by content, into the point's tree, and where it lies into the point's sources."""


@cache
def stages() -> dict[str, Stage]:
    """All stages by name, in the order of the data flow."""
    return in_order([stage for module in _declarations("stage") for stage in module.STAGES])


def listed(needs: Mapping[str, list[str]]) -> list[str]:
    """What lists the artifacts that a set of figures needs, each once: `Stage.listed`."""
    found = (stages()[stage].listed for stage, keys in needs.items() if keys)
    return list(dict.fromkeys(name for name in found if name))


def in_order(found: list[Stage]) -> dict[str, Stage]:
    """Stages after those that they need. Raises `ValueError` where they need each other."""
    left = {stage.name: stage for stage in found}
    ordered: dict[str, Stage] = {}
    while left:
        free = [s for s in left.values() if not left.keys() & {*s.needs, *s.after}]
        if not free:
            raise ValueError(f"stages need each other in a circle: {', '.join(left)}")
        first = min(free, key=lambda stage: (stage.says_all, stage.name))
        ordered[first.name] = left.pop(first.name)
    return ordered


def downstream(names: Iterable[str]) -> set[str]:
    """Stages, and all that need them, directly or not; what is of all others follows from any."""
    found = set(names)
    for stage in stages().values():  # in the order of the data flow
        if found & {*stage.needs} or (found and stage.says_all):
            found.add(stage.name)
    return found


@cache
def sources() -> list[Source]:
    return [source for module in _declarations("source") for source in module.SOURCES]


def _declarations(name: str) -> list[Any]:
    packages = [m.name for m in pkgutil.iter_modules(saeflow.__path__, "saeflow.") if m.ispkg]
    return [importlib.import_module(f"{p}.{name}") for p in packages if importlib.util.find_spec(f"{p}.{name}")]
