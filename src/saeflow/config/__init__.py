"""The configuration as data: one frozen dataclass a group of `conf/`, validated when it is built."""

from saeflow.config.checks import ConfigError, build
from saeflow.config.circuits import CircuitsConfig
from saeflow.config.corpus import CorpusConfig, TokensConfig
from saeflow.config.dashboards import DashboardsConfig
from saeflow.config.dictionary import DictionaryConfig
from saeflow.config.evaluation import BlindConfig, EvaluationConfig
from saeflow.config.features import FeaturesConfig
from saeflow.config.heads import HeadsConfig
from saeflow.config.jacobian import JacobianConfig
from saeflow.config.model import ModelConfig, TracrConfig
from saeflow.config.point import PointConfig, takes_list
from saeflow.config.site import ActivationsConfig, SiteConfig
from saeflow.config.training import TrainingConfig

__all__ = [
    "ActivationsConfig", "BlindConfig", "CircuitsConfig", "ConfigError", "CorpusConfig", "DashboardsConfig",
    "DictionaryConfig", "EvaluationConfig", "FeaturesConfig", "HeadsConfig", "JacobianConfig", "ModelConfig",
    "PointConfig", "SiteConfig", "TokensConfig", "TracrConfig", "TrainingConfig", "build", "takes_list",
]  # fmt: skip
