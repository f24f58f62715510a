"""The language model, its weight processing, and controls in its place."""

from dataclasses import dataclass
from typing import Literal

from saeflow.config.checks import LEARNING_RATES, ConfigError, at_least, check_seed, require


@dataclass(frozen=True)
class TracrConfig:
    """A model whose algorithm is known, which the pipeline makes (docs/groundtruth.md)."""

    case: int
    """[index] Number of a case of `saeflow.groundtruth.cases`, as in InterpBench."""
    method: Literal["compiled", "supervised", "iit", "siit", "published"] = "siit"
    """The compiled program itself, how a small transformer is trained on its task, or one that InterpBench publishes.
    Source: InterpBench (arXiv 2407.14494)."""
    seed: int = 0
    """[seed] Of first weights and draws of its training."""
    n_rows: int | None = None
    """[rows] Of the case that it is trained on; null: all that there are."""
    n_steps: int = 400
    """[steps] Of its training."""
    batch_rows: int = 128
    """[rows] In a batch of its training."""
    lr: float = 1e-2
    """[rate] Adam's learning rate at the start of its training, from which it falls to 0."""
    recipe: Literal["saeflow", "interpbench"] = "saeflow"
    """How it is trained with `iit` and `siit`: pairs of rows, clipping, weights and end (docs/groundtruth.md). Source:
    InterpBench's code."""
    path: str | None = None
    """Folder of InterpBench's `ll_model.pth` and `ll_model_cfg.pkl`, with `published`; null with all others."""

    def __post_init__(self) -> None:
        if (self.path is not None) != (self.method == "published"):
            wanted = "the folder of a model of InterpBench with model.tracr.method=published, and null with all others"
            raise ConfigError(f"model.tracr.path={self.path} is out of range: it must be {wanted}")
        legal = self.recipe == "saeflow" or self.method in ("iit", "siit")
        require(legal, "model.tracr.recipe", self.recipe, "saeflow unless model.tracr.method is iit or siit")
        at_least(1, self, "model.tracr", "n_steps batch_rows")
        check_seed(self, "model.tracr.seed")
        require(0 < self.lr <= 1, "model.tracr.lr", self.lr, LEARNING_RATES)
        require(self.n_rows is None or self.n_rows > 0, "model.tracr.n_rows", self.n_rows, "1 or more, or null for all")


@dataclass(frozen=True)
class ModelConfig:
    """The language model, and TransformerLens's weight processing, which changes activations: a local folder, a model
    of the hub that is in the local cache, or one that the pipeline makes."""

    name: str
    """What people call it; in no key, as its weights identify it."""
    path: str | None = None
    """A Hugging Face folder. With `hub`: a copy of that model's folder, where there is no network."""
    hub: str | None = None
    """A name on the Hugging Face hub whose files are in the local cache (`scripts/fetch.py`)."""
    revision: str | None = None
    """Branch, tag or commit of it; null: its main branch."""
    fold_ln: bool = False
    """Whether gains and biases of norms are folded into the weights behind them. Source: TransformerLens."""
    center_writing_weights: bool = False
    """Whether weights that write to the residual stream are centred. Source: TransformerLens."""
    center_unembed: bool = False
    """Whether the unembedding is centred over the vocabulary. Source: TransformerLens."""
    randomise: Literal["none", "reinit", "permuted"] = "none"
    """Other weight matrices in place of the trained ones, as a control: drawn as at the start of training, or rows and
    columns shuffled (`saeflow.models.controls`). Source: JSAE paper (arXiv 2502.18147)."""
    randomise_seed: int = 0
    """[seed] Of these weights."""
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """Of the weights and of what the model computes with them; values at hooks are float32 from there, and logits.
    Source: transformers."""
    tracr: TracrConfig | None = None
    """A model of a case, in place of `path` and `hub`."""

    def __post_init__(self) -> None:
        check_seed(self, "model.randomise_seed")
        if (self.path is not None or self.hub is not None) == (self.tracr is not None):
            raise ConfigError(
                "model: set exactly one of model.path (a local folder), model.hub (a hub name, which with model.path "
                "says of what that folder is a copy) and tracr"
            )
        processed = self.fold_ln or self.center_writing_weights or self.center_unembed or self.randomise != "none"
        if self.dtype != "float32" and processed:
            raise ConfigError(
                f"model.dtype={self.dtype} rounds the weights as they are stored; leave fold_ln, center_* and "
                "randomise as they are, or set model.dtype=float32"
            )
        if self.tracr and self.dtype != "float32":
            raise ConfigError("model.tracr: its models are float32; leave model.dtype as it is")
        if self.tracr and processed:
            raise ConfigError(
                "model.tracr: its models have no norms; leave fold_ln, center_* and randomise as they are"
            )
