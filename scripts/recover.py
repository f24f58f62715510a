"""Compares dictionaries of a model whose algorithm is known with that algorithm; each has a folder of its own."""

from saeflow.jobs.job import Job, run


def recover(jobs: list[Job]) -> str:
    from saeflow.groundtruth.job import recover_jobs

    lines = [
        f"{job.path}/: {s['n_live']} live latents, {s['n_distinct']} of them distinct, recovery "
        f"{'none' if s['recovery'] is None else format(s['recovery'], '.3f')}, accuracy {s['accuracy_replaced']:.3f} "
        f"(clean {s['accuracy_clean']:.3f})"
        for job, s in zip(jobs, recover_jobs(jobs), strict=True)
    ]
    return "\n".join(lines)


if __name__ == "__main__":
    run("recover", recover)
