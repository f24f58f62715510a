"""Fifty faults of all kinds end well in a small experiment, two at a time."""

from pathlib import Path

import pytest
from tests.chaos.bench import Bench
from tests.chaos.outcome import SURVIVED
from tests.chaos.run import inject


@pytest.mark.slow
def test_fifty_faults_end_well(tmp_path: Path) -> None:
    outcomes = inject(Bench.undisturbed(tmp_path, "chaos_small"), 50, seed=0, workers=2)
    assert not [outcome for outcome in outcomes if outcome.verdict != SURVIVED]
    assert len(outcomes) >= 50
