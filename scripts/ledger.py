"""Says what an experiment has cost by stage and in all, and what was saved; writes it to results/ledger/."""

import argparse
import os
import sys
from pathlib import Path

from saeflow.config import ConfigError
from saeflow.planning.digests import DIGESTS_FILE
from saeflow.planning.expansion import compose
from saeflow.planning.ledger import ABOUT, ledger_file, save_ledger
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
        print(save_ledger(plan))
    except (ConfigError, ValueError, OSError) as error:
        sys.exit(f"ledger: {error}")
    if ledger_file(plan).is_file():
        print(f"{ABOUT} The same in seconds and bytes: {ledger_file(plan)} (.csv)")
    if left := sum(map(len, plan.to_make.values())):
        print(f"{left} artifacts are still to be made, which count nowhere")


main()
