"""The configuration as data: one frozen dataclass a group of `conf/`, validated when it is built.

The plan builds a `PointConfig` for every point of a sweep; a stage gets only what it declares (`plan.STAGES`).
No file is read here: what depends on the model (does this hook exist?) is checked by `expand` and `models`.
"""

import dataclasses
import difflib
import math
import types
import typing
from dataclasses import dataclass, field
from typing import Any, Literal, TypeVar, Union

T = TypeVar("T")


class ConfigError(ValueError):
    """A configuration that cannot be run; the message names the key, what is wrong and the legal values."""


@dataclass(frozen=True)
class CorpusConfig:
    """Where the text is from: a local file or folder (`path`), or a Hugging Face dataset (`dataset`), streamed; or the
    rows of a `case` whose algorithm is known."""

    name: str
    path: str | None = None
    dataset: str | None = None
    subset: str | None = None
    split: str = "train"
    revision: str | None = None
    text_field: str = "text"
    source_field: str = "source"
    sample_by: Literal["document", "paragraph", "line"] = "document"
    case: int | None = None

    def __post_init__(self) -> None:
        if sum(source is not None for source in (self.path, self.dataset, self.case)) != 1:
            raise ConfigError("corpus: set exactly one of corpus.path, corpus.dataset and corpus.case")


@dataclass(frozen=True)
class TokensConfig:
    """How documents become rows of `context_size` tokens; both sizes count BOS and EOS."""

    context_size: int
    train_tokens: int
    held_out_tokens: int
    held_out_fraction: float = 0.1
    prepend_bos: bool = True
    bos_token: str | None = None

    def __post_init__(self) -> None:
        _require(self.context_size >= 2, "tokens.context_size", self.context_size, "2 or more")
        _require(0 < self.held_out_fraction < 1, "tokens.held_out_fraction", self.held_out_fraction, "between 0 and 1")
        for name in ("train_tokens", "held_out_tokens"):
            value = getattr(self, name)
            _require(value >= self.context_size, f"tokens.{name}", value, f"one row ({self.context_size}) or more")


@dataclass(frozen=True)
class TracrConfig:
    """A model of a case of `saeflow.groundtruth.cases`: the `compiled` one, or a small one that is trained from `seed`
    on `n_rows` rows of the case (null: all that there are), as `saeflow.groundtruth.lowlevel.Recipe` says."""

    case: int
    method: Literal["compiled", "supervised", "iit", "siit"] = "siit"
    seed: int = 0
    n_rows: int | None = None
    n_steps: int = 400
    batch_rows: int = 128
    lr: float = 1e-2

    def __post_init__(self) -> None:
        for name in ("n_steps", "batch_rows"):
            _require(getattr(self, name) > 0, f"model.tracr.{name}", getattr(self, name), "1 or more")


@dataclass(frozen=True)
class ModelConfig:
    """A Hugging Face folder (`path`), or a hub name whose files are in the local cache, and TransformerLens's weight
    processing, which changes activations; or a model that the pipeline makes (`tracr`).

    `randomise` replaces the weight matrices, as a control (`saeflow.models.randomise`): `reinit` draws them as at the
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
        _require(self.randomise_seed >= 0, "model.randomise_seed", self.randomise_seed, "0 or more")
        if sum(source is not None for source in (self.path, self.hub, self.tracr)) != 1:
            raise ConfigError("model: set exactly one of model.path (a local folder), model.hub (a hub name) and tracr")
        processed = self.fold_ln or self.center_writing_weights or self.center_unembed or self.randomise != "none"
        if self.tracr and processed:
            raise ConfigError(
                "model.tracr: its models have no norms; leave fold_ln, center_* and randomise as they are"
            )


@dataclass(frozen=True)
class ActivationsConfig:
    """`batch_rows` rows go through the model at once. A chunk is the unit of checksums, a shard one file."""

    dtype: Literal["float32", "float16", "bfloat16"] = "float32"
    batch_rows: int = 16
    chunk_tokens: int = 4096
    shard_tokens: int = 65536

    def __post_init__(self) -> None:
        for name in ("batch_rows", "chunk_tokens"):
            _require(getattr(self, name) > 0, f"activations.{name}", getattr(self, name), "1 or more")
        whole = self.shard_tokens > 0 and self.shard_tokens % self.chunk_tokens == 0
        _require(whole, "activations.shard_tokens", self.shard_tokens, "a multiple of activations.chunk_tokens")


@dataclass(frozen=True)
class SiteConfig:
    """`hook_name` is where a dictionary reads; transcoders and pairs also have `hook_name_out`. `head`: of a hook with
    heads, the one that an SAE is of (`kind=sae`, or foreign)."""

    hook_name: str
    hook_name_out: str | None = None
    layer: int | None = None
    head: int | None = None


_TOPK_OPTIONS = ("aux_loss_coefficient", "rescale_acts_by_decoder_norm", "use_sparse_activations")
_BATCHTOPK_OPTIONS = (*_TOPK_OPTIONS, "topk_threshold_lr")
SAELENS: dict[str, tuple[str, tuple[str, ...]]] = {
    "standard": ("l1_coefficient", ("lp_norm",)),
    "gated": ("l1_coefficient", ()),
    "topk": ("k", _TOPK_OPTIONS),
    "abstopk": ("k", _TOPK_OPTIONS),
    "batchtopk": ("k", _BATCHTOPK_OPTIONS),
    "matryoshka_batchtopk": ("k", (*_BATCHTOPK_OPTIONS, "matryoshka_widths", "use_matryoshka_aux_loss")),
    "jumprelu": (
        "l0_coefficient",
        ("jumprelu_init_threshold", "jumprelu_bandwidth", "jumprelu_sparsity_loss_mode", "pre_act_loss_coefficient",
         "jumprelu_tanh_scale", "jumprelu_ste_to_input", "target_l0"),
    ),
    "matching_pursuit": ("residual_threshold", ("max_iterations", "stop_on_duplicate_support")),
}  # fmt: skip
"""SAELens's training classes: the option that a sweep varies, and the others. A test holds it in step with SAELens."""


def amount_of(k: int | None, l1_coefficient: float | None, options: dict[str, Any]) -> tuple[str, float | None]:
    """What decides how sparse a dictionary is, and its value: k, the L1 coefficient, or what plays their part."""
    held = {"k": k, "l1_coefficient": l1_coefficient} | options
    names = ("k", "l1_coefficient", *(amount for amount, _ in SAELENS.values()))
    return next(((name, held[name]) for name in names if held.get(name) is not None), ("k", None))


@dataclass(frozen=True)
class DictionaryConfig:
    """`kind`: an SAE, a transcoder from `hook_name` to `hook_name_out`, or two TopK SAEs, one at each: a `pair` of
    ordinary ones, or a `jacobian` pair, trained as one so that the Jacobian between their latents is sparse; or, of a
    hook with `heads`, an SAE of each head, trained as one, whose k, L1 coefficient and size are those of each.

    `squared_error` names how the reconstruction error of N tokens is averaged, so that a source's coefficient can be
    used as printed: `sum` over d, mean over N (SAELens); `mean` over both (JSAE); `target_norm`: mean over both of the
    error divided by the target's L2 norm (transcoder paper). `sparsity`: L1 of activations weighted by the decoder
    row's norm (SAELens, April recipe), or plain L1 with unit-norm decoder rows (transcoder paper). With TopK likewise:
    latents compete by value times the decoder row's norm (SAELens), or rows are kept at unit norm (JSAE). `batchtopk`
    keeps the k N largest of a batch of N tokens, and after training whatever exceeds the mean threshold of that.
    `skip` adds a linear map from a transcoder's input to its output. `normalize_activations`: training sees the input
    times sqrt(d_in) over its mean norm (SAELens), or each head of it times sqrt(d_head) over that head's RMS norm.
    `apply_b_dec_to_input`: whether an SAE subtracts `b_dec` from its input (SAELens, Kissane), or not (April recipe).

    With `activation=saelens` it is SAELens's training class of the name `saelens`, on our trainer; `options` are that
    class's own. It brings its first weights and its loss, so `squared_error` and `sparsity` say nothing there.

    `kind=foreign` is a dictionary that another library made, at `path` (of `format`, or known by its files), or
    `sae_id` of a `release` that SAELens knows; the site says whether it is an SAE or a transcoder. `label` names it in
    figures. Nothing else applies to it.

    A `jacobian` pair adds to the losses of its SAEs `jacobian_coefficient` / k^2 times the mean over tokens of what the
    k x k Jacobian of the active latents costs by `jacobian_penalty` (see `saeflow.kernels.penalties`), taken at the
    input (as the paper, arXiv 2502.18147) or at the input SAE's reconstruction of it. With coefficient 0 they are the
    SAEs that they would be alone.
    """

    kind: Literal["sae", "transcoder", "pair", "jacobian", "heads", "foreign"]
    activation: Literal["topk", "batchtopk", "relu", "saelens", "foreign"]
    k: int | None = None
    l1_coefficient: float | None = None
    expansion: int | None = 8
    d_sae: int | None = None
    squared_error: Literal["sum", "mean", "target_norm"] = "sum"
    sparsity: Literal["decoder_norm", "unit_norm"] = "decoder_norm"
    normalize_activations: Literal["none", "expected_average_only_in", "per_head"] = "none"
    apply_b_dec_to_input: bool = True
    skip: bool = False
    saelens: str | None = None
    options: dict[str, Any] = field(default_factory=dict)
    jacobian_coefficient: float | None = None
    jacobian_penalty: Literal["l1", "scad", "l1_over_l2", "lp"] = "l1"
    jacobian_at: Literal["input", "reconstruction"] = "input"
    path: str | None = None
    format: Literal["saelens", "transcoder_circuits", "dictionary_learning", "sparsify"] | None = None
    release: str | None = None
    sae_id: str | None = None
    label: str | None = None

    def __post_init__(self) -> None:
        if "foreign" in (self.kind, self.activation) or self.path is not None or self.release is not None:
            return self._check_foreign()
        if (self.expansion is None) == (self.d_sae is None):
            raise ConfigError("dictionary: set exactly one of dictionary.expansion and dictionary.d_sae to a number")
        width = self.expansion or self.d_sae or 0
        _require(width > 0, "dictionary.expansion or d_sae", width, "1 or more")
        given, needed = self.jacobian_coefficient, self.kind == "jacobian"
        legal = (given is not None and given >= 0) if needed else given is None
        wanted = "0 or more" if needed else "null"
        _require(legal, "dictionary.jacobian_coefficient", given, f"{wanted} with kind={self.kind}")
        if self.activation == "saelens" or self.saelens is not None or self.options:
            return self._check_saelens()
        if self.activation != "relu":
            _require(
                self.k is not None and self.k > 0,
                "dictionary.k",
                self.k,
                f"1 or more with activation={self.activation}",
            )
            legal = self.l1_coefficient is None
            _require(legal, "dictionary.l1_coefficient", self.l1_coefficient, f"null with activation={self.activation}")
        else:
            legal = self.l1_coefficient is not None and self.l1_coefficient >= 0
            _require(legal, "dictionary.l1_coefficient", self.l1_coefficient, "0 or more with activation=relu")
            _require(self.k is None, "dictionary.k", self.k, "null with activation=relu")
        if self.kind in ("pair", "jacobian"):
            _require(self.activation == "topk", "dictionary.activation", self.activation, f"topk with kind={self.kind}")
        if self.kind == "jacobian":  # or a latent could shrink its Jacobian by growing
            wanted = "unit_norm with kind=jacobian"
            _require(self.sparsity == "unit_norm", "dictionary.sparsity", self.sparsity, wanted)
        if self.kind == "heads":  # of a head, what is stored with the activations has only the RMS norm
            scaling = self.normalize_activations
            legal = scaling != "expected_average_only_in"
            _require(legal, "dictionary.normalize_activations", scaling, "none or per_head with kind=heads")
        if self.skip:
            _require(self.kind == "transcoder", "dictionary.kind", self.kind, "transcoder with dictionary.skip=true")

    def _check_foreign(self) -> None:
        legal = (self.kind, self.activation) == ("foreign", "foreign")
        _require(legal, "dictionary.kind", self.kind, "foreign, with activation=foreign: use dictionary=foreign")
        if (self.path is None) == (self.release is None):
            raise ConfigError("dictionary=foreign: set exactly one of dictionary.path and dictionary.release")
        legal = (self.release is None) == (self.sae_id is None)
        _require(legal, "dictionary.sae_id", self.sae_id, "given with dictionary.release, and only then")

    def _check_saelens(self) -> None:
        legal = self.activation == "saelens" and self.saelens in SAELENS
        wanted = f"one of {', '.join(SAELENS)} with activation=saelens, else null and without dictionary.options"
        _require(legal, "dictionary.saelens", self.saelens, wanted)
        legal = self.kind == "sae" and not self.skip
        wanted = "sae with activation=saelens: SAELens trains no transcoder, and heads one by one"
        _require(legal, "dictionary.kind", self.kind, wanted)
        legal = self.apply_b_dec_to_input
        _require(legal, "dictionary.apply_b_dec_to_input", legal, "true with activation=saelens")
        legal = self.normalize_activations != "per_head"
        _require(
            legal, "dictionary.normalize_activations", self.normalize_activations, "none or expected_average_only_in"
        )
        amount, others = SAELENS[self.saelens or ""]
        for name in ("k", "l1_coefficient"):
            given, takes = getattr(self, name), name == amount
            _require((given is not None) == takes, f"dictionary.{name}", given, "a number" if takes else "null here")
        names = (*others, *(() if amount in ("k", "l1_coefficient") else (amount,)))
        for option in self.options:
            near = difflib.get_close_matches(option, names, n=1)
            hint = f" (did you mean {near[0]!r}?)" if near else ""
            if option not in names:
                raise ConfigError(
                    f"unknown option dictionary.options.{option}{hint}; SAELens's {self.saelens} has here: "
                    + (", ".join(names) or "none")
                )
        legal = amount not in names or isinstance(self.options.get(amount), int | float)
        _require(legal, f"dictionary.options.{amount}", self.options.get(amount), "a number")

    @property
    def amount(self) -> tuple[str, float | None]:
        """The option that a sweep varies, and its value; see `amount_of`."""
        return amount_of(self.k, self.l1_coefficient, self.options)


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
    log_every: int = 10
    loggers: tuple[Literal["wandb", "tensorboard"], ...] = ()
    together: int = 4
    checkpoint_seconds: float = 60.0
    keep_checkpoints: int = 1

    def __post_init__(self) -> None:
        for name in ("batch_size", "dead_after_tokens", "resample_batches", "log_every", "together"):
            _require(getattr(self, name) > 0, f"training.{name}", getattr(self, name), "1 or more")
        _require(self.keep_checkpoints > 0, "training.keep_checkpoints", self.keep_checkpoints, "1 or more")
        _require(self.n_tokens >= self.batch_size, "training.n_tokens", self.n_tokens, "one batch or more")
        _require(self.lr > 0, "training.lr", self.lr, "more than 0")
        clips = self.clip_grad_norm is None or self.clip_grad_norm > 0
        _require(clips, "training.clip_grad_norm", self.clip_grad_norm, "more than 0, or null")
        fraction = self.jacobian_fraction
        _require(0 < fraction <= 1, "training.jacobian_fraction", fraction, "above 0 and at most 1")
        legal = (self.revive == "resample") == bool(self.resample_steps)
        _require(legal, "training.resample_steps", self.resample_steps, "a list of steps with revive=resample, else []")


@dataclass(frozen=True)
class JacobianConfig:
    """`n_tokens` held-out tokens (position 0 left out); the histogram has `bins` equal bins on [0, `max_value`].

    `at`: whether the Jacobian is taken at the true input of f or at its reconstruction by the input dictionary. `norm`
    matters where f begins before the norm: `ignored` leaves it out of f but for its gain and bias (notebook 000's
    `ignore_ln`, whose MLP reads the residual stream as it is).
    `thresholds` are of |J| itself and of J divided by a token's L1 or L2 norm, `relative_thresholds` in units of the
    RMS of J. Intervals over documents come from `resamples` resamples.

    The Jacobians of the first `stored_tokens` tokens are stored whole. The `top_pairs` pairs by each statistic, and the
    `top_inputs` inputs of the outputs among them, are those active together on `min_count` tokens or more, and each
    comes with up to `contexts` windows of `window` tokens. `linearity_samples` functions of one latent by another are
    looked at. With `transcoders`, the Jacobian of every transcoder's input-output map is studied too.
    """

    n_tokens: int = 16384
    at: Literal["input", "reconstruction"] = "input"
    norm: Literal["inside", "ignored"] = "inside"
    bins: int = 200
    max_value: float = 0.5
    thresholds: tuple[float, ...] = (0.005, 0.01, 0.015, 0.02)
    relative_thresholds: tuple[float, ...] = (0.1, 0.5, 1.0, 2.0)
    resamples: int = 1000
    stored_tokens: int = 1024
    top_pairs: int = 32
    top_inputs: int = 16
    min_count: int = 12
    contexts: int = 12
    window: int = 16
    linearity_samples: int = 1000
    transcoders: bool = False

    def __post_init__(self) -> None:
        for name in ("n_tokens", "bins", "resamples", "stored_tokens", "top_pairs", "top_inputs", "min_count"):
            _require(getattr(self, name) > 0, f"jacobian.{name}", getattr(self, name), "1 or more")
        for name in ("contexts", "window", "linearity_samples"):
            _require(getattr(self, name) > 0, f"jacobian.{name}", getattr(self, name), "1 or more")
        _require(self.max_value > 0, "jacobian.max_value", self.max_value, "more than 0")
        for name in ("thresholds", "relative_thresholds"):
            legal = all(value > 0 for value in getattr(self, name))
            _require(legal, f"jacobian.{name}", list(getattr(self, name)), "a list of numbers above 0")


@dataclass(frozen=True)
class HeadsConfig:
    """How a layer's heads and their dictionaries are studied, on the first `n_tokens` held-out tokens, `batch_rows`
    rows at a time. The model is run without cross terms between heads on `loss_tokens` of them, with intervals from
    `resamples` resamples of the documents.

    Of every two heads the `top_pairs` pairs of latents that interfere most are kept. Latents of a dictionary on all
    heads count where they are active on `min_active` tokens or more; `n_latents` of these, drawn at random, are
    decomposed in the heads' dictionaries with up to `max_atoms` atoms, and `dashboards` of those shown, each with
    `contexts` texts of `window` tokens to either side. `seed` decides all draws.
    """

    n_tokens: int = 65536
    batch_rows: int = 16
    loss_tokens: int = 16384
    resamples: int = 1000
    top_pairs: int = 32
    min_active: int = 12
    n_latents: int = 64
    max_atoms: int = 16
    dashboards: int = 12
    contexts: int = 4
    window: int = 12
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("n_tokens", "batch_rows", "loss_tokens", "resamples", "top_pairs", "min_active", "n_latents"):
            _require(getattr(self, name) > 0, f"heads.{name}", getattr(self, name), "1 or more")
        for name in ("max_atoms", "contexts", "window"):
            _require(getattr(self, name) > 0, f"heads.{name}", getattr(self, name), "1 or more")
        for name in ("dashboards", "seed"):
            _require(getattr(self, name) >= 0, f"heads.{name}", getattr(self, name), "0 or more")


@dataclass(frozen=True)
class EvaluationConfig:
    """All rows of the held-out tokens are used, `batch_rows` at a time. Intervals hold `confidence` of `resamples`
    draws of the documents."""

    batch_rows: int = 16
    resamples: int = 1000
    confidence: float = 0.95
    bootstrap_seed: int = 0

    def __post_init__(self) -> None:
        for name in ("batch_rows", "resamples"):
            _require(getattr(self, name) > 0, f"evaluation.{name}", getattr(self, name), "1 or more")
        _require(0 < self.confidence < 1, "evaluation.confidence", self.confidence, "between 0 and 1")


@dataclass(frozen=True)
class BlindConfig:
    """A blind set of `n_features` of each dictionary that are active on `min_active` tokens or more and on more than
    `min_frequency` of all; `n_examples` texts each, of `window` tokens to either side."""

    n_features: int = 50
    n_examples: int = 25
    window: int = 8
    min_active: int = 4
    min_frequency: float = 1e-4
    batch_rows: int = 16
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("n_features", "n_examples", "window", "min_active", "batch_rows"):
            _require(getattr(self, name) > 0, f"blind.{name}", getattr(self, name), "1 or more")


@dataclass(frozen=True)
class PointConfig:
    """One point of a sweep: everything that decides a number."""

    corpus: CorpusConfig
    tokens: TokensConfig
    model: ModelConfig
    activations: ActivationsConfig
    site: SiteConfig
    dictionary: DictionaryConfig
    training: TrainingConfig
    jacobian: JacobianConfig
    heads: HeadsConfig
    evaluation: EvaluationConfig
    seed: int

    def __post_init__(self) -> None:
        _require(self.seed >= 0, "seed", self.seed, "0 or more")
        if self.corpus.case != (self.model.tracr and self.model.tracr.case):
            raise ConfigError(
                "a model of a case is studied on the rows of that case: use model=tracr with corpus=tracr"
            )
        if self.dictionary.kind in ("sae", "heads") and self.site.hook_name_out is not None:
            use = "site=attn_z" if self.dictionary.kind == "heads" else "site=mlp_in, site=mlp_out or another with one"
            hooks = f"{self.site.hook_name} and {self.site.hook_name_out}"
            raise ConfigError(
                f"dictionary.kind={self.dictionary.kind} reads one hook, but this site has two ({hooks}); use {use}"
            )
        if self.site.head is not None:
            legal = self.dictionary.kind in ("sae", "foreign")
            _require(legal, "site.head", self.site.head, f"null with dictionary.kind={self.dictionary.kind}")
            scaling = self.dictionary.normalize_activations
            legal = scaling != "expected_average_only_in" and self.dictionary.activation != "saelens"
            wanted = "none or per_head with site.head, and activation none of SAELens's"
            _require(legal, "dictionary.normalize_activations", scaling, wanted)
        if self.dictionary.kind == "heads":
            legal = self.training.revive in ("none", "resample")
            _require(legal, "training.revive", self.training.revive, "none or resample with dictionary.kind=heads")
        if self.dictionary.kind not in ("sae", "heads", "foreign") and self.site.hook_name_out is None:
            raise ConfigError(
                f"dictionary.kind={self.dictionary.kind} needs a site with hook_name and hook_name_out: use site=mlp"
            )


def _require(legal: bool, key: str, value: Any, wanted: str) -> None:
    if not legal:
        raise ConfigError(f"{key}={value} is out of range: it must be {wanted}")


def build(cls: type[T], tree: dict[str, Any], where: str = "") -> T:
    """Builds the dataclass `cls` from a plain tree, checking every key and type.

    Raises `ConfigError` for unknown keys (with the nearest legal one), missing keys and values of the wrong type.
    """
    fields = {f.name: f for f in dataclasses.fields(cls)}  # type: ignore[arg-type]
    hints = typing.get_type_hints(cls)
    for key in tree:
        if key not in fields:
            near = difflib.get_close_matches(str(key), fields, n=1)
            hint = f" (did you mean {near[0]!r}?)" if near else ""
            raise ConfigError(f"unknown key {where}{key}{hint}; legal here: {', '.join(fields)}")
    values = {}
    for name, held in fields.items():
        if name in tree:
            values[name] = _coerce(hints[name], tree[name], f"{where}{name}")
        elif held.default is dataclasses.MISSING and held.default_factory is dataclasses.MISSING:
            raise ConfigError(f"missing key {where}{name}")
    return cls(**values)


def _coerce(hint: Any, value: Any, where: str) -> Any:
    """The value as the hint's type. Numbers of equal value become equal: 1 and 1.0 hash alike for a float field."""
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if dataclasses.is_dataclass(hint):
        if not isinstance(value, dict):
            raise ConfigError(f"{where}={value!r} must be a group of keys")
        return build(typing.cast(type, hint), value, where + ".")
    if origin in (Union, types.UnionType):
        if value is None and type(None) in args:
            return None
        return _coerce(next(a for a in args if a is not type(None)), value, where)
    if origin is Literal:
        if value not in args:
            raise ConfigError(f"{where}={value!r} is not legal: use one of {', '.join(map(str, args))}")
        return value
    if origin is dict:
        if not isinstance(value, dict):
            raise ConfigError(f"{where}={value!r} must be a group of keys")
        return {str(key): value[key] for key in sorted(value)}
    if origin is tuple:
        if not isinstance(value, list | tuple):
            raise ConfigError(f"{where}={value!r} must be a list")
        return tuple(_coerce(args[0], v, f"{where}[{i}]") for i, v in enumerate(value))
    if hint is float and isinstance(value, int | float) and not isinstance(value, bool):
        if not math.isfinite(value):
            raise ConfigError(f"{where}={value} must be a finite number")
        return float(value)
    if hint is int and isinstance(value, float) and value.is_integer():
        return int(value)
    if not isinstance(value, hint) or (hint is int and isinstance(value, bool)):
        raise ConfigError(f"{where}={value!r} must be of type {hint.__name__}")
    return value


def takes_list(path: str) -> bool:
    """Whether the field at a dotted path of `PointConfig` is itself a list, so that a list there is no sweep axis."""
    hint: Any = PointConfig
    for part in path.split("."):
        if not dataclasses.is_dataclass(hint):
            return False
        hint = typing.get_type_hints(hint).get(part)
    return typing.get_origin(hint) is tuple
