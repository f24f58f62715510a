"""Training of one dictionary: batches in, a folder with the dictionary and its metrics out.

`train` does a job of the workflow; `fit` is the loop, which takes any source of batches. A step is one of the two
functions in `saeflow.kernels`; this file knows schedules, constraints, metrics and units, not mathematics.

Units. With `normalize_activations=expected_average_only_in` training sees the input times sqrt(d_in) over its mean
norm, as in SAELens, and a transcoder's target times sqrt(d_out) over *its* mean norm (SAELens trains no transcoders):
so an L1 coefficient means the same at every site. `loss`, `squared_error` and `sparsity` in the metrics are in these
units; the saved weights take and give raw activations.

Schedules, as in SAELens: the learning rate rises linearly over `lr_warm_up_steps` and falls linearly to 0 over the last
`lr_decay_steps`; the L1 coefficient rises linearly from 0 over `l1_warm_up_steps`. Gradients are not clipped: SAELens
clips at norm 1, which the sum over d_in exceeds at nearly every step, and Adam does not see a constant factor.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from saeflow.config import ConfigError, DictionaryConfig, TrainingConfig, build
from saeflow.dictionaries.initial import initial_weights
from saeflow.dictionaries.io import save_dictionary
from saeflow.dictionaries.sae import Dictionary
from saeflow.dictionaries.sae import build as build_dictionary
from saeflow.dictionaries.spec import DictionaryError, Origin, Spec
from saeflow.job import Job, progress
from saeflow.kernels.adam import Adam
from saeflow.kernels.relu_step import relu_step
from saeflow.kernels.step import Step, Weights, normalise_rows_, remove_parallel_, token_weights
from saeflow.kernels.topk_step import topk_step
from saeflow.loggers import open_loggers
from saeflow.training_metrics import TrainingError, TrainingMetrics, write_metrics


class Batches(Protocol):
    """Where batches come from: `saeflow.reader.BatchReader`, or anything that does this."""

    def iterate(self, start: int, n_steps: int, /) -> Iterator[tuple[Tensor, ...]]:
        """Batches `start` to `start + n_steps - 1`: (x,) for an SAE, (x, y) for a transcoder; x (N, d), y (N, p)."""
        ...


@dataclass(frozen=True)
class Side:
    """What training needs to know of the activations at one hook."""

    mean: Tensor
    """(d,)"""
    mean_norm: float

    def scale(self, normalize_activations: str | None) -> float:
        return math.sqrt(self.mean.numel()) / self.mean_norm if normalize_activations != "none" else 1.0


def train(job: Job) -> str:
    """Trains the dictionary of a job from its columns of activations and writes its folder."""
    from saeflow.reader import BatchReader
    from saeflow.store import open_column

    columns = [open_column(folder) for folder in job.inputs("activations")]
    training = build(TrainingConfig, job.config["training"], "training.")
    spec = spec_of_job(job, columns)
    sides = [Side(torch.as_tensor(c.statistics.mean), float(c.statistics.mean_norm)) for c in columns]
    batches = BatchReader(columns, training.batch_size, job.config["seed"])
    results = Path(job.plan.results)
    loggers = open_loggers(job.instance.sources.get("loggers", "").split(), job.instance.key, job.config, results)

    def log_row(row: Mapping[str, float]) -> None:
        for logger in loggers:
            logger.log(row)

    try:
        with job.writing() as folder:
            dictionary, rows = fit(spec, training, batches, sides[0], sides[-1], job.device, log_row)
            save_dictionary(dictionary, folder)
            write_metrics(rows, folder / "metrics.parquet")
    finally:
        for logger in loggers:
            logger.close()
    last = rows[-1]
    return (
        f"{job.instance.key}: {last['tokens']:,} tokens, L0 {last['l0']:.1f}, explained variance "
        f"{last['explained_variance']:.3f}, {last['dead']} of {spec.d_sae} latents dead: {job.path}"
    )


def spec_of_job(job: Job, columns: list[Any]) -> Spec:
    """What the job is to train, checked against the columns that it got."""
    config = build(DictionaryConfig, job.config["dictionary"], "dictionary.")
    wanted = [h for h in (job.config["hook_name"], job.config["hook_name_out"]) if h]
    given = [c.hook_name for c in columns]
    if wanted != given or len(wanted) != (2 if config.kind == "transcoder" else 1):
        raise ConfigError(f"a dictionary of kind {config.kind} at {wanted} was given the activations of {given}")
    if len({c.n_tokens for c in columns}) > 1:
        raise ConfigError(f"the columns of {given} hold {[c.n_tokens for c in columns]} tokens; they must be the same")
    store = job.instance.needs["activations"][0]
    activations = job.plan.instance("activations", store)
    tokens = job.plan.instance("tokens", activations.needs["tokens"][0])
    model = activations.config["model"]
    return make_spec(
        config,
        columns[0].d,
        columns[-1].d,
        wanted[0],
        wanted[-1],
        job.config["seed"],
        Origin(
            model_name=store.split("/")[0].rsplit("-", 2)[0],  # a store is called <model>-<dtype>-<hash>
            model_weights=model["weights"],
            fold_ln=model["fold_ln"],
            center_writing_weights=model["center_writing_weights"],
            center_unembed=model["center_unembed"],
            context_size=activations.config["tokens"]["context_size"],
            prepend_bos=tokens.config["tokens"]["prepend_bos"],
        ),
    )


def make_spec(
    config: DictionaryConfig, d_in: int, d_out: int, hook_name: str, hook_name_out: str, seed: int, origin: Origin
) -> Spec:
    if config.kind == "pair":
        raise DictionaryError("a pair is trained as two SAEs, one a hook")
    return Spec(
        kind=config.kind,
        activation=config.activation,
        d_in=d_in,
        d_out=d_out,
        d_sae=config.d_sae or d_in * (config.expansion or 0),
        hook_name=hook_name,
        hook_name_out=hook_name_out,
        k=config.k,
        apply_b_dec_to_input=config.kind == "sae",  # SAELens's default for standard and TopK SAEs
        l1_coefficient=config.l1_coefficient,
        squared_error=config.squared_error,
        sparsity=config.sparsity,
        normalize_activations=config.normalize_activations,
        seed=seed,
        origin=origin,
    )


def fit(
    spec: Spec,
    training: TrainingConfig,
    batches: Batches,
    side_in: Side,
    side_out: Side,
    device: str = "cpu",
    on_row: Callable[[Mapping[str, float]], None] = lambda row: None,
) -> tuple[Dictionary, list[dict[str, float]]]:
    """Trains a dictionary; returns it, for raw activations, and one row of metrics every `log_every` steps.

    `side_out` is the target's side; for an SAE the same as `side_in`. `on_row` gets each row as it is made.
    Raises `TrainingError` when the loss stops being finite.
    """
    for side, hook in ((side_in, spec.hook_name), (side_out, spec.hook_name_out)):
        if not (math.isfinite(side.mean_norm) and side.mean_norm > 0 and side.mean.isfinite().all()):
            raise TrainingError(
                f"the activations of {hook} have mean norm {side.mean_norm}: they hold infinities or only zeros; a "
                "wider activations.dtype (float32) may help"
            )
    scale_in, scale_out = (s.scale(spec.normalize_activations) for s in (side_in, side_out))
    weights = Weights(*(t.to(device) for t in initial_weights(spec, side_out.mean * scale_out, spec.seed or 0)))
    optimiser = Adam(weights, training.adam_beta1, training.adam_beta2)
    n_steps = training.n_tokens // training.batch_size
    metrics = TrainingMetrics(spec.d_sae, training, device)

    for step, batch in enumerate(_shown(batches.iterate(0, n_steps), n_steps, spec)):
        lr, l1 = learning_rate(training, step, n_steps), l1_coefficient(spec, training, step)
        logged = (step + 1) % training.log_every == 0 or step in (0, n_steps - 1)
        x = batch[0].to(device, non_blocking=True) * scale_in
        y = x if spec.kind == "sae" else batch[1].to(device, non_blocking=True) * scale_out
        found = _take(spec, weights, x, y, l1, logged)
        if spec.sparsity == "unit_norm":
            remove_parallel_(found.gradients.W_dec, weights.W_dec)
        optimiser.step(found.gradients, lr)
        if spec.sparsity == "unit_norm":
            normalise_rows_(weights.W_dec)
        metrics.add(found, l1)
        if logged:
            on_row(metrics.row(step, found, y, lr, l1))
    return _finished(spec, weights, scale_in, scale_out), metrics.rows


def _take(spec: Spec, weights: Weights, x: Tensor, y: Tensor, l1: float, count: bool) -> Step:
    """Loss and gradients of one batch x (N, d), y (N, p)."""
    w = token_weights(y, spec.squared_error or "sum")
    by_norm = spec.sparsity == "decoder_norm"
    if spec.activation == "topk":
        return topk_step(weights, x, y, w, spec.k or 0, by_norm, spec.apply_b_dec_to_input)
    return relu_step(weights, x, y, w, l1, by_norm, spec.apply_b_dec_to_input, count)


def _finished(spec: Spec, weights: Weights, scale_in: float, scale_out: float) -> Dictionary:
    """The trained dictionary, for raw activations.

    Decoder norms move into the encoder where training ranked or penalised latents as if they were 1; a ReLU dictionary
    with `sparsity=decoder_norm` keeps its norms, as SAELens's does.
    """
    if not all(t.isfinite().all() for t in weights):
        raise TrainingError("the last step made weights that are not finite; lower training.lr")
    encoder, b_enc, W_dec, b_dec = weights
    dictionary = build_dictionary(spec, encoder.T.contiguous(), b_enc, W_dec, b_dec)
    dictionary = dictionary.with_scaling_folded(scale_in, scale_out)
    keeps_norms = spec.activation == "relu" and spec.sparsity == "decoder_norm"
    return dictionary if keeps_norms else dictionary.with_unit_decoder()


def learning_rate(training: TrainingConfig, step: int, n_steps: int) -> float:
    """Of step 0, 1, ..., n_steps - 1."""
    rise = min((step + 1) / max(training.lr_warm_up_steps, 1), 1.0)
    fall = min((n_steps - step) / max(training.lr_decay_steps, 1), 1.0)
    return training.lr * rise * fall


def l1_coefficient(spec: Spec, training: TrainingConfig, step: int) -> float:
    """Of step 0, 1, ...: 0 at the first, unless there is no warm-up."""
    rise = min(step / training.l1_warm_up_steps, 1.0) if training.l1_warm_up_steps else 1.0
    return (spec.l1_coefficient or 0.0) * rise


def _shown(batches: Iterable[tuple[Tensor, ...]], n_steps: int, spec: Spec) -> Iterable[tuple[Tensor, ...]]:
    return progress(batches, f"{spec.kind} {spec.hook_name_out}", total=n_steps)
