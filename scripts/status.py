"""Says how far each unfinished job of an experiment is: running, queued, failed and why, stopped, or not started."""

import argparse
import os
import sys
from collections import Counter
from pathlib import Path

from saeflow.config import ConfigError
from saeflow.config.checks import escape_controls
from saeflow.jobs.status import unfinished
from saeflow.planning.digests import DIGESTS_FILE
from saeflow.planning.expansion import compose
from saeflow.planning.overrides import split


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("overrides", nargs="*", help="the Hydra overrides of the run")
    parser.add_argument("--conf", default=Path(__file__).resolve().parent.parent / "conf", help="folder of the groups")
    parser.add_argument(
        "--directory", help="that of the run, as of snakemake: results/ and relative paths are below it"
    )
    args = parser.parse_args()
    conf = Path(args.conf).resolve()
    try:
        if args.directory:
            os.chdir(args.directory)
        plan = compose(conf, split(" ".join(args.overrides)), digests=DIGESTS_FILE)
    except (ConfigError, ValueError, OSError) as error:
        sys.exit(f"status: {error}")
    states = list(unfinished(plan))
    for state in states:
        print(escape_controls(str(state)))
    counts = Counter(state.state for state in states)
    there = sum(map(len, plan.found.values()))
    print(
        f"{plan.experiment}: {there} artifacts are there; "
        + (
            ", ".join(f"{n} {'job' if n == 1 else 'jobs'} {state}" for state, n in counts.items())
            or "nothing is left to do"
        )
    )


main()
