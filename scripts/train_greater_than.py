"""Trains the small model of the greater-than study: python scripts/train_greater_than.py [--to models/greater_than]."""

import argparse
import shutil
from pathlib import Path

from saeflow.jobs.log import limit_threads, start_log
from saeflow.storage.publish import beside, publish

ROOT = Path(__file__).resolve().parent.parent

if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--to", type=Path, default=ROOT / "models/greater_than", help="folder to make")
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    start_log(None)
    limit_threads(args.threads)

    from saeflow.models.greater_than import train

    partial = beside(args.to)
    shutil.rmtree(partial, ignore_errors=True)
    last = train(partial)
    publish(partial, args.to)
    print(f"made {args.to}, {last['held_out_loss']:.3f} nats per held-out token; use it as model=greater_than")
