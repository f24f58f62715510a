"""What kinds share that are trained here: width, sparsity and how the loss is normalised."""

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from math import prod
from typing import Any, ClassVar, Literal

from saeflow.config.checks import ConfigError, require
from saeflow.config.dictionary import Columns, DictionaryConfig
from saeflow.dictionaries.spec import Origin, Spec, amount_of


@dataclass(frozen=True)
class TrainedConfig(DictionaryConfig):
    """What all have that are trained here."""

    activation: Literal["topk", "batchtopk", "relu"]
    """What keeps latents few: the k largest of a token; the k N largest of a batch of N tokens, and after training what
    exceeds the mean threshold of that; or an L1 penalty on ReLU. Source: Gao et al. 2024 (arXiv 2406.04093); Bussmann
    et al. 2024 (arXiv 2412.06410); Bricken et al. 2023."""
    k: int | None = None
    """[latents] Active on a token, with TopK and BatchTopK; null with ReLU."""
    l1_coefficient: float | None = None
    """[factor] Weight of the L1 penalty with ReLU; null without. What one means depends on `squared_error`, `sparsity`
    and `normalize_activations`."""
    expansion: int | None = 8
    """[factor] Latents for each dimension that it reads; this or `d_sae`."""
    d_sae: int | None = None
    """[latents] How many it has; this or `expansion`."""
    squared_error: Literal["sum", "mean", "target_norm"] = "sum"
    """How the squared error of N tokens is averaged, so that a source's coefficient can be used as printed: over N, of
    sums over d; over both; over both, of the error divided by the target's L2 norm. Source: SAELens; JSAE paper;
    transcoder paper."""
    sparsity: Literal["decoder_norm", "unit_norm"] = "decoder_norm"
    """Whether activations count times the norm of their decoder row, in the L1 penalty and among what competes in TopK;
    or rows are kept at norm 1. Source: SAELens and the April recipe; transcoder and JSAE papers."""
    normalize_activations: Literal["none", "expected_average_only_in", "per_head"] = "none"
    """What training sees: activations as they are, times sqrt(d_in) over their mean norm, or each head's times
    sqrt(d_head) over its RMS norm. Source: SAELens; April recipe."""

    activations: ClassVar[tuple[str, ...]] = ("topk", "batchtopk", "relu")
    trainer: ClassVar[str] = "saeflow.training.trainer:Trainer"
    relu_cost: ClassVar[float] = 2.1

    def __post_init__(self) -> None:
        if (self.expansion is None) == (self.d_sae is None):
            raise ConfigError("dictionary: set exactly one of dictionary.expansion and dictionary.d_sae to a number")
        width = self.expansion or self.d_sae or 0
        require(width > 0, "dictionary.expansion or d_sae", width, "1 or more")
        self.check_amount()

    def check_amount(self) -> None:
        """Raises `ConfigError` unless the amount that the activation takes is given, and no other."""
        k, l1, activation = self.k, self.l1_coefficient, f"activation={self.activation}"
        if self.activation == "relu":
            require(l1 is not None and l1 >= 0, "dictionary.l1_coefficient", l1, f"0 or more with {activation}")
            require(k is None, "dictionary.k", k, f"null with {activation}")
        else:
            require(k is not None and k > 0, "dictionary.k", k, f"1 or more with {activation}")
            require(l1 is None, "dictionary.l1_coefficient", l1, f"null with {activation}")

    @property
    def amount(self) -> tuple[str, float | None]:
        return amount_of(self.k, self.l1_coefficient, {})

    def width(self, d_in: int) -> int:
        """`d_sae` of a dictionary that reads `d_in` values."""
        return self.d_sae or d_in * (self.expansion or 1)

    def check_size(self, hook_name: str, d_in: int, of_each_head: bool) -> None:
        if self.k is not None and self.k > self.width(d_in):
            where = f"each head of {hook_name}" if of_each_head else hook_name
            raise ConfigError(f"dictionary.k={self.k} is more than d_sae={self.width(d_in)} at {where}")

    def needs_heads(self) -> str | None:
        if self.by_head:
            return f"dictionary.kind={self.kind}"
        return "dictionary.normalize_activations=per_head" if self.normalize_activations == "per_head" else None

    @property
    def ranks_in_scaled_units(self) -> bool:
        return self.activation == "topk" and self.normalize_activations == "per_head" and not self.by_head

    # -------------------------------------------------------------------- what training asks
    def spec(
        self,
        d_in: int,
        d_out: int,
        hook_name: str,
        hook_name_out: str,
        seed: int,
        origin: Origin,
        head: int | None = None,
    ) -> Spec:
        """Of one dictionary; `head`: of a hook with heads, the one that it reads and writes."""
        options = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        shared = {f.name for f in dataclasses.fields(Spec)} & options.keys()
        named = {name: options[name] for name in shared}
        sizes = {"d_in": d_in, "d_out": d_out, "d_sae": self.width(d_in)}
        places = {"hook_name": hook_name, "hook_name_out": hook_name_out, "hook_head_index": head}
        return Spec(**named | sizes | places, seed=seed, origin=origin)

    def specs(self, columns: Columns, seed: int, origin: Origin) -> list[Spec]:
        """Of all that one training makes."""
        hooks, sizes, head = columns
        d_in, d_out = (prod(size) if head is None else size[-1] for size in (sizes[0], sizes[-1]))
        return [self.spec(d_in, d_out, hooks[0], hooks[-1], seed, origin, head)]

    def operations(self, columns: Columns, training: dict[str, Any], d_mlp: Callable[[], int | None]) -> float:
        """Counted are the matrix products of a step and its work on active pairs: of an SAE, or the SAE of every head,
        the encoder's product. ReLU is counted as dense, which it is at first."""
        _, sizes, head = columns
        one_head = self.by_head or head is not None
        d_in, d_out = (size[-1] if one_head else prod(size) for size in (sizes[0], sizes[-1]))
        return (sizes[0][0] if self.by_head else 1) * self.step_operations(d_in, d_out) * float(training["n_tokens"])

    def step_operations(self, d_in: int, d_out: int) -> float:
        """Of a token, in one dictionary that reads `d_in` values and is paired with `d_out`."""
        n = self.width(d_in)
        return 2.0 * d_in * n + (6.0 * self.k * (d_in + d_out) if self.k else 4.0 * n * (d_in + d_out))

    @property
    def cost(self) -> float:
        """ReLU begins dense, and stays denser where it reconstructs."""
        if self.activation != "relu":
            return 1.0 + (self.k or 0) / 50
        return self.relu_cost
