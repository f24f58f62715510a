"""Makes models whose algorithm is known: compiled from a case's program, or small ones trained on the case."""

from saeflow.jobs.job import Job, run


def groundtruth(jobs: list[Job]) -> str:
    from saeflow.groundtruth.job import make_model

    return "\n".join(make_model(job) for job in jobs)


if __name__ == "__main__":
    run("groundtruth", groundtruth)
