"""How few units of an MLP know which of two years is later: latents of its transcoder against its own neurons
(Dunefsky, Chlenski, Nanda 2024, section 5, and their greater-than notebook).

A prompt "The war lasted from 17YY to 17" for every YY from 00 to 99; with p the softmax over the logits of the hundred
two-digit tokens at its end, the score is the mean over YY = 01 to 98 of sum p(y > YY) - sum p(y <= YY): 1 for all on
later years. Units are ranked by the variance over the hundred prompts of their activation at the end; the k first are
kept as they are, at every position, and all others are 0. What does not depend on units, `b_dec` and a skip connection
of a transcoder, b_out of an MLP, stays. All prompts that there are are used, so that a score has no sampling error.

Shapes: Y years (prompts), P positions, n units.
"""

import json
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple

import pandas as pd
import torch
from torch import Tensor

from saeflow.config import ConfigError
from saeflow.dictionaries import Dictionary
from saeflow.dictionaries.fitting import open_dictionary
from saeflow.jobs.job import Job
from saeflow.jobs.progress import progress
from saeflow.models.greater_than import TEMPLATE, YEARS
from saeflow.models.opening import open_model
from saeflow.models.source import reading_model
from saeflow.text.packing import encode_all
from saeflow.text.tokenizer import open_tokenizer
from saeflow.text.tokens import open_tokens

if TYPE_CHECKING:
    from tokenizers import Tokenizer
    from transformer_lens import HookedTransformer

MOST = 99  # units that are kept at most. Source: their notebook
Hooks = list[tuple[str, Callable[..., Tensor]]]


class Prompts(NamedTuple):
    tokens: Tensor
    """(Y, P)"""
    years: Tensor
    """(Y,) ids of the two-digit tokens."""


class Units(NamedTuple):
    """What an MLP's output is made of."""

    activations: Tensor
    """(Y, P, n)"""
    written: Callable[[Tensor], Tensor]
    """What activations (Y, P, n) make of the MLP's output, (Y, P, D)."""


def prompts(tokenizer: "Tokenizer", bos: int | None) -> Prompts:
    """Raises `ConfigError` for a tokenizer that does not write a year's last two digits as one token each."""
    texts = [TEMPLATE.format(year) for year in YEARS]
    rows = list(encode_all(tokenizer, texts))
    longer = list(encode_all(tokenizer, [texts[0] + year for year in YEARS]))
    first = rows[0]
    alike = len({len(row) for row in rows}) == 1 and all(row[: len(first)] == first for row in longer)
    if not alike or any(len(row) != len(first) + 1 for row in longer) or len({row[-1] for row in longer}) < len(YEARS):
        raise ConfigError(
            f"the model's tokenizer does not write the last two digits of a year as one token each after {texts[0]!r}, "
            "as the figure greater_than needs; leave it out, or use another model (model=greater_than)"
        )
    front = [] if bos is None else [bos]
    return Prompts(torch.tensor([[*front, *row] for row in rows]), torch.tensor([row[-1] for row in longer]))


def score(logits: Tensor) -> float:
    """Logits of the years after each prompt, (Y, Y) -> the mean over years that have an earlier and a later one."""
    p = logits.double().softmax(1)
    later = torch.ones_like(p).triu(1)
    return float((p * (2 * later - 1)).sum(1)[1:-1].mean())


@torch.no_grad()
def run(model: "HookedTransformer", asked: Prompts, hooks: Hooks | None = None) -> float:
    """The score of the model with some hooks."""
    logits = model.run_with_hooks(asked.tokens, fwd_hooks=hooks or [])[:, -1]
    return score(logits[:, asked.years])


@torch.no_grad()
def units_of(model: "HookedTransformer", dictionary: Dictionary, asked: Prompts) -> dict[str, Units]:
    """`latents` of the transcoder and `neurons` of the MLP that it stands for, on the prompts."""
    spec = dictionary.spec
    layer = int(spec.hook_name_out.split(".")[1])
    mlp: Any = model.blocks[layer].mlp
    _, cache = model.run_with_cache(asked.tokens, names_filter=[spec.hook_name, f"blocks.{layer}.mlp.hook_post"])
    x = cache[spec.hook_name].flatten(0, 1)
    n_prompts, n_positions = asked.tokens.shape

    def of_latents(f: Tensor) -> Tensor:
        return dictionary.decode(f.flatten(0, 1), x).view(n_prompts, n_positions, -1)

    def of_neurons(post: Tensor) -> Tensor:
        return post @ mlp.W_out + mlp.b_out

    latents = dictionary.encode(x).view(n_prompts, n_positions, -1)
    neurons = cache[f"blocks.{layer}.mlp.hook_post"]
    return {"latents": Units(latents, of_latents), "neurons": Units(neurons, of_neurons)}


def ranked(units: Units) -> Tensor:
    """(n,) units by the variance of their activation at the end of the prompts, the largest first."""
    return units.activations[:, -1].double().var(0, correction=0).argsort(descending=True, stable=True)


def with_units(units: Units, kept: Tensor, hook_name: str) -> Hooks:
    """Puts what the units `kept` write in the place of the MLP's output."""
    some = torch.zeros_like(units.activations)
    some[..., kept] = units.activations[..., kept]
    output = units.written(some)
    return [(hook_name, lambda value, hook: output)]


@torch.no_grad()
def curves(model: "HookedTransformer", dictionary: Dictionary, asked: Prompts) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Tables: `units`, `k`, `score` with the first k units; and `units`, `rank`, `unit`, `variance` of these units."""
    hook, points, found = dictionary.spec.hook_name_out, [], []
    for name, units in units_of(model, dictionary, asked).items():
        order = ranked(units)
        variance = units.activations[:, -1].double().var(0, correction=0)
        most = min(MOST, len(order))
        for k in progress(range(most + 1), name, most + 1, "units"):
            points.append((name, k, run(model, asked, with_units(units, order[:k], hook))))
        found += [(name, i + 1, int(unit), float(variance[unit])) for i, unit in enumerate(order[:most])]
    return (
        pd.DataFrame(points, columns=["units", "k", "score"]),
        pd.DataFrame(found, columns=["units", "rank", "unit", "variance"]),
    )


def greater_than_job(job: Job) -> dict[str, Any]:
    """Writes `curve.parquet`, `units.parquet` and `summary.json`."""
    (folder,) = job.dictionaries()
    dictionary, model = open_dictionary(folder, job), open_model(job)
    with reading_model(job) as model_folder:
        tokenizer = open_tokenizer(model_folder)
    asked = prompts(tokenizer, open_tokens(job.input("tokens")).attributes["bos_token_id"])
    curve, units = curves(model, dictionary, asked)
    latents = units_of(model, dictionary, asked)["latents"]
    hook = dictionary.spec.hook_name_out
    spec, (name, amount) = dictionary.spec, dictionary.spec.amount
    summary: dict[str, Any] = {"train_key": folder.name, "dictionary_key": folder.name, "amount_name": name}
    summary |= {"amount": amount, "model_name": job.instance.sources.get("model_name"), "source": spec.origin.source}
    names = ("kind", "activation", "skip", "saelens", "hook_name", "hook_name_out", "hook_head_index", "d_sae", "seed")
    summary |= {n: getattr(spec, n) for n in names} | {"sparsity": spec.sparsity}
    summary["score_model"] = run(model, asked)
    summary["score_transcoder"] = run(model, asked, with_units(latents, torch.arange(spec.d_sae), hook))
    with job.writing() as out:
        curve.to_parquet(out / "curve.parquet", index=False)
        units.to_parquet(out / "units.parquet", index=False)
        (out / "summary.json").write_text(json.dumps(summary, indent=1, allow_nan=False) + "\n")
    return summary
