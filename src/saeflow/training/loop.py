"""Training jobs: from columns of activations to folders with a dictionary and its metrics.

The dictionaries of one job read columns of one store in the same order of batches, so each is read once; otherwise they
know nothing of each other, and each is what it would be if it trained alone. Killed at any moment, a job goes on
from its checkpoints, and ends with the same bytes. `fit` is the loop without jobs, for any source of batches.
"""

import contextlib
import json
import logging
import pkgutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from saeflow.activations.exclusion import LeftOut
from saeflow.activations.store import Column, open_column
from saeflow.config import ConfigError, DictionaryConfig, TrainingConfig, build
from saeflow.config.dictionary import Columns
from saeflow.dictionaries.kinds.saelens import SAELensConfig
from saeflow.dictionaries.kinds.trained import TrainedConfig
from saeflow.dictionaries.naming import amount_name, hook_title
from saeflow.dictionaries.sae import Dictionary
from saeflow.dictionaries.saelens_format import save_dictionary
from saeflow.dictionaries.settings import settings
from saeflow.dictionaries.spec import Origin, Spec
from saeflow.jobs.job import Job
from saeflow.jobs.progress import progress
from saeflow.jobs.signals import STOPPED_BY, Preempted, StopSignals
from saeflow.models.blocks import Block, ModuleBlock, read_block
from saeflow.models.opening import model_config
from saeflow.models.source import PROCESSING, reading_model
from saeflow.planning.graph import Instance
from saeflow.training.checkpoints import Checkpoints, Timer
from saeflow.training.loggers import About, Logger, open_loggers
from saeflow.training.metrics import TrainingError, write_metrics
from saeflow.training.protocol import Batches, DictionaryTrainer, HookStatistics, Inputs, PartOfBatches
from saeflow.training.selection import Selection
from saeflow.training.trainer import Trainer

log = logging.getLogger("saeflow")
MOST_AT_ONCE, BYTES_AT_ONCE = 16, 16 << 20  # batches, and their bytes, that one member takes before the next


@dataclass
class Member:
    """One dictionary of a job."""

    job: Job
    trainer: DictionaryTrainer
    checkpoints: Checkpoints
    columns_of: Callable[[tuple[Tensor, ...]], tuple[Tensor, ...]]
    """What it reads of a batch of the job's columns: of some, all entries or those of one head."""
    left_out: LeftOut | None = None
    """Of the tokens that are stored, those that it is not trained on; None: none."""
    failure: TrainingError | None = None
    loggers: Sequence[Logger] = ()

    @property
    def unfinished(self) -> bool:
        return self.failure is None and self.trainer.step < self.trainer.n_steps

    def save(self) -> None:
        if self.failure is None and self.trainer.step:
            self.checkpoints.save(self.trainer.step, self.trainer.state())


def train(jobs: list[Job]) -> str:
    """Trains the dictionaries of jobs that read the same tokens in the same batches, and writes their folders.

    A dictionary whose training fails does not stop the others; in the end `TrainingError` says which failed. Raises
    `Preempted`, with the state saved, when the job is asked to stop.
    """
    reads = [job.inputs("activations") for job in jobs]
    columns = {folder: open_column(folder) for folders in reads for folder in folders}
    given = [job.config["training"] | json.loads(job.instance.sources["training"]) for job in jobs]  # what, and how
    options = [build(TrainingConfig, one, "training.") for one in given]
    context_size = _origin_of(jobs[0]).config["tokens"]["context_size"]
    selection = Selection(columns, options, reads, context_size, jobs[0].plan.read_ahead_mb << 20)
    selection.warn_of_massive(list(columns.values()))
    batches = selection.batches
    with contextlib.ExitStack() as stack:
        signals = stack.enter_context(StopSignals())
        members = [_member(job, o, columns, selection, stack) for job, o in zip(jobs, options, strict=True)]
        written: list[str] = []
        log.info("training %d dictionaries on batches of %d tokens", len(members), batches.batch_size)
        for member in _steps(members, batches, signals, Timer(min(o.checkpoint_seconds for o in options))):
            try:
                written.append(_write(member))
            except TrainingError as error:
                member.failure = error
    failed = [f"{m.job.instance.key}: {m.failure}" for m in members if m.failure]
    if failed:
        for member in members:
            member.save()  # Snakemake removes the receipts of the others with those of the failed: make them cheap
        raise TrainingError("; ".join(failed))
    for member in members:
        member.checkpoints.remove()
    return "\n".join(written)


def _steps(members: list[Member], batches: Batches, signals: StopSignals, timer: Timer) -> Iterator[Member]:
    """Runs the members' steps; yields each when it is done."""
    yield from (member for member in members if not member.unfinished)
    start = min((m.trainer.step for m in members if m.unfinished), default=0)
    end = max((m.trainer.n_steps for m in members if m.unfinished), default=0)
    read = progress(batches.iterate(start, end - start), f"{len(members)} dictionaries", end, "steps", start=start)
    for first, some in _batch_groups(iter(read), start):
        for member in members:
            for step, batch in enumerate(some, first):
                if signals.received or not member.unfinished or member.trainer.step != step:
                    continue  # killed between two checkpoints, members may go on from different steps
                try:
                    if member.trainer.resamples_next():
                        member.trainer.resample(PartOfBatches(batches, member.columns_of))
                    member.trainer.train_step(member.columns_of(batch))
                except TrainingError as error:
                    member.failure = error
                if member.trainer.step == member.trainer.n_steps:
                    yield member
                if timer.passed:
                    with timer.saving():
                        for each in members:
                            each.save()
        if not any(m.unfinished for m in members):
            return
        if signals.received:
            for member in members:
                member.save()
            step = min(m.trainer.step for m in members)
            raise Preempted(f"{STOPPED_BY}{signals.received} after step {step}; run again to go on from there")


def _batch_groups(batches: Iterator[tuple[Tensor, ...]], start: int) -> Iterator[tuple[int, list[tuple[Tensor, ...]]]]:
    """A few batches at a time, with the number of the first: a member takes them in a row, its weights in the cache."""
    some: list[tuple[Tensor, ...]] = []
    for number, batch in enumerate(batches, start):
        some.append(batch)
        if len(some) == MOST_AT_ONCE or len(some) * sum(t.nbytes for t in batch) >= BYTES_AT_ONCE:
            yield number - len(some) + 1, some
            some = []
    if some:
        yield number - len(some) + 1, some


def _member(
    job: Job,
    options: TrainingConfig,
    columns: dict[Path, Column],
    selection: Selection,
    stack: contextlib.ExitStack,
) -> Member:
    """The member that a job stands for, at the step that its newest checkpoint has."""
    folders = job.inputs("activations")
    results = Path(job.plan.results)
    config = build(DictionaryConfig, job.config["dictionary"], "dictionary.")
    specs = specs_of_job(job, [columns[folder] for folder in folders])
    opened = open_loggers(options.loggers, _about(job, specs), results) if options.loggers else []
    loggers = [stack.enter_context(contextlib.closing(logger)) for logger in opened]

    def log_row(row: dict[str, float]) -> None:
        for logger in loggers:
            logger.log(row)

    head = job.config.get("head")
    statistics = [selection.statistics[folder] for folder in folders]
    given = statistics if head is None else [one.by_head()[head] for one in statistics]
    inputs = Inputs(config, specs, options, given, job.device, log_row, lambda: _block(job))
    trainer: DictionaryTrainer = config.trainer_class().of_job(inputs)
    for part in trainer.parts.values():
        part.metrics.is_first = selection.is_first
    checkpoints = Checkpoints(results / "checkpoints" / job.instance.key, options.keep_checkpoints)
    state = checkpoints.newest()
    if state is not None:
        trainer.restore(state)
        log.info("%s goes on from step %d of %d", job.instance.key, trainer.step, trainer.n_steps)
    reads = [list(columns).index(folder) for folder in folders]
    entries = slice(None) if head is None else slice(head * specs[0].d_in, (head + 1) * specs[0].d_in)
    columns_of = lambda batch: tuple(batch[i][:, entries] for i in reads)  # noqa: E731
    return Member(job, trainer, checkpoints, columns_of, selection.left_out, loggers=loggers)


def _about(job: Job, specs: list[Spec]) -> About:
    """What loggers call a training: kind, place, amount and seed."""
    one, config, hooks = specs[0], job.config, (job.config["hook_name"], job.config["hook_name_out"])
    name, amount = one.amount
    kind = f"{config['dictionary']['kind']} {one.activation}"
    place = " to ".join(hook_title(hook) for hook in hooks if hook)
    head = "" if config.get("head") is None else f", head {config['head']}"
    said = "" if amount is None else f", {amount_name(name)} = {amount:g}"
    title = f"{kind}, {place}{head}{said}, {one.d_sae:,} latents, seed {one.seed}"
    held = {"d_in": one.d_in, "d_out": one.d_out, "d_sae": one.d_sae, "hook_name": hooks[0], "hook_name_out": hooks[1]}
    held |= settings(job.plan, "train", job.instance.key)
    tags = (config["dictionary"]["kind"], one.activation, *filter(None, hooks), str(one.origin.model_name))
    return About(job.instance.key, title, job.plan.experiment, tags, held)


def _write(member: Member) -> str:
    job, trainer = member.job, member.trainer
    finished = {name: part.finished() for name, part in trainer.parts.items()}
    with job.writing() as folder:
        for name, part in trainer.parts.items():
            (folder / name).mkdir(exist_ok=True)
            save_dictionary(finished[name], folder / name)
            write_metrics(part.metrics.rows, folder / name / "metrics.parquet")
        for name, rows in trainer.tables().items():
            write_metrics(rows, folder / f"{name}.parquet")
        if text := trainer.text():
            (folder / "table.txt").write_text(text)
        if member.left_out is not None:
            (folder / "left_out.json").write_text(json.dumps(member.left_out.record(), indent=1) + "\n")
    last = {name: part.metrics.rows[-1] for name, part in trainer.parts.items()}
    for logger in member.loggers:
        logger.finish(last)
    tokens = next(iter(last.values()))["tokens"]
    bad = {name: part.metrics.diverged for name, part in trainer.parts.items() if part.metrics.diverged}
    for name, reason in bad.items():
        log.warning("%s DIVERGED, %s", "/".join(filter(None, [job.instance.key, name])), reason)
    loud = f"DIVERGED ({next(iter(bad.values()))}), " if bad else ""
    return f"{job.instance.key}: {loud}{tokens:,} tokens, {trainer.summary()}: {job.path}"


def _block(job: Job) -> Block | ModuleBlock:
    """The block of the language model that a Jacobian pair is trained around."""
    from saeflow.models.loading import load_model  # ten seconds, and only pairs need it

    with reading_model(job, _origin_of(job)) as folder:
        model = load_model(folder, model_config(folder, _origin_of(job).config["model"]), job.device)
    return read_block(model, job.config["hook_name"], job.config["hook_name_out"])


def specs_of_job(job: Job, columns: list[Any]) -> list[Spec]:
    """What the job is to train, one dictionary, the two of a pair or those of all heads, checked against the columns
    that it got."""
    config = build(DictionaryConfig, job.config["dictionary"], "dictionary.")
    assert isinstance(config, TrainedConfig)
    wanted = [h for h in (job.config["hook_name"], job.config["hook_name_out"]) if h]
    column_hooks = [c.hook_name for c in columns]
    if wanted != column_hooks or len(wanted) != 1 + config.two_hooks:
        raise ConfigError(f"a dictionary of kind {config.kind} at {wanted} was given the activations of {column_hooks}")
    if len({c.n_tokens for c in columns}) > 1:
        sizes = [c.n_tokens for c in columns]
        raise ConfigError(f"the columns of {column_hooks} hold {sizes} tokens; they must be the same")
    activations = _origin_of(job)
    tokens = job.plan.instance("tokens", activations.needs["tokens"][0])
    model = activations.config["model"]
    origin = Origin(
        model_name=job.instance.sources.get("model_name"),
        model_weights=model["weights"],
        **{name: model[name] for name in PROCESSING},
        context_size=activations.config["tokens"]["context_size"],
        prepend_bos=tokens.config["tokens"]["prepend_bos"],
    )
    head, sizes = job.config.get("head"), [column.size for column in columns]
    if (config.by_head or head is not None) and len(sizes[0]) != 2:
        raise ConfigError(f"a dictionary of heads needs a hook with heads, and {wanted[0]} has none")
    return config.specs(Columns(wanted, sizes, head), job.config["seed"], origin)


def _origin_of(job: Job) -> Instance:
    """The column of activations that the job reads first."""
    return job.plan.instance("activations", job.instance.needs["activations"][0])


def fit(
    spec: Spec,
    training: TrainingConfig,
    batches: Batches,
    statistics_in: HookStatistics,
    statistics_out: HookStatistics,
    device: str = "cpu",
    on_row: Callable[[dict[str, float]], None] = lambda row: None,
) -> tuple[Dictionary, list[dict[str, float]]]:
    """The loop without jobs, for any source of batches: trains a dictionary, and returns it, for raw activations, and
    its rows of metrics.

    Raises `ConfigError` for a `training.exclude`, which no batches of another source keep to, and `TrainingError` when
    the loss stops being finite.
    """
    if training.exclude.identity():
        raise ConfigError(
            "fit trains on the batches that it is given: leave tokens out of them, not in training.exclude"
        )
    trainer_class = Trainer if spec.saelens is None else pkgutil.resolve_name(SAELensConfig.trainer)
    trainer: Trainer = trainer_class(spec, training, statistics_in, statistics_out, device, on_row)
    for batch in progress(batches.iterate(0, trainer.n_steps), spec.hook_name_out, trainer.n_steps, "steps"):
        if trainer.resamples_next():
            trainer.resample(batches)
        trainer.train_step(batch)
    return trainer.finished(), trainer.metrics.rows
