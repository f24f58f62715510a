"""Trains sparse dictionaries from stored activations: `python scripts/train.py --key KEY`."""

from saeflow.job import Job, run


def train_all(jobs: list[Job]) -> str:
    from saeflow.training import train  # torch must not be imported before `run` has set the number of threads

    return "\n".join(train(job) for job in jobs)


if __name__ == "__main__":
    run("train", train_all)
