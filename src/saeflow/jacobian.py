"""The study of one TopK pair around an MLP: how large are the entries of its Jacobians on held-out tokens?

The table of notebook 000, for any model: over the k x k block of a token's active latents, the histogram of |J| and
how many entries exceed each threshold, as means over tokens. Position 0 is left out, as in the paper's analysis.

Convention: the Jacobian is taken at the true input x (the paper, arXiv 2502.18147), and the output SAE's active latents
are those of y = f(x); notebook 000 takes both at the input SAE's reconstruction. f begins at `ln2.hook_normalized`,
before the norm's gain and bias (see `saeflow.mlp`). Latents that TopK kept at 0 have derivative 0; they count among the
k x k.
"""

import json
import logging
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from torch import Tensor

from saeflow.attention import fused_attention
from saeflow.config import ConfigError, JacobianConfig
from saeflow.dictionaries import Dictionary, load_dictionary
from saeflow.fitting import FitError, check_fit, model_config
from saeflow.job import Job, progress
from saeflow.kernels.jacobian import Products, jacobian_chunks, jacobian_of_any, make_products, mask_inactive
from saeflow.loading import load_model
from saeflow.mlp import Block, ModuleBlock, read_block
from saeflow.models import block_of_hooks, read_geometry
from saeflow.splicing import read_hooks
from saeflow.tokens import TokenStore, open_tokens

if TYPE_CHECKING:
    from transformer_lens import HookedTransformer

log = logging.getLogger("saeflow")
ROWS = 16  # that go through the model at once


class Pair(NamedTuple):
    """Two TopK SAEs around a block."""

    input: Dictionary
    output: Dictionary
    block: Block | ModuleBlock
    products: Products | None
    """Of their weights, the same for every token; None for a block without closed form."""


def make_pair(block: Block | ModuleBlock, input: Dictionary, output: Dictionary) -> Pair:
    if isinstance(block, ModuleBlock):
        return Pair(input, output, block, None)
    return Pair(input, output, block, make_products(input.W_dec, output.W_enc.T.contiguous(), block.weights()))


@torch.no_grad()
def pair_jacobians(pair: Pair, x: Tensor, y: Tensor) -> Iterator[Tensor]:
    """Yields the blocks J (tokens, k_out, k_in) of `x` (N, d) with y = f(x) (N, d), some tokens at a time."""
    values_in, A = pair.input.top_latents(x)
    values_out, B = pair.output.top_latents(y)
    if pair.products is None or isinstance(pair.block, ModuleBlock):
        J = jacobian_of_any(pair.block, x, pair.input.W_dec[A], pair.output.W_enc.T[B])
        yield mask_inactive(J, values_in, values_out)
        return
    for some, J in jacobian_chunks(pair.products, pair.block.around(x), A, B):
        yield mask_inactive(J, values_in[some], values_out[some])


@dataclass
class Tally:
    """Running counts and sums of |J| over tokens."""

    points: np.ndarray
    """(T,), ascending: the thresholds at which entries are counted."""
    n_tokens: int = 0
    n_entries: int = 0
    sums: dict[str, float] = field(default_factory=dict)
    between: np.ndarray = field(init=False)
    """(T + 1,): entries in (points[i - 1], points[i]]."""

    def __post_init__(self) -> None:
        self.between = np.zeros(len(self.points) + 1, dtype=np.int64)

    def add(self, J: Tensor) -> None:
        """J (N, k_out, k_in)."""
        size = J.abs()
        points = torch.from_numpy(self.points).to(J)
        places = torch.bucketize(size.flatten(), points)
        self.between += torch.bincount(places, minlength=len(points) + 1).cpu().numpy()
        self.n_tokens += len(J)
        self.n_entries += J.numel()
        for name, value in _token_sums(size.double()).items():
            self.sums[name] = self.sums.get(name, 0.0) + value.sum().item()

    def above(self) -> np.ndarray:
        """(T,): entries strictly above each point."""
        return self.between[::-1].cumsum()[::-1][1:]


def _token_sums(size: Tensor) -> dict[str, Tensor]:
    """Of |J| (N, k_out, k_in), float64: quantities (N,) or (N, k_out) that are summed over tokens."""
    row_sum, row_squares = size.sum(2), size.square().sum(2)
    squares = row_squares.sum(1)
    nonzero = squares > 0
    safe = squares.where(nonzero, torch.ones_like(squares))
    live = row_squares > 0
    return {
        "absolute": row_sum.sum(1),
        "squares": squares,
        "tokens": nonzero.double(),  # of which the scale-free measures are means
        "l1_over_l2": (row_sum.sum(1) / safe.sqrt()).where(nonzero, 0.0),
        "kurtosis": (size.pow(4).sum((1, 2)) * size[0].numel() / safe.square()).where(nonzero, 0.0),
        "outputs": live.double(),
        "effective_inputs": (row_sum.square() / row_squares.where(live, torch.ones_like(row_squares))).where(live, 0.0),
    }


def study(model: "HookedTransformer", pair: Pair, rows: TokenStore | np.ndarray, config: JacobianConfig) -> Tally:
    """Counts |J| over the first `config.n_tokens` tokens of `rows` (sequence, position) that are not at position 0."""
    tally = Tally(_points(config))
    hooks = [pair.input.spec.hook_name, pair.output.spec.hook_name]
    for start in progress(range(0, len(rows), ROWS), "Jacobians"):
        tokens = torch.from_numpy(rows[start : start + ROWS].astype(np.int64)).to(model.cfg.device)
        with fused_attention(model):
            x, y = (value[:, 1:].flatten(0, 1) for value in read_hooks(model, tokens, hooks))
        left = config.n_tokens - tally.n_tokens
        for J in pair_jacobians(pair, x[:left], y[:left]):
            tally.add(J)
        if tally.n_tokens == config.n_tokens:
            break
    return tally


# -------------------------------------------------------------------- tables
def _edges(config: JacobianConfig) -> np.ndarray:
    return np.linspace(0, config.max_value, config.bins + 1)


def _points(config: JacobianConfig) -> np.ndarray:
    """Bin edges and thresholds, each once, as float32: the precision that |J| has."""
    return np.unique(np.concatenate([_edges(config), config.thresholds]).astype(np.float32))


def _above_per_token(tally: Tally, values: np.ndarray) -> np.ndarray:
    """Mean number of entries of a token's block strictly above each of `values`, all among the tally's points."""
    return tally.above()[np.searchsorted(tally.points, values.astype(np.float32))] / tally.n_tokens


def histogram_table(tally: Tally, config: JacobianConfig) -> pa.Table:
    """`count_per_token` in each bin (left, right], zeros in the first; the summary has what is beyond the last."""
    edges = _edges(config)
    above = _above_per_token(tally, edges)
    counts = above[:-1] - above[1:]
    counts[0] = tally.n_entries / tally.n_tokens - above[1]
    return pa.table(
        {"bin_left": edges[:-1], "bin_right": edges[1:], "count_per_token": counts, "above_per_token": above[:-1]}
    )


def survival_table(tally: Tally, config: JacobianConfig) -> pa.Table:
    """`values_above_per_token` and their `fraction` of all entries at every bin edge above 0 and every threshold."""
    values = {
        np.float32(v): v for v in [*_edges(config)[1:], *config.thresholds]
    }  # a threshold wins over an equal edge
    thresholds = np.array([values[point] for point in sorted(values)])
    above = _above_per_token(tally, thresholds)
    fraction = above * tally.n_tokens / tally.n_entries
    return pa.table({"threshold": thresholds, "values_above_per_token": above, "fraction": fraction})


def summarise(tally: Tally, config: JacobianConfig) -> dict[str, Any]:
    """Sizes, and measures of sparsity that do not change when J is scaled: means over tokens whose block is not 0."""
    sums, n = tally.sums, tally.n_entries
    out: dict[str, Any] = {
        "n_tokens": tally.n_tokens,
        "mean_absolute": sums["absolute"] / n,
        "rms": (sums["squares"] / n) ** 0.5,
        "nonzero_fraction": float(tally.n_entries - tally.between[0]) / n,
        "l1_over_l2": sums["l1_over_l2"] / sums["tokens"] if sums["tokens"] else None,
        "kurtosis": sums["kurtosis"] / sums["tokens"] if sums["tokens"] else None,
        "effective_inputs": sums["effective_inputs"] / sums["outputs"] if sums["outputs"] else None,
        "overflow_per_token": float(_above_per_token(tally, _edges(config)[-1:])[0]),
    }
    thresholds = np.array(config.thresholds)
    above = _above_per_token(tally, thresholds) * tally.n_tokens / n
    return out | {f"fraction_above_{t:g}": float(a) for t, a in zip(thresholds, above, strict=True)}


# -------------------------------------------------------------------- job
def jacobian_job(job: Job) -> dict[str, Any]:
    """Studies the pair of a job and writes its folder.

    Raises `FitError` where the two dictionaries are no TopK pair around one MLP of the model, and `ConfigError` where
    there are fewer held-out tokens than wanted.
    """
    config = JacobianConfig(**job.config["jacobian"] | {"thresholds": tuple(job.config["jacobian"]["thresholds"])})
    folder = job.source("model")
    geometry = read_geometry(folder)
    folders = job.dictionaries()
    input, output = (load_dictionary(path, job.device) for path in folders)
    for dictionary, path in zip((input, output), folders, strict=True):
        check_fit(dictionary, path, folder, job.config["model"], geometry)
    _check_pair(input, output, folders, geometry.parallel)
    rows = _open_rows(job.input("tokens"), config)

    model = load_model(folder, model_config(folder, job.config["model"]), job.device)
    pair = make_pair(read_block(model, input.spec.hook_name, output.spec.hook_name), input, output)
    tally = study(model, pair, rows, config)
    summary = {
        "train_key_in": job.inputs("train")[0].name,
        "train_key_out": job.inputs("train")[-1].name,
        "hook_name": input.spec.hook_name,
        "hook_name_out": output.spec.hook_name,
        "k": input.spec.k,
        "k_out": output.spec.k,
        "d_sae": input.d_sae,
        "seed": input.spec.seed,
        "convention": "at x, without position 0; f from ln2.hook_normalized, gain and bias inside f",
    } | summarise(tally, config)
    survival = survival_table(tally, config)
    for row in survival.slice(0, 19).to_pylist():
        log.info("There are %.1f values above %.3f.", row["values_above_per_token"], np.float32(row["threshold"]))
    with job.writing() as out:
        pq.write_table(histogram_table(tally, config), out / "histogram.parquet")
        pq.write_table(survival, out / "survival.parquet")
        (out / "summary.json").write_text(json.dumps(summary, indent=1, allow_nan=False) + "\n")
    return summary


def _check_pair(input: Dictionary, output: Dictionary, folders: list[Path], parallel: bool) -> None:
    for dictionary, folder in zip((input, output), folders, strict=True):
        if dictionary.spec.kind != "sae" or dictionary.spec.activation != "topk":
            raise FitError(
                f"a Jacobian needs two TopK SAEs around one MLP, but {folder} is a {dictionary.spec.activation} "
                f"{dictionary.spec.kind} at {dictionary.spec.hook_name}; use dictionary=pair with site=mlp"
            )
    try:
        block_of_hooks(input.spec.hook_name, output.spec.hook_name, parallel)
    except ConfigError as error:
        raise FitError(f"{folders[0]} and {folders[1]}: {error}") from error


def _open_rows(folder: Path, config: JacobianConfig) -> TokenStore:
    tokens = open_tokens(folder)
    usable = tokens.n_rows * (tokens.context_size - 1)
    if usable < config.n_tokens:
        raise ConfigError(
            f"jacobian.n_tokens={config.n_tokens}, but {folder} holds {usable} tokens that are not at position 0; "
            "lower it, or raise tokens.held_out_tokens"
        )
    return tokens
