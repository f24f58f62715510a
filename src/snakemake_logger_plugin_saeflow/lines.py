"""The words for a job: what it makes, what it found as its log says, why it failed."""

import re
import time
from dataclasses import dataclass, field
from pathlib import Path

from saeflow.jobs.log import RECORD
from saeflow.planning.parts import MARKS, told_together, without_hash

RECEIPT = "provenance.json"
_NUMBER = re.compile(r"\d[\d,]*(?:\.\d+)?(?:e[+-]?\d+)?")
LOUD = "DIVERGED"  # a finding that no other stands for
NAMES = 3
"""Of several artifacts, the names that are told."""


@dataclass
class Work:
    """A job: its stage, and the files that it declares."""

    stage: str
    outputs: tuple[str, ...]
    logs: tuple[str, ...]
    mem_mb: int = 0
    """That it asked for; 0 where nothing says it."""
    started: float = field(default_factory=time.monotonic)

    @property
    def folders(self) -> list[str]:
        """Of its artifacts."""
        return [str(Path(output).parent) for output in self.outputs if Path(output).name == RECEIPT]

    def __str__(self) -> str:
        """Stage, number and names of what it makes, without hashes."""
        labels = [without_hash(Path(folder).name) for folder in self.folders]
        if not labels:
            marks = [Path(output) for output in self.outputs if Path(output).is_relative_to(MARKS)]
            return " ".join([self.stage, *(without_hash(mark.name) for mark in marks)])
        if len(labels) == 1:
            return f"{self.stage} {labels[0]}"
        told = told_together(labels, NAMES)
        return f"{self.stage} {len(labels)}{'' if told.startswith(':') else ' '}{told}"


def duration(seconds: float) -> str:
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"


def findings(work: Work) -> str:
    """What the job says of its artifacts in the last record of its log, a line each: one text, in which numbers that
    differ are ranges."""
    level, lines = _last_record(work, ("INFO",))
    texts = [text for line in lines if (text := _without_names(line, work))] if level else []
    skeletons = {_NUMBER.sub("#", text) for text in texts}
    if len(skeletons) != 1:
        return "; ".join([text for text in texts if LOUD in text] or texts[:1])
    columns = zip(*(_NUMBER.findall(text) for text in texts), strict=True)
    ranges = iter([_range(column) for column in columns])
    return _NUMBER.sub(lambda _: next(ranges), texts[0])


def sentence(work: Work) -> str:
    """Why it failed, in one line."""
    level, lines = _last_record(work, ("ERROR", "WARNING", "INFO"))
    if level in (None, "INFO"):  # a warning that it went on after is no reason
        asked = f" (it had asked for {work.mem_mb:,} MB)" if work.mem_mb else ""
        return (
            f"{work.stage} failed without a word: it was killed, as for too much memory{asked}, or could not start; "
            f"device.mem_mb.{work.stage}=... asks for more"
        )
    return " ".join(" ".join(lines).split())


def refusal(text: str) -> str:
    """Snakemake's message for an error of the configuration, without where in the rules it was raised; and for what it
    refuses itself, what was meant."""
    ours = r"WorkflowError in file \S+/(?:common|options)\.smk\S*, line \d+:\n(.*?)(\n  File \".*)?"
    found = re.fullmatch(ours, text, re.DOTALL)
    if found:
        return f"refused: {found[1].strip()}"
    meant = re.search(r"No rule to produce (\S+=.*?) \(if you", text)
    if meant or "Invalid config definition" in text:
        what = f"{meant[1]} is" if meant else "something behind --config is"
        return f'refused: {what} outside of hydra="...": put all overrides inside the quotes, --config hydra="a=1 b=2"'
    return text


def _last_record(work: Work, levels: tuple[str, ...]) -> tuple[str | None, list[str]]:
    """Level and lines of the last record of its log with one of these levels."""
    level, lines = None, list[str]()
    for log in work.logs:
        try:
            text = Path(log).read_text(errors="replace")
        except OSError:
            continue
        wanted = False
        for line in text.splitlines():
            if found := RECORD.match(line):
                _, said, message = found.groups()
                wanted = said in levels
                if wanted:
                    level, lines = said, [message]
            elif wanted:
                lines.append(line)
    return level, lines


def _without_names(line: str, work: Work) -> str:
    line = re.sub(r"(?:,? (?:in|to) )?(?<!\S)results/\S+", "", line)
    for folder in work.folders:
        line = line.replace(Path(folder).name, "")
    return re.sub(r"^[\s:,]+|(?:[\s:,]+(?:in|to))?[\s:,]*$", "", line)


def _range(column: tuple[str, ...]) -> str:
    ordered = sorted(column, key=lambda number: float(number.replace(",", "")))
    return ordered[0] if ordered[0] == ordered[-1] else f"{ordered[0]} to {ordered[-1]}"
