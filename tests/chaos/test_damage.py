"""Thirty-four faults between runs end well, in a small experiment: with those of the other file fifty, of all kinds."""

from pathlib import Path

import pytest
from tests.chaos.outcome import SURVIVED
from tests.chaos.run import inject_small


@pytest.mark.slow
def test_faults_end_well(tmp_path: Path) -> None:
    outcomes = inject_small(tmp_path, 34, ["flip", "truncate", "delete", "lost", "clock", "bookkeeping"])
    assert not [outcome for outcome in outcomes if outcome.verdict != SURVIVED]
    assert len(outcomes) >= 34
