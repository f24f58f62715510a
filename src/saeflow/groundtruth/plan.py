"""What the plan must know of a model that does not exist yet: its sizes, and whether a point fits its case."""

from typing import TYPE_CHECKING, Any

from saeflow.config import ConfigError, TracrConfig
from saeflow.groundtruth.cases import ALL_ROWS_UP_TO, get_case, small_config
from saeflow.groundtruth.compiler import written_before
from saeflow.models.folder import GROUND_TRUTH, Geometry

if TYPE_CHECKING:
    from saeflow.config import PointConfig


def config_of(tracr: TracrConfig) -> dict[str, Any]:
    """Fields of `HookedTransformerConfig` of the model that is to be made."""
    case = get_case(tracr.case)
    return case.compiled.config if tracr.method == "compiled" else small_config(case)


def geometry_of_case(tracr: TracrConfig) -> Geometry:
    c = config_of(tracr)
    sizes = {name: c[name] for name in ("n_layers", "d_model", "n_heads", "d_head", "d_mlp", "n_ctx")}
    return Geometry(architecture=GROUND_TRUTH, n_key_value_heads=c["n_heads"], parallel=False, gated=False, **sizes)


def check_case(point: "PointConfig") -> None:
    """Raises `ConfigError` for a case that is not there, rows that it does not have, or a hook of which nothing is
    known."""
    assert point.model.tracr
    case = get_case(point.model.tracr.case)
    size = point.tokens.context_size
    if size != case.n_ctx or not point.tokens.prepend_bos:
        raise ConfigError(
            f"rows of case {case.number} are {case.n_ctx} tokens with BOS in front: set tokens.context_size="
            f"{case.n_ctx} and tokens.prepend_bos=true"
        )
    for name in ("train_tokens", "held_out_tokens"):
        n_rows = getattr(point.tokens, name) // size
        if case.n_rows <= ALL_ROWS_UP_TO and n_rows != case.n_rows:
            raise ConfigError(
                f"case {case.number} has {case.n_rows} rows, and all of them are used: set tokens.{name}="
                f"{case.n_rows * size}, not {getattr(point.tokens, name)}"
            )
    if case.n_rows > ALL_ROWS_UP_TO and point.model.tracr.n_rows is None and point.model.tracr.method != "compiled":
        raise ConfigError(f"case {case.number} has {case.n_rows:,} rows: set model.tracr.n_rows to train on so many")
    if point.dictionary.kind != "jacobian":
        written_before(point.site.hook_name_out or point.site.hook_name)
