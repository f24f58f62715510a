"""What doesn't end well is seen, and every kind of fault has its share; the faults: `test_fifty`."""

import json
from pathlib import Path

import pytest
from tests.chaos.bench import Bench, Copy, Run
from tests.chaos.outcome import REPEATED, SILENT, STUCK, SURVIVED, UNNAMED, Outcome, judge
from tests.chaos.run import KINDS, report, shares

FILES = {
    "train/a/weights": "w",
    "train/a/provenance.json": json.dumps({"needs": {"tokens": ["t"]}}),
    "tokens/t/provenance.json": json.dumps({"needs": {}}),
}
WELL, ILL = Run(0, ""), Run(1, "train failed: results/tokens/t/shard is damaged")


def copy_of(home: Path, files: dict[str, str]) -> Copy:
    for name, text in files.items():
        path = home / "results" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return Copy(home, "none")


@pytest.fixture
def bench(tmp_path: Path) -> Bench:
    base = copy_of(tmp_path / "base", FILES)
    return Bench(tmp_path, base, 1.0, base.contents(), base.receipts())


@pytest.mark.parametrize(
    ("changed", "runs", "verdict"),
    [
        ({}, [WELL], SURVIVED),
        ({}, [ILL, WELL], SURVIVED),
        ({}, [ILL, ILL], STUCK),
        ({}, [Run(-1, "")], STUCK),
        ({"train/a/weights": "x"}, [WELL], SILENT),
        ({"train/a/weights": None}, [WELL], SILENT),
        ({"train/a/provenance.json": json.dumps({"needs": {}})}, [WELL], REPEATED),
        ({}, [Run(1, "train failed: [Errno 28] No space left on device"), WELL], UNNAMED),
    ],
)
def test_what_does_not_end_well_is_seen(
    bench: Bench, tmp_path: Path, changed: dict[str, str | None], runs: list[Run], verdict: str
) -> None:
    copy = copy_of(tmp_path / "copy", {n: t for n, t in (FILES | changed).items() if t is not None})
    outcome = judge("flip", "", copy, bench, runs, bench.artifacts, named=frozenset({"tokens/t"}))
    assert outcome.verdict == verdict


@pytest.mark.parametrize("lost", ["tokens/t", "tokens"])
def test_what_may_stay_away_may(bench: Bench, tmp_path: Path, lost: str) -> None:
    copy = copy_of(tmp_path / "copy", {n: t for n, t in FILES.items() if not n.startswith("tokens")})
    assert judge("lost", "", copy, bench, [WELL], lost=frozenset({lost})).verdict == SURVIVED


@pytest.mark.parametrize(("whole", "verdict"), [(False, SURVIVED), (True, SILENT)])
def test_what_may_stay_away_may_be_damaged_if_nothing_calls_it_whole(
    bench: Bench, tmp_path: Path, whole: bool, verdict: str
) -> None:
    files = FILES | {"train/a/weights": "x"}
    copy = copy_of(tmp_path / "copy", {n: t for n, t in files.items() if whole or n != "train/a/provenance.json"})
    assert judge("flip", "", copy, bench, [WELL], lost=frozenset({"train/a"})).verdict == verdict


def test_receipts_and_needs_are_read(bench: Bench) -> None:
    partial = bench.base.results / "train/b.host-7.partial/provenance.json"
    partial.parent.mkdir()
    partial.write_text("")  # of a job that is at work: no artifact
    assert set(bench.base.receipts()) == {"train/a", "tokens/t"}
    assert set(bench.expected) == {"train/a/weights"}  # receipts say when and where: they differ between runs
    assert bench.base.needs() == {"train/a": ["tokens/t"], "tokens/t": []}


def test_a_line_a_kind(capsys: pytest.CaptureFixture[str]) -> None:
    outcomes = [Outcome("kill", SURVIVED), Outcome("kill", STUCK), Outcome("disk full", SURVIVED)]
    counts = {"kill_tried": 2, "kill_survived": 1, "kill_stuck": 1, "disk_full_tried": 1, "disk_full_survived": 1}
    assert report(outcomes) == {"faults": 3, "survived": 2} | counts
    assert [line.split()[0] for line in capsys.readouterr().out.splitlines()] == ["kill", "disk"]


@pytest.mark.parametrize("faults", [1, 7, 50, 1000])
def test_shares_add_up(faults: int) -> None:
    assert sum(shares(faults, list(KINDS)).values()) == faults
    assert min(shares(1000, list(KINDS)).values()) >= 10
    assert min(shares(17, list(KINDS)).values()) >= 1
