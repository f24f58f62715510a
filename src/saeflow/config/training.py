"""How dictionaries are trained."""

from dataclasses import dataclass, fields
from typing import Any, Literal

from saeflow.config.checks import LEARNING_RATES, ConfigError, at_least, check_seed, require

DIVERGED = -0.1
"""An explained variance below which a dictionary is worse than none: what predicts the mean alone has 0."""


@dataclass(frozen=True)
class ExcludeConfig:
    """Tokens that no dictionary is trained on: those that any of the three names."""

    positions: tuple[int, ...] = ()
    """[index] Positions in a row; 0 is the first, where BOS is."""
    token_ids: tuple[int, ...] = ()
    """[index] Ids of tokens."""
    norm_above: float | None = None
    """[factor] Tokens whose L2 norm is over so many medians at a hook that the dictionary reads or predicts. The median
    is that of the tokens that positions and ids keep; heads of a hook count together. Source: massive activations, Sun
    et al. 2024 (arXiv 2402.17762)."""

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
    """How dictionaries are trained. The last four say how to run, and never enter a hash."""

    n_tokens: int
    """[tokens] That are trained on. More than are stored are passes over them again, reshuffled."""
    batch_size: int = 4096
    """[tokens] In a step."""
    shuffle_seed: int = 0
    """[seed] Of the order of the batches. The `seed` of a point decides only first weights, so that points of many
    seeds read the same batches."""
    order: Literal["uniform", "buffered"] = "uniform"
    """Of the tokens of an epoch, which has each once. `uniform`: any order is as likely. `buffered`: pieces of 256
    tokens in any order, whose tokens are mixed within buffers; it reads the disk in order, for activations that are
    larger than memory (`saeflow.activations.order`)."""
    buffer_tokens: int = 262_144
    """[tokens] In a buffer of `order=buffered`; two of them are to fit into memory, as they are stored."""
    lr: float = 4e-4
    """[rate] Adam's learning rate, between warm-up and decay."""
    adam_beta1: float = 0.9
    """[fraction] Adam's decay of the mean of gradients."""
    adam_beta2: float = 0.999
    """[fraction] Adam's decay of the mean of their squares."""
    lr_warm_up_steps: int = 0
    """[steps] Over which the rate rises linearly."""
    lr_decay_steps: int = 0
    """[steps] The last ones, over which it falls linearly."""
    l1_warm_up_steps: int = 0
    """[steps] Over which the L1 coefficient rises linearly from 0; of SAELens's classes all of their coefficients."""
    precision: Literal["float32", "bfloat16"] = "float32"
    """Of the encoder's product, which decides what is active; everything else is float32."""
    clip_grad_norm: float | None = None
    """[norm] The largest of all gradients together; null: they are not clipped."""
    initial: Literal["saeflow", "saelens", "jsae", "kaiming"] = "saeflow"
    """First weights: this project's, SAELens's, the JSAE paper's, notebook 002's (`saeflow.dictionaries.initial`)."""
    revive: Literal["none", "auxk", "ghost", "resample"] = "none"
    """What is done for latents that have not fired for `dead_after_tokens`. `auxk`: the d_in / 2 most active of them
    reconstruct the error of the others. `ghost`: ghost gradients. `resample`: they are set to what is reconstructed
    badly. Source: Gao et al. 2024, as in SAELens; Jermyn and Templeton 2024, as in the transcoder paper; Bricken et al.
    2023, as Kissane et al."""
    dead_after_tokens: int = 100_000
    """[tokens] Without firing after which a latent counts as dead."""
    auxk_coefficient: float = 1.0
    """[factor] Weight of the loss of `revive=auxk`."""
    resample_steps: tuple[int, ...] = ()
    """[steps] Before which dead latents are resampled; the learning rate rises again after each."""
    resample_batches: int = 100
    """[batches] On which `revive=resample` judges what is reconstructed badly."""
    resample_warm_up_steps: int = 1000
    """[steps] Over which the rate rises from a tenth along half a cosine after a resampling. Source: Kissane et al.
    2024 (arXiv 2406.17759)."""
    jacobian_warm_up_steps: int = 0
    """[steps] Over which the penalty of a Jacobian pair rises."""
    jacobian_fraction: float = 1.0
    """[fraction] Share of each batch's tokens on which that penalty is taken, drawn anew at every step: the same on
    average, at a fraction of the cost."""
    exclude: ExcludeConfig = ExcludeConfig()
    """Tokens that are left out of training, and of all that it takes from the activations: batches, mean and norms,
    metrics, `n_tokens`."""
    log_every: int = 10
    """[steps] From one row of metrics to the next."""
    loggers: tuple[Literal["wandb", "tensorboard"], ...] = ()
    """Where copies of the metrics go."""
    together: int = 4
    """[dictionaries] Of one site that train in one job, which reads each batch once; at most so many."""
    checkpoint_seconds: float = 60.0
    """[seconds] From one checkpoint to the next, about."""
    keep_checkpoints: int = 1
    """[checkpoints] The newest, which stay until training is done."""

    @property
    def buffered(self) -> int | None:
        """Tokens in a buffer; None for the uniform order."""
        return self.buffer_tokens if self.order == "buffered" else None

    def __post_init__(self) -> None:
        names = "batch_size buffer_tokens dead_after_tokens resample_batches log_every together keep_checkpoints"
        at_least(1, self, "training", names)
        check_seed(self, "training.shuffle_seed")
        names = "lr_warm_up_steps lr_decay_steps l1_warm_up_steps resample_warm_up_steps "
        at_least(0, self, "training", names + "jacobian_warm_up_steps auxk_coefficient")
        for name in ("adam_beta1", "adam_beta2"):
            require(0 <= getattr(self, name) < 1, f"training.{name}", getattr(self, name), "0 or more and below 1")
        require(self.checkpoint_seconds >= 0, "training.checkpoint_seconds", self.checkpoint_seconds, "0 or more")
        require(self.n_tokens >= self.batch_size, "training.n_tokens", self.n_tokens, "one batch or more")
        wanted = f"training.batch_size={self.batch_size} or more with order=buffered, to mix tokens of several pieces"
        mixes = self.order == "uniform" or self.buffer_tokens >= self.batch_size
        require(mixes, "training.buffer_tokens", self.buffer_tokens, wanted)
        require(0 < self.lr <= 1, "training.lr", self.lr, LEARNING_RATES)
        clips = self.clip_grad_norm is None or self.clip_grad_norm > 0
        require(clips, "training.clip_grad_norm", self.clip_grad_norm, "more than 0, or null")
        fraction = self.jacobian_fraction
        require(0 < fraction <= 1, "training.jacobian_fraction", fraction, "above 0 and at most 1")
        legal = all(step >= 0 for step in self.resample_steps)
        require(legal, "training.resample_steps", list(self.resample_steps), "a list of steps, of which the first is 0")
        legal = (self.revive == "resample") == bool(self.resample_steps)
        require(legal, "training.resample_steps", self.resample_steps, "a list of steps with revive=resample, else []")
