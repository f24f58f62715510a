"""What evaluations of dictionaries at one hook are compared with: the clean model, and the hook ablated.

A baseline is an artifact of its own, made once for a model, a hook and held-out tokens: sums by batch and by document
of the clean cross-entropy, of cross-entropy and KL under zero and mean ablation (the mean of the training split), and
of the target's second moments. A dictionary that is added later recomputes none of it.

What is not kept is the residual stream, from which a dictionary's pass goes on, and the clean model's logits, which KL
needs: 2 d_model and V numbers a token against fifteen. Logits would take 200 KB a token for a vocabulary of 50,257. The
stream of Pythia-410M on notebook 004's 3.3 million tokens is 27 GB, and a GPU makes it in the time that a disk reads
it; on the embedded model the clean pass is 1.9 of the 11 seconds of evaluating one dictionary on two cores, the start
of the job included, and is shared by all dictionaries of a job.
"""

import json
import logging
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import pyarrow.parquet as pq
import torch
from safetensors.numpy import load_file, save_file
from torch import Tensor

from saeflow.activations.store import open_column
from saeflow.evaluation.metrics import squared_norm
from saeflow.evaluation.scope import Scope
from saeflow.evaluation.sums import Rows, SumAccumulator, Sums, token_batches, write_tables
from saeflow.jobs.job import Job
from saeflow.kernels.next_token import Losses, next_token_losses
from saeflow.models.attention import fused_attention
from saeflow.models.opening import open_model
from saeflow.models.protocol import unembedding
from saeflow.models.splicing import flattened, run_clean, run_spliced
from saeflow.text.tokens import open_tokens

if TYPE_CHECKING:
    from transformer_lens import HookedTransformer

log = logging.getLogger("saeflow")


class AblationSite(NamedTuple):
    """A hook at which dictionaries write, and what mean ablation puts there."""

    hook_name: str
    mean: Tensor
    """(p,): mean over the training split, heads flattened."""
    head: int | None = None
    """Of a hook with heads: ablate this one alone."""


class Baseline(NamedTuple):
    """The measurement; `sums.vectors["centred"]` are sums of the target minus the mean."""

    hook_name: str
    head: int | None
    sums: Sums


def measure_baselines(
    model: "HookedTransformer",
    sites: list[AblationSite],
    rows: Rows,
    prepend_bos: bool,
    batch_rows: int,
    replace_first: bool = True,
) -> list[Baseline]:
    """Runs `rows` (sequence, position) of token ids clean and with every hook ablated, each at every position, or at
    all but the first of rows."""
    accumulators = [SumAccumulator(prepend_bos) for _ in sites]
    for tokens, document in token_batches(rows, prepend_bos, batch_rows, model.cfg.device, "baselines"):
        scope = Scope.of(tokens, replace_first)
        with fused_attention(model), torch.no_grad():
            for accumulator, (values, centred) in zip(accumulators, _measure(model, sites, tokens, scope), strict=True):
                accumulator.add(document, values, {"centred": centred})
    return [
        Baseline(a.hook_name, a.head, accumulator.sums()) for a, accumulator in zip(sites, accumulators, strict=True)
    ]


def _measure(
    model: "HookedTransformer", sites: list[AblationSite], tokens: Tensor, scope: Scope
) -> list[tuple[dict[str, Tensor], Tensor]]:
    """Of one batch `tokens` (B, P) and each hook: values (B, P) by name, and the centred target (B, P, p)."""
    B, P = tokens.shape
    clean = run_clean(model, tokens, [], {a.hook_name for a in sites})
    finals = []
    for hook, mean, head in sites:
        y = flattened(clean.values[hook], head)
        for value in (torch.zeros_like(mean), mean):
            ablated = scope.put(scope.part(value.expand(B * P, -1)), y)
            finals.append(drop_last_position(run_spliced(model, clean, hook, ablated, head)))
    ce_clean, losses = model_losses(model, tokens, drop_last_position(clean.final), finals)
    n_predictions = at_positions(torch.ones_like(ce_clean), B)
    found = []
    for i, (hook, mean, head) in enumerate(sites):
        y = flattened(clean.values[hook], head)
        zero, averaged = losses[2 * i : 2 * i + 2]
        centred = y - mean
        values = {
            "n_tokens": torch.ones_like(n_predictions),
            "n_predictions": n_predictions,
            "ce_clean": at_positions(ce_clean, B),
            "ce_zero": at_positions(zero.ce, B),
            "ce_mean": at_positions(averaged.ce, B),
            "kl_zero": at_positions(zero.kl, B),
            "kl_mean": at_positions(averaged.kl, B),
            "squared_norm": squared_norm(y).view(B, P),
            "squared_centred": squared_norm(centred).view(B, P),
        }
        counted = {name: scope.counted(value.flatten()).view(B, P) for name, value in values.items()}
        found.append((counted, scope.counted(centred).view(B, P, -1)))
    return found


def model_losses(
    model: "HookedTransformer", tokens: Tensor, clean: Tensor, variants: list[Tensor]
) -> tuple[Tensor, list[Losses]]:
    """`next_token_losses` of the model on `tokens` (B, P), of final values (B (P - 1), D)."""
    W_U, b_U, softcap = unembedding(model)
    return next_token_losses(W_U, b_U, softcap, tokens[:, 1:].flatten(), clean, variants)


def drop_last_position(final: Tensor) -> Tensor:
    """(B, P, D) to (B (P - 1), D): the positions that have a next token."""
    return final[:, :-1].flatten(0, 1)


def at_positions(loss: Tensor, n_rows: int) -> Tensor:
    """(B (P - 1),) to (B, P), float64: each prediction at the position that it is made from, 0 at the last."""
    return torch.nn.functional.pad(loss.view(n_rows, -1).double(), (0, 1))


# -------------------------------------------------------------------- jobs
def baseline_jobs(jobs: list[Job]) -> list[Baseline]:
    """Measures the baselines of jobs that share the model and the tokens; writes their folders."""
    first, sites = jobs[0], []
    for job in jobs:
        column = open_column(job.input("activations"))
        mean, head = column.statistics.mean.to(first.device, torch.float32), job.config["head"]
        sites.append(AblationSite(column.hook_name, mean if head is None else mean.view(*column.size)[head], head))
    rows = open_tokens(first.input("tokens"))
    model = open_model(first, rows.context_size)  # the first of the whole model: caching ends at the last hook's layer
    log.info("%d hooks, %d tokens", len(sites), rows.n_rows * rows.context_size)
    batch_rows = first.config["evaluation"]["batch_rows"]
    replace_first = first.config.get("replace_first", True)
    found = measure_baselines(model, sites, rows, rows.attributes["prepend_bos"], batch_rows, replace_first)
    for job, baseline in zip(jobs, found, strict=True):
        with job.writing() as out:
            write_baseline(baseline, out)
    return found


def write_baseline(baseline: Baseline, folder: Path) -> None:
    write_tables(folder, batches=baseline.sums.batches, documents=baseline.sums.documents)
    save_file(baseline.sums.vectors, folder / "vectors.safetensors")
    (folder / "baseline.json").write_text(json.dumps({"hook_name": baseline.hook_name, "head": baseline.head}) + "\n")


def read_baseline(folder: Path) -> Baseline:
    site: dict[str, Any] = json.loads((folder / "baseline.json").read_text())
    batches, documents = (pq.read_table(folder / f"{name}.parquet").to_pylist() for name in ("batches", "documents"))
    sums = Sums(batches, documents, load_file(folder / "vectors.safetensors"))
    return Baseline(site["hook_name"], site["head"], sums)
