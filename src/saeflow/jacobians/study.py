"""The Jacobian stage: of a pair of dictionaries around an MLP, or of a transcoder, on held-out tokens.

`maps` says which map and which entries, `one_pass` runs it over tokens, `statistics` counts, `sums` adds up over
tokens, `examples` and `pages` show the largest pairs, `linearity` asks what an entry of J tells. The convention of a
study is in its summary: the Jacobian is taken at the true input x (the paper, arXiv 2502.18147) or at the input
dictionary's reconstruction (notebook 000), by `jacobian.at`; f begins at the input dictionary's hook, after the norm's
division or before the norm, which `jacobian.norm=ignored` leaves out of f as that notebook's `ignore_ln` does.
"""

import functools
import json
import logging
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from saeflow.config import ConfigError, JacobianConfig, build
from saeflow.dictionaries import Dictionary
from saeflow.dictionaries.fitting import FitError, open_dictionary
from saeflow.dictionaries.series import control
from saeflow.evaluation.sums import write_tables
from saeflow.features.text import Grid
from saeflow.jacobians import examples, statistics
from saeflow.jacobians.examples import Read, TopWindows, Window
from saeflow.jacobians.linearity import Samples, choose_tokens, linearity_table, summarise_linearity
from saeflow.jacobians.maps import JacobianMap, Pair, TranscoderMap
from saeflow.jacobians.one_pass import Tokens, collect_activity, iterate_jacobians
from saeflow.jacobians.pages import latex, page
from saeflow.jacobians.statistics import Tally
from saeflow.jacobians.sums import Pairs, PairSums, TokenBlocks, exceedance_table, outputs_table, write_pairs
from saeflow.jobs.job import Job
from saeflow.models.blocks import input_gain, read_block, read_span, without_norm
from saeflow.models.folder import Geometry, Span, block_of_hooks, read_geometry
from saeflow.models.opening import open_model
from saeflow.models.source import reading_model
from saeflow.text.tokenizer import open_tokenizer
from saeflow.text.tokens import open_tokens

if TYPE_CHECKING:
    from tokenizers import Tokenizer
    from transformer_lens import HookedTransformer

log = logging.getLogger("saeflow")


def jacobian_job(job: Job) -> dict[str, Any]:
    """Studies the pair or the transcoder of a job and writes its folder.

    Raises `FitError` where there is neither, and `ConfigError` where there are fewer held-out tokens than wanted.
    """
    config = build(JacobianConfig, job.config["jacobian"])
    folders = job.dictionaries()
    dictionaries = [open_dictionary(path, job) for path in folders]
    with reading_model(job) as folder:
        geometry, tokenizer = read_geometry(folder), open_tokenizer(folder)
    span = _check_around_mlp(dictionaries, folders, geometry)
    tokens = _row_of_text(job.config["row"], config) if config.of_text else _open_tokens(job.input("tokens"), config)

    model = open_model(job)
    jacobian_map = open_map(model, dictionaries, config)
    grid = tokens.grid(config.window)
    with job.writing() as out:
        tally, pairs, tops, samples = _run_pass(out, model, jacobian_map, tokens, grid, config)
        summary = _identity(job, dictionaries, span, config) | _write_statistics(out, tally, pairs, config)
        if isinstance(jacobian_map, Pair):
            linearity = linearity_table(jacobian_map, samples)
            summary |= summarise_linearity(linearity, config.resamples)
            tables = {"pairs": examples.top_pairs_table(pairs, config)}
            tables["top_inputs"] = examples.top_inputs_table(pairs, config)
            wanted = examples.select_examples(tables.values(), *tops)
            for one in tops:
                one.remove()
            activity = collect_activity(model, jacobian_map, tokens, grid, wanted)
            read = _reader(tokens, grid, tokenizer)
            tables["contexts"] = examples.contexts_table(activity, grid, read)
            tables["pair_contexts"] = examples.pair_contexts_table(activity, grid, config.contexts, read)
            write_tables(out, **tables, linearity=linearity)
            frames = {name: table.to_pandas() for name, table in tables.items()}
            (out / "pairs.html").write_text(page(summary, **frames), encoding="utf-8")
            (out / "pairs.tex").write_text(latex(summary, frames["pairs"], frames["pair_contexts"]), encoding="utf-8")
        (out / "summary.json").write_text(json.dumps(summary, indent=1, allow_nan=False) + "\n")
        lines = statistics.notebook_lines(tally)
        for line in lines:
            log.info(line)
        (out / "table.txt").write_text("\n".join([_title(summary), *lines]) + "\n")
    return summary


def _title(summary: dict[str, Any]) -> str:
    of = "transcoder"
    if summary["kind"] == "pair":  # a transcoder has no coefficient
        of = f"k = {summary['k']}, Jacobian coefficient {summary['jacobian_coefficient']:g}, {control(summary)}"
    where = f"{summary['hook_name']} to {summary['hook_name_out']}"
    return f"{where}, {of}, {summary['n_tokens']} tokens: {summary['convention']}"


def _run_pass(
    out: Path, model: "HookedTransformer", jacobian_map: JacobianMap, tokens: Tokens, grid: Grid, config: JacobianConfig
) -> tuple[Tally, Pairs, list[TopWindows], Samples]:
    """The pass itself, which also writes the first tokens' Jacobians.

    Gives what was counted and summed, the windows of outputs and of inputs, and the tokens to look at functions of.
    """
    tally = Tally(config, tokens.n_documents)
    sums = PairSums(jacobian_map.n_out, jacobian_map.n_in, out, jacobian_map.shared)
    sizes = {"outputs": jacobian_map.n_out, "inputs": jacobian_map.n_in}
    tops = [TopWindows(n, grid, config.contexts, out / f"{side}.firings") for side, n in sizes.items()]
    row, position = grid.row_and_position(np.arange(min(config.stored_tokens, tokens.n_tokens)))
    stored = TokenBlocks(out / "tokens.zarr", tokens.rows[row, position], tokens.sequence[row], position)
    chosen = choose_tokens(tokens.n_tokens, config.linearity_samples)
    kept: list[list[Tensor]] = []
    for chunk in iterate_jacobians(model, jacobian_map, tokens):
        here = slice(chunk.first, chunk.first + chunk.n_tokens)
        lengths = None if jacobian_map.lengths is None else jacobian_map.lengths[chunk.blocks.inputs]
        tally.add(chunk.blocks.J, tokens.document[here], chunk.blocks.n_entries, lengths)
        sums.add(chunk.blocks)
        stored.add(chunk.first, chunk.blocks)
        if not jacobian_map.shared:  # the model's own dimensions are active everywhere, and have no examples
            tops[0].add(chunk.blocks.outputs, chunk.blocks.values_out)
            tops[1].add(chunk.blocks.inputs, chunk.blocks.values_in)
        sampled = chosen[(chosen >= here.start) & (chosen < here.stop)] - here.start
        kept.append([v[sampled] for v in chunk.values])
    stored.close()
    values = [torch.cat(parts) for parts in zip(*kept, strict=True)]
    return tally, sums.pairs(), tops, Samples(chosen, tokens.document[chosen], values[0], values[-1])


def _write_statistics(out: Path, tally: Tally, pairs: Pairs, config: JacobianConfig) -> dict[str, Any]:
    """Tables of what was counted and summed; their numbers for the summary."""
    outputs = outputs_table(pairs)
    write_tables(
        out,
        histogram=statistics.histogram_table(tally),
        survival=statistics.survival_table(tally),
        log_histogram=statistics.log_histogram_table(tally),
        thresholds=statistics.thresholds_table(tally),
        global_exceedance=exceedance_table(pairs, config),
        outputs=outputs,
    )
    write_pairs(out / "global.zarr", pairs)
    needed = outputs["inputs_for_90_percent"].to_numpy()
    return statistics.summarise(tally) | {
        "pairs_ever_active": len(pairs.count),
        "pairs_ever_active_fraction": len(pairs.count) / (len(pairs.active_output) * len(pairs.active_input)),
        "outputs_ever_active": len(needed),
        "inputs_for_90_percent_median": float(np.median(needed)) if len(needed) else None,
    }


def _reader(tokens: Tokens, grid: Grid, tokenizer: "Tokenizer") -> Read:
    @functools.cache
    def text(token: int) -> str:
        return str(tokenizer.decode([token], skip_special_tokens=False))

    def read(window: int) -> Window:
        row, start, end = grid.span(window)
        ids = tokens.rows[row, start:end].tolist()
        return Window(int(tokens.sequence[row]), start, ids, [text(token) for token in ids])

    return functools.cache(read)


def _check_around_mlp(dictionaries: list[Dictionary], folders: list[Path], geometry: Geometry) -> Span:
    """`block_of_hooks` of the dictionaries. Raises `FitError` where they are around no MLP."""
    kinds = [d.spec.kind for d in dictionaries]
    if kinds not in (["sae", "sae"], ["transcoder"]) or any(d.spec.activation == "saelens" for d in dictionaries):
        described = " and ".join(
            f"{path} is a {d.spec.activation} {d.spec.kind} at {d.spec.hook_name}"
            for d, path in zip(dictionaries, folders, strict=True)
        )
        raise FitError(
            f"a Jacobian needs two TopK, ReLU or JumpReLU SAEs around one MLP, or one transcoder, but {described}; use "
            "dictionary=pair or dictionary=transcoder with site=mlp"
        )
    try:
        hooks = dictionaries[0].spec.hook_name, dictionaries[-1].spec.hook_name_out
        return block_of_hooks(*hooks, geometry.parallel, geometry.norms)
    except ConfigError as error:
        raise FitError(f"{' and '.join(map(str, folders))}: {error}") from error


def open_map(model: "HookedTransformer", dictionaries: list[Dictionary], config: JacobianConfig) -> JacobianMap:
    """The map of a pair of SAEs, or of a transcoder, on a model."""
    if len(dictionaries) == 1:
        return TranscoderMap(dictionaries[0])
    input, output = dictionaries
    hooks = input.spec.hook_name, output.spec.hook_name
    block = read_block(model, *hooks)
    gain = input_gain(model, read_span(model, *hooks))
    if config.norm == "ignored":
        block = without_norm(block, "jacobian.norm")
    return Pair(block, input, output, config.at == "reconstruction", own_output=config.norm == "ignored", gain=gain)


def _identity(job: Job, dictionaries: list[Dictionary], span: Span, config: JacobianConfig) -> dict[str, Any]:
    """What the study is of, and its convention."""
    first, last = dictionaries[0].spec, dictionaries[-1].spec
    made = job.inputs("train") + job.inputs("foreign")
    where = "its reconstruction by the input dictionary" if config.at == "reconstruction" else "the true input"
    which = (
        f"tokens {' to '.join(map(str, config.text_tokens))} of a text" if config.text_tokens else "without position 0"
    )
    if len(dictionaries) == 2:
        entries = "k x k entries of a token's active latents, latents at 0 included"
        if first.activation != "topk" or last.activation != "topk":
            entries = "entries of a token's active latents"
        begins = {
            "norm": "before the norm, which is inside f",
            "gain": "after the norm's division, gain and bias inside f",
            "mlp": "after the norm's gain and bias",
        }[span.begins]
        if config.norm == "ignored":
            begins = "before the norm, which is left out of f but for its gain and bias"
        convention = f"at {where}, {which}; {entries}; f begins {begins}"
    else:
        convention = f"of the transcoder's output by its input, {which}; all d_out x d_in entries"
    return {
        "train_key_in": made[0].name,
        "train_key_out": made[-1].name,
        "kind": "pair" if len(dictionaries) == 2 else "transcoder",
        "activation": first.activation,
        "hook_name": first.hook_name,
        "hook_name_out": last.hook_name_out,
        "layer": span.layer,
        "k": first.k,
        "k_out": last.k,
        "d_sae": first.d_sae,
        "seed": first.seed,
        "randomise": job.config["model"].get("randomise", "none"),
        "randomise_seed": job.config["model"].get("randomise_seed"),
        "jacobian_coefficient": first.options.get("jacobian_coefficient", 0.0) if len(dictionaries) == 2 else None,
        "jacobian_penalty": first.options.get("jacobian_penalty", "l1") if len(dictionaries) == 2 else None,
        "at": config.at,
        "norm": config.norm if span.norm else "outside",
        "convention": convention,
        **({"text": config.text} if config.of_text else {}),
    }


def _row_of_text(row: list[int], config: JacobianConfig) -> Tokens:
    """One document, so that nothing has an interval."""
    first = config.text_tokens[0] if config.text_tokens else 1
    return Tokens(np.array([row], np.int32), np.zeros(1, np.int64), np.zeros(len(row) - first, np.int64), first)


def _open_tokens(folder: Path, config: JacobianConfig) -> Tokens:
    store = open_tokens(folder)
    per_row = store.context_size - 1
    if store.n_rows * per_row < config.n_tokens:
        raise ConfigError(
            f"jacobian.n_tokens={config.n_tokens}, but {folder} holds {store.n_rows * per_row} tokens that are not at "
            "position 0; lower it, or raise tokens.held_out_tokens"
        )
    sequence, rows = store.spread_rows(-(-config.n_tokens // per_row))
    document = rows.document[:, 1:].flatten()[: config.n_tokens]
    return Tokens(rows.tokens, sequence, np.unique(document, return_inverse=True)[1])
