"""How dictionaries are trained."""

from dataclasses import dataclass, fields
from typing import Any, Literal

from saeflow.config.checks import LEARNING_RATES, ConfigError, at_least, check_seed, require

DIVERGED = -0.1
"""An explained variance below which a dictionary is worse than none: what predicts the mean alone has 0."""


@dataclass(frozen=True)
class ExcludeConfig:
    """Tokens that no dictionary is trained on: those at some `positions` of a row (0 is the first, where BOS is), those
    with some `token_ids`, and those whose L2 norm is over `norm_above` times the median at a hook that the dictionary
    reads or predicts. The median is that of the tokens that positions and ids keep; heads of a hook count together.
    """

    positions: tuple[int, ...] = ()
    token_ids: tuple[int, ...] = ()
    norm_above: float | None = None

    def __post_init__(self) -> None:
        for name in ("positions", "token_ids"):
            values = getattr(self, name)
            require(min(values, default=0) >= 0, f"training.exclude.{name}", list(values), "a list of 0 or more")
            object.__setattr__(self, name, tuple(sorted(set(values))))  # equal sets are one key
        above = self.norm_above
        require(above is None or above > 1, "training.exclude.norm_above", above, "more than 1 (medians), or null")

    def identity(self) -> dict[str, Any]:
        """What enters the key of a training: the fields that are not at their defaults."""
        return {f.name: getattr(self, f.name) for f in fields(self) if getattr(self, f.name) != f.default}

    def check(self, context_size: int, d_vocab: int | None) -> None:
        """Raises `ConfigError` for positions and token ids that rows of this length and vocabulary do not have, and
        where no token is left."""
        if self.token_ids and d_vocab is None:
            raise ConfigError("training.exclude.token_ids: the model's config.json does not say its vocab_size; add it")
        for name, n, what in (
            ("positions", context_size, f"tokens.context_size={context_size}"),
            ("token_ids", d_vocab or 0, f"a vocabulary of {d_vocab} tokens"),
        ):
            values = getattr(self, name)
            if values and values[-1] >= n:
                raise ConfigError(
                    f"training.exclude.{name}={list(values)}: {values[-1]} is out of range; with {what} they are 0 to "
                    f"{n - 1}"
                )
            if values and len(values) == n:
                raise ConfigError(f"training.exclude.{name} names all {n} that there are: no token is left to train on")


@dataclass(frozen=True)
class TrainingConfig:
    """`n_tokens` may exceed what is stored: training then passes over it again, reshuffled.

    The order of the batches comes from `shuffle_seed`; `seed` of a point decides only its first weights, so that points
    of many seeds read the same batches. `precision=bfloat16`: the encoder's product, which decides what is active, is
    taken in bfloat16; everything else is float32. `clip_grad_norm` bounds the norm of all gradients together.
    `initial=saelens`: SAELens's first weights; `jsae`: the JSAE paper's.

    `revive` is what is done for latents that have not fired for `dead_after_tokens`. `auxk`: the d_in / 2 most active
    of them reconstruct the error of the others, weighted by `auxk_coefficient` (Gao et al. 2024, as in SAELens).
    `ghost`: ghost gradients (Jermyn and Templeton 2024, as in the transcoder paper). `resample`: after each of
    `resample_steps` they are set to what is reconstructed badly, judged on `resample_batches` batches, and the learning
    rate rises again over `resample_warm_up_steps` (Bricken et al. 2023, as Kissane et al.).

    The penalty of a Jacobian pair rises over `jacobian_warm_up_steps`. With `jacobian_fraction` below 1 it is taken on
    that share of each batch's tokens, drawn anew at every step: the same on average, at a fraction of the cost.

    `exclude` leaves tokens out of training, and out of all that it takes from the activations: batches, mean and
    norms, metrics, `n_tokens`.

    The last four say how to run and never enter a hash: up to `together` dictionaries of one site train in one job that
    reads each batch once; a checkpoint is written about every `checkpoint_seconds`, and the newest `keep_checkpoints`
    stay until training is done.
    """

    n_tokens: int
    batch_size: int = 4096
    shuffle_seed: int = 0
    lr: float = 4e-4
    adam_beta1: float = 0.9
    adam_beta2: float = 0.999
    lr_warm_up_steps: int = 0
    lr_decay_steps: int = 0
    l1_warm_up_steps: int = 0
    precision: Literal["float32", "bfloat16"] = "float32"
    clip_grad_norm: float | None = None
    initial: Literal["saeflow", "saelens", "jsae"] = "saeflow"
    revive: Literal["none", "auxk", "ghost", "resample"] = "none"
    dead_after_tokens: int = 100_000
    auxk_coefficient: float = 1.0
    resample_steps: tuple[int, ...] = ()
    resample_batches: int = 100
    resample_warm_up_steps: int = 1000
    jacobian_warm_up_steps: int = 0
    jacobian_fraction: float = 1.0
    exclude: ExcludeConfig = ExcludeConfig()
    log_every: int = 10
    loggers: tuple[Literal["wandb", "tensorboard"], ...] = ()
    together: int = 4
    checkpoint_seconds: float = 60.0
    keep_checkpoints: int = 1

    def __post_init__(self) -> None:
        names = "batch_size dead_after_tokens resample_batches log_every together keep_checkpoints"
        at_least(1, self, "training", names)
        check_seed(self, "training.shuffle_seed")
        names = "lr_warm_up_steps lr_decay_steps l1_warm_up_steps resample_warm_up_steps "
        at_least(0, self, "training", names + "jacobian_warm_up_steps auxk_coefficient")
        for name in ("adam_beta1", "adam_beta2"):
            require(0 <= getattr(self, name) < 1, f"training.{name}", getattr(self, name), "0 or more and below 1")
        require(self.checkpoint_seconds >= 0, "training.checkpoint_seconds", self.checkpoint_seconds, "0 or more")
        require(self.n_tokens >= self.batch_size, "training.n_tokens", self.n_tokens, "one batch or more")
        require(0 < self.lr <= 1, "training.lr", self.lr, LEARNING_RATES)
        clips = self.clip_grad_norm is None or self.clip_grad_norm > 0
        require(clips, "training.clip_grad_norm", self.clip_grad_norm, "more than 0, or null")
        fraction = self.jacobian_fraction
        require(0 < fraction <= 1, "training.jacobian_fraction", fraction, "above 0 and at most 1")
        legal = all(step >= 0 for step in self.resample_steps)
        require(legal, "training.resample_steps", list(self.resample_steps), "a list of steps, of which the first is 0")
        legal = (self.revive == "resample") == bool(self.resample_steps)
        require(legal, "training.resample_steps", self.resample_steps, "a list of steps with revive=resample, else []")
