"""Trains sparse dictionaries from stored activations: `python scripts/train.py --key KEY [--key KEY ...]`."""

import os

from saeflow.jobs.job import Job, run


def train_together(jobs: list[Job]) -> str:
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # torch's idle threads would spin beside those of our loops
    # torch must not be imported before `run` has set the number of threads
    from saeflow.kernels.memory import keep_freed_memory
    from saeflow.training.loop import train

    keep_freed_memory()
    return train(jobs)


if __name__ == "__main__":
    run("train", train_together)
