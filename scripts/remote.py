"""Carries the artifacts of an experiment to a bucket (device.remote=s3://bucket/folder) and back, whole or not at all.

python scripts/remote.py push experiment=demo device.remote=s3://bucket/folder [--drop-local]
python scripts/remote.py pull experiment=demo device.remote=s3://bucket/folder [--arrays]
python scripts/remote.py verify experiment=demo device.remote=s3://bucket/folder [--set-aside]
"""

import logging
import sys

from saeflow.config.checks import escape_controls
from saeflow.planning.command import parser_of, plan_of, refusals
from saeflow.planning.remote import damaged, pull, push, remote_of


def main() -> None:
    parser = parser_of(__doc__)
    parser.add_argument(
        "--drop-local", action="store_true", help="push: then read activations there, and free the disk"
    )
    parser.add_argument("--arrays", action="store_true", help="pull: activations too, instead of reading them there")
    parser.add_argument("--set-aside", action="store_true", help="verify: take away there what is damaged")
    parser.usage = "%(prog)s push|pull|verify OVERRIDES [options]"
    args = parser.parse_intermixed_args()
    command, *args.overrides = args.overrides or [""]
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    failed = 0
    with refusals("remote"):
        if command not in ("push", "pull", "verify"):
            raise ValueError(f"{command or 'nothing'!r} is not what to do: say push, pull or verify")
        plan, _ = plan_of(args)
        remote = remote_of(plan)
        work = {
            "push": lambda: push(plan, remote, args.drop_local),
            "pull": lambda: pull(plan, remote, args.arrays),
            "verify": lambda: damaged(plan, remote, args.set_aside),
        }
        for line, well in work[command]():
            print(escape_controls(line), flush=True)
            failed += not well
    sys.exit(bool(failed))


main()
