"""Evaluation of dictionaries on held-out tokens: how sparse, how faithful.

All dictionaries of a job share the model, the tokens and the clean pass; each then costs the layers above the hook at
which it writes. The ablations that it is compared with come from that hook's baseline (`baseline`). What a
dictionary's numbers are does not depend on which others it is evaluated with.

Scope: the replacement is made at every position, BOS too (as in notebook 004 and the transcoder paper), and so are the
ablations; with `evaluation.replace_first=false` at all but the first of rows, which then count nowhere. A dictionary of
one head replaces that head, and its ablations are of that head. BOS's activations are unlike any other's, so every
metric is also given `_without_bos`: over the tokens that are not BOS, and the predictions not made from it. Tokens
without BOS (packed with prepend_bos=false) have the same numbers in both. `<metric>_low` and `<metric>_high` are its
interval over documents (`saeflow.evaluation.intervals`).
"""

import json
import logging
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor

from saeflow.config import EvaluationConfig
from saeflow.dictionaries import Dictionary
from saeflow.dictionaries.fitting import FitError, open_dictionary
from saeflow.dictionaries.naming import dictionary_key
from saeflow.evaluation.baseline import Baseline, at_positions, drop_last_position, model_losses, read_baseline
from saeflow.evaluation.intervals import entry, interval, resample
from saeflow.evaluation.metrics import firing, limits, reconstruct, summarise, target
from saeflow.evaluation.scope import Scope, bos_of, warn_of_untrained_first
from saeflow.evaluation.sums import Row, Rows, SumAccumulator, columns, joined, token_batches, write_tables
from saeflow.jobs.job import Job
from saeflow.models.attention import fused_attention
from saeflow.models.opening import open_model
from saeflow.models.splicing import flattened, run_clean, run_spliced
from saeflow.text.tokens import open_tokens

if TYPE_CHECKING:
    from transformer_lens import HookedTransformer

log = logging.getLogger("saeflow")


class EvaluationTask(NamedTuple):
    """One dictionary to evaluate, and the baseline of the hook at which it writes, of the same tokens and batches."""

    dictionary: Dictionary
    baseline: Baseline


class Evaluation(NamedTuple):
    """Sums and counts, and what follows from them."""

    batches: list[Row]
    documents: list[Row]
    """`positions` is `bos` or `rest`: disjoint, so that rows can be added."""
    fired: np.ndarray
    """(2, n): on how many tokens each latent fires; first those of BOS, then the others."""
    by_l0: np.ndarray
    """(2, most + 1): how many tokens have an L0 of 0, 1, ...; first those of BOS, then the others."""
    resamples: dict[str, np.ndarray]
    """Each metric without one of the documents, or one group of them: (resamples,)."""
    summary: dict[str, Any]


def evaluate(
    model: "HookedTransformer", tasks: list[EvaluationTask], rows: Rows, prepend_bos: bool, config: EvaluationConfig
) -> list[Evaluation]:
    """Evaluates every task on `rows` (sequence, position) of token ids."""
    accumulators = [SumAccumulator(prepend_bos) for _ in tasks]
    fired = [np.zeros((2, s.dictionary.d_sae), dtype=np.int64) for s in tasks]
    by_l0 = [np.zeros((2, s.dictionary.d_sae + 1), dtype=np.int64) for s in tasks]
    for tokens, document in token_batches(rows, prepend_bos, config.batch_rows, model.cfg.device, "evaluating"):
        is_bos = bos_of(tokens, prepend_bos)
        scope = Scope.of(tokens, config.replace_first)
        with fused_attention(model):
            for i, (per_token, fired_now) in enumerate(_evaluate_batch(model, tasks, tokens, is_bos, scope)):
                accumulators[i].add(document, per_token)
                fired[i] += fired_now.cpu().numpy()
                l0 = per_token["l0"].flatten().long()
                for counts, chosen in zip(by_l0[i], (is_bos, ~is_bos), strict=True):
                    chosen = scope.counted(chosen)
                    counts += torch.bincount(l0[chosen], minlength=len(counts)).cpu().numpy()
    results = zip(tasks, accumulators, fired, by_l0, strict=True)
    return [_evaluation(s.baseline, accumulator, f, counts, config) for s, accumulator, f, counts in results]


@torch.no_grad()
def _evaluate_batch(
    model: "HookedTransformer", tasks: list[EvaluationTask], tokens: Tensor, is_bos: Tensor, scope: Scope
) -> list[tuple[dict[str, Tensor], Tensor]]:
    """Measures every task on `tokens` (B, P); `is_bos` (B P,).

    Gives of each its values per token, (B, P) float64, a prediction at the position that it is made from, and on how
    many tokens each latent fires, (2, n).
    """
    splices = {s.baseline.hook_name for s in tasks}
    clean = run_clean(model, tokens, {s.dictionary.spec.hook_name for s in tasks}, splices)
    sites = {(s.baseline.hook_name, s.baseline.head) for s in tasks}
    values = {(hook, head): flattened(clean.values[hook], head) for hook, head in sites}
    targets = {site: target(scope.part(value)) for site, value in values.items()}
    finals, reconstructions = [], []
    for dictionary, (hook, head, _) in tasks:
        x = scope.part(flattened(clean.values[dictionary.spec.hook_name], head))
        reconstruction = reconstruct(dictionary, x, targets[hook, head], scope.part(is_bos))
        replaced = scope.put(reconstruction.output, values[hook, head])
        finals.append(drop_last_position(run_spliced(model, clean, hook, replaced, head)))
        # not the output: it is as large as the final value
        nothing = torch.zeros(len(is_bos), dtype=torch.float64, device=tokens.device)
        per_token = {name: scope.put(v, nothing) for name, v in reconstruction.per_token.items()}
        reconstructions.append((per_token, reconstruction.fired))
    B, P = tokens.shape
    _, losses = model_losses(model, tokens, drop_last_position(clean.final), finals)
    results = []
    for (per_token, fired), loss in zip(reconstructions, losses, strict=True):
        losses_by_name = {"ce_replaced": at_positions(loss.ce, B), "kl": at_positions(loss.kl, B)}
        measured = {name: scope.counted(v.flatten()) for name, v in losses_by_name.items()} | per_token
        results.append(({name: v.view(B, P) for name, v in measured.items()}, fired))
    return results


def _evaluation(
    baseline: Baseline, accumulator: SumAccumulator, fired: np.ndarray, by_l0: np.ndarray, config: EvaluationConfig
) -> Evaluation:
    sums = accumulator.sums()
    batches = joined(baseline.sums.batches, sums.batches)
    documents = joined(baseline.sums.documents, sums.documents)
    centred = baseline.sums.vectors["centred"]
    rest = np.array([row["positions"] == "rest" for row in documents])
    everything, resamples = _metrics(documents, centred, config)
    # Legacy explained variance compares with its batch's mean, BOS included: it has no meaning for a part of a batch.
    for table, part in zip((everything, resamples), _metrics(documents, centred, config, rest), strict=True):
        table |= {_without_bos(k): v for k, v in part.items() if not k.startswith("explained_variance_legacy")}
    latents = firing(fired.sum(0), everything["n_tokens"])
    by_l0 = by_l0[:, : int(np.flatnonzero(by_l0.sum(0)).max()) + 1]
    summary = everything | latents | {"confidence": config.confidence}
    return Evaluation(batches, documents, fired, by_l0, resamples, summary)


def _without_bos(name: str) -> str:
    metric, end = re.fullmatch(r"(.*?)(_low_reason|_reason|_low|_high|)", name).groups()  # type: ignore[union-attr]
    return f"{metric}_without_bos{end}"


def _metrics(
    rows: list[Row], centred: np.ndarray, config: EvaluationConfig, chosen: np.ndarray | None = None
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Metrics with their intervals, and resampled, of the `chosen` rows of documents."""
    sums = columns(rows)
    document = np.array([row["document"] for row in rows])
    if chosen is not None:
        sums, centred, document = {n: v[chosen] for n, v in sums.items()}, centred[chosen], document[chosen]
    total = {name: values.sum() for name, values in sums.items()}
    summary = summarise(total | {"centred": np.square(centred.sum(0)).sum()})
    present, group = np.unique(document, return_inverse=True)
    by_document = {name: np.bincount(group, values, len(present)) for name, values in sums.items()}
    centred_by_document = np.zeros((len(present), centred.shape[1]))
    np.add.at(centred_by_document, group, centred)
    resampled = resample(by_document, centred_by_document, config.resamples)
    for name, values in resampled.items():
        value = np.nan if summary[name] is None else summary[name]
        summary |= entry(name, value, *interval(value, values, config.confidence, *limits(name)), len(present))
    return summary | {"n_documents": len(present)}, resampled


# -------------------------------------------------------------------- jobs
def evaluate_jobs(jobs: list[Job]) -> list[dict[str, Any]]:
    """Evaluates the dictionaries of jobs that share the model and the tokens; writes their folders.

    Raises `FitError` before any forward pass where a dictionary does not fit the model or its baseline.
    """
    first = jobs[0]
    # all but which part of a pair is meant
    shared = [(job.input("tokens"), {k: v for k, v in job.config.items() if k != "part"}) for job in jobs]
    for job, own in zip(jobs, shared, strict=True):
        if own != shared[0]:
            raise ValueError(f"{job.path} and {first.path} have other models or tokens, so they need jobs of their own")
    baselines = {path: read_baseline(path) for path in {job.input("baseline") for job in jobs}}
    tasks = []
    for job in jobs:
        (path,) = job.dictionaries()
        dictionary = open_dictionary(path, first)
        baseline_path = job.input("baseline")
        hook, head, _ = baselines[baseline_path]
        writes = dictionary.spec.hook_name_out, dictionary.spec.hook_head_index
        if (hook, head) != writes:
            raise FitError(
                f"dictionary {path} writes at {_site_name(*writes)}, but is compared with the baseline of "
                f"{_site_name(hook, head)} ({baseline_path}); evaluate it at its own site"
            )
        tasks.append(EvaluationTask(dictionary, baselines[baseline_path]))

    rows = open_tokens(first.input("tokens"))
    log.info("%d dictionaries at %d hooks, %d tokens", len(tasks), len(baselines), rows.n_rows * rows.context_size)
    config = EvaluationConfig(**first.config["evaluation"], replace_first=first.config.get("replace_first", True))
    warn_of_untrained_first([folder for job in jobs for folder in job.inputs("train")], config.replace_first)
    evaluations = evaluate(open_model(first), tasks, rows, rows.attributes["prepend_bos"], config)
    summaries = []
    for job, task, evaluation in zip(jobs, tasks, evaluations, strict=True):
        summaries.append(_identity(job, task.dictionary) | evaluation.summary)
        with job.writing() as out:
            write_evaluation(evaluation, summaries[-1], out)
    return summaries


def write_evaluation(evaluation: Evaluation, summary: dict[str, Any], folder: Path) -> None:
    at_bos, at_rest = evaluation.fired
    latents = {"latent": np.arange(len(at_rest)), "fired": at_bos + at_rest, "fired_without_bos": at_rest}
    latents |= {"frequency": (at_bos + at_rest) / evaluation.summary["n_tokens"]}
    l0 = {"l0": np.arange(evaluation.by_l0.shape[1]), "tokens": evaluation.by_l0.sum(0)}
    l0 |= {"tokens_without_bos": evaluation.by_l0[1]}
    write_tables(folder, batches=evaluation.batches, documents=evaluation.documents)
    write_tables(folder, resamples=pa.table(evaluation.resamples), latents=pa.table(latents), l0=pa.table(l0))
    (folder / "summary.json").write_text(json.dumps(summary, indent=1, allow_nan=False) + "\n")


def _site_name(hook: str, head: int | None) -> str:
    return hook if head is None else f"head {head} of {hook}"


def _identity(job: Job, dictionary: Dictionary) -> dict[str, Any]:
    spec = dictionary.spec
    names = ["kind", "activation", "skip", "saelens", "k", "l1_coefficient", "hook_name", "hook_name_out"]
    names += ["hook_head_index", "d_sae", "sparsity", "seed"]
    name, amount = spec.amount
    identity = {name: getattr(spec, name) for name in names}
    key, part = (job.inputs("train") + job.inputs("foreign"))[0].name, job.config.get("part")
    keys = {"train_key": key, "part": part, "dictionary_key": dictionary_key(key, part)}
    keys |= {"tokens_key": job.input("tokens").name, "model_name": spec.origin.model_name or ""}
    pair = {"source": spec.origin.source or "", "jacobian_coefficient": spec.options.get("jacobian_coefficient")}
    scope = {name: job.config[name] for name in ("replace_first",) if name in job.config}
    return keys | pair | scope | {"amount_name": name, "amount": amount} | identity
