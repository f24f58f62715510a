"""Evaluation of dictionaries on held-out tokens: how sparse, how faithful.

All dictionaries of a job share the model, the tokens, and per batch of rows the clean pass and the ablations of every
hook at which one of them writes; each dictionary then costs the layers above that hook. What a dictionary's numbers are
does not depend on which others it is evaluated with.

Scope: the replacement is made at every position, BOS too (as in notebook 004 and the transcoder paper), and so are the
ablations that it is compared with. BOS's activations are unlike any other's, so every metric is also given
`_without_bos`: over the tokens that are not BOS, and the predictions not made from it. Tokens without BOS (packed with
prepend_bos=false) have the same numbers in both.
"""

import json
import logging
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from torch import Tensor
from torch.nn import functional as F

from saeflow.attention import fused_attention
from saeflow.dictionaries import Dictionary, load_dictionary
from saeflow.fitting import FitError, check_fit, model_config
from saeflow.job import Job, progress
from saeflow.kernels.next_token import next_token_losses
from saeflow.loading import load_model
from saeflow.metrics import firing, reconstruct, summarise, target
from saeflow.models import read_geometry
from saeflow.splicing import run_clean, run_spliced
from saeflow.store import open_column
from saeflow.tokens import TokenStore, open_tokens

if TYPE_CHECKING:
    from transformer_lens import HookedTransformer

log = logging.getLogger("saeflow")


class Baseline(NamedTuple):
    """A hook at which dictionaries write, and what mean ablation puts there."""

    hook_name: str
    mean: Tensor
    """(p,): mean over the training split, heads flattened."""


class Study(NamedTuple):
    """One dictionary to evaluate; studies that write at one hook share its `Baseline`."""

    dictionary: Dictionary
    baseline: Baseline


class Evaluation(NamedTuple):
    """Sums and counts, one row a batch and part of it, and what follows from them."""

    batches: list[dict[str, Any]]
    """`positions` is `bos` or `rest`: disjoint, so that rows can be added. `centred` is a vector (p,)."""
    summary: dict[str, Any]


def evaluate(
    model: "HookedTransformer", studies: list[Study], rows: TokenStore | np.ndarray, prepend_bos: bool, batch_rows: int
) -> list[Evaluation]:
    """Evaluates every study on `rows` (sequence, position) of token ids, `batch_rows` at a time."""
    batches: list[list[dict[str, Any]]] = [[] for _ in studies]
    fired = [torch.zeros(s.dictionary.d_sae, dtype=torch.int64) for s in studies]
    parts = {"bos": slice(0, 1), "rest": slice(1, None)} if prepend_bos else {"rest": slice(None)}
    starts = range(0, len(rows), batch_rows)
    for batch, start in enumerate(progress(starts, "evaluating")):
        tokens = torch.from_numpy(rows[start : start + batch_rows].astype(np.int64)).to(model.cfg.device)
        with fused_attention(model):
            measured = _evaluate_batch(model, studies, tokens)
        for i, one in enumerate(measured):
            fired[i] += one.fired
            for name, some in parts.items():
                sums = {k: v[:, some].sum().item() for k, v in one.per_token.items()}
                centred = one.centred[:, some].sum((0, 1), dtype=torch.float64).tolist()
                batches[i].append({"batch": batch, "positions": name, **sums, "centred": centred})
    return [Evaluation(b, _summary(b, f)) for b, f in zip(batches, fired, strict=True)]


class _Measured(NamedTuple):
    """Of one study and batch of B rows, P positions."""

    per_token: dict[str, Tensor]
    """(B, P) each, float64. A prediction counts at the position that it is made from."""
    centred: Tensor
    """(B, P, p)"""
    fired: Tensor
    """(n,)"""


@torch.no_grad()
def _evaluate_batch(model: "HookedTransformer", studies: list[Study], tokens: Tensor) -> list[_Measured]:
    """Measures every study on `tokens` (B, P)."""
    baselines = list({id(s.baseline): s.baseline for s in studies}.values())
    splices = {b.hook_name for b in baselines}
    clean = run_clean(model, tokens, {s.dictionary.spec.hook_name for s in studies}, splices)
    values = {name: clean.values[name].flatten(2).flatten(0, 1) for name in clean.values}  # (N, d)

    finals = []  # (B (P - 1), D) each: zero and mean ablation of every baseline, then the studies
    targets = {}
    for baseline in baselines:
        y = values[baseline.hook_name]
        targets[id(baseline)] = target(y, baseline.mean)
        for value in (torch.zeros_like(y), baseline.mean.expand_as(y)):
            finals.append(_predicting(run_spliced(model, clean, baseline.hook_name, value)))
    reconstructions = []
    for dictionary, baseline in studies:
        made = reconstruct(dictionary, values[dictionary.spec.hook_name], targets[id(baseline)])
        finals.append(_predicting(run_spliced(model, clean, baseline.hook_name, made.output)))
        reconstructions.append(made)

    B, P = tokens.shape
    ce_clean, losses = next_token_losses(
        model.unembed.W_U.contiguous(),
        model.unembed.b_U,
        model.cfg.output_logits_soft_cap,
        tokens[:, 1:].flatten(),
        _predicting(clean.final),
        finals,
    )

    def at_positions(loss: Tensor) -> Tensor:
        return F.pad(loss.view(B, P - 1).double(), (0, 1))  # the last position predicts nothing

    ones = torch.ones(B, P, dtype=torch.float64, device=tokens.device)
    shared = {
        "n_tokens": ones,
        "n_predictions": at_positions(torch.ones_like(ce_clean)),
        "ce_clean": at_positions(ce_clean),
    }
    ablated = {}
    for i, baseline in enumerate(baselines):
        zero, mean = losses[2 * i : 2 * i + 2]
        named = {"ce_zero": zero.ce, "ce_mean": mean.ce, "kl_zero": zero.kl, "kl_mean": mean.kl}
        ablated[id(baseline)] = {name: at_positions(loss) for name, loss in named.items()}
    measured = []
    for study, made, loss in zip(studies, reconstructions, losses[2 * len(baselines) :], strict=True):
        replaced = {"ce_replaced": at_positions(loss.ce), "kl": at_positions(loss.kl)}
        own = {name: v.view(B, P) for name, v in made.per_token.items()}
        centred = targets[id(study.baseline)].centred.view(B, P, -1)
        measured.append(_Measured(shared | ablated[id(study.baseline)] | replaced | own, centred, made.fired.cpu()))
    return measured


def _predicting(final: Tensor) -> Tensor:
    """(B, P, D) to (B (P - 1), D): the positions that have a next token."""
    return final[:, :-1].flatten(0, 1)


def _summary(batches: list[dict[str, Any]], fired: Tensor) -> dict[str, Any]:
    def total(rows: list[dict[str, Any]]) -> dict[str, Any]:
        names = [name for name in rows[0] if name not in ("batch", "positions")]
        return {name: np.sum([row[name] for row in rows], axis=0) for name in names}

    everything = summarise(total(batches))
    without = summarise(total([row for row in batches if row["positions"] == "rest"]))
    # Legacy explained variance compares with its batch's mean, BOS included: it has no meaning for a part of a batch.
    renamed = {f"{k}_without_bos": v for k, v in without.items() if not k.startswith("explained_variance_legacy")}
    return everything | renamed | firing(fired, everything["n_tokens"])


# -------------------------------------------------------------------- jobs
def evaluate_jobs(jobs: list[Job]) -> list[dict[str, Any]]:
    """Evaluates the dictionaries of jobs that share the model and the tokens; writes their folders.

    Raises `FitError` before any forward pass where a dictionary does not fit the model or its column of activations.
    """
    first = jobs[0]
    for job in jobs[1:]:
        if (_shared(job), job.input("tokens")) != (_shared(first), first.input("tokens")):
            raise ValueError(f"{job.path} and {first.path} have other models or tokens, so they need jobs of their own")
    folder, config = first.source("model"), first.config
    geometry = read_geometry(folder)
    baselines: dict[Path, Baseline] = {}
    studies = []
    for job in jobs:
        (path,) = job.dictionaries()
        dictionary = load_dictionary(path, first.device)
        check_fit(dictionary, path, folder, config["model"], geometry)
        column = job.input("activations")
        if column not in baselines:
            baselines[column] = _read_baseline(column, first.device)
        if baselines[column].hook_name != dictionary.spec.hook_name_out:
            raise FitError(
                f"dictionary {path} writes at {dictionary.spec.hook_name_out}, but is evaluated with the "
                f"activations of {baselines[column].hook_name} ({column}); evaluate it at its own site"
            )
        studies.append(Study(dictionary, baselines[column]))

    rows = open_tokens(first.input("tokens"))
    n_tokens = rows.n_rows * rows.context_size
    log.info("%d dictionaries at %d hooks, %d tokens", len(studies), len(baselines), n_tokens)
    model = load_model(folder, model_config(folder, config["model"]), first.device)
    prepend_bos, batch_rows = rows.attributes["prepend_bos"], config["evaluation"]["batch_rows"]
    evaluations = evaluate(model, studies, rows, prepend_bos, batch_rows)
    summaries = []
    for job, study, evaluation in zip(jobs, studies, evaluations, strict=True):
        summaries.append(_identity(job, study.dictionary) | evaluation.summary)
        with job.writing() as out:
            pq.write_table(pa.Table.from_pylist(evaluation.batches), out / "batches.parquet")
            (out / "summary.json").write_text(json.dumps(summaries[-1], indent=1, allow_nan=False) + "\n")
    return summaries


def _shared(job: Job) -> dict[str, Any]:
    """What jobs must have in common: all but which part of a pair is meant."""
    return {name: value for name, value in job.config.items() if name != "part"}


def _identity(job: Job, dictionary: Dictionary) -> dict[str, Any]:
    spec = dictionary.spec
    names = (
        "kind",
        "activation",
        "skip",
        "saelens",
        "k",
        "l1_coefficient",
        "hook_name",
        "hook_name_out",
        "d_sae",
        "seed",
    )
    name, amount = spec.amount
    held = {name: getattr(spec, name) for name in names}
    pair = {"part": job.config.get("part"), "jacobian_coefficient": spec.options.get("jacobian_coefficient")}
    return {"train_key": job.input("train").name, "amount_name": name, "amount": amount} | pair | held


def _read_baseline(folder: Path, device: str) -> Baseline:
    column = open_column(folder)
    return Baseline(column.hook_name, column.statistics.mean.to(device, torch.float32))
