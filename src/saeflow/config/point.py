"""A point: one combination of a sweep, with every group of its configuration.

A stage gets only what it declares to read. No file is read here: what depends on the model (does this hook exist?) is
checked by the plan.
"""

import dataclasses
import typing
from dataclasses import dataclass, field
from typing import Any

from saeflow.config.checks import ConfigError, check_seed
from saeflow.config.circuits import CircuitsConfig
from saeflow.config.corpus import CorpusConfig, TokensConfig
from saeflow.config.dashboards import DashboardsConfig
from saeflow.config.dictionary import DictionaryConfig, kinds
from saeflow.config.evaluation import EvaluationConfig
from saeflow.config.features import FeaturesConfig
from saeflow.config.heads import HeadsConfig
from saeflow.config.jacobian import JacobianConfig
from saeflow.config.model import ModelConfig
from saeflow.config.site import ActivationsConfig, SiteConfig
from saeflow.config.training import TrainingConfig


@dataclass(frozen=True)
class PointConfig:
    """One point of a sweep: everything that decides a number."""

    corpus: CorpusConfig
    """Where the text is from."""
    tokens: TokensConfig
    """How it becomes rows of tokens."""
    model: ModelConfig
    """The language model."""
    activations: ActivationsConfig
    """How its activations are stored."""
    site: SiteConfig
    """Where in it dictionaries read and write."""
    dictionary: DictionaryConfig
    """What is trained, or read from elsewhere."""
    training: TrainingConfig
    """How it is trained."""
    jacobian: JacobianConfig
    """How Jacobians are studied."""
    heads: HeadsConfig
    """How heads are studied."""
    evaluation: EvaluationConfig
    """How dictionaries are evaluated."""
    seed: int
    """[seed] Of a dictionary's first weights, and of what its training draws; not of the order of the batches."""
    features: FeaturesConfig = field(default_factory=FeaturesConfig)
    """What is looked up of every latent."""
    dashboards: DashboardsConfig = field(default_factory=DashboardsConfig)
    """Whether pages of dictionaries and their latents are made."""
    circuits: CircuitsConfig = field(default_factory=CircuitsConfig)
    """How circuits through transcoders are looked for."""

    def __post_init__(self) -> None:
        check_seed(self, "seed")
        if self.corpus.case != (self.model.tracr and self.model.tracr.case):
            raise ConfigError(
                "a model of a case is studied on the rows of that case: use model=tracr with corpus=tracr"
            )
        other = self.evaluation.corpus
        if other is not None and (self.corpus.case is not None or other.case is not None):
            raise ConfigError("evaluation.corpus is another text, and a case has no text: set evaluation.corpus=null")
        self.dictionary.check(self)


def takes_list(path: str) -> bool:
    """Whether the field at a dotted path of `PointConfig` is itself a list, so that a list there is no sweep axis."""
    hint: Any = PointConfig
    for part in path.split("."):
        if not dataclasses.is_dataclass(hint):
            return False
        variants = [hint, *(kinds().values() if hint is DictionaryConfig else ())]
        hint = next((found for v in variants if (found := typing.get_type_hints(v).get(part))), None)
    return any(typing.get_origin(one) is tuple for one in (hint, *typing.get_args(hint)))
