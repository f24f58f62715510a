"""The stage `tokens`: the two splits of a corpus as rows of tokens."""

from collections.abc import Sequence
from pathlib import Path

from saeflow.config import ConfigError
from saeflow.jobs.job import Job
from saeflow.planning.expansion import Expansion, PlannedPoint
from saeflow.planning.graph import Instance, Plan
from saeflow.planning.parts import Part, Parts
from saeflow.planning.stages import Stage
from saeflow.text.source import of_held_out

PART_TOKENS = 1 << 16  # fewer are not worth a job of their own


def expand(expansion: Expansion) -> None:
    for planned in expansion.points:
        point, size = planned.point, planned.point.tokens.context_size
        if size > planned.geometry.n_ctx:
            raise ConfigError(
                f"tokens.context_size={size} is longer than the model's context, {planned.geometry.n_ctx}"
            )
        seen = of_held_out(planned)
        for split, of in (("train", planned), ("held_out", seen)):
            if of.point.corpus.path is not None:
                _look(of, (split,) if seen is not planned else ("train", "held_out"))
            n_rows = getattr(point.tokens, f"{split}_tokens") // size
            extra, says = {"split": split, "n_rows": n_rows}, {"n_rows": f"tokens.{split}_tokens"}
            of.add("tokens", f"{split}-{n_rows}rows", {}, extra, name=split, says=says)


def _look(planned: PlannedPoint, splits: tuple[str, ...]) -> None:
    """Raises `CorpusError` for text that would fail in the job, as far as its first records say."""
    from saeflow.text.look import check_length, look_at

    corpus, tokens, digests = planned.point.corpus, planned.point.tokens, planned.digests
    look = digests.once(("look", corpus), lambda: look_at(corpus))
    folder = planned.sources["model"]
    about = ("length", corpus, tokens, folder, splits)
    digests.once(about, lambda: check_length(look, corpus, tokens, Path(folder), splits))


def n_bytes(plan: Plan, instance: Instance) -> int:
    """Token, document and offset, four bytes each."""
    return 3 * 4 * int(instance.config["n_rows"] * instance.config["tokens"]["context_size"])


def resources(plan: Plan, instances: Sequence[Instance]) -> dict[str, int]:
    """Documents are read and packed one after another, at 20,000 tokens of their split a second or more; an hour at
    least."""
    seconds = 0.0
    for instance in instances:
        tokens, held_out = instance.config["tokens"], instance.config["split"] == "held_out"
        share = tokens["held_out_fraction"] if held_out else 1 - tokens["held_out_fraction"]
        seconds += instance.config["n_rows"] * tokens["context_size"] / max(share, 1e-3) / 20_000
    return {"mem_mb": 2000, "runtime": max(60, round(seconds / 60))}


def most_parts(plan: Plan, instances: Sequence[Instance]) -> int:
    """One for what is streamed, which each part would have to fetch whole, and for a case, which has no text."""
    (instance,) = instances
    n_tokens = int(instance.config["n_rows"] * instance.config["tokens"]["context_size"])
    return -(-n_tokens // PART_TOKENS) if instance.sources["corpus"] else 1


def parts_missing(plan: Plan, instances: Sequence[Instance], parts: list[Part]) -> list[Part]:
    from saeflow.text.ahead import Ahead

    (instance,) = instances
    ahead = Ahead(plan.folder("tokens", instance.key))
    return [part for part in parts if not ahead.is_finished(part)]


def part_work(jobs: list[Job], part: Part) -> str:
    from saeflow.text.job import tokens_part

    (job,) = jobs
    return tokens_part(job, part)


def outside(folder: Path) -> list[Path]:
    """What was tokenised ahead of it."""
    return [folder.with_name(f"{folder.name}.parts")]


def all_outside(results: Path) -> list[Path]:
    return sorted((results / "tokens").glob("*.parts"))


def work(jobs: list[Job]) -> str:
    from saeflow.text.job import tokens_job

    return "\n".join(map(tokens_job, jobs))


STAGES = (
    Stage(
        "tokens",
        ("token store", "token stores"),
        work,
        expand,
        reads=(
            "corpus",
            "tokenizer",
            "tokens.context_size",
            "tokens.prepend_bos",
            "tokens.bos_token",
            "tokens.eos_token?",
            "tokens.held_out_fraction",
        ),
        after=("groundtruth",),
        n_bytes=n_bytes,
        outside=outside,
        all_outside=all_outside,
        resources=resources,
        parts=Parts(most_parts, parts_missing, part_work),
    ),
)
