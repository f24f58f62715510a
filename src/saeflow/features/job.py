"""Tables of the latents of all dictionaries of one model and text, in one pass over the tokens.

The pass gives where latents fire (`saeflow.features.firings`); all else is made of that, chunk by chunk of the latents,
but for what weights alone say and for ablations, which take another pass over the rows with sampled firings.
"""

import logging
import math
import shutil
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import pandas as pd
import torch
import xarray as xr

from saeflow.activations.store import open_column
from saeflow.config import FeaturesConfig, build
from saeflow.dictionaries import Dictionary, DictionaryError
from saeflow.dictionaries.fitting import FitError, open_dictionary
from saeflow.dictionaries.naming import dictionary_key
from saeflow.features.artifact import GROUP, ExamplesWriter, latents_table, write_index, write_latents
from saeflow.features.effects import Samples, Task, loss_increases
from saeflow.features.examples import draws, examples_table
from saeflow.features.logits import logit_weights
from saeflow.features.lookup import Batch, Found, choose_text, gather, run_activations, stored_activations
from saeflow.features.neighbours import by_decoder, by_jacobian
from saeflow.features.order import lowest
from saeflow.features.statistics import activity, counted, limits, parts, position_bins, tokens_of
from saeflow.features.text import Seen, Text
from saeflow.jobs.job import Job
from saeflow.models.alone import can_stand_alone
from saeflow.models.opening import open_model
from saeflow.models.source import reading_model
from saeflow.text.tokenizer import open_tokenizer
from saeflow.text.tokens import open_tokens

if TYPE_CHECKING:
    from transformer_lens import HookedTransformer

log = logging.getLogger("saeflow")

NO_TOKENS = "the model gives the output of an algorithm, and predicts no tokens"


class Pass(NamedTuple):
    """What jobs that share the model and the tokens look up."""

    config: FeaturesConfig
    dictionaries: list[Dictionary]
    """Of each job one."""
    text: Text
    model: "HookedTransformer"
    batches: Iterator[Batch]


def open_pass(jobs: list[Job]) -> Pass:
    """Opens what jobs that share the model and the tokens read; nothing is run yet.

    Raises `FitError` where a dictionary does not fit the model.
    """
    first = jobs[0]
    config = build(FeaturesConfig, first.config["features"])
    dictionaries = [open_dictionary(folder, first) for job in jobs for folder in job.dictionaries()]
    store = open_tokens(first.input("tokens"))
    columns = {column.hook_name: column for job in jobs for column in map(open_column, job.inputs("activations"))}
    text = choose_text(store, columns, config)
    model = open_model(first)
    hooks = sorted({dictionary.spec.hook_name for dictionary in dictionaries})
    if missing := [hook for hook in hooks if columns and hook not in columns]:
        raise FitError(f"the activations at {missing[0]} are not cached; set features.split=held_out")
    log.info("%d dictionaries at %d hooks, %d tokens", len(dictionaries), len(hooks), text.n_tokens)
    stored = stored_activations(columns, hooks, text, config.batch_rows, model.cfg.device)
    batches = stored if columns else run_activations(model, hooks, text, config.batch_rows)
    return Pass(config, dictionaries, text, model, batches)


def features_jobs(jobs: list[Job]) -> list[dict[str, Any]]:
    """Makes the tables of jobs that share the model and the tokens; returns their indices.

    Raises `FitError` before any forward pass where a dictionary does not fit the model.
    """
    first = jobs[0]
    config, dictionaries, text, model, batches = open_pass(jobs)
    with reading_model(first) as folder:
        tokenizer = open_tokenizer(folder)

    def read(token: int) -> str:
        return str(tokenizer.decode([token], skip_special_tokens=False))

    with ExitStack() as stack:
        outs = [stack.enter_context(job.writing()) for job in jobs]
        found = gather(dictionaries, batches, text, [out / "firings" for out in outs], config)
        with ThreadPoolExecutor(torch.get_num_threads()) as threads:
            tables = list(threads.map(lambda one, out: _of_chunks(one, text, model, config, out), found, outs))
        samples = [(one.dictionary, table.samples) for one, table in zip(found, tables, strict=True)]
        effects = _effects(model, samples, text, config, bool(first.inputs("groundtruth")))
        indices = []
        for job, one, table, effect, out in zip(jobs, found, tables, effects, outs, strict=True):
            left_out = {name: why for name, why in [("effect", effect)] if isinstance(effect, str)}
            columns_of = table.columns | ({} if isinstance(effect, str) else effect)
            columns_of |= _of_weights(model, one, job, config, left_out)
            n = one.dictionary.d_sae
            latents = latents_table(columns_of | {"latent": np.arange(n)}, n)
            write_latents(out, latents, _profiles(table, one, model, text, config), table.tokens, read)
            about = _about(job, one.dictionary, text, config) | {"left_out": left_out}
            indices.append(write_index(out, about, latents, config))
            shutil.rmtree(out / "firings", ignore_errors=True)
    return indices


# -------------------------------------------------------------------- what is made of it
class OfChunks(NamedTuple):
    """What the firings of one dictionary say, and which of them are to be ablated."""

    columns: dict[str, Any]
    histogram: np.ndarray
    positions: np.ndarray
    samples: Samples
    tokens: list[np.ndarray]
    """Token ids that are in the examples."""


def _of_chunks(one: Found, text: Text, model: "HookedTransformer", config: FeaturesConfig, out: Path) -> OfChunks:
    occurrences = text.occurrences(model.cfg.d_vocab)
    bins, edges = position_bins(text)
    grid = text.grid(config.before + 1 + config.after)
    columns: dict[str, list[Any]] = {}
    histograms, positions, samples = [], [], []
    examples = ExamplesWriter(out)
    for chunk in one.firings.chunks(GROUP):
        seen = Seen(chunk, grid)
        active, draw = activity(seen, text), draws(seen, text, config.seed)
        examples.write(examples_table(seen, text, active, draw, config))
        for name, values in (active | tokens_of(seen, text, occurrences, config)).items():
            columns.setdefault(name, []).extend(values)
        histograms.append(counted(chunk, parts(chunk, limits(active), config.bins), config.bins))
        positions.append(counted(chunk, bins[seen.place[1]], len(edges) - 1))
        samples.append(_samples(seen, draw, config))
    examples.close()
    joined = Samples(*(np.concatenate(parts) for parts in zip(*samples, strict=True)))
    order = np.argsort(joined.token, kind="stable")
    arrays = {name: np.array(values) if name not in _LISTS else values for name, values in columns.items()}
    return OfChunks(
        arrays,
        np.concatenate(histograms),
        np.concatenate(positions),
        Samples(*(column[order] for column in joined)),
        examples.tokens,
    )


_LISTS = ("tokens", "token_fired", "token_share", "token_mean")


def _samples(seen: Seen, draw: np.ndarray, config: FeaturesConfig) -> Samples:
    """Firings to be ablated: those that are not drawn for examples first, so that the two are of different tokens."""
    chunk = seen.chunk
    place = np.flatnonzero(seen.place[1] < seen.grid.context_size - 1)
    latent = chunk.latent[place]
    chosen = place[lowest(latent, 1 - draw[place], config.effect_samples, chunk.n_latents)]
    return Samples(chunk.first + chunk.latent[chosen], chunk.token[chosen], chunk.value[chosen])


def _effects(
    model: "HookedTransformer", of_all: list[tuple[Dictionary, Samples]], text: Text, config: FeaturesConfig, case: bool
) -> list[Any]:
    """Columns of each dictionary, or why it has none; `case`: whether the model is of a case."""
    why = [_no_effect(model, dictionary, config, case) for dictionary, _ in of_all]
    tasks = [Task(*one) for one, reason in zip(of_all, why, strict=True) if not reason]
    measured = iter(loss_increases(model, tasks, text, config.batch_rows))
    found: list[Any] = []
    for (dictionary, samples), reason in zip(of_all, why, strict=True):
        found.append(reason or _summed(samples.latent, next(measured), dictionary.d_sae))
    return found


def _no_effect(model: "HookedTransformer", dictionary: Dictionary, config: FeaturesConfig, case: bool) -> str:
    """Why latents cannot be ablated; '' where they can."""
    if not config.effect_samples:
        return "features.effect_samples is 0"
    if case:
        return NO_TOKENS
    if not can_stand_alone(model):
        return "the model has attention that is not plain causal attention"
    try:
        one = torch.ones(1, device=model.cfg.device)
        dictionary.writes(one.long() - 1, one)
    except DictionaryError as error:
        return str(error)
    return ""


def _summed(latent: np.ndarray, increase: np.ndarray, n: int) -> dict[str, np.ndarray]:
    count = np.bincount(latent, minlength=n)
    with np.errstate(invalid="ignore", divide="ignore"):
        mean = np.bincount(latent, increase, n) / count
        variance = np.bincount(latent, (increase - mean[latent]) ** 2, n) / np.where(count > 1, count - 1, np.nan)
        error = np.sqrt(variance / count)
    return {"effect": mean, "effect_error": error, "effect_tokens": count}


@torch.no_grad()
def _of_weights(
    model: "HookedTransformer", one: Found, job: Job, config: FeaturesConfig, left_out: dict[str, str]
) -> dict[str, Any]:
    """Columns that the weights say, and those that other artifacts have."""
    dictionary = one.dictionary
    columns: dict[str, Any] = {"decoder_norm": dictionary.W_dec.norm(dim=1).cpu().numpy()}
    case = bool(job.inputs("groundtruth"))
    weights = None if case else logit_weights(model, dictionary, config.logits)
    if weights is None:
        nothing = f"nothing leads from {dictionary.spec.hook_name_out} to the logits directly"
        left_out["raised"] = NO_TOKENS if case else nothing if config.logits else "features.logits is 0"
    else:
        columns |= {name: list(values) for name, values in weights._asdict().items()}
    for name, measure, near in (
        ("decoder", "cosine", by_decoder(dictionary, config.neighbours)),
        ("firing", "jaccard", one.together.nearest(config.neighbours)),
    ):
        columns |= {f"near_{name}": near.latent, f"near_{name}_{measure}": near.value}
    for folder in job.inputs("jacobian", "summary.json", "global.zarr"):
        _, near = by_jacobian(folder, dictionary, config.neighbours)
        columns |= {"near_jacobian": near.latent, "near_jacobian_mean": near.value}
    for folder in job.inputs("recover"):
        labels = pd.read_parquet(folder / "labels.parquet").set_index("latent").reindex(range(dictionary.d_sae))
        label = labels["label"].astype(object)
        columns |= {"label": label.where(label.notna(), None).tolist(), "label_f1": labels["f1"].to_numpy()}
    share = head_shares(model, dictionary)
    if share is not None:
        columns["head"] = np.where(share.sum(1) > 0, share.argmax(1), np.nan)
    elif dictionary.spec.hook_head_index is not None:
        columns["head"] = np.full(dictionary.d_sae, dictionary.spec.hook_head_index)
    return columns


def head_shares(model: "HookedTransformer", dictionary: Dictionary) -> np.ndarray | None:
    """(n, H): of the norms of the parts of each decoder row that are of a head, the share of each; 0 of a row of zeros.
    None where the dictionary is not of all heads of a layer."""
    spec = dictionary.spec
    if not spec.hook_name_out.endswith("attn.hook_z") or spec.hook_head_index is not None:
        return None
    norms = dictionary.W_dec.unflatten(1, (model.cfg.n_heads, -1)).norm(dim=2)
    return (norms / norms.sum(1, keepdim=True).clamp(min=1e-30)).cpu().numpy()


def _profiles(
    table: OfChunks, one: Found, model: "HookedTransformer", text: Text, config: FeaturesConfig
) -> xr.Dataset:
    _, edges = position_bins(text)
    counts = {"units": "tokens"}
    arrays: dict[str, Any] = {
        "histogram": (("latent", "bin"), table.histogram, counts | {
            "description": "firings in equal bins from min(0, smallest) to max(0, largest activation of the latent)"}),
        "positions": (("latent", "position_bin"), table.positions, counts | {
            "description": "firings at positions in a row, from position_begin to that of the next bin"}),
        "position_begin": (("position_bin",), edges[:-1], counts),
    }  # fmt: skip
    share = head_shares(model, one.dictionary)
    if share is not None:
        arrays["head_share"] = (("latent", "head"), share, {"units": "1", "description": "of the decoder row's norms"})
    return xr.Dataset(arrays, attrs={"n_tokens": text.n_tokens})


def _about(job: Job, dictionary: Dictionary, text: Text, config: FeaturesConfig) -> dict[str, Any]:
    spec = dictionary.spec
    names = ("kind", "activation", "hook_name", "hook_name_out", "hook_head_index", "d_in", "d_out")
    part = job.config.get("part")
    key = (job.inputs("train") + job.inputs("foreign"))[0].name
    amount_name, amount = spec.amount
    return {
        "dictionary_key": dictionary_key(key, part),
        **{name: getattr(spec, name) for name in names},
        "amount_name": amount_name,
        "amount": amount if amount is None or math.isfinite(amount) else None,
        "tokens_key": job.input("tokens").name,
        "split": config.split,
        "context_size": text.context_size,
        "n_tokens": text.n_tokens,
        "n_rows": len(text.tokens),
        "n_documents": len(np.unique(text.document[:, text.first :])),
        "jacobian_key": next((folder.name for folder in job.inputs("jacobian", "summary.json")), None),
    }
