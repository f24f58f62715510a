"""Fourteen faults of runs end well, in a small experiment: with those of the other file fifty, of all kinds."""

from pathlib import Path

import pytest
from tests.chaos.bench import Bench
from tests.chaos.outcome import SURVIVED
from tests.chaos.run import inject


@pytest.mark.slow
def test_faults_end_well(tmp_path: Path) -> None:
    kinds = ["kill", "signal", "power", "disk full", "source swapped", "two runs"]
    outcomes = inject(Bench.undisturbed(tmp_path, "chaos_small"), faults=14, seed=0, only=kinds)
    assert not [outcome for outcome in outcomes if outcome.verdict != SURVIVED]
    assert len(outcomes) >= 14
