"""What the terminal shows of a run: a line a job, a failure's one sentence at the end, and where to look.

A logger plugin of Snakemake, which finds it by its name; `profiles/default` chooses it, `--logger` another. The whole
of what Snakemake says is in `.snakemake/log/`; with `--verbose` the terminal has it too.
"""

import logging
import re
import shutil
import sys
import time
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

from snakemake.logging import DefaultFormatter
from snakemake_interface_logger_plugins.base import LogHandlerBase
from snakemake_interface_logger_plugins.common import LogEvent
from snakemake_interface_logger_plugins.settings import LogHandlerSettingsBase

from saeflow.config.checks import escape_controls, loud
from snakemake_logger_plugin_saeflow.lines import Work, duration, findings, refusal, sentence

# Snakemake says these at every run, whatever it does.
NOISE = (
    "Assuming unrestricted shared filesystem usage", "Building DAG of jobs", "Using shell", "Provided cores",
    "Rules claiming more threads", "Provided resources", "Conda environments: ignored", "Select jobs to execute",
    "Execute ", "Complete log(s)", "Elapsed time", "Removing output files of failed job", "host: ", "Cannot restore",
    "SLURM run ID", "Cleaning up SLURM log files",
)  # fmt: skip
UPDATED = " (update)"  # what Snakemake says behind an output that it does not delete before its job
NOTHING = "Nothing to be done"
AGAIN = re.compile(r"Trying to restart job (\d+)\.")
OF_THE_JOB = "RuleException:\nCalledProcessError"  # with the whole command; that the job failed is told apart
GAVE_UP = re.compile(
    r"Exiting because a job execution failed|WorkflowError[^\n]*:\nAt least one job did not complete successfully"
)
HIDDEN = (
    LogEvent.WORKFLOW_STARTED, LogEvent.SHELLCMD, LogEvent.JOB_STARTED, LogEvent.RESOURCES_INFO, LogEvent.PROGRESS,
    LogEvent.GROUP_INFO,
)  # fmt: skip


@dataclass
class LogHandlerSettings(LogHandlerSettingsBase):
    no_ending: bool = field(default=False, metadata={"help": "Do not say at the end where figures and tables are."})


class LogHandler(LogHandlerBase):
    """Writes to the terminal; emits run in one thread, in the order of the records."""

    ending: Callable[[], str] | None = None
    """What to say after a run in which all went well; the rules set it, who know the plan."""
    there: int = 0
    """Artifacts of the plan that are there already; of the rules too."""
    together: Mapping[str, list[str]] = MappingProxyType({})
    """Receipts of all that a job makes, by the one that it is known by; of the rules too."""

    def __post_init__(self) -> None:
        self.stream = sys.stdout if self.common_settings.dryrun else sys.stderr
        self.default = DefaultFormatter(self.common_settings.quiet, self.common_settings.show_failed_logs)
        self.running: dict[int, Work] = {}
        self.failures: dict[int, str] = {}
        """By the number of the job; what was tried again, and went well, is none."""
        self.done = self.total = 0
        self.whole = False
        self.closed = False
        self.is_terminal = self.stream.isatty() and not self.common_settings.dryrun
        self.started = time.monotonic()

    writes_to_stream = property(lambda self: True)
    writes_to_file = property(lambda self: False)
    has_filter = property(lambda self: False)  # Snakemake's: --quiet and the like
    has_formatter = property(lambda self: True)
    needs_rulegraph = property(lambda self: False)

    def emit(self, record: logging.LogRecord) -> None:
        try:
            text = self.default.format(record) if self.common_settings.verbose else self.text(record)
            self.write(text, failed=record.levelno >= logging.ERROR)
        except Exception:
            self.handleError(record)

    def write(self, text: str | None, failed: bool = False) -> None:
        """A line or several, in red where something failed; on a terminal, what runs now stands below them until the
        next."""
        plain = escape_controls(text).rstrip() if text and text != "None" else ""
        said = f"{loud(plain, self.stream) if failed else plain}\n" if plain else ""
        if self.is_terminal:
            now = escape_controls(", ".join(str(work) for work in self.running.values() if work.outputs))
            status = f"running: {now}"[: shutil.get_terminal_size().columns - 1] if now and not self.closed else ""
            said = f"\r\033[K{said}{status}"
        self.stream.write(said)
        self.stream.flush()

    def text(self, record: logging.LogRecord) -> str | None:
        """What to show of a record; None for nothing."""
        event, said = getattr(record, "event", None), record.__dict__
        if event == LogEvent.JOB_INFO:
            return self.begun(said)
        if event == LogEvent.JOB_FINISHED:
            self.failures.pop(said["job_id"], None)
            return self.finished(self.running.pop(said["job_id"], None))
        if event == LogEvent.JOB_ERROR:
            return self.failed(said)
        if event == LogEvent.RUN_INFO and not self.common_settings.dryrun:
            return self.overview(said["stats"])
        if event == LogEvent.PROGRESS:
            self.whole = said["done"] == said["total"] and (self.done > 0 or self.total == 0)
        if event in HIDDEN:
            return None
        text = self.default.format(record)
        if text.startswith(NOTHING):
            self.whole = True
        if again := AGAIN.match(text):
            return f"trying it again: {self.failures.get(int(again[1]), 'it failed')}"
        if text.startswith((*NOISE, OF_THE_JOB)) or (self.failures and GAVE_UP.match(text)):
            return None
        return refusal(text)

    def overview(self, stats: dict[str, int]) -> str | None:
        """Jobs by stage, when a run starts."""
        counts: Counter[str] = Counter()
        for rule, count in stats.items():
            if rule not in ("all", "total"):
                counts[rule] += count
        self.total = counts.total()
        what = ", ".join(f"{count} {stage}" for stage, count in counts.items())
        there = f"; {self.there} artifacts are there already" if self.there else ""
        return f"{self.total} job{'s' * (self.total != 1)} to do: {what}{there}" if counts else None

    def begun(self, said: dict[str, Any]) -> str | None:
        work = self.work(said)
        self.running[said["jobid"]] = work
        return f"would run {work}" if self.common_settings.dryrun and work.outputs else None

    def work(self, said: dict[str, Any]) -> Work:
        files = [str(file).removesuffix(UPDATED) for file in said["output"] or ()]
        outputs = (one for file in files for one in self.together.get(file, [file]))
        memory = said["resources"].get("mem_mb") if said.get("resources") else None
        stage, logs = said["rule_name"].removesuffix("_part"), tuple(said["log"] or ())
        return Work(stage, tuple(outputs), logs, memory if type(memory) is int else 0)

    def finished(self, work: Work | None) -> str | None:
        if work is None or not work.outputs:
            return None
        self.done += 1
        took, found = duration(time.monotonic() - work.started), findings(work)
        return f"[{self.done} of {self.total}] {work}{': ' if found else ''}{found} ({took})"

    def failed(self, said: dict[str, Any]) -> str:
        """A line now; what went wrong is said at the end, when nothing more comes after it."""
        known = self.running.pop(said["jobid"], None)
        work = known or self.work(said)
        self.failures[said["jobid"]] = f"{sentence(work)} (log: {', '.join(work.logs) or 'none'})"
        return f"failed: {work}; the reason stands at the end"

    def close(self) -> None:
        """Has the last word: after the listener has stopped, before the process ends."""
        if not self.closed:
            self.closed = True
            self.write("\n".join(self.last_words()), failed=bool(self.failures))
        super().close()

    def last_words(self) -> list[str]:
        if self.failures:
            left = max(self.total - self.done - len(self.failures), 0)
            rest = f", {left} did not run for it" if left else ""
            jobs = f"{len(self.failures)} of {self.total} jobs failed" if self.total else "a job failed"
            return [f"{jobs}{rest}; the same command goes on from here", *dict.fromkeys(self.failures.values())]
        if self.common_settings.dryrun or not self.whole:
            return []
        took = [f"done in {duration(time.monotonic() - self.started)}"] if self.done else []
        wanted = self.ending is not None and not getattr(self.settings, "no_ending", False)
        return took + ([self.ending()] if self.ending is not None and wanted else [])


__all__ = ["LogHandler", "LogHandlerSettings"]
