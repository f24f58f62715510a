"""What the terminal shows: a line a job, what it found, why it failed; by Snakemake's own tests of plugins too."""

import io
import logging
from pathlib import Path
from types import SimpleNamespace

import pytest
from snakemake_interface_logger_plugins.common import LogEvent
from snakemake_interface_logger_plugins.tests import TestLogHandlerBase

from saeflow.config import ConfigError
from saeflow.planning.command import refusals
from snakemake_logger_plugin_saeflow import LogHandler, LogHandlerSettings
from snakemake_logger_plugin_saeflow.lines import Work, duration, findings, refusal, sentence

LOG = """2026-11-28 20:22:10,744 INFO training 2 dictionaries on batches of 256 tokens
2026-11-28 20:22:51,500 INFO sae-L1.mlp_out-k4-seed0-106cc3d9: 4,096 tokens, L0 4.0: results/train/sae-L1
sae-L1.mlp_out-k16-seed0-e807310b: 4,096 tokens, L0 16.0: results/train/sae-L1.mlp_out-k16-seed0-e807310b
"""
FAILED = """2026-11-28 20:22:10,744 INFO training 2 dictionaries on batches of 256 tokens
2026-11-28 20:22:11,000 ERROR failed
Traceback (most recent call last):
  File "loop.py", line 1, in train
ValueError: a loss is not finite
2026-11-28 20:22:11,001 ERROR train failed: a loss is not finite; lower
 training.lr
"""
OUTPUTS = [f"results/train/sae-L1.mlp_out-k{k}/provenance.json" for k in ("4-seed0-106cc3d9", "16-seed0-e807310b")]


class TestTheInterface(TestLogHandlerBase):
    __test__ = True

    def get_log_handler_cls(self) -> type[LogHandler]:
        return LogHandler

    def get_log_handler_settings(self) -> LogHandlerSettings:
        return LogHandlerSettings()


def handler(dryrun: bool = False, no_ending: bool = False) -> LogHandler:
    common = SimpleNamespace(quiet=set(), dryrun=dryrun, verbose=False, show_failed_logs=False)
    made = LogHandler(common, LogHandlerSettings(no_ending))
    made.stream, made.is_terminal = io.StringIO(), False
    return made


def say(to: LogHandler, event: LogEvent | None = None, msg: str = "", **extra: object) -> None:
    record = logging.LogRecord("snakemake", logging.INFO, "", 1, msg, (), None)
    record.__dict__ |= {"event": event, **extra} if event else extra
    to.handle(record)


def job(to: LogHandler, log: Path, event: LogEvent = LogEvent.JOB_INFO) -> None:
    to.together = {OUTPUTS[0]: OUTPUTS}
    say(to, event, jobid=3, rule_name="train", output=[f"{OUTPUTS[0]} (update)"], log=[str(log)], input=["x" * 5000])


def shown(of: LogHandler) -> list[str]:
    of.close()
    of.close()  # logging does so at exit
    return of.stream.getvalue().splitlines()


def test_a_part_is_called_by_what_it_is_of(tmp_path: Path) -> None:
    log = tmp_path / "job.log"
    log.write_text("2026-01-01 00:00:00,000 INFO 4 shards computed ahead in results/activations/s\n")
    terminal, mark = handler(), ".snakemake/parts/activations/s-01/L1.mlp_out-9rows-0123.part-2-of-8 (update)"
    say(terminal, LogEvent.JOB_INFO, jobid=3, rule_name="activations_part", output=[mark], log=[str(log)])
    say(terminal, LogEvent.JOB_FINISHED, job_id=3)
    (line,) = shown(terminal)
    assert line.startswith("[1 of 0] activations L1.mlp_out-9rows, part 2 of 8: 4 shards computed ahead (")


def test_a_job_is_one_line_with_what_it_found_and_what_is_left(tmp_path: Path) -> None:
    log = tmp_path / "job.log"
    log.write_text(LOG)
    terminal = handler()
    terminal.there, terminal.ending = 5, lambda: "figures: there"
    say(terminal, None, "Building DAG of jobs...")
    say(terminal, LogEvent.RUN_INFO, stats={"train": 1, "figures": 1, "all": 1, "total": 3})
    job(terminal, log)
    say(terminal, LogEvent.JOB_FINISHED, job_id=3)
    say(terminal, LogEvent.JOB_INFO, jobid=0, rule_name="all", output=[], log=[])
    say(terminal, LogEvent.JOB_FINISHED, job_id=0)
    say(terminal, LogEvent.PROGRESS, done=3, total=3)
    say(terminal, None, "Complete log(s): x")
    lines = shown(terminal)
    assert lines[0] == "2 jobs to do: 1 train, 1 figures; 5 artifacts are there already"
    assert lines[1].startswith("[1 of 2] train 2 (sae L1.mlp_out seed0): k4, k16: 4,096 tokens, L0 4.0 to 16.0 (")
    assert lines[2].startswith("done in ") and lines[3:] == ["figures: there"]


def test_what_is_tried_again_and_goes_well_has_not_failed(tmp_path: Path) -> None:
    """Snakemake says of a job that failed that it restarts it, by its number."""
    log = tmp_path / "job.log"
    log.write_text(FAILED)
    terminal = handler()
    say(terminal, LogEvent.RUN_INFO, stats={"train": 1, "total": 1})
    job(terminal, log)
    job(terminal, log, LogEvent.JOB_ERROR)
    say(terminal, LogEvent.ERROR, "Cannot restore results/train/a/provenance.json: no backup found.")
    say(terminal, None, "Trying to restart job 3.")
    job(terminal, log)
    log.write_text(LOG)
    say(terminal, LogEvent.JOB_FINISHED, job_id=3)
    say(terminal, LogEvent.PROGRESS, done=1, total=1)
    lines = shown(terminal)
    assert lines[2] == f"trying it again: train failed: a loss is not finite; lower training.lr (log: {log})"
    assert lines[3].startswith("[1 of 1] train 2") and lines[4].startswith("done in ") and len(lines) == 5


def test_a_failure_is_said_once_and_last_without_traceback_or_command(tmp_path: Path) -> None:
    log = tmp_path / "job.log"
    log.write_text(FAILED)
    terminal = handler()
    terminal.ending = lambda: "figures: there"
    say(terminal, LogEvent.RUN_INFO, stats={"train": 1, "evaluate": 1, "figures": 1, "total": 3})
    job(terminal, log)
    say(
        terminal,
        LogEvent.ERROR,
        'RuleException:\nCalledProcessError in file "stages.smk", line 49:\nCommand python job.py',
    )
    job(terminal, log, LogEvent.JOB_ERROR)
    say(terminal, None, "Exiting because a job execution failed. Look above for error messages")
    for where in ("", ' in file "workflow/rules/options.smk", line 23'):
        say(terminal, LogEvent.ERROR, f"WorkflowError{where}:\nAt least one job did not complete successfully.")
    assert shown(terminal)[1:] == [
        "failed: train 2 (sae L1.mlp_out seed0): k4, k16; the reason stands at the end",
        "1 of 3 jobs failed, 2 did not run for it; the same command goes on from here",
        f"train failed: a loss is not finite; lower training.lr (log: {log})",
    ]


def test_a_job_that_was_killed_says_so(tmp_path: Path) -> None:
    log = tmp_path / "job.log"
    log.write_text(LOG)
    assert "train failed without a word: it was killed" in sentence(Work("train", (), (str(log),)))
    assert "without a word" in sentence(Work("train", (), (str(tmp_path / "none.log"),)))
    log.write_text(f"2026-11-28 20:22:10,744 WARNING the first token is massive\n{LOG}")
    said = sentence(Work("train", (), (str(log),), mem_mb=4000))
    assert "it had asked for 4,000 MB" in said and "device.mem_mb.train=" in said and "massive" not in said


def test_nothing_to_do_ends_with_where_it_is_and_a_dry_run_does_not() -> None:
    for options, last in (({}, "figures: there"), ({"no_ending": True}, "Nothing"), ({"dryrun": True}, "Nothing")):
        terminal = handler(**options)
        terminal.ending = lambda: "figures: there"
        say(terminal, None, "Nothing to be done (all requested files are present and up to date).")
        assert shown(terminal)[-1].startswith(last)


def test_a_dry_run_is_a_line_a_job_and_the_table_of_all(tmp_path: Path) -> None:
    terminal = handler(dryrun=True)
    say(terminal, LogEvent.RUN_INFO, "Job stats:\ntrain 1", stats={"train": 1})
    job(terminal, tmp_path / "none.log")
    assert shown(terminal) == ["Job stats:", "train 1", "would run train 2 (sae L1.mlp_out seed0): k4, k16"]


def test_a_terminal_shows_what_runs_now(tmp_path: Path) -> None:
    terminal = handler()
    terminal.is_terminal = True
    job(terminal, tmp_path / "none.log")
    assert terminal.stream.getvalue().endswith("running: train 2 (sae L1.mlp_out seed0): k4, k16")
    say(terminal, LogEvent.JOB_FINISHED, job_id=3)
    assert "running" not in terminal.stream.getvalue().rsplit("\r\033[K", 1)[1]


@pytest.mark.parametrize(
    ("lines", "expected"),
    [
        (["results/t/a-12345678/: CE 3.5, clean 3.0"], "CE 3.5, clean 3.0"),
        (["wrote 128 rows to results/t/a-12345678/"], "wrote 128 rows"),
        (["2 columns, in results/t/a-12345678: 1.5 s"], "2 columns 1.5 s"),
        (["a-12345678: L0 4.0", "b-12345678: L0 1,000.5"], "L0 4.0 to 1,000.5"),
        (["a-12345678: 3 dead", "b-12345678: none"], "3 dead"),
        (["a-12345678: L0 4.0", "b-12345678: DIVERGED (-4e+11), L0 3.0"], "DIVERGED (-4e+11), L0 3.0"),
    ],
)
def test_findings_are_without_names_and_with_ranges(lines: list[str], expected: str, tmp_path: Path) -> None:
    (tmp_path / "log").write_text("2026-11-28 20:22:10,744 INFO " + "\n".join(lines) + "\n")
    outputs = tuple(f"results/t/{name}-12345678/provenance.json" for name in "ab")
    assert findings(Work("t", outputs, (str(tmp_path / "log"),))) == expected


def test_no_control_character_reaches_the_terminal(tmp_path: Path) -> None:
    terminal = handler()
    (tmp_path / "log").write_text("2026-11-28 20:22:10,744 ERROR no file \x1b]0;owned\x07 \x1b[31mred\n")
    job(terminal, tmp_path / "log")
    say(terminal, LogEvent.JOB_ERROR, jobid=3)
    last = shown(terminal)[-1]
    assert last.startswith(r"no file \x1b]0;owned\x07 \x1b[31mred") and last.isprintable()


def test_names_of_many_artifacts_are_told_by_what_differs() -> None:
    outputs = tuple(f"results/train/sae-L{n}.mlp_out-k4-seed0-0000000{n}/provenance.json" for n in range(5))
    assert str(Work("train", outputs, ())) == "train 5 (sae k4 seed0): L0.mlp_out, L1.mlp_out, L2.mlp_out and 2 more"
    assert str(Work("train", outputs[:1], ())) == "train sae-L0.mlp_out-k4-seed0"
    assert str(Work("tokens", (), ())) == "tokens"


def test_refusals_are_one_sentence_without_the_place_in_the_rules() -> None:
    said = 'WorkflowError in file "/a/common.smk", line 32:\nno such\n  File "/a/common.smk", line 32, in <module>'
    assert refusal(said) == "refused: no such"
    assert 'dictionary=topk is outside of hydra="..."' in refusal(
        "MissingRuleException:\nNo rule to produce dictionary=topk (if you use input functions make sure ...)."
    )
    assert "put all overrides inside the quotes" in refusal("ValueError: Invalid config definition: Config entry must")
    other = "MissingRuleException:\nNo rule to produce trian (if you use input functions make sure ...)."
    assert refusal(other) == other


def test_durations_are_read_at_a_glance() -> None:
    assert [duration(s) for s in (0.04, 59.9, 61, 3599, 3600, 90_000)] == [
        "0.0 s", "59.9 s", "1 min", "1 h 0 min", "1 h 0 min", "25 h 0 min",
    ]  # fmt: skip


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_what_failed_is_red_on_a_terminal_and_nowhere_else(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.setenv("TERM", "xterm")
    log = tmp_path / "job.log"
    log.write_text(FAILED.replace("a loss", "a \x1b[32mloss"))

    def said(stream: io.StringIO) -> str:
        terminal = handler()
        terminal.stream = stream
        job(terminal, log)
        say(terminal, None, "all is well")
        record = logging.LogRecord("snakemake", logging.ERROR, "", 1, "failed", (), None)
        record.__dict__ |= {"event": LogEvent.JOB_ERROR, "jobid": 3}
        terminal.handle(record)
        terminal.close()
        return stream.getvalue()

    lines = said(Terminal()).splitlines()
    red = [line for line in lines if line.startswith("\x1b[31m") and line.endswith("\x1b[0m")]
    assert [line for line in lines if line not in red] == ["all is well"] and len(red) == 3
    assert "a \\x1b[32mloss" in red[-1]  # what a log holds colours nothing
    assert "\x1b" not in said(io.StringIO())
    monkeypatch.setenv("NO_COLOR", "1")
    assert "\x1b" not in said(Terminal())
    monkeypatch.delenv("NO_COLOR")
    monkeypatch.setenv("TERM", "dumb")
    assert "\x1b" not in said(Terminal())


def test_a_refusal_of_a_script_is_red_on_a_terminal_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.setenv("TERM", "xterm")
    for stream, wanted in ((Terminal(), "\x1b[31mplan: no such\x1b[0m"), (io.StringIO(), "plan: no such")):
        monkeypatch.setattr("sys.stderr", stream)
        with pytest.raises(SystemExit) as ended, refusals("plan"):
            raise ConfigError("no such")
        assert ended.value.code == wanted
