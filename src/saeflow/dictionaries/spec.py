"""What a dictionary is, apart from its weights: how it acts, where it acts, and what it was trained on."""

from dataclasses import dataclass, field
from typing import Any, Literal

AMOUNTS = ("k", "l1_coefficient", "l0_coefficient", "residual_threshold")


def amount_of(k: int | None, l1_coefficient: float | None, options: dict[str, Any]) -> tuple[str, float | None]:
    """What decides how sparse a dictionary is, and its value: k, the L1 coefficient, or what plays their part."""
    held = {"k": k, "l1_coefficient": l1_coefficient} | options
    return next(((name, held[name]) for name in AMOUNTS if held.get(name) is not None), ("k", None))


class DictionaryError(ValueError):
    """A dictionary that cannot be built, opened or used here; the message says why and what to do."""


@dataclass(frozen=True)
class Origin:
    """Where the activations came from that a dictionary was trained on. None: not known (made elsewhere).

    Activations depend on the weights and on TransformerLens's processing of them, so a dictionary fits only the two
    together.
    """

    model_name: str | None = None
    """A name for people; `model_weights` is what identifies the model."""
    model_weights: str | None = None
    """Content hash of the weights and `config.json` (`saeflow.models.folder.model_digest`)."""
    fold_ln: bool | None = None
    center_writing_weights: bool | None = None
    center_unembed: bool | None = None
    context_size: int | None = None
    prepend_bos: bool | None = None
    source: str | None = None
    """Name of what another library made."""


@dataclass(frozen=True)
class Spec:
    """Everything about a dictionary but its weights.

    What concerns training alone (`l1_coefficient` to `options`) is None where a dictionary was made elsewhere.
    """

    kind: Literal["sae", "transcoder", "heads"]
    """`heads`: the SAEs of all heads of a hook as one."""
    activation: Literal["topk", "batchtopk", "relu", "jumprelu", "saelens"]
    """`saelens`: what only SAELens can compute."""
    d_in: int
    d_out: int
    d_sae: int
    hook_name: str
    """Where it reads."""
    hook_name_out: str
    """Where its output belongs; for an SAE the same hook."""
    hook_head_index: int | None = None
    """Of a hook with heads: the one that it reads and writes. None: all of them, flattened."""
    k: int | None = None
    """Latents that TopK keeps for a token, or BatchTopK kept on average; else None."""
    skip: bool = False
    """Whether a transcoder adds a linear map of its input."""
    apply_b_dec_to_input: bool = False
    """Whether `b_dec` is subtracted from the input; SAELens's default for SAEs, impossible for transcoders."""
    l1_coefficient: float | None = None
    squared_error: str | None = None
    sparsity: str | None = None
    normalize_activations: str | None = None
    """What training did; on disk the scaling is folded into the weights, which take raw activations."""
    seed: int | None = None
    saelens: str | None = None
    """The class of SAELens that trained it."""
    options: dict[str, Any] = field(default_factory=dict)
    """That class's own options."""
    origin: Origin = Origin()

    @property
    def amount(self) -> tuple[str, float | None]:
        """What decides how sparse it is, and its value; see `amount_of`."""
        return amount_of(self.k, self.l1_coefficient, self.options)

    @property
    def reconstructs(self) -> bool:
        """Whether its target is what it reads; else it predicts another hook."""
        return self.kind != "transcoder"

    @property
    def any_number_active(self) -> bool:
        """Whether only the loss bounds how many latents are active, so that a step of training may be dense."""
        return self.activation == "relu"

    @property
    def keeps_decoder_norms(self) -> bool:
        """Whether its decoder rows have norms of their own once trained, as SAELens's with L1 do."""
        return self.activation == "relu" and self.sparsity == "decoder_norm"

    @property
    def ranks_in_scaled_units(self) -> bool:
        """Whether training ranked latents in units that differ from raw ones by more than one factor: by another for
        each head. Norms of decoder rows then have to be folded before the scale, or TopK would keep other latents."""
        by_head = self.normalize_activations == "per_head" and self.hook_head_index is None
        return by_head and self.activation == "topk"

    @property
    def random_seed(self) -> int:
        """Of all that training draws: heads of one seed do not start alike."""
        head = self.hook_head_index
        return (self.seed or 0) + (0 if head is None else 1_000_003 * (head + 1))

    def __post_init__(self) -> None:
        if min(self.d_in, self.d_out, self.d_sae) < 1:
            raise DictionaryError(f"sizes must be 1 or more: d_in={self.d_in}, d_out={self.d_out}, d_sae={self.d_sae}")
        if self.activation in ("topk", "batchtopk") and not 1 <= (self.k or 0) <= self.d_sae:
            raise DictionaryError(
                f"dictionary.k={self.k} is out of range: it must be 1 to d_sae={self.d_sae} with {self.activation}"
            )
        if self.kind != "transcoder" and (self.d_in, self.hook_name) != (self.d_out, self.hook_name_out):
            raise DictionaryError(
                f"an SAE reads and writes one hook, but {self.hook_name} ({self.d_in} wide) and {self.hook_name_out} "
                f"({self.d_out} wide) are two; use kind=transcoder"
            )
        if self.kind == "transcoder" and self.apply_b_dec_to_input:
            raise DictionaryError("a transcoder's b_dec belongs to its output: apply_b_dec_to_input must be false")
