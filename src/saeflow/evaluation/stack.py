"""Several dictionaries in the model at once: one of each of a set of layers, as in the transcoder paper's walkthrough.

A dictionary reads what the ones below it leave of the stream, not the clean model's. What the set is compared with has
the same scope: the same hooks ablated together, and a clean pass. L0 is of each dictionary in place, and their sum.
"""

import json
import logging
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor

from saeflow.activations.store import open_column
from saeflow.config import EvaluationConfig
from saeflow.dictionaries import Dictionary
from saeflow.dictionaries.fitting import FitError, open_dictionary
from saeflow.evaluation.baseline import at_positions, drop_last_position, model_losses
from saeflow.evaluation.intervals import entry, interval, resample
from saeflow.evaluation.metrics import Ratio, limits, loss_ratios, why_undefined
from saeflow.evaluation.scope import Scope, warn_of_untrained_first
from saeflow.evaluation.sums import Row, Rows, SumAccumulator, columns, token_batches, write_tables
from saeflow.jobs.job import Job
from saeflow.models.attention import fused_attention
from saeflow.models.folder import hook_layer
from saeflow.models.opening import open_model
from saeflow.models.splicing import flattened, run_clean, run_hooked
from saeflow.text.tokens import open_tokens

if TYPE_CHECKING:
    from transformer_lens import HookedTransformer

log = logging.getLogger("saeflow")


class Member(NamedTuple):
    """One dictionary of the set, and what mean ablation puts where it writes."""

    dictionary: Dictionary
    mean: Tensor
    """(p,)"""


class StackEvaluation(NamedTuple):
    batches: list[Row]
    documents: list[Row]
    resamples: dict[str, np.ndarray]
    summary: dict[str, Any]


def evaluate_stack(
    model: "HookedTransformer", members: list[Member], rows: Rows, prepend_bos: bool, config: EvaluationConfig
) -> StackEvaluation:
    """Evaluates all of `members` in place at once on `rows` (sequence, position) of token ids.

    Raises `FitError` where two of them write at one hook.
    """
    hooks = [m.dictionary.spec.hook_name_out for m in members]
    if len(set(hooks)) < len(hooks):
        raise FitError(f"two dictionaries of a stack write at one hook: {', '.join(hooks)}")
    accumulator = SumAccumulator(prepend_bos)
    for tokens, document in token_batches(rows, prepend_bos, config.batch_rows, model.cfg.device, "stack"):
        with fused_attention(model), torch.no_grad():
            scope = Scope.of(tokens, config.replace_first)
            accumulator.add(document, _measure(model, members, tokens, scope))
    sums = accumulator.sums()
    sums_by_name = columns(sums.documents)
    owner = np.unique([row["document"] for row in sums.documents], return_inverse=True)[1]
    rest = np.array([row["positions"] == "rest" for row in sums.documents])
    summary: dict[str, Any] = {"n_documents": int(owner.max()) + 1, "confidence": config.confidence}
    resamples: dict[str, np.ndarray] = {}
    for suffix, chosen in (("", np.ones(len(rest), dtype=bool)), ("_without_bos", rest)):
        present, group = np.unique(owner[chosen], return_inverse=True)
        by_document = {n: np.bincount(group, v[chosen], len(present)) for n, v in sums_by_name.items()}
        total = {name: values.sum() for name, values in by_document.items()}
        drawn = resample(by_document, None, config.resamples, _ratios)
        summary |= {f"{name}{suffix}": int(total[name]) for name in ("n_tokens", "n_predictions")}
        values = {name: float(ratio.value()) for name, ratio in _ratios(total).items()}
        for name, value in values.items():
            ends = interval(value, drawn[name], config.confidence, *limits(name))
            summary |= entry(f"{name}{suffix}", value, *ends, len(present))
            if not np.isfinite(value):
                summary[f"{name}{suffix}_reason"] = why_undefined(name, values)
            resamples[f"{name}{suffix}"] = drawn[name]
    return StackEvaluation(sums.batches, sums.documents, resamples, summary)


def _ratios(sums: dict[str, Any]) -> dict[str, Ratio]:
    """Losses, recovered fractions, L0 of the set (`l0`) and of every member (`l0.<hook>`)."""
    l0 = {name: Ratio(values, sums["n_tokens"]) for name, values in sums.items() if name.startswith("l0")}
    return loss_ratios(sums) | l0


def _measure(model: "HookedTransformer", members: list[Member], tokens: Tensor, scope: Scope) -> dict[str, Tensor]:
    """Of one batch `tokens` (B, P): values (B, P) by name."""
    B, P = tokens.shape
    layer = min(hook_layer(m.dictionary.spec.hook_name, model.cfg.n_layers) for m in members) - 1
    start = f"blocks.{layer}.hook_resid_pre"
    clean = run_clean(model, tokens, [start] if layer >= 0 else [], [])
    residual = clean.values.get(start)

    read: dict[str, Tensor] = {}
    l0: dict[str, Tensor] = {}

    def keep(value: Tensor, hook: Any) -> None:
        read[hook.name] = value

    def replace(value: Tensor, hook: Any, dictionary: Dictionary) -> Tensor:
        spec = dictionary.spec
        head = spec.hook_head_index
        x = scope.part(flattened(read.pop(spec.hook_name) if not spec.reconstructs else value, head))
        f = dictionary.encode(x)
        l0[spec.hook_name_out] = scope.put((f != 0).sum(1), torch.zeros(B * P, dtype=torch.int64, device=f.device))
        return _put(value, scope.put(dictionary.decode(f, x), flattened(value, head)), head)

    def ablate(value: Tensor, hook: Any, dictionary: Dictionary, by: Tensor) -> Tensor:
        head = dictionary.spec.hook_head_index
        return _put(value, scope.put(scope.part(by.expand(B * P, -1)), flattened(value, head)), head)

    reading = [(m.dictionary.spec.hook_name, keep) for m in members if not m.dictionary.spec.reconstructs]
    writing: list[list[Any]] = [reading, [], []]
    for dictionary, mean in members:
        hook = dictionary.spec.hook_name_out
        writing[0].append((hook, partial(replace, dictionary=dictionary)))
        writing[1].append((hook, partial(ablate, dictionary=dictionary, by=torch.zeros_like(mean))))
        writing[2].append((hook, partial(ablate, dictionary=dictionary, by=mean)))
    finals = [drop_last_position(run_hooked(model, tokens, hooks, residual, layer)) for hooks in writing]
    ce_clean, losses = model_losses(model, tokens, drop_last_position(clean.final), finals)
    replaced, zero, averaged = losses
    n_predictions = at_positions(torch.ones_like(ce_clean), B)
    values = {"n_tokens": torch.ones_like(n_predictions), "n_predictions": n_predictions}
    values |= {"ce_clean": at_positions(ce_clean, B)}
    for name, loss in (("replaced", replaced), ("zero", zero), ("mean", averaged)):
        values[f"ce_{name}"] = at_positions(loss.ce, B)
        values["kl" if name == "replaced" else f"kl_{name}"] = at_positions(loss.kl, B)
    values = {name: scope.counted(value.flatten()).view(B, P) for name, value in values.items()}
    counts = {hook: count.view(B, P) for hook, count in l0.items()}
    values["l0"] = torch.stack(list(counts.values())).sum(0)
    return values | {f"l0.{hook}": count for hook, count in counts.items()}


def _put(value: Tensor, new: Tensor, head: int | None) -> Tensor:
    """`new` (N, p) in the place of `value` (B, P, ...), or of one head of it."""
    if head is None:
        return new.view(value.shape)
    value = value.clone()
    value[:, :, head] = new.view(*value.shape[:2], -1)
    return value


# -------------------------------------------------------------------- jobs
def stack_job(job: Job) -> dict[str, Any]:
    """Evaluates the set of dictionaries that a job names, and writes its folder."""
    config, folders = job.config, job.inputs("train") + job.inputs("foreign")
    members = [
        Member(open_dictionary(path, job), open_column(column).statistics.mean.to(job.device, torch.float32))
        for path, column in zip(folders, job.inputs("activations"), strict=True)
    ]
    rows = open_tokens(job.input("tokens"))
    model = open_model(job)
    log.info("%d dictionaries at once, %d tokens", len(members), rows.n_rows * rows.context_size)
    prepend_bos = rows.attributes["prepend_bos"]
    options = EvaluationConfig(**config["evaluation"], replace_first=config.get("replace_first", True))
    warn_of_untrained_first(job.inputs("train"), options.replace_first)
    evaluation = evaluate_stack(model, members, rows, prepend_bos, options)
    hooks = [m.dictionary.spec.hook_name_out for m in members]
    names = {"stack": config["stack"], "group": config["group"], "train_keys": [p.name for p in folders]}
    summary = names | {"layers": config["layers"], "hooks": hooks} | evaluation.summary
    with job.writing() as out:
        resamples = pa.table(evaluation.resamples)
        write_tables(out, batches=evaluation.batches, documents=evaluation.documents, resamples=resamples)
        (out / "summary.json").write_text(json.dumps(summary, indent=1, allow_nan=False) + "\n")
    return summary
