"""Fifty faults of all kinds end well in a small experiment, two at a time."""

from pathlib import Path

import pytest
from tests.chaos.bench import Bench
from tests.chaos.outcome import SURVIVED
from tests.chaos.run import KINDS, inject

FIFTY = dict.fromkeys(KINDS, 1) | {"flip": 15, "truncate": 9, "delete": 9, "lost": 4}
"""Of each kind one trial: those between runs have several faults at once."""


@pytest.mark.slow
def test_fifty_faults_end_well(tmp_path: Path) -> None:
    assert sum(FIFTY.values()) == 50
    outcomes = inject(Bench.undisturbed(tmp_path, "chaos_small"), FIFTY, seed=0, workers=2)
    assert not [outcome for outcome in outcomes if outcome.verdict != SURVIVED]
    assert len(outcomes) >= 50
