"""A model that the pipeline makes: what identifies its weights is the key of the artifact that they will be.

What the plan must know of it before it is there: its sizes, and whether a point fits its case.
"""

import dataclasses
import json
from pathlib import Path
from typing import Any

from saeflow.config import ConfigError, PointConfig, TracrConfig
from saeflow.config.labels import joined, unusual
from saeflow.groundtruth.cases import ALL_ROWS_UP_TO, Case, get_case, small_config
from saeflow.groundtruth.compiler import written_before
from saeflow.groundtruth.interpbench import published_digest, read_config
from saeflow.models.folder import GROUND_TRUTH, Geometry
from saeflow.models.source import set_model
from saeflow.planning.digests import canonical
from saeflow.planning.expansion import PlannedPoint, add_instance
from saeflow.planning.stages import Source


def config_of(tracr: TracrConfig) -> dict[str, Any]:
    """Fields of `HookedTransformerConfig` of the model that is to be made."""
    case = get_case(tracr.case)
    if tracr.path is not None:
        config = read_config(Path(tracr.path))
        _check_published(case, config, tracr.path)
        return config
    return case.compiled.config if tracr.method == "compiled" else small_config(case)


def _check_published(case: Case, config: dict[str, Any], path: str) -> None:
    """Raises `ConfigError` for a model that has not the case's rows, words or outputs, or less than its program."""
    wanted = {name: case.compiled.config[name] for name in ("n_ctx", "d_vocab", "d_vocab_out", "attention_dir")}
    other = [f"{name} {config[name]} for {value}" for name, value in wanted.items() if config[name] != value]
    heads = max(case.compiled.config["n_heads"], 1 + max(case.heads.values(), default=0))
    least = {"n_layers": case.compiled.config["n_layers"], "n_heads": heads}
    other += [f"{name} {config[name]} for {value} or more" for name, value in least.items() if config[name] < value]
    if other:
        raise ConfigError(
            f"model.tracr.path={path} is no model of case {case.number}: it has {', '.join(other)}; set "
            "model.tracr.case to the case that it is of"
        )


def geometry_of_case(tracr: TracrConfig) -> Geometry:
    c = config_of(tracr)
    sizes = {name: c[name] for name in ("n_layers", "d_model", "n_heads", "d_head", "d_mlp", "n_ctx", "d_vocab")}
    return Geometry(architecture=GROUND_TRUTH, n_key_value_heads=c["n_heads"], parallel=False, gated=False, **sizes)


def check_case(point: PointConfig) -> None:
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
    trained = point.model.tracr.method not in ("compiled", "published")
    if case.n_rows > ALL_ROWS_UP_TO and point.model.tracr.n_rows is None and trained:
        raise ConfigError(f"case {case.number} has {case.n_rows:,} rows: set model.tracr.n_rows to train on so many")
    for hook in point.dictionary.known_hooks(point.site):
        written_before(hook)


def identify(planned: PlannedPoint) -> None:
    tracr = planned.point.model.tracr
    assert tracr
    check_case(planned.point)
    config, sources = json.loads(canonical(dataclasses.asdict(tracr))), dict[str, str]()
    del config["path"]
    if config["method"] in ("compiled", "published"):  # the rest says how to train
        config = {name: config[name] for name in ("case", "method")}
    geometry = geometry_of_case(tracr)
    if tracr.path is not None:
        config["content"], sources = published_digest(Path(tracr.path), planned.digests), {"published": tracr.path}
    label = f"case{config['case']}-{config['method']}" + (f"-seed{config['seed']}" if "seed" in config else "")
    named = ("tracr.case", "tracr.method", "tracr.seed")
    label += f"-{config['content'][:4]}" if "content" in config else ""
    label = joined(label, {p: t for p, t in unusual({"tracr": config}, {}).items() if p not in named})
    key = add_instance(planned.plan, "groundtruth", label, {"tracr": config}, {}, sources)
    planned.keys["groundtruth"] = {"": key}
    set_model(planned, planned.plan.folder("groundtruth", key), geometry, key, "", label)


SOURCES = (Source(lambda point: point.model.tracr is not None, identify),)
