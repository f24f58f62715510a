"""Trains sparse dictionaries from stored activations: `python scripts/train.py --key KEY [--key KEY ...]`."""

import os

from saeflow.job import Job, keep_freed_memory, run


def train_together(jobs: list[Job]) -> str:
    keep_freed_memory()
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # torch's idle threads would spin beside those of our loops
    from saeflow.training import train  # torch must not be imported before `run` has set the number of threads

    return train(jobs)


if __name__ == "__main__":
    run("train", train_together)
