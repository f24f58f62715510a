"""Sixteen faults of runs and of a cluster end well in a small experiment: fifty of all kinds with those of damage."""

from pathlib import Path

import pytest
from tests.chaos.outcome import SURVIVED
from tests.chaos.run import inject_small


@pytest.mark.slow
def test_faults_end_well(tmp_path: Path) -> None:
    of_runs = ["kill", "signal", "power", "disk full", "source swapped", "two runs"]
    of_a_cluster = ["preempted", "node", "late disk", "memory", "log folder"]
    outcomes = inject_small(tmp_path, 16, of_runs + of_a_cluster)
    assert not [outcome for outcome in outcomes if outcome.verdict != SURVIVED]
    assert len(outcomes) >= 16
