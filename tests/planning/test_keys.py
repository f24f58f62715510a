"""Keys are for ever: what has been computed under one must be found under it, whatever becomes of the code.

`plan-keys.txt` lists the artifacts of the experiments of conf/ that need nothing from outside. It changes only with a
stage's version, or where an experiment, the embedded model or its corpus does.
"""

import re
from pathlib import Path

import pytest

from saeflow.planning.batches import resources
from saeflow.planning.expansion import compose
from saeflow.planning.stages import stages

ROOT = Path(__file__).resolve().parents[2]
BLOCKS = re.findall(
    r"^# experiment=(\w+)\n((?:results/.*\n)+)", Path(__file__).with_name("plan-keys.txt").read_text(), re.M
)
KNOWN = {name: lines.split() for name, lines in BLOCKS}


def test_twelve_experiments_are_known() -> None:
    assert len(KNOWN) == 12 and sum(map(len, KNOWN.values())) > 1000


@pytest.mark.parametrize("experiment", KNOWN)
def test_artifacts_have_the_keys_that_they_always_had_and_jobs_have_sizes(
    experiment: str, tmp_path_factory: pytest.TempPathFactory
) -> None:
    digests = tmp_path_factory.getbasetemp() / "digests.json"
    plan = compose(ROOT / "conf", [f"experiment={experiment}"], digests=digests)
    found = [f"results/{stage}/{key}" for stage, table in plan.stages.items() for key in table]
    assert sorted(found) == sorted(KNOWN[experiment])
    for stage, table in plan.stages.items():
        for key in table:  # whatever a study is of, its job has sizes
            assert resources(plan, stage, [key]).keys() >= {"mem_mb", "runtime", "device"}, (stage, key)
            stages()[stage].note(plan, [table[key]])
