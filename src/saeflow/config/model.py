"""The language model, its weight processing, and controls in its place."""

from dataclasses import dataclass
from typing import Literal

from saeflow.config.checks import LEARNING_RATES, ConfigError, at_least, check_seed, require


@dataclass(frozen=True)
class TracrConfig:
    """A model of a case of `saeflow.groundtruth.cases`: the `compiled` one, or a small one that is trained from `seed`
    on `n_rows` rows of the case (null: all that there are), as `saeflow.groundtruth.training` says."""

    case: int
    method: Literal["compiled", "supervised", "iit", "siit"] = "siit"
    seed: int = 0
    n_rows: int | None = None
    n_steps: int = 400
    batch_rows: int = 128
    lr: float = 1e-2

    def __post_init__(self) -> None:
        at_least(1, self, "model.tracr", "n_steps batch_rows")
        check_seed(self, "model.tracr.seed")
        require(0 < self.lr <= 1, "model.tracr.lr", self.lr, LEARNING_RATES)
        require(self.n_rows is None or self.n_rows > 0, "model.tracr.n_rows", self.n_rows, "1 or more, or null for all")


@dataclass(frozen=True)
class ModelConfig:
    """A Hugging Face folder (`path`), or a hub name whose files are in the local cache, and TransformerLens's weight
    processing, which changes activations; or a model that the pipeline makes (`tracr`).

    `randomise` replaces the weight matrices, as a control (`saeflow.models.controls`): `reinit` draws them as at the
    start of training, `permuted` shuffles their rows and columns; by `randomise_seed`.
    """

    name: str
    path: str | None = None
    hub: str | None = None
    revision: str | None = None
    fold_ln: bool = False
    center_writing_weights: bool = False
    center_unembed: bool = False
    randomise: Literal["none", "reinit", "permuted"] = "none"
    randomise_seed: int = 0
    tracr: TracrConfig | None = None

    def __post_init__(self) -> None:
        check_seed(self, "model.randomise_seed")
        if (self.path is not None or self.hub is not None) == (self.tracr is not None):
            raise ConfigError(
                "model: set exactly one of model.path (a local folder), model.hub (a hub name, which with model.path "
                "says of what that folder is a copy) and tracr"
            )
        processed = self.fold_ln or self.center_writing_weights or self.center_unembed or self.randomise != "none"
        if self.tracr and processed:
            raise ConfigError(
                "model.tracr: its models have no norms; leave fold_ln, center_* and randomise as they are"
            )
